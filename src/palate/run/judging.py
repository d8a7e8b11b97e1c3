"""A judge within a run: over the run's ledger, with its costs in the run's metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from palate.annotate import Annotator, judged
from palate.annotate.base import Judge
from palate.annotate.judges.build import JudgeContext, Judging, judging, local_options
from palate.annotate.judges.local import LocalModel
from palate.config import JudgeConfig, ModelConfig
from palate.learn import Policy
from palate.run.run import Run


def judge_annotator(cfg: Any, run: Run) -> Annotator:
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
    return run.annotator(court.annotate, name=_name(cfg, run))


def judge_court(cfg: JudgeConfig, run: Run) -> Judging:
    """Return the judge that a run's configuration names, over the run's ledger.

    Raises:
        ConfigError, AnnotatorError, ModelError: the judge cannot be used.
    """
    one_score = getattr(cfg, "n", 2) == 1 or getattr(cfg, "compares_rewards", None) is not None
    return judging(
        JudgeContext(cfg, model_options(cfg), own=lambda: _policy(cfg, run)),
        ledger=run.ledger(cfg.verdict_cache),
        say=run.display.say,
        one_completion=one_score,
        missing_eos_penalty=getattr(cfg, "missing_eos_penalty", 0.0),
    )


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
