"""Soft preferences of a judge, a reward model that learns from them, and its rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

import torch

from palate.annotate import Annotator, Ranker, penalised
from palate.config import LearnerConfig
from palate.data import Stream
from palate.errors import RunError
from palate.given import GivenReward
from palate.learn import Learner, Policy, SoftRanking
from palate.loops.offline import named
from palate.loops.records import once, read_pairs
from palate.loops.rl_config import LearntReward
from palate.model import share_frozen
from palate.run import Run
from palate.select import distinct, select_completions
from palate.types import Group, LabelledPair, Prompt

OF_REWARD_MODEL = {
    "loss": "reward_model/loss",
    "accuracy": "reward_model/accuracy",
    "margin": "reward_model/margin",
    "divergence": "reward_model/divergence",
    "grad_norm": "reward_model/grad_norm",
    "learning_rate": "reward_model/learning_rate",
    "skipped_updates": "reward_model/skipped_updates",
}
"""Metric names of the reward model, which keep its loss apart from the policy's."""

LITTLE = 0.55
"""Agreement with the judge on held-out pairs below which a warning says so; chance is 0.5."""
ENOUGH = 20
"""Held-out pairs from which agreement says anything."""

NAME = "reward model"
"""Name of the stage, of its seeds and of its measurements."""


@dataclass(frozen=True)
class Preferences:
    """Pairs with the soft labels of a judge.

    Attributes:
        learnt: the pairs that the reward model learns from.
        held_out: pairs of other prompts.
        numbers: metrics of the labels, which every step of the reward model logs.
    """

    learnt: Sequence[LabelledPair]
    held_out: Sequence[LabelledPair]
    numbers: Mapping[str, float]


def preferences(
    policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: LearntReward, run: Run
) -> Preferences:
    """Return pairs of completions with the judge's soft labels.

    Args:
        policy: samples the completions, unless `cfg.pairs` has them.
        annotate: a judge's annotator, which averages both orders of two completions.
        prompts: all prompts of the data.
        cfg, run: the method's configuration and its run.

    Raises:
        RunError: no pair to learn from has a usable verdict, or a verdict lies outside [0, 1].
        DataError: `cfg.pairs` cannot be used.
    """
    groups, count = _candidates(policy, prompts, cfg, run)
    twos = [Group(g.prompt, two) for g in groups for two in combinations(g.completions, 2)]
    odds = gives_odds(cfg)
    labelled = [pair for two in annotate(twos) if (pair := soft_label(two, odds=odds)) is not None]
    ids = list(dict.fromkeys(group.prompt.id for group in groups))
    unseen = set(ids[: int(cfg.preference_held_out * len(ids))])
    learnt, held_out = (
        [pair for pair in labelled if (pair.prompt.id in unseen) == out] for out in (False, True)
    )
    if not learnt:
        raise RunError(
            f"none of {len(twos)} comparisons has a usable verdict, so the reward model has nothing to learn "
            "from; check the judge, or raise --candidates"
        )
    numbers = {
        "preferences/kept": len(labelled),
        "preferences/dropped": count - len(labelled),
        "preferences/confidence": fmean(abs(pair.p - 0.5) for pair in labelled),
    }
    return Preferences(learnt, held_out, numbers)


def gives_odds(cfg: LearntReward) -> bool:
    """Return True if the annotator of a configuration gives rewards or log-odds instead of probabilities.

    With label noise, rewards are shares of won comparisons, whatever they were before.
    """
    if cfg.label_noise:
        return False
    given = next(iter(cfg.reward), None)
    if isinstance(given, GivenReward) and given.kind == "judge":
        return isinstance(given.reward, Ranker)  # its annotator gives log-odds, as that of `ranker:ID`
    return given is not None


def soft_label(two: Group, *, odds: bool) -> LabelledPair | None:
    """Return two annotated completions with P(first preferred); None without a verdict.

    Args:
        two: two completions with rewards: the probabilities from a judge, averaged over both orders.
        odds: the difference of the rewards is instead the log-odds that the first is preferred.

    Raises:
        RunError: the rewards are to be probabilities, and are not.
    """
    first, second = two.rewards or (None, None)
    if first is None or second is None:
        return None
    one, other = two.completions
    if odds:
        difference = torch.tensor(first - second, dtype=torch.float64)
        return LabelledPair(two.prompt, one, other, float(difference.sigmoid()))
    if not 0 <= first <= 1 or abs(first + second - 1) > 1e-6:
        raise RunError(
            f"the annotator gave {first:g} and {second:g} to two completions; expected probabilities that "
            "add up to 1, as from a judge that compares"
        )
    return LabelledPair(two.prompt, one, other, first)


