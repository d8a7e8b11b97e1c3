"""A whole run from a method's name and its configuration: the work of `palate run` and `palate.train`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

import torch

from palate.annotate import Annotator, Judge, annotator, files_of
from palate.config import KLConfig, MethodConfig, RewardConfig, Sampling
from palate.data import Account, Stream, read_comparisons, read_demonstrations, read_prompts
from palate.errors import AnnotatorError, ConfigError
from palate.evaluate import Evaluation, compare, kl_from
from palate.journal import key_of
from palate.learn import Learner, Policy
from palate.loops import PairRounds, account_of, content_key, fresh_logps, pairs_of, records_of
from palate.methods import METHODS, Method
from palate.model import Snapshot
from palate.run import BoundReachedError, Display, Drift, Run, judge_annotator, own_judge
from palate.run.judging import model_options
from palate.types import Example, Pair, Prompt

_NO_FUNCTIONS = ("length:", "regex:", "model:", "ranker:", "judge:")
"""Rewards that read no columns of the data."""

COSTS = ("judge/verdicts", "judge/tokens", "judge/cost")
"""Numbers of a judge that hold for the whole run."""

KL_EVERY = 10
"""Steps between measurements of the KL with `max_kl`, unless `kl_every` says otherwise."""


@dataclass(frozen=True)
class Outcome:
    """A finished run and its results."""

    run: Run
    learner: Learner
    summary: dict[str, Any]
    evaluation: Evaluation | None

    @property
    def policy(self) -> Policy:
        """The learner as a policy; methods that train a reward model have none."""
        assert isinstance(self.learner, Policy), "the run trained no policy; `learner` has the trained model"
        return self.learner


def train(
    method: str, cfg: MethodConfig, *, judge: str | Judge | None = None, display: Display | None = None
) -> Outcome:
    """Do a whole run: load, measure, train, save, measure again.

    Args:
        method: name of a method, as in `palate methods`.
        cfg: its configuration, of the class of one of the method's ways, as `METHODS[method].config`.
        judge: the judge of completions, instead of the configuration's reward: as `--judge` has it, or an
            object of the `Judge` protocol.
        display: shows progress.

    Raises:
        PalateError: a mistake that the user can correct; the message says how.
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is unknown; there are {', '.join(METHODS)}")
    chosen = METHODS[method]
    way = chosen.way_of(cfg)
    if isinstance(judge, str):
        if not isinstance(cfg, RewardConfig):
            raise ConfigError(f"{method} takes no reward, so it takes no judge")
        cfg = type(cfg).model_validate({**cfg.model_dump(), "judge": judge})
        judge = None
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    with Run(cfg, method=method, display=display) as run:
        annotate = _annotator(cfg, run, judge)
        return _PROCEDURES[way.learns_from](chosen, cfg, run, annotate)


# ---- A procedure for each kind of data -------------------------------------------------------------


def _from_prompts(method: Method, cfg: Any, run: Run, annotate: Annotator | None) -> Outcome:
    prompts, account = _rows(read_prompts, cfg)
    held_out, others = _rows(read_prompts, cfg, held_out=True)
    if annotate is None and not (isinstance(cfg, PairRounds) and cfg.label == "implicit"):
        raise AnnotatorError(
            "no reward is given; name at least one, such as --reward sentiment, or a judge, such as "
            "--judge local:MODEL"
        )
    run.require_same("the prompts", content_key([*prompts, *held_out]), "the data")
    policy = _learner(method, cfg, run, cfg.steps or 1)  # where steps follow from samples, rounds restart it
    prompts = _with_room(policy, prompts, cfg.data, account, cfg)
    held_out = _with_room(policy, held_out, cfg.eval_data, others, cfg)
    _report(run, cfg, account, others)
    _attach(policy, (*prompts, *held_out), run)
    start = policy.snapshot() if held_out and annotate is not None and isinstance(policy, Policy) else None
    shown = _shown(method, policy, held_out, prompts, cfg, all_held_out=start is not None)
    _measure_fresh(policy, shown, cfg, run)
    _watch_kl(policy, prompts, cfg, run)
    with suppress(BoundReachedError):
        method.way_of(cfg).train(policy, annotate, prompts, cfg, run)
    numbers = {} if method.summarise is None else method.summarise(policy, run, held_out)
    evaluation = _compared(start, policy, held_out, _held_out_annotator(annotate, cfg, run), cfg, run)
    _measure_fresh(policy, shown, cfg, run, evaluation)
    return _finish(policy, evaluation, numbers, run)


