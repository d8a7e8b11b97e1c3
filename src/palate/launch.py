"""A whole run from a method's name and its configuration: the work of `palate run` and `palate.train`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch

from palate.annotate import Annotator, annotator, files_of
from palate.config import MethodConfig, ModelConfig, RewardConfig, Sampling
from palate.data import read_comparisons, read_demonstrations, read_prompts
from palate.errors import ConfigError
from palate.evaluate import Evaluation, compare, wilson
from palate.journal import key_of
from palate.learn import Learner, Policy
from palate.loops import PairRounds, content_key, fresh_logps, pairs_of, report_same
from palate.methods import METHODS, Method
from palate.model import Snapshot
from palate.run import Display, Run
from palate.types import Example, Pair, Prompt

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """A finished run and its results."""

    run: Run
    learner: Learner
    summary: dict[str, Any]
    evaluation: Evaluation | None

    @property
    def policy(self) -> Policy:
        """The learner as a policy; for methods that train a policy."""
        assert isinstance(self.learner, Policy), "the run trained no policy; use `learner` instead"
        return self.learner


def train(method: str, cfg: MethodConfig, *, display: Display | None = None) -> Outcome:
    """Run a method from start to end: load, measure, train, save, and measure again.

    Args:
        method: name of a method, as in `palate methods`.
        cfg: its configuration, such as an instance of `METHODS[method].config`.
        display: shows progress.

    Raises:
        PalateError: a mistake that the user can correct; the message says how.
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is unknown; expected one of {', '.join(METHODS)}")
    chosen = METHODS[method]
    way = chosen.way_of(cfg)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    with Run(cfg, method=method, display=display) as run:
        return _PROCEDURES[way.learns_from](chosen, cfg, run)


# ---- A procedure for each kind of data -------------------------------------------------------------


def _from_prompts(method: Method, cfg: Any, run: Run) -> Outcome:
    prompts = read_prompts(cfg.data, split=cfg.split, columns=cfg.map, limit=cfg.limit)
    held_out = _held_out(read_prompts, cfg) or []
    own_judge = isinstance(cfg, PairRounds) and cfg.label == "implicit"
    annotate = _optional_annotator(cfg, run) if own_judge else run.annotator(_annotator(cfg, run))
    run.require_same("the prompts", content_key([*prompts, *held_out]), "the data")
    policy = _learner(method, cfg, run, cfg.steps or 1)  # methods in rounds set the schedule of each round
    _attach(policy, (*prompts, *held_out), run)
    for prompt in (*prompts, *held_out):
        policy.model.codec.room(prompt, need=cfg.max_new_tokens)
    start = policy.snapshot() if held_out and annotate is not None and isinstance(policy, Policy) else None
    shown = _shown(method, policy, held_out, prompts, cfg, all_held_out=start is not None)
    _measure_fresh(policy, shown, cfg, run)
    method.way_of(cfg).train(policy, annotate, prompts, cfg, run)
    numbers = {} if method.summarise is None else method.summarise(policy, run, held_out)
    evaluation = _compared(start, policy, held_out, annotate, cfg, run)
    _measure_fresh(policy, shown, cfg, run, evaluation)
    return _finish(policy, evaluation, numbers, run)


def _from_pairs(method: Method, cfg: Any, run: Run) -> Outcome:
    annotate = _optional_annotator(cfg, run)
    rows, same = read_comparisons(cfg.data, split=cfg.split, columns=cfg.map, limit=cfg.limit)
    unseen, _ = _held_out(read_comparisons, cfg) or ([], 0)
    learner = _learner(method, cfg, run, cfg.total_steps(len(rows)))
    pairs, truncated_same = pairs_of(learner, rows, cfg.data)
    held_out = pairs_of(learner, unseen, cfg.eval_data)[0] if unseen else []
    run.require_same("the pairs", content_key([*pairs, *held_out]), "the data")
    _attach(learner, [pair.prompt for pair in (*pairs, *held_out)], run)
    report_same(run, same + truncated_same)
    counts = {"pairs": len(pairs), "pairs_dropped": same + truncated_same}
    return _on_records(method, learner, pairs, held_out, annotate, cfg, run, counts)