def load_reward_model(policy: Policy, cfg: LearntReward, *, seed: int) -> Learner:
    """Load the reward model: the policy's model with a scalar head, and with LoRA on the policy's base."""
    changes = {"lr": cfg.reward_lr, "warmup_steps": 0}
    own = LearnerConfig.model_validate({**cfg.part(LearnerConfig).model_dump(), **changes})
    reward = Learner.load(own, total_steps=1, seed=seed, head="scalar", name="reward")
    reward.model.codec = policy.model.codec  # it scores the policy's tokens as they are
    share_frozen(reward.model, policy.model)
    return reward


def fit_reward_model(
    reward: Learner, labelled: Preferences, cfg: LearntReward, run: Run, *, learners: Sequence[Learner]
) -> None:
    """Train `reward` in place on soft labels, and measure its agreement with the judge before and after.

    Args:
        reward: a learner with a scalar head.
        labelled: the judge's preferences.
        cfg, run: the method's configuration and its run; the fit is one of the run's stages.
        learners: all learners of the run, the policy first, which checkpoints save together.
    """
    stream = Stream(labelled.learnt, seed=run.seed(NAME))
    steps = cfg.reward_total_steps(len(labelled.learnt))
    reward.optimizer.total_steps = steps
    objective = SoftRanking()

    def measure() -> Mapping[str, float]:
        if not labelled.held_out:
            return {}
        return run.measure(NAME, lambda: named(_renamed(reward.measure(labelled.held_out, objective))))

    measure()
    for step in run.steps(steps, *learners):
        batch = stream.batch(step, cfg.reward_batch_size)
        metrics = _renamed(reward.update(batch, objective))
        epoch = {"epoch": (step + 1) * cfg.reward_batch_size / len(labelled.learnt)}
        run.log(step, metrics, labelled.numbers, epoch)
    agreement = measure().get("eval_reward_model/accuracy")
    if agreement is not None:
        verdict = f"{agreement:.2f} of {len(labelled.held_out)} held-out pairs"
        useless = agreement < LITTLE and len(labelled.held_out) >= ENOUGH
        little = "; its rewards say little: use more prompts, or a judge that is surer"
        run.display.say(f"the reward model agrees with the judge on {verdict}{little if useless else ''}")


def learnt_reward(reward: Learner, cfg: LearntReward, run: Run) -> Annotator:
    """Return the annotator of a trained reward model: its score, less the penalty for truncated completions.

    The run stores its rewards like all rewards.
    """

    def scored(groups: Sequence[Group]) -> list[Group]:
        scores = torch.split(reward.scores(groups), [len(group.completions) for group in groups])
        return [g.annotated(tuple(own.tolist())) for g, own in zip(groups, scores, strict=True)]

    return run.annotator(penalised(scored, missing_eos=cfg.missing_eos_penalty or 0.0), name="learnt reward")


def _candidates(
    policy: Policy, prompts: Sequence[Prompt], cfg: LearntReward, run: Run
) -> tuple[Sequence[Group], int]:
    """Return the completions to compare, shuffled, and the number of pairs before any are dropped."""
    seed = run.seed("preferences")
    if cfg.pairs is not None:
        pairs, dropped = read_pairs(policy, cfg.pairs, cfg, run)
        drawn = Stream(pairs, seed=seed).batch(0, min(cfg.preference_prompts or len(pairs), len(pairs)))
        return [Group(pair.prompt, pair.completions) for pair in drawn], len(drawn) + dropped
    each = once(prompts)
    chosen = Stream(each, seed=seed).batch(0, min(cfg.preference_prompts or len(each), len(each)))
    groups = policy.snapshot().sample(chosen, cfg.candidates, cfg.sampling, seed=run.seed("candidates"))
    count = len(groups) * cfg.candidates * (cfg.candidates - 1) // 2
    return select_completions(groups, distinct).groups, count


def _renamed(metrics: Mapping[str, float]) -> dict[str, float]:
    return {named: metrics[name] for name, named in OF_REWARD_MODEL.items() if name in metrics}
