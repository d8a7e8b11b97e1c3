"""The catalogue of panels in a report: the metrics of each panel, with titles and captions."""

from __future__ import annotations

import math
from collections.abc import Callable

from palate.report.curves import HELD_OUT, TRAINING, Curve, Panel
from palate.rundir import RunRecord
from palate.rundir.record import Points


def _where_fresh(name: str) -> Callable[[RunRecord], Points]:
    """Return a reader of a metric that is meaningful only on fresh samples of the current policy."""
    return lambda run: run.curve(name) if run.fresh else ((), ())


def _dropped(reason: str) -> Callable[[RunRecord], Points]:
    """Return a reader of the share of groups, per step or round, that gave no pair for `reason`."""

    def share(run: RunRecord) -> Points:
        points = []
        for row in run.draws:
            dropped, kept = row.get("pairs/dropped", math.nan), row.get("pairs/kept", math.nan)
            count = row.get(f"pairs/dropped_{reason}", math.nan)
            if math.isfinite(dropped + kept + count) and dropped + kept > 0:
                points.append((row["step"], count / (dropped + kept)))
        return tuple(step for step, _ in points), tuple(value for _, value in points)

    return share


PANELS = (
    Panel(
        "reward",
        "Reward",
        "reward",
        "Mean reward of fresh samples.",
        (
            Curve("objective/scores", TRAINING, std="objective/scores_std"),
            Curve("eval_objective/scores", HELD_OUT),
        ),
    ),
    Panel(
        "win_rate",
        "Win rate against the model before",
        "share of prompts",
        "Held-out prompts on which the model beats the model before training.",
        (Curve("eval_win_rate", bounds=("eval_win_rate_low", "eval_win_rate_high")),),
        guide=0.5,
        rate=True,
    ),
    Panel(
        "round_win_rate",
        "Win rate of a round over the one before",
        "share of prompts",
        "Held-out prompts on which the model beats itself before the round.",
        (Curve("eval_round_win_rate", bounds=("eval_round_win_rate_low", "eval_round_win_rate_high")),),
        guide=0.5,
        rate=True,
    ),
    Panel(
        "round_reward",
        "Reward of a round and of the one before",
        "reward",
        "Mean reward on held-out prompts after a round, and of the model from which the round started.",
        (Curve("eval_round_reward", "after"), Curve("eval_round_reward_before", "before")),
    ),
    Panel(
        "round_length",
        "Length of a round and of the one before",
        "tokens",
        "Mean length on held-out prompts after a round, and of the model from which the round started.",
        (Curve("eval_round_length", "after"), Curve("eval_round_length_before", "before")),
    ),
    Panel(
        "round_kl",
        "KL of a round to the one before",
        "nats per completion",
        "Distance from the model from which the round started, on held-out prompts.",
        (Curve("eval_round_kl"),),
        guide=0.0,
    ),
    Panel(
        "spread",
        "Best minus worst",
        "reward",
        "Difference in reward within a group of completions. At 0, a group has no preference to learn from.",
        (Curve("objective/scores_margin"),),
    ),
    Panel(
        "selected",
        "Reward of the training samples",
        "reward",
        "Mean reward of the samples kept in this round and, if rounds add to a pool, of the whole pool.",
        (Curve("candidates/scores", "kept"), Curve("pool/scores", "pool"), Curve("threshold", "threshold")),
    ),
    Panel(
        "ranked",
        "Accuracy of the reward model",
        "share of pairs",
        "Pairs whose chosen completion gets the higher reward. Chance is 50 %.",
        (
            Curve("accuracy", TRAINING),
            Curve("eval_accuracy", HELD_OUT, bounds=("eval_accuracy_low", "eval_accuracy_high")),
        ),
        guide=0.5,
        rate=True,
    ),
    Panel(
        "agreement",
        "Agreement of the reward model with the judge",
        "share of pairs",
        "Pairs that the reward model orders as the judge does. Chance is 50 %.",
        (Curve("reward_model/accuracy", TRAINING), Curve("eval_reward_model/accuracy", HELD_OUT)),
        guide=0.5,
        rate=True,
    ),
    Panel(
        "ranked_shorter",
        "Accuracy where chosen is shorter",
        "share of pairs",
        "Accuracy on held-out pairs whose chosen completion is the shorter one.",
        (
            Curve(
                "eval_accuracy_shorter",
                HELD_OUT,
                bounds=("eval_accuracy_shorter_low", "eval_accuracy_shorter_high"),
            ),
        ),
        guide=0.5,
        rate=True,
    ),
    Panel(
        "ranked_margin",
        "Reward margin",
        "log-odds",
        "Reward of chosen minus reward of rejected.",
        (Curve("margin", TRAINING), Curve("eval_margin", HELD_OUT)),
        guide=0.0,
    ),
    Panel(
        "ece",
        "Calibration error",
        "probability",
        "Mean difference between predicted preference probabilities and observed shares.",
        (Curve("eval_ece", HELD_OUT),),
        guide=0.0,
    ),
    Panel(
        "scores",
        "Rewards of a pair",
        "reward",
        "Means of the lower and the higher reward of each pair. Only the difference matters, not the level.",
        (Curve("min_reward", "lower"), Curve("max_reward", "higher"), Curve("eval_mean_reward", HELD_OUT)),
    ),
    Panel(
        "kl",
        "KL to the reference",
        "nats per completion",
        "Distance of the policy from the reference. It starts at 0 and should grow slowly.",
        (
            Curve("objective/kl", TRAINING, of=_where_fresh("objective/kl")),
            Curve("kl/fresh", "fresh samples"),
            Curve("eval_objective/kl", HELD_OUT),
        ),
        guide=0.0,
    ),
    Panel(
        "rlhf_reward",
        "Reward and KL penalty",
        "reward",
        "The reward less its mean at the start, and what is left of it when the KL is paid: that is what is "
        "maximised.",
        (Curve("objective/centred_scores", "reward"), Curve("objective/rlhf_reward", "with penalty")),
        guide=0.0,
    ),
    Panel(
        "explained",
        "Explained variance",
        "share of the variance",
        "How well the value function predicts the returns: 1 is perfect, at 0 a constant would do as well.",
        (Curve("val/explained_variance", TRAINING),),
        guide=0.0,
    ),
    Panel(
        "bounds",
        "Beyond the bounds",
        "share of tokens",
        "Tokens and values that PPO holds back, as they moved too far in a step.",
        (Curve("policy/clipfrac_avg", "policy"), Curve("val/clipfrac_avg", "value")),
        rate=True,
    ),
    Panel(
        "accuracy",
        "Accuracy",
        "share of pairs",
        "Pairs whose chosen completion gets the higher implicit reward. Chance is 50 %.",
        (Curve("rewards/accuracies", TRAINING), Curve("eval_rewards/accuracies", HELD_OUT)),
        guide=0.5,
        rate=True,
    ),
    Panel(
        "margin",
        "Margin",
        "implicit reward",
        "Implicit reward of chosen minus implicit reward of rejected.",
        (Curve("rewards/margins", TRAINING), Curve("eval_rewards/margins", HELD_OUT)),
        guide=0.0,
    ),
    Panel(
        "implicit",
        "Implicit rewards",
        "implicit reward",
        "Beta times the log-ratio of policy and reference: log-probability minus reference log-probability.",
        (Curve("rewards/chosen", "chosen"), Curve("rewards/rejected", "rejected")),
        guide=0.0,
    ),
    Panel(
        "logps",
        "Log-probabilities",
        "nats",
        "Mean log-probability of chosen and rejected completions in the pairs of each step.",
        (Curve("logps/chosen", "chosen"), Curve("logps/rejected", "rejected")),
    ),
    Panel(
        "eval_logps",
        "Log-probabilities, held out",
        "nats",
        "Mean log-probability on the same held-out pairs each time, so values can be compared across steps.",
        (Curve("eval_logps/chosen", "chosen"), Curve("eval_logps/rejected", "rejected")),
    ),
    Panel(
        "shift",
        "Distribution shift",
        "nats per token",
        "Log-probability of the training texts and of the model's own samples. A large gap means that the "
        "training texts differ from the model's own.",
        (
            Curve("logps/training", "training texts"),
            Curve("logps/fresh", "own samples"),
            Curve("eval_logps/training", HELD_OUT),
        ),
    ),
    Panel(
        "length",
        "Length",
        "tokens",
        "Mean length of fresh completions, and of those that ended.",
        (Curve("completions/mean_length", "all"), Curve("completions/mean_terminated_length", "ended")),
    ),
    Panel(
        "ended",
        "Ended and truncated",
        "share of completions",
        "Completions that ended with an end token, and completions truncated at max_new_tokens.",
        (Curve("val/contain_eos_token", "ended"), Curve("completions/clipped_ratio", "truncated")),
        rate=True,
    ),
    Panel(
        "dead",
        "Groups without a pair",
        "share",
        "Groups, or pairs of candidates, that gave no training pair: the rewards tie, the texts are "
        "identical, or a reward is unusable.",
        tuple(
            Curve(f"pairs/dropped_{why}", label, of=_dropped(why))
            for why, label in (("tie", "ties"), ("identical", "identical"), ("unusable", "unusable"))
        ),
        rate=True,
    ),
    Panel(
        "loss",
        "Loss",
        "loss",
        "The training loss. A falling loss does not yet mean a better model.",
        (Curve("loss", TRAINING), Curve("eval_loss", HELD_OUT)),
    ),
    Panel(
        "loss_parts",
        "Parts of the loss",
        "loss",
        "Parts before weighting: the ranking loss, the negative log-likelihood and the Cringe loss.",
        (Curve("rank_loss", "ranking"), Curve("nll_loss", "NLL"), Curve("cringe_loss", "Cringe")),
    ),
    Panel(
        "grad_norm",
        "Gradient norm",
        "norm",
        "Norm before clipping to max_grad_norm. Peaks come from unusual batches.",
        (Curve("grad_norm"),),
    ),
    Panel(
        "entropy",
        "Entropy",
        "nats per token",
        "Entropy of the model's next-token distribution. Near 0, the model always writes the same text.",
        (Curve("entropy", TRAINING), Curve("eval_entropy", HELD_OUT)),
    ),
    Panel(
        "gap",
        "Sampler-learner difference",
        "nats per token",
        "Difference between their log-probabilities of the same tokens. It should be rounding error only.",
        (
            Curve("sampling/sampling_logp_difference/mean", "mean"),
            Curve("sampling/sampling_logp_difference/max", "largest"),
        ),
    ),
    Panel(
        "judge",
        "The judge",
        "share",
        "Questions without a usable verdict, and pairs of which one place wins whatever stands there.",
        (
            Curve("judge/unusable", "unusable"),
            Curve("judge/orders_disagree", "orders disagree"),
            Curve("judge/members_disagree", "members of the panel disagree"),
        ),
        rate=True,
    ),
    Panel(
        "judge_agreement",
        "The judge on ranked answers",
        "share of pairs",
        "Held-out answers that the judge orders as people do. A tie counts one half; chance is 50 %.",
        (Curve("eval_judge/pairwise", bounds=("eval_judge/pairwise_low", "eval_judge/pairwise_high")),),
        guide=0.5,
        rate=True,
    ),
    Panel(
        "judge_shares",
        "The judge on ranked answers, further shares",
        "share",
        "Prompts whose answers the judge orders wholly as people do, answers with its highest score that "
        "people rank first, and pairs that it ties or gives no clear score.",
        (
            Curve("eval_judge/exact", "exact"),
            Curve("eval_judge/best", "best"),
            Curve("eval_judge/ties", "ties"),
            Curve("eval_judge/unclear", "unclear"),
        ),
        rate=True,
    ),
    Panel(
        "judge_correlation",
        "Correlation of the judge with ranked answers",
        "correlation",
        "Means over prompts of rank correlations with people's order.",
        (Curve("eval_judge/spearman", "Spearman"), Curve("eval_judge/kendall", "Kendall")),
        guide=0.0,
    ),
    Panel(
        "judge_mean",
        "Mean score of the judge",
        "score",
        "The answers are the same each time, so a rise is a drift of the judge.",
        (Curve("eval_judge/mean"),),
    ),
    Panel("judge_cost", "Cost of the judge", "$", "Since the run began.", (Curve("judge/cost"),)),
    Panel(
        "speed",
        "Sampling speed",
        "tokens per second",
        "Sampled tokens per second of sampling time.",
        (Curve("sampling/tokens_per_second"),),
    ),
    Panel("step_time", "Time per step", "seconds", "Wall-clock time.", (Curve("step_time"),)),
)
"""All panels, in order. A report draws the panels that its runs have numbers for."""
