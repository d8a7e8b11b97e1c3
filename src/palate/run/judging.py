"""A judge within a run: over the run's ledger, with its costs in the run's metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate.annotate import Annotator, Early, judged, with_label_noise
from palate.annotate.base import Judge
from palate.annotate.judges.build import JudgeContext, Judging, judging, local_options
from palate.annotate.judges.local import LocalModel
from palate.config import JudgeConfig, ModelConfig
from palate.learn import Policy
from palate.run.run import Run
from palate.rundir.files import VERDICTS
from palate.types import Group


@dataclass(frozen=True)
class JudgeAnnotator:
    """The annotator of a run's judge.

    Attributes:
        annotate: groups in, groups with rewards out; the run stores its answers.
        court: the judge itself.
        early: judges groups in the background, for a judge on a server; None for a judge here.
    """

    annotate: Annotator
    court: Judging
    early: Early | None = None

    @property
    def begin(self) -> Callable[[Group], None] | None:
        """The function that begins to judge a group in the background; None for a judge here."""
        return None if self.early is None else self.early.begin

    def close(self) -> None:
        """Wait for the verdicts under way, and ask for no further ones."""
        if self.early is not None:
            self.early.close()

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        """Return the groups with rewards."""
        return self.annotate(groups)


def judge_annotator(cfg: Any, run: Run) -> JudgeAnnotator:
    """Return the annotator of the judge that a run's configuration names.

    Its verdicts and what they cost are kept in the run's journal; each step's metrics have the costs.

    Raises:
        ConfigError, AnnotatorError, ModelError: the judge cannot be used.
        RunError: the run began with another template.
    """
    assert isinstance(cfg, JudgeConfig)
    court = judge_court(cfg, run)
    run.require_same("the judge's question", court.template.hash, "the judge's template")
    run.meter = court.metrics
    noise = getattr(cfg, "label_noise", 0.0)
    early = Early(court.annotate) if court.remote else None
    annotate = with_label_noise(early or court.annotate, noise, seed=run.seed("label noise"))
    return JudgeAnnotator(run.annotator(annotate, name=_name(cfg, run)), court, early)


def judge_court(cfg: JudgeConfig, run: Run) -> Judging:
    """Return the judge that a run's configuration names, over the run's ledger.

    Raises:
        ConfigError, AnnotatorError, ModelError: the judge cannot be used.
    """
    one_score = getattr(cfg, "n", 2) == 1 or getattr(cfg, "compares_rewards", None) is not None
    pairs = getattr(cfg, "compares_pairs", False)
    return judging(
        JudgeContext(cfg, model_options(cfg), own=lambda: _policy(cfg, run)),
        ledger=run.ledger(cfg.verdict_cache or _verdicts_of_pool(cfg)),
        say=run.display.say,
        one_completion=one_score and not pairs,
        missing_eos_penalty=getattr(cfg, "annotator_penalty", 0.0),
    )


def _verdicts_of_pool(cfg: JudgeConfig) -> Path | None:
    """Return the file with the verdicts on a pool that the run reads; None without one."""
    pool: Path | None = getattr(cfg, "pool", None)
    return pool / VERDICTS if pool is not None and (pool / VERDICTS).exists() else None


def _name(cfg: JudgeConfig, run: Run) -> str | Callable[[], str]:
    """Return the judge's name in the journal; each version of the policy is another judge."""
    if cfg.judge == "self":
        return lambda: f"judge self {run.learners[0].version}"
    return f"judge {cfg.judge}"


def own_judge(judge: Judge, run: Run) -> Annotator:
    """Return the annotator of a judge that is a Python object; it is asked in both orders."""
    return run.annotator(judged(judge), name=f"judge {judge.name}")


def model_options(cfg: Any) -> dict[str, Any]:
    """Return the options that models beside the policy share with it."""
    if not isinstance(cfg, ModelConfig):
        return {}
    return {"device": cfg.device, "trust_remote_code": cfg.trust_remote_code, "fast": cfg.fast}


def _policy(cfg: JudgeConfig, run: Run) -> LocalModel:
    """Return the policy as its own judge. A later version of it is another judge."""

    def policy() -> Policy:
        learner = run.learners[0]
        assert isinstance(learner, Policy), "a method with a judge trains a policy"
        return learner

    def identity() -> Mapping[str, Any]:
        return {"model": "self", "run": run.id, "version": policy().version}

    return LocalModel(
        lambda: policy().snapshot(),
        lambda: policy().model.codec,
        name="self",
        identity=identity,
        **local_options(cfg),
    )