def _from_pairs(method: Method, cfg: Any, run: Run, annotate: Annotator | None) -> Outcome:
    rows, account = _rows(read_comparisons, cfg)
    unseen, others = _rows(read_comparisons, cfg, held_out=True)
    learner = _learner(method, cfg, run, cfg.total_steps(len(rows)))
    pairs = pairs_of(learner, rows, cfg.data, account)
    held_out = pairs_of(learner, unseen, cfg.eval_data, others) if unseen else []
    _report(run, cfg, account, others)
    run.require_same("the pairs", content_key([*pairs, *held_out]), "the data")
    _attach(learner, [pair.prompt for pair in (*pairs, *held_out)], run)
    counts = {"pairs": len(pairs), "pairs_dropped": account.dropped_rows}
    return _on_records(method, learner, pairs, held_out, annotate, cfg, run, counts)


def _from_demonstrations(method: Method, cfg: Any, run: Run, annotate: Annotator | None) -> Outcome:
    rows, account = _rows(read_demonstrations, cfg)
    unseen, others = _rows(read_demonstrations, cfg, held_out=True)
    learner = _learner(method, cfg, run, cfg.total_steps(len(rows)))
    example = learner.model.codec.example
    examples = records_of(learner, rows, cfg.data, account, example)
    held_out = records_of(learner, unseen, cfg.eval_data, others, example) if unseen else []
    _report(run, cfg, account, others)
    run.require_same("the demonstrations", content_key([*examples, *held_out]), "the data")
    _attach(learner, [example.prompt for example in (*examples, *held_out)], run)
    counts = {"demonstrations": len(examples)}
    return _on_records(method, learner, examples, held_out, annotate, cfg, run, counts)


_PROCEDURES = {"prompts": _from_prompts, "pairs": _from_pairs, "demonstrations": _from_demonstrations}


def _on_records(
    method: Method,
    learner: Learner,
    records: Sequence[Pair | Example],
    held_out: Sequence[Pair | Example],
    annotate: Annotator | None,
    cfg: Any,
    run: Run,
    counts: Mapping[str, float],
) -> Outcome:
    """Train on records from data, and summarise the measurements on the held-out records."""
    learner.optimizer.total_steps = cfg.total_steps(len(records))  # dropped records do not count
    measured = held_out and annotate is not None
    start = learner.snapshot() if measured and isinstance(learner, Policy) else None
    prompts = list({record.prompt.id: record.prompt.to_sample() for record in held_out}.values())
    if annotate is not None:
        for prompt in prompts:
            learner.model.codec.room(prompt, need=cfg.max_new_tokens)
    others = [record.prompt.to_sample() for record in records]
    shown = _shown(method, learner, prompts, others, cfg, all_held_out=start is not None)
    _measure_fresh(learner, shown, cfg, run)
    _watch_kl(learner, others, cfg, run)
    with suppress(BoundReachedError):
        method.way_of(cfg).train(learner, records, cfg, run, held_out=held_out)
    summarise = _measured if method.summarise is None else method.summarise
    numbers = {**counts, **summarise(learner, run, held_out)}
    evaluation = _compared(start, learner, prompts, _held_out_annotator(annotate, cfg, run), cfg, run)
    _measure_fresh(learner, shown, cfg, run, evaluation)
    return _finish(learner, evaluation, numbers, run)


# ---- Parts of them ---------------------------------------------------------------------------------


def _shown(
    method: Method,
    learner: Learner,
    held_out: Sequence[Prompt],
    others: Iterable[Prompt],
    cfg: Any,
    *,
    all_held_out: bool,
) -> Sequence[Prompt]:
    """Return the prompts of `_measure_fresh`: all held-out prompts if they are compared on, else a few.

    There are none if every step samples from the current policy and logs the same number.
    """
    samples = isinstance(learner, Policy) and isinstance(cfg, Sampling)  # a ranker does not complete prompts
    if not samples or method.recipe.judged == "each step":
        return ()
    if all_held_out:
        return held_out
    return list(islice(_fitting(learner, held_out or others, cfg), cfg.fresh_prompts))


