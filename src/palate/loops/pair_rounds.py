"""Rounds that learn from pairs: the labels of the policy's completions, and the pairs of a round."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from palate.annotate import Annotator
from palate.errors import RunError
from palate.loops.config import PairRounds
from palate.loops.report import group_numbers
from palate.loops.rounds import prompts_of_round
from palate.loops.stage import annotated_samples
from palate.model import Snapshot
from palate.run import Run
from palate.select import Rule, best_vs_worst, select_pairs
from palate.types import Group, Pair, Prompt


def pairs_of_round(
    index: int,
    policy: Snapshot,
    label: Annotator,
    prompts: Sequence[Prompt],
    human: Sequence[Pair],
    cfg: PairRounds,
    run: Run,
) -> tuple[list[Pair], dict[str, float]]:
    """Return the pairs that a round learns from, and the metrics of its samples.

    Args:
        index: index of the round, from 0.
        policy: the policy to sample from.
        label: annotates the samples.
        prompts: all prompts of the data.
        human: pairs from data; if there are any, the first round uses them and samples nothing.
        cfg, run: the method's configuration and run.

    Raises:
        RunError: no group gave a pair.
    """
    if index == 0 and human:
        return list(human), {"round": 1}
    batch = prompts_of_round(prompts, index - bool(human), cfg, run)
    groups = annotated_samples(policy, label, batch, cfg.n, cfg.sampling, seed=run.seed("sample", index))
    pairs, numbers = some_pairs(groups, partial(best_vs_worst, tie=cfg.tie), index, tie=cfg.tie)
    return [*pairs, *human] if cfg.mix_pairs else pairs, numbers


def some_pairs(
    groups: Sequence[Group], rule: Rule, index: int, *, tie: float
) -> tuple[list[Pair], dict[str, float]]:
    """Return the pairs of a round's annotated groups, and the metrics of its samples.

    Args:
        groups: the groups.
        rule: makes a pair of a group.
        index: index of the round, from 0.
        tie: the largest difference that the rule counts as a tie, for messages.

    Raises:
        RunError: no group gave a pair.
    """
    pairs, dropped = select_pairs(groups, rule)
    if not pairs:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise RunError(
            f"round {index + 1}: none of {len(groups)} prompts gave a pair to learn from ({reasons}). "
            f"tie: use a finer reward, a larger --n{' or a smaller --tie' if tie else ''}; identical: raise "
            "--temperature or --max-new-tokens; unusable: check why the reward returns no number"
        )
    return list(pairs), {"round": index + 1, **group_numbers(groups, dropped)}


def labeller(
    annotate: Annotator,
    index: int,
    policy: Snapshot,
    ref: Snapshot | None,
    beta: float,
    cfg: PairRounds,
    run: Run,
) -> Annotator:
    """Return the annotator of a round's samples: `annotate`, or the policy's implicit reward.

    The run stores implicit rewards like all rewards.
    """
    if cfg.label == "annotator":
        return annotate
    assert ref is not None, "an implicit reward needs a reference"
    own = partial(implicit_rewards, policy=policy, ref=ref, beta=beta)
    return run.annotator(own, name=f"implicit reward of round {index}")


def implicit_rewards(
    groups: Sequence[Group], *, policy: Snapshot, ref: Snapshot, beta: float = 1.0
) -> list[Group]:
    """Annotate with beta log(π(y) / π_ref(y)): for this reward, π is optimal under a KL penalty beta.

    Rafailov et al. 2023, arXiv:2305.18290, Eq. 5, without the term that depends only on the prompt.
    Log-probabilities are summed over tokens, in nats.
    """
    gains = policy.logps(groups).sum() - ref.logps(groups).sum()
    rewards = torch.split(beta * gains, [len(group.completions) for group in groups])
    return [g.annotated(tuple(r.tolist())) for g, r in zip(groups, rewards, strict=True)]
