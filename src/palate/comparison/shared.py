"""The parts that all methods of a comparison share, each computed once: data, pool, SFT and reward model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from palate.annotate import Annotator
from palate.comparison.arms import Arm, Budget
from palate.comparison.config import CompareConfig
from palate.config import JudgeConfig
from palate.data import Account, read_prompts, write_rows
from palate.errors import ConfigError, DataError
from palate.evaluation.config import EvaluateConfig
from palate.evaluation.sides import Open, fitting, opened
from palate.journal import key_of
from palate.launch.rewards import annotator_of
from palate.loops.records import once
from palate.recipe import Spent
from palate.run import Display, Run
from palate.run.seeds import seed_of
from palate.rundir.writing import writing
from palate.select import best_vs_worst, select_pairs, top_k
from palate.types import Completion, Group, Pair, Prompt

MEASURED_FOR_LENGTH = 32
"""Prompts on which the mean length of the base model's completions is measured, for a budget of tokens."""
VALIDATION = 64
"""Most training prompts that are kept apart to tune the learning rate; at most a fifth."""


@dataclass(frozen=True)
class Prompts:
    """The prompts: for training, for tuning (none without it), and for the test; and the training file."""

    train: list[Prompt]
    validation: list[Prompt]
    test: list[Prompt]
    file: Path


@dataclass(frozen=True)
class Pool:
    """Data from the base model's labelled completions.

    Attributes:
        file: pairs or demonstrations.
        completions, tokens, verdicts, cost: the bill.
    """

    file: Path
    completions: int
    tokens: int
    verdicts: int
    cost: float


