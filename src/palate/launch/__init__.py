"""A whole run from a method's name and its configuration: the work of `palate run` and `palate.train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch

from palate.annotate import Annotator, Judge
from palate.arguments import configured, method_named
from palate.config import MethodConfig, RewardConfig
from palate.data import read_prompts, scan_comparisons, scan_demonstrations
from palate.errors import AnnotatorError, ConfigError
from palate.evaluate import Evaluation, compare
from palate.journal import key_of
from palate.launch.measure import (
    held_out_numbers,
    hold_contests,
    keep_best,
    measure_fresh,
    report_weights,
    shown_prompts,
    watch_kl,
    worth_gathering,
)
from palate.launch.probe import probe_judge
from palate.launch.rewards import annotator_of, held_out_annotator
from palate.launch.rollouts import closing_rollouts, open_rollouts
from palate.launch.rows import prepared, read_rows, report_rows, stored, with_room
from palate.learn import Learner, Policy
from palate.loops import PairRounds, Records, content_key, forget_prepared, pool_bill, pool_date, prompts_of
from palate.methods import METHODS, Method
from palate.model import Snapshot
from palate.model.device import resolve
from palate.quiet import quieted
from palate.run import BoundReachedError, Display, JudgeAnnotator, Run, led, settle_compiling
from palate.types import Example, Pair, Prompt
from palate.world.start import Together, threads_of

__all__ = ["Outcome", "train"]

COSTS = ("judge/verdicts", "judge/tokens", "judge/cost")
"""Metrics of a judge that are totals of the run."""


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
    judge: str | Judge | None = None,
    tokenizer: Any = None,
    display: Display | Literal["auto"] | None = "auto",
    **settings: Any,
) -> Outcome:
    """Do a whole run: load, measure, train, save, and measure again.

        palate.train("oaif", data="everyday", reward=my_function, steps=50)

    A second call with the same arguments resumes the run, or returns its results if it is finished. Rows and
    functions given in Python count by their content.

    Args:
        method: the name of a method, as in `palate methods`.
        cfg: a configuration, such as an object of `METHODS[method].config`; or the path of a YAML file, whose
            values the settings override; not needed with settings.
        judge: the judge of completions, instead of a reward: as `--judge` has it, or an object of the `Judge`
            protocol.
        tokenizer: the tokenizer of a model that is given as an object; default: that of its `name_or_path`.
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
    if isinstance(judge, str):
        cfg, settings = _judged(chosen, cfg, settings, judge)
    config = configured(chosen, cfg, settings, tokenizer)
    way = chosen.way_of(config)
    with Together(config.processes, config.process_limit) as world:
        if (threads := threads_of(config.threads)) is not None:
            torch.set_num_threads(threads)
        if world.size > 1 and getattr(config, "variant", None) == "meta":
            raise ConfigError(
                f"variant is meta, which runs in one process, but {world.size} are running; leave "
                "--processes out, or use another variant"
            )
        world.agree("the configuration", key_of(method, config.model_dump(mode="json")))
        shown = Display(titled=True) if display == "auto" else display
        with quieted(), Run(config, method=method, display=shown) as run:
            if config.compile != "off":
                compiles = settle_compiling(run, config.compile, resolve(config)[0])
                config = config.model_copy(update={"compile": compiles})
            own_judge = None if isinstance(judge, str) else judge
            annotate = led(lambda: annotator_of(config, run, own_judge))
            judging = closing(annotate) if isinstance(annotate, JudgeAnnotator) else nullcontext()
            with judging, closing_rollouts(run):
                return _PROCEDURES[way.learns_from](chosen, config, run, annotate)


def _judged(
    method: Method, cfg: MethodConfig | Path | str | None, settings: Mapping[str, Any], judge: str
) -> tuple[MethodConfig | Path | str | None, dict[str, Any]]:
    """Put a judge's name into the configuration, or among the settings."""
    if not issubclass(method.options, RewardConfig):
        raise ConfigError(f"{method.name} uses no reward, so it cannot use a judge")
    if isinstance(cfg, MethodConfig):
        return type(cfg).model_validate({**cfg.model_dump(), "judge": judge}), dict(settings)
    return cfg, {**settings, "judge": judge}


# ---- A procedure for each kind of data -------------------------------------------------------------


def _from_prompts(method: Method, cfg: Any, run: Run, annotate: Annotator | None) -> Outcome:
    prompts, account = read_rows(read_prompts, cfg)
    held_out, others = read_rows(read_prompts, cfg, held_out=True)
    if annotate is None and not (isinstance(cfg, PairRounds) and cfg.label == "implicit"):
        raise AnnotatorError(
            "no reward is given; name at least one, such as --reward sentiment, or a judge, such as "
            "--judge local:MODEL"
        )
    run.require_same("the prompts", content_key([*prompts, *held_out]), "the data")
    # If the number of steps depends on samples, rounds restart the schedule.
    policy = _learner(method, cfg, run, cfg.steps or 1)
    prompts = with_room(policy, prompts, cfg.data, account, cfg)
    held_out = with_room(policy, held_out, cfg.eval_data, others, cfg)
    report_rows(run, cfg, account, others)
    beside = () if method.beside is None else method.beside(policy, cfg, seed=run.seed("beside"))
    codec = policy.model.codec
    tokens = key_of([codec.prompt_ids(p) for p in (*prompts, *held_out)])
    _attach(policy, tokens, cfg, run, *beside)
    report_weights(run, policy, *beside)
    start = policy.snapshot() if held_out and annotate is not None and isinstance(policy, Policy) else None
    shown = shown_prompts(method, policy, held_out, prompts, cfg, all_held_out=start is not None)
    measure_fresh(policy, shown, cfg, run)
    watch_kl(policy, prompts, cfg, run, annotate)
    probe_judge(annotate, policy, prompts, cfg, run)
    hold_contests(held_out, led(lambda: held_out_annotator(annotate, cfg, run)), cfg, run)
    with suppress(BoundReachedError):
        method.way_of(cfg).train(policy, annotate, prompts, cfg, run, *beside)
    keep_best(run, policy, *beside)
    numbers = {} if method.summarise is None else method.summarise(policy, run, held_out)
    judge = led(lambda: held_out_annotator(annotate, cfg, run))
    evaluation = _compared(start, policy, held_out, judge, cfg, run)
    measure_fresh(policy, shown, cfg, run, evaluation)
    return _finish(policy, evaluation, numbers, run)