def _fitting(learner: Learner, prompts: Iterable[Prompt], cfg: Any) -> Iterator[Prompt]:
    """Distinct prompts that leave room for a completion, in order."""
    codec = learner.model.codec
    distinct = {prompt.id: prompt for prompt in prompts}.values()
    return (p for p in distinct if len(codec.prompt_ids(p)) + cfg.max_new_tokens <= codec.max_length)


def _watch_kl(learner: Learner, prompts: Iterable[Prompt], cfg: Any, run: Run) -> None:
    """Have the run measure KL(policy || start) as `KLConfig` says, on training prompts drawn once."""
    if not isinstance(cfg, KLConfig) or not isinstance(cfg, Sampling) or not isinstance(learner, Policy):
        return
    every = cfg.kl_every or (KL_EVERY if cfg.max_kl is not None else None)
    if every is None:
        return
    start, sampling = learner.snapshot(), cfg.sampling
    fitting = list(_fitting(learner, prompts, cfg))
    if not fitting:
        raise ConfigError("no training prompt leaves room for max_new_tokens, so the KL cannot be measured")
    drawn = Stream(fitting, seed=run.seed("kl prompts")).batch(0, min(cfg.kl_prompts, len(fitting)))

    def measure(step: int) -> float:
        return kl_from(start, learner.snapshot(), drawn, sampling, seed=run.seed("kl", step))

    run.watch_kl(Drift(measure, every, cfg.max_kl))


def _measure_fresh(
    learner: Learner, prompts: Sequence[Prompt], cfg: Any, run: Run, known: Evaluation | None = None
) -> None:
    """Measure `logps/fresh`: the policy's log-probability of its own samples."""
    if not prompts or not isinstance(learner, Policy):
        return

    def metrics() -> dict[str, float]:
        if known is not None:
            return fresh_logps(known.after)
        # With the seed of `compare`, which then reads them from the journal.
        return fresh_logps(learner.snapshot().sample(prompts, 1, cfg.sampling, seed=2 * run.seed("evaluate")))

    run.measure("fresh", metrics)


def _compared(
    start: Snapshot | None,
    learner: Learner,
    prompts: Sequence[Prompt],
    annotate: Annotator | None,
    cfg: Any,
    run: Run,
) -> Evaluation | None:
    """Save, then compare with the start: a failing reward must not cost the training."""
    run.save(learner)
    if start is None or annotate is None or not prompts or not isinstance(learner, Policy):
        return None
    run.observe("evaluate")
    return compare(start, learner.snapshot(), prompts, annotate, cfg.sampling, seed=run.seed("evaluate"))


def _finish(
    learner: Learner, evaluation: Evaluation | None, numbers: Mapping[str, float], run: Run
) -> Outcome:
    summary: dict[str, Any] = {"method": run.method, "steps": learner.version, **numbers}
    if evaluation is not None:
        summary |= evaluation.summary()
    checkpoint = run.save(learner).relative_to(run.directory)
    summary |= {name.replace("/", "_"): number for name, number in run.meter().items() if name in COSTS}
    summary |= {"seconds": round(run.seconds, 1), "checkpoint": str(checkpoint)}
    summary = run.finish(summary, evaluation.samples() if evaluation is not None else ())
    return Outcome(run, learner, summary, evaluation)


def _measured(learner: Learner, run: Run, held_out: Sequence[Pair | Example]) -> dict[str, float]:
    """Return the first and the last measurement on the held-out records.

    For pairs it is the share that the implicit reward ranks as the data do, else the loss.
    """
    ranked = [row for row in run.measured if "eval_rewards/accuracies" in row]
    losses = [row["eval_loss"] for row in run.measured if "eval_loss" in row]
    if ranked:
        return {
            "held_out_pairs": len(held_out),
            "accuracy_before": ranked[0]["eval_rewards/accuracies"],
            "accuracy_after": ranked[-1]["eval_rewards/accuracies"],
            "accuracy_low": ranked[-1]["eval_rewards/accuracies_low"],
            "accuracy_high": ranked[-1]["eval_rewards/accuracies_high"],
        }
    if losses:
        return {"held_out": len(held_out), "loss_before": losses[0], "loss_after": losses[-1]}
    return {}