def read_all(cfg: CompareConfig, say: Callable[[str], None]) -> Prompts:
    """Read the prompts, and keep some apart for tuning.

    Say how much of the data is used. Training prompts that are test prompts too are left out.

    Raises:
        DataError: the data cannot be used, or too few prompts are left.
    """
    drawn = _read(cfg, cfg.data, cfg.split, cfg.limit, say)
    test = _read(cfg, cfg.eval_data or cfg.data, cfg.eval_split, cfg.eval_limit, say)
    held_out = {prompt.id for prompt in test}
    train = [prompt for prompt in drawn if prompt.id not in held_out]
    if len(train) < len(drawn):
        say(f"{cfg.data}: {len(drawn) - len(train):,} training prompts are test prompts too and are left out")
    kept = min(VALIDATION, len(train) // 5) if cfg.tune else 0
    validation, train = train[len(train) - kept :], train[: len(train) - kept]
    if len(train) < 2 or (cfg.tune and len(validation) < 2):
        raise DataError(
            f"{cfg.data}: {len(train)} training prompts are left without the test prompts and the validation "
            "split; give more prompts"
        )
    return Prompts(train, validation, test, cfg.output / "shared" / "train.jsonl")


def write_training(prompts: Prompts) -> None:
    """Write the training file."""
    prompts.file.parent.mkdir(parents=True, exist_ok=True)
    write_rows(prompts.file, [_row(prompt) for prompt in prompts.train])


def _read(
    cfg: CompareConfig, source: str, split: str, limit: int | None, say: Callable[[str], None]
) -> list[Prompt]:
    account = Account(strict=False)
    rows = read_prompts(source, split=split, columns=cfg.map, limit=limit, account=account)
    prompts = once(rows)
    account.use(None)
    for line in (*account.overview(), *account.lines()):
        say(f"{source}: {line}")
    if len(prompts) < len(rows):
        say(f"{source}: {len(rows) - len(prompts):,} rows repeat another row and are used once")
    return prompts


def keep_json(file: Path, value: Any) -> None:
    """Write JSON into a file, which is complete or unchanged.

    Raises:
        RunError: the file cannot be written.
    """
    part = file.with_suffix(".part")
    with writing(file):
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        part.replace(file)


def asking(cfg: CompareConfig, model: str, place: str) -> EvaluateConfig:
    """Return options to sample and annotate in a run of its own, in a directory below the output."""
    judge = {k: v for k, v in cfg.passed.items() if k in JudgeConfig.model_fields}
    return EvaluateConfig.model_validate(
        {
            **judge,
            "model": (model,),
            "against": "data",
            "reward": cfg.reward,
            "max_new_tokens": cfg.max_new_tokens,
            "temperature": cfg.temperature,
            "seed": cfg.seed,
            "device": cfg.device,
            "dtype": cfg.dtype,
            "missing_eos_penalty": cfg.passed.get("missing_eos_penalty"),
            "output": cfg.output / place,
        }
    )


@contextmanager
def pool_run(cfg: CompareConfig, model: str, display: Display) -> Iterator[tuple[Open, Annotator, Run]]:
    """Open the base model and the annotator in the run that makes the pool."""
    options = asking(cfg, model, "shared/pool")
    with Run(options, method="pool", display=display) as run:
        run.journal.forget_unusable()  # a server that failed may work again
        annotate = annotator_of(options.annotating, run, None)  # type: ignore[arg-type]
        assert annotate is not None, "the configuration requires a reward or a judge"
        with opened(model, options, run) as one:
            yield one, annotate, run


def measured_budget(cfg: CompareConfig, one: Open, annotate: Annotator, run: Run, prompts: Prompts) -> Budget:
    """Return the budget, with the length and the cost of a completion where its unit needs them.

    Raises:
        ConfigError: the budget is in dollars, but the annotator costs nothing.
    """
    unit, amount = cfg.budget
    options = asking(cfg, cfg.model, "shared/pool")
    budget = Budget(unit, amount, cfg.batch_size, options.pairwise)
    if unit not in ("tokens", "cost"):
        return budget
    # The same for every call: more methods and seeds get the same shares.
    file = cfg.output / "shared" / "budget.json"
    if file.exists():
        known = json.loads(file.read_text("utf-8"))
        return replace(budget, mean_tokens=known["mean_tokens"], verdict_cost=known["verdict_cost"])
    few = prompts.train[:MEASURED_FOR_LENGTH]
    groups = one.snapshot.sample(few, 2, options.sampling, seed=seed_of(cfg.seed, "length"))
    completions = [c for group in groups for c in group.completions]
    mean = sum(len(c.token_ids) for c in completions) / len(completions)
    cost = 0.0
    if unit == "cost":
        annotate(groups)
        meter = run.meter()
        cost = float(meter.get("judge/cost", 0.0)) / max(1.0, float(meter.get("judge/verdicts", 0.0)))
        if not cost:
            raise ConfigError(
                "the annotator costs nothing, so --budget-cost limits nothing; give another budget"
            )
    keep_json(file, {"mean_tokens": mean, "verdict_cost": cost})
    return replace(budget, mean_tokens=mean, verdict_cost=cost)


def pools(
    cfg: CompareConfig,
    arms: Sequence[Arm],
    shares: Mapping[str, Spent],
    opening: tuple[Open, Annotator, Run],
    prompts: Prompts,
) -> dict[str, Pool]:
    """Return the data of each arm that learns from the pool; arms with equal shares have one file."""
    one, annotate, run = opening
    made: dict[str, Pool] = {}
    options = asking(cfg, cfg.model, "shared/pool")
    for arm in arms:
        share = shares[arm.name]
        if not share.pool_n:
            continue
        kind = "demonstrations" if arm.method.learns_from == "demonstrations" else "pairs"
        file = cfg.output / "shared" / f"{kind}-{share.pool_prompts}x{share.pool_n}.jsonl"
        bill = file.with_suffix(".bill.json")
        if not bill.exists():
            usable = fitting(one, prompts.train, options, Account())[: share.pool_prompts]
            before = _once(file.with_suffix(".before.json"), run.meter())
            drawn = one.snapshot.sample(
                usable, share.pool_n, options.sampling, seed=seed_of(cfg.seed, "pool", share.pool_n)
            )
            groups = annotate(drawn)
            _write(file, kind, groups, run.display.say)
            after = dict(run.meter())
            keep_json(bill, _bill(groups, before, after, pairwise=options.pairwise))
        made[arm.name] = Pool(file, **json.loads(bill.read_text("utf-8")))
    return made


def _once(file: Path, numbers: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers that an interrupted call stored; else store these."""
    if not file.exists():
        keep_json(file, dict(numbers))
    stored: dict[str, float] = json.loads(file.read_text("utf-8"))
    return stored


def _write(file: Path, kind: str, groups: Sequence[Group], say: Callable[[str], None]) -> None:
    """Write the rows to learn from: the best completion of each prompt, for pairs with the worst.

    An empty completion cannot be learnt from data, so a prompt whose best one is empty is left out.

    Raises:
        DataError: no row is left.
    """
    if kind == "pairs":
        pairs, _ = select_pairs(groups, best_vs_worst)
        made = [(pair.chosen, _pair_row(pair)) for pair in pairs]
    else:
        usable = [group for group in groups if any(reward is not None for reward in group.rewards or ())]
        made = [(best := top_k(group, 1).completions[0], _best_row(group.prompt, best)) for group in usable]
    if not made:
        rewards = [reward for group in groups for reward in group.rewards or ()]
        missing = sum(reward is None for reward in rewards)
        raise DataError(
            f"the annotator gave no usable reward for {missing} of the base model's {len(rewards)} "
            "completions; look into its errors, and give the same command again"
            if missing
            else "the annotator prefers no completion of the base model to another: all are ties"
        )
    rows = [row for best, row in made if best.text.strip()]
    if len(rows) < len(made):
        left_out = len(made) - len(rows)
        say(f"{file.name}: {left_out:,} prompts are left out, because their best completion is empty")
    if not rows:
        raise DataError(
            f"the best of the base model's completions is empty for all {len(made)} prompts; use another "
            "reward, or more prompts"
        )
    write_rows(file, rows)


def _best_row(prompt: Prompt, best: Completion) -> dict[str, Any]:
    return {**_row(prompt), **_answer(prompt, "completion", best), "finish": _end(best)}


def _pair_row(pair: Pair) -> dict[str, Any]:
    ends = {"chosen_finish": _end(pair.chosen), "rejected_finish": _end(pair.rejected)}
    texts = _answer(pair.prompt, "chosen", pair.chosen) | _answer(pair.prompt, "rejected", pair.rejected)
    return {**_row(pair.prompt), **texts, **ends}


def _end(completion: Completion) -> str:
    return "length" if completion.finish == "length" else "eos"


def _row(prompt: Prompt) -> dict[str, Any]:
    content = prompt.content
    own = {k: v for k, v in prompt.columns.items() if k not in ("prompt", "completion", "chosen", "rejected")}
    return {**own, "prompt": content if isinstance(content, str) else [dict(turn) for turn in content]}


def _answer(prompt: Prompt, name: str, completion: Completion) -> dict[str, Any]:
    if isinstance(prompt.content, str):
        return {name: completion.text}
    return {name: [{"role": "assistant", "content": completion.text}]}


def _bill(
    groups: Sequence[Group], before: Mapping[str, float], after: Mapping[str, float], *, pairwise: bool
) -> dict[str, float]:
    completions = [c for group in groups for c in group.completions]
    n = len(groups[0].completions)
    return {
        "completions": len(completions),
        "tokens": sum(len(c.token_ids) for c in completions),
        "verdicts": len(groups) * n * (n - 1) if pairwise else len(completions),
        "cost": float(after.get("judge/cost", 0.0)) - float(before.get("judge/cost", 0.0)),
    }


def facts_of(prompts: Prompts) -> str:
    """Return a key of the data, by which a resumed comparison notices that they changed."""
    return key_of([[p.id for p in part] for part in (prompts.train, prompts.validation, prompts.test)])