def _from_pairs(method: Method, cfg: Any, run: Run, annotate: Annotator | None) -> Outcome:
    rows, unseen = stored(scan_comparisons, cfg, run), stored(scan_comparisons, cfg, run, held_out=True)
    learner = _learner(method, cfg, run, cfg.total_steps(len(rows)))
    pairs, held_out = prepared(rows, unseen, learner, cfg, run, name="pairs")
    counts = {"pairs": len(pairs), "pairs_dropped": rows.account.dropped_rows}
    return _on_records(method, learner, pairs, held_out, annotate, cfg, run, counts)


def _from_demonstrations(method: Method, cfg: Any, run: Run, annotate: Annotator | None) -> Outcome:
    rows, unseen = stored(scan_demonstrations, cfg, run), stored(scan_demonstrations, cfg, run, held_out=True)
    learner = _learner(method, cfg, run, cfg.total_steps(len(rows)))
    examples, held_out = prepared(rows, unseen, learner, cfg, run, name="demonstrations")
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
    keys = [part.prompts_key for part in (records, held_out) if isinstance(part, Records)]
    _attach(learner, key_of(*keys), cfg, run)
    learner.optimizer.total_steps = cfg.total_steps(len(records))  # dropped records do not count
    measured = held_out and annotate is not None
    start = learner.snapshot() if measured and isinstance(learner, Policy) else None
    prompts = list({record.prompt.id: record.prompt.to_sample() for record in held_out}.values())
    if annotate is not None:
        for prompt in prompts:
            learner.model.codec.room(prompt, need=cfg.max_new_tokens)
    others = prompts_of(records)
    shown = shown_prompts(method, learner, prompts, others, cfg, all_held_out=start is not None)
    if start is None:
        shown = worth_gathering(learner, shown, run)
    measure_fresh(learner, shown, cfg, run)
    watch_kl(learner, others, cfg, run, annotate)
    with suppress(BoundReachedError):
        method.way_of(cfg).train(learner, records, cfg, run, held_out=held_out)
    keep_best(run, learner)
    summarise = held_out_numbers if method.summarise is None else method.summarise
    numbers = {**counts, **summarise(learner, run, held_out)}
    judge = led(lambda: held_out_annotator(annotate, cfg, run))
    evaluation = _compared(start, learner, prompts, judge, cfg, run)
    measure_fresh(learner, shown, cfg, run, evaluation)
    return _finish(learner, evaluation, numbers, run)


# ---- Shared steps of the procedures ------------------------------------------------------------------


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
    seed = run.seed("evaluate")
    return compare(start, learner.snapshot(), prompts, annotate, cfg.held_out_sampling, seed=seed)


def _finish(
    learner: Learner, evaluation: Evaluation | None, numbers: Mapping[str, float], run: Run
) -> Outcome:
    summary: dict[str, Any] = {"method": run.method, "steps": learner.version, **numbers}
    if evaluation is not None:
        summary |= evaluation.summary()
    checkpoint = run.save(learner).relative_to(run.directory)
    summary |= pool_bill(run)
    summary |= {name.replace("/", "_"): number for name, number in run.meter().items() if name in COSTS}
    summary |= {"seconds": round(run.seconds, 1), "checkpoint": str(checkpoint)}
    summary = run.finish(summary, evaluation.samples() if evaluation is not None else ())
    forget_prepared(run)
    return Outcome(run, learner, summary, evaluation)


def _learner(method: Method, cfg: MethodConfig, run: Run, steps: int) -> Learner:
    load = Policy.load if method.learner is None else method.learner
    learner = load(cfg, total_steps=steps, seed=run.seed("adapter"))
    # A template that prints the date must not render other prompts when the run resumes on another day.
    started = run.remember("date of chat templates", pool_date(cfg) or datetime.now().isoformat())
    learner.model.codec.keep_date(datetime.fromisoformat(started))
    return learner


def _attach(learner: Learner, tokens: str, cfg: Any, run: Run, *beside: Learner) -> None:
    """Check that the key of the prompts' tokens is that at the start of the run, then start or resume."""
    subject = f"the rendering of the prompts by the tokenizer or chat template of {learner.model.source}"
    run.require_same("the prompts in tokens", tokens, subject)
    run.attach(learner, *beside)
    open_rollouts(learner, cfg, run)