def _learner(method: Method, cfg: MethodConfig, run: Run, steps: int) -> Learner:
    load = Policy.load if method.learner is None else method.learner
    learner = load(cfg, total_steps=steps, seed=run.seed("adapter"))
    # A template that prints the date must not render other prompts when the run resumes on another day.
    started = run.remember("date of chat templates", datetime.now().isoformat())
    learner.model.codec.keep_date(datetime.fromisoformat(started))
    return learner


def _attach(learner: Learner, prompts: Iterable[Prompt], run: Run) -> None:
    """Check the prompts' tokens against those that the run began with, then start or resume."""
    codec = learner.model.codec
    tokens = key_of([codec.prompt_ids(prompt) for prompt in prompts])
    subject = f"what the tokenizer or chat template of {learner.model.source} makes of the prompts"
    run.require_same("the prompts in tokens", tokens, subject)
    run.attach(learner)


def _rows(read: Callable[..., Any], cfg: Any, *, held_out: bool = False) -> tuple[list[Any], Account]:
    """Read the data, or the held-out data if there are any, with an account of them."""
    account = account_of(cfg)
    if held_out and cfg.eval_data is None:
        return [], account
    source, split, limit = (
        (cfg.eval_data, cfg.eval_split, cfg.eval_limit) if held_out else (cfg.data, cfg.split, cfg.limit)
    )
    rows = read(source, split=split, columns=cfg.map, limit=limit, account=account)
    return (rows[0] if isinstance(rows, tuple) else rows), account


def _with_room(
    policy: Learner, prompts: Sequence[Prompt], source: str, account: Account, cfg: Any
) -> list[Prompt]:
    """The prompts that the chat template takes and that leave room for a completion."""

    def fitting(prompt: Prompt) -> Prompt:
        policy.model.codec.room(prompt, need=cfg.max_new_tokens)
        return prompt

    return records_of(policy, prompts, source, account, fitting) if prompts else []


def _report(run: Run, cfg: Any, account: Account, held_out: Account) -> None:
    """Show what becomes of the data, without the columns that a reward function or the method reads."""
    functions = any(":" in spec and not spec.startswith(_NO_FUNCTIONS) for spec in getattr(cfg, "reward", ()))
    named = {value for _, value in cfg if isinstance(value, str)}
    for source, one in ((cfg.data, account), (cfg.eval_data, held_out)):
        if source is not None:
            one.use(None if functions else named)
            run.report_data(source, one)


def _held_out_annotator(annotate: Annotator | None, cfg: Any, run: Run) -> Annotator | None:
    """Return the annotator for the comparison before and after: that of `eval_reward`, or the given one."""
    if annotate is None or not isinstance(cfg, RewardConfig) or not cfg.eval_reward:
        return annotate
    return run.annotator(_rewards(cfg, cfg.eval_reward, run), name="eval_reward")


def _annotator(cfg: MethodConfig, run: Run, judge: Judge | None) -> Annotator | None:
    """Return the annotator that the configuration names; None if it names none.

    Methods that train without one use it for the comparison before and after.
    """
    if judge is not None:
        return own_judge(judge, run)
    if not isinstance(cfg, RewardConfig) or not (cfg.reward or cfg.judge):
        return None
    if cfg.judge is not None:
        return judge_annotator(cfg, run)
    return run.annotator(_rewards(cfg, cfg.reward, run))


def _rewards(cfg: RewardConfig, specs: Sequence[str], run: Run) -> Annotator:
    """Return the annotator of rewards; the files of functions must be those that the run began with."""
    annotate = annotator(
        specs,
        missing_eos_penalty=cfg.missing_eos_penalty or 0.0,
        kept=run.ledger(),
        say=run.display.say,
        **model_options(cfg),
    )
    for path in files_of(specs):
        run.require_same(
            f"the reward in {path}", key_of(path.read_text("utf-8")), f"the reward in {str(path)!r}"
        )
    return annotate
