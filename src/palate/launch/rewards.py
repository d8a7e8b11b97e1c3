"""The annotators of a run, from its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from palate.annotate import Annotator, Judge, annotator, code_key, files_of, with_label_noise
from palate.config import MethodConfig, RewardConfig
from palate.given import GivenReward
from palate.journal import key_of
from palate.run import Run, judge_annotator, own_judge
from palate.run.judging import model_options


def annotator_of(cfg: MethodConfig, run: Run, judge: Judge | None) -> Annotator | None:
    """Return the annotator that the configuration names; None if it names none.

    Methods that train without one use it for the comparison before and after.
    """
    if judge is not None:
        return own_judge(judge, run)
    if not isinstance(cfg, RewardConfig) or not (cfg.reward or cfg.judge):
        return None
    if cfg.judge is not None:
        return judge_annotator(cfg, run)
    annotate = _rewards(cfg, cfg.reward, run)
    return run.annotator(with_label_noise(annotate, cfg.label_noise, seed=run.seed("label noise")))


def held_out_annotator(annotate: Annotator | None, cfg: Any, run: Run) -> Annotator | None:
    """Return the annotator for the comparison before and after: from `eval_reward`, or the given one."""
    if annotate is None or not isinstance(cfg, RewardConfig) or not cfg.eval_reward:
        return annotate
    return run.annotator(_rewards(cfg, cfg.eval_reward, run), name="eval_reward")


def _rewards(cfg: RewardConfig, specs: Sequence[str], run: Run) -> Annotator:
    """Return the annotator of rewards; refuse files of functions that changed since the run began."""
    annotate = annotator(
        specs,
        missing_eos_penalty=cfg.annotator_penalty,
        kept=run.ledger(),
        say=run.display.say,
        **model_options(cfg),
    )
    for path in files_of(specs):
        run.require_same(
            f"the reward in {path}", key_of(path.read_text("utf-8")), f"the reward in {str(path)!r}"
        )
    for i, reward in enumerate(specs):
        if isinstance(reward, GivenReward):
            run.require_same(f"reward {i}: {reward}", code_key(reward.reward), f"the code of the {reward}")
    return annotate
