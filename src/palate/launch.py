"""A whole run from a method's name and its configuration: the work of `palate run` and `palate.train`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from palate.annotate import Annotator, annotator, code_key, files_of
from palate.arguments import configured, method_named
from palate.config import MethodConfig, ModelConfig, RewardConfig, Sampling
from palate.data import read_comparisons, read_demonstrations, read_prompts
from palate.evaluate import Evaluation, compare, wilson
from palate.given import GivenReward
from palate.journal import key_of
from palate.learn import Learner, Policy
from palate.loops import PairRounds, content_key, fresh_logps, pairs_of, tell_same
from palate.methods import METHODS, Method
from palate.model import Snapshot
from palate.quiet import quieted
from palate.run import Display, Run
from palate.types import Example, Pair, Prompt

T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class Outcome:
    """A finished run and its results.

    Attributes:
        run: the run, closed.
        learner: the trained model with its optimizer.
        summary: the numbers of `summary.json`.
        evaluation: the comparison with the start on held-out prompts; None without held-out data or a reward.
    """

    run: Run
    learner: Learner
    summary: dict[str, Any]
    evaluation: Evaluation | None

    @property
    def policy(self) -> Policy:
        """The learner as a policy; methods that train a reward model have none."""
        assert isinstance(self.learner, Policy), "the run trained no policy; `learner` has the trained model"
        return self.learner

    @property
    def directory(self) -> Path:
        """The run's directory. It serves as a model: `model=result.directory`, or `palate chat DIRECTORY`."""
        return self.run.directory

    @property
    def checkpoint(self) -> Path:
        """The directory of the last checkpoint, in Hugging Face layout."""
        return self.directory / self.summary["checkpoint"]  # type: ignore[no-any-return]

    @property
    def samples(self) -> list[dict[str, Any]]:
        """A row per held-out prompt: its completion and reward before and after, as in `samples.jsonl`."""
        return [] if self.evaluation is None else self.evaluation.samples()

    @property
    def report(self) -> Path:
        """The run's report, one HTML file, which is written when this is read.

        Raises:
            RunError: it cannot be written.
        """
        from palate.report import write_report  # loads matplotlib

        return write_report([self.directory])

    def __repr__(self) -> str:
        """Return one line: the method, its steps, the rewards before and after, the directory."""
        parts = [f"{self.run.method}: {self.summary['steps']} steps"]
        if (seen := self.evaluation) is not None:
            parts.append(f"mean reward {seen.reward_before:.3f} before, {seen.reward_after:.3f} after")
            parts.append(f"wins {seen.win_rate:.0%} of {seen.compared} held-out prompts")
        return f"<Outcome of {', '.join(parts)}, in {str(self.directory)!r}>"


def train(
    method: str,
    cfg: MethodConfig | Path | str | None = None,
    *,
    tokenizer: Any = None,
    display: Display | Literal["auto"] | None = "auto",
    **settings: Any,
) -> Outcome:
    """Do a whole run: load, measure, train, save, measure again.

        palate.train("oaif", data="everyday", reward=my_function, steps=50)

    A second call with the same arguments resumes the run, or returns its results if it is finished. Rows and
    functions given in Python count by their content.

    Args:
        method: name of a method, as in `palate methods`.
        cfg: a configuration, of the class of one of the method's ways, as `METHODS[method].config`; or the
            path of a YAML file, whose values the settings override; not needed with settings.
        tokenizer: of a model that is given as an object; that of its `name_or_path` if not given.
        display: shows progress; `auto` shows it in a terminal, a notebook or a log; None shows nothing.
        settings: the method's options by name; `palate run METHOD --help` explains them. `data` and
            `eval_data` may be a list of dicts, a `datasets.Dataset` or a `DatasetDict`; `reward` may be a
            function, a `Scorer` or a `Judge`, or a list of these and of names, with weights as
            `(0.5, my_function)`; `model` may be a loaded model. With `data="everyday"`, `eval_data` is a few
            of its test prompts if it is not given; None leaves them out.

    Raises:
        PalateError: a mistake that the user can correct; the message says how.
    """
    chosen = method_named(method, METHODS)
    config = configured(chosen, cfg, settings, tokenizer)
    way = chosen.way_of(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    shown = Display(titled=True) if display == "auto" else display
    with quieted(), Run(config, method=method, display=shown) as run:
        return _PROCEDURES[way.learns_from](chosen, config, run)


# ---- A procedure for each kind of data -------------------------------------------------------------


def _from_prompts(method: Method, cfg: Any, run: Run) -> Outcome:
    prompts = read_prompts(cfg.data, split=cfg.split, columns=cfg.map, limit=cfg.limit)
    held_out = _held_out(read_prompts, cfg) or []
    own_judge = isinstance(cfg, PairRounds) and cfg.label == "implicit"
    annotate = _optional_annotator(cfg, run) if own_judge else run.annotator(_annotator(cfg, run))
    run.require_same("the prompts", content_key([*prompts, *held_out]), "the data")
    policy = _learner(method, cfg, run, cfg.steps or 1)  # where steps follow from samples, rounds restart it
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
    pairs, cut_same = pairs_of(learner, rows, cfg.data)
    held_out = pairs_of(learner, unseen, cfg.eval_data)[0] if unseen else []
    run.require_same("the pairs", content_key([*pairs, *held_out]), "the data")
    _attach(learner, [pair.prompt for pair in (*pairs, *held_out)], run)
    tell_same(run, same + cut_same)
    counts = {"pairs": len(pairs), "pairs_dropped": same + cut_same}
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
    """Return the prompts of `_measure_fresh`: all held-out prompts if they are compared on, else a few.

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
    summary |= {"seconds": round(run.seconds, 1), "checkpoint": str(checkpoint)}
    summary = run.finish(summary, evaluation.samples() if evaluation is not None else ())
    return Outcome(run, learner, summary, evaluation)


def _measured(learner: Learner, run: Run, held_out: Sequence[Pair | Example]) -> dict[str, float]:
    """Return the first and the last measurement on the held-out records.

    For pairs it is the share that the implicit reward ranks as the data do, else the loss. The interval
    counts prompts as trials: several pairs of one prompt say less than pairs of several prompts.
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
    """Check the prompts' tokens against those that the run began with, then start or resume."""
    codec = learner.model.codec
    tokens = key_of([codec.prompt_ids(prompt) for prompt in prompts])
    subject = f"what the tokenizer or chat template of {learner.model.source} makes of the prompts"
    run.require_same("the prompts in tokens", tokens, subject)
    run.attach(learner)


def _held_out(read: Callable[..., T], cfg: Any) -> T | None:
    """Read the held-out data; None if there are none."""
    if cfg.eval_data is None:
        return None
    return read(cfg.eval_data, split=cfg.eval_split, columns=cfg.map, limit=cfg.eval_limit)


def _optional_annotator(cfg: MethodConfig, run: Run) -> Annotator | None:
    """Return the annotator for the comparison before and after, of a method that trains without one."""
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
    for i, reward in enumerate(cfg.reward):
        if isinstance(reward, GivenReward):
            run.require_same(f"reward {i}: {reward}", code_key(reward.reward), f"the code of the {reward}")
    return annotate