def _from_demonstrations(method: Method, cfg: Any, run: Run) -> Outcome:
    annotate = _optional_annotator(cfg, run)
    rows = read_demonstrations(cfg.data, split=cfg.split, columns=cfg.map, limit=cfg.limit)
    unseen = _held_out(read_demonstrations, cfg) or []
    learner = _learner(method, cfg, run, cfg.total_steps(len(rows)))
    examples, held_out = ([learner.model.codec.example(row) for row in part] for part in (rows, unseen))
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
    prompts = list({record.prompt.id: record.prompt for record in held_out}.values())
    if annotate is not None:
        for prompt in prompts:
            learner.model.codec.room(prompt, need=cfg.max_new_tokens)
    others = [record.prompt for record in records]
    shown = _shown(method, learner, prompts, others, cfg, all_held_out=start is not None)
    _measure_fresh(learner, shown, cfg, run)
    method.way_of(cfg).train(learner, records, cfg, run, held_out=held_out)
    summarise = _measured if method.summarise is None else method.summarise
    numbers = {**counts, **summarise(learner, run, held_out)}
    evaluation = _compared(start, learner, prompts, annotate, cfg, run)
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
    """Return the prompts of `_measure_fresh`: all held-out prompts if they are compared, else a few.

    There are none if every step samples from the current policy and logs the same number.
    """
    samples = isinstance(learner, Policy) and isinstance(cfg, Sampling)  # a ranker does not complete prompts
    if not samples or method.recipe.judged == "each step":
        return ()
    if all_held_out:
        return held_out
    distinct = {prompt.id: prompt for prompt in (held_out or others)}.values()
    codec = learner.model.codec
    fitting = (p for p in distinct if len(codec.prompt_ids(p)) + cfg.max_new_tokens <= codec.max_length)
    return list(islice(fitting, cfg.fresh_prompts))


def _measure_fresh(
    learner: Learner, prompts: Sequence[Prompt], cfg: Any, run: Run, known: Evaluation | None = None
) -> None:
    """Measure `logps/fresh`, the policy's log-probability of its own samples."""
    if not prompts or not isinstance(learner, Policy):
        return

    def metrics() -> dict[str, float]:
        if known is not None:
            return fresh_logps(known.after)
        # This is the seed of `compare`, which then reads the samples from the journal.
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
    """Save the learner, then compare it with the start; saving first protects it if the reward fails."""
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
    summary |= {"seconds": round(run.seconds, 1), "checkpoint": str(checkpoint)}
    summary = run.finish(summary, evaluation.samples() if evaluation is not None else ())
    return Outcome(run, learner, summary, evaluation)


def _measured(learner: Learner, run: Run, held_out: Sequence[Pair | Example]) -> dict[str, float]:
    """Return the first and the last measurement on the held-out records.

    For pairs it is the fraction of pairs that the implicit reward ranks like the data, else the loss. The
    interval counts prompts as trials, since several pairs of one prompt are less informative than pairs of
    several prompts.
    """
    ranked = [row["eval_rewards/accuracies"] for row in run.measured if "eval_rewards/accuracies" in row]
    losses = [row["eval_loss"] for row in run.measured if "eval_loss" in row]
    if ranked:
        low, high = wilson(ranked[-1], len({record.prompt.id for record in held_out}))
        return {
            "held_out_pairs": len(held_out),
            "accuracy_before": ranked[0],
            "accuracy_after": ranked[-1],
            "accuracy_low": low,
            "accuracy_high": high,
        }
    if losses:
        return {"held_out": len(held_out), "loss_before": losses[0], "loss_after": losses[-1]}
    return {}


def _learner(method: Method, cfg: MethodConfig, run: Run, steps: int) -> Learner:
    load = Policy.load if method.learner is None else method.learner
    return load(cfg, total_steps=steps, seed=run.seed("adapter"))


def _attach(learner: Learner, prompts: Iterable[Prompt], run: Run) -> None:
    """Check that the prompts' tokens have not changed since the start of the run, then start or resume."""
    codec = learner.model.codec
    tokens = key_of([codec.prompt_ids(prompt) for prompt in prompts])
    label = f"the tokenizer or chat template of {learner.model.source}"
    run.require_same("the prompts in tokens", tokens, label)
    run.attach(learner)


def _held_out(read: Callable[..., T], cfg: Any) -> T | None:
    """Read the held-out data; None if there are none."""
    if cfg.eval_data is None:
        return None
    return read(cfg.eval_data, split=cfg.eval_split, columns=cfg.map, limit=cfg.eval_limit)


def _optional_annotator(cfg: MethodConfig, run: Run) -> Annotator | None:
    """Return the annotator for the comparison before and after training, if the user gave a reward."""
    return run.annotator(_annotator(cfg, run)) if isinstance(cfg, RewardConfig) and cfg.reward else None


def _annotator(cfg: RewardConfig, run: Run) -> Annotator:
    options = (
        {}
        if not isinstance(cfg, ModelConfig)
        else {"device": cfg.device, "trust_remote_code": cfg.trust_remote_code, "fast": cfg.fast}
    )
    annotate = annotator(cfg.reward, missing_eos_penalty=cfg.missing_eos_penalty, **options)
    for path in files_of(cfg.reward):
        run.require_same(
            f"the reward in {path}", key_of(path.read_text("utf-8")), f"the reward in {str(path)!r}"
        )
    return annotate
