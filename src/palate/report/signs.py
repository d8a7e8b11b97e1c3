"""Warnings about common training problems, derived from a run's numbers.

Each check is a pure function of a run's record. It returns None if it finds no problem, or if the run lacks
the numbers. A `note` is good to know, a `worry` needs action. The thresholds are Palate's own rules of thumb,
not from a paper; they are named and explained here, and a report shows the measured numbers.
"""

from __future__ import annotations

from collections.abc import Callable

from palate.report.data_signs import data_truncated
from palate.report.judge_signs import position_decides
from palate.report.rl_signs import entropy_collapses, steps_too_long, value_useless
from palate.report.sign import Sign
from palate.report.spans import ends, late, latest_samples, length_link, quarters, rounds, third_quarter
from palate.report.words import count, interval, number, percent, signed, unit
from palate.rundir import RunRecord

CHOSEN_FALL_NOTE, CHOSEN_FALL_WORRY = 0.02, 0.10
"""Relative fall of the chosen log-probability. It is relative because a sum over tokens grows with the length
of the texts. A few per cent are common with DPO; at 10 %, the effect is visible in the samples."""
LENGTH_DRIFT_NOTE, LENGTH_DRIFT_WORRY = 1.25, 2.0
"""Ratio of the mean lengths, the larger over the smaller. A reader notices 1.25; 2 is another style."""
LENGTH_LINK = 0.3
"""Rank correlation between gain in length and gain in reward from which they count as related."""
CLIPPED_NOTE, CLIPPED_WORRY = 0.2, 0.8
"""Share of completions truncated at max_new_tokens. Their rewards rate only the beginning of a text."""
DEAD_NOTE, DEAD_WORRY = 0.2, 0.5
"""Share of groups (or of pairs in the data) that gave no training pair, although they cost compute."""
KL_NOTE, KL_WORRY = 10.0, 30.0
"""KL in nats per completion. Best-of-n sampling has a KL of log n - (n - 1) / n: 10 nats are n = 60,000."""
KL_GROWTH = 2.0
"""Growth of the mean KL, last quarter over third quarter, from which it counts as running away."""
KL_FLOOR = 2.0
"""KL in nats below which growth is ignored, since every run starts at 0."""
GAP_NOTE = {"float32": 1e-3, "bfloat16": 0.05}
"""Mean difference between the sampler's and the learner's log-probability of a token, in nats, by dtype.
Rounding alone gives about 1e-6 for float32 and 0.01 for bfloat16."""
SKIPPED_WORRY = 0.05
"""Share of skipped updates (loss or gradient not finite) for a worry; fewer are a note."""
CHANCE = 0.5
"""The score of random guessing, and of a model compared with itself."""
OVERFIT = 0.05
"""Relative rise of the last held-out loss over the lowest one."""


def signs(run: RunRecord) -> list[Sign]:
    """Return all warnings about a run, worries first."""
    warnings = [sign for check in SIGNS if (sign := check(run)) is not None]
    return sorted(warnings, key=lambda sign: sign.level != "worry")


def chosen_falls(run: RunRecord) -> Sign | None:
    """Check for likelihood displacement: chosen texts become less likely while the margin grows.

    Razin et al. 2024, arXiv:2410.08847. The check uses held-out pairs if there are any, else the first and
    last quarter of the steps. It only applies to pairs from data, not to pairs of the policy's own samples.
    """
    start, end, where = ends(run, "eval_logps/chosen"), ends(run, "eval_logps/rejected"), "held-out pairs"
    if start is None and not run.curve("objective/scores")[0]:
        start, end, where = quarters(run, "logps/chosen"), quarters(run, "logps/rejected"), "training pairs"
    if start is None or start[0] == 0:
        return None
    first, last = start
    fall = (first - last) / abs(first)
    if fall < CHOSEN_FALL_NOTE:
        return None
    other = (
        ""
        if end is None or rounds(run) > 1
        else f"; that of rejected completions changed from {number(end[0], 4)} to {number(end[1], 4)}"
    )
    return Sign(
        "chosen_falls",
        "worry" if fall >= CHOSEN_FALL_WORRY else "note",
        "Chosen completions became less likely",
        f"On {where}, the mean log-probability of chosen completions fell from {number(first, 4)} to "
        f"{number(last, 4)} nats (by {percent(fall)}){other}.",
        "The loss only rewards the difference between chosen and rejected. Both can fall, and the "
        "probability moves to other texts (likelihood displacement). A fall of a few per cent is common and "
        f"harmless; above about {100 * CHOSEN_FALL_WORRY:.0f} %, or if the samples below got worse, it is a "
        "problem.",
        "Compare the samples before and after. If they got worse, use a larger --beta, a lower --lr or "
        "fewer steps; train on the chosen completions with sft first; or use the model's own samples (oaif).",
    )


def length_drift(run: RunRecord) -> Sign | None:
    """Check for longer or shorter completions, and for a correlation of reward and length."""
    before, after = run.figure("length_before"), run.figure("length_after")
    if before is None or after is None:
        ends = quarters(run, "completions/mean_length")
        if ends is None:
            return None
        before, after = ends
    if min(before, after) <= 0:
        return None
    ratio = max(before / after, after / before)
    if ratio < LENGTH_DRIFT_NOTE:
        return None
    longer = after > before
    link = length_link(run.samples)
    together = (
        "" if link is None else f" The changes in length and reward have rank correlation {signed(link)}."
    )
    means = (
        "Reward and length are correlated here, so the reward may pay for length instead of quality."
        if link is not None and link * (1 if longer else -1) >= LENGTH_LINK
        else "Rewards and judges often prefer longer texts. Losses summed over tokens can change the length."
    )
    return Sign(
        "length_drift",
        "worry" if ratio >= LENGTH_DRIFT_WORRY else "note",
        f"Completions became {'longer' if longer else 'shorter'}",
        f"Mean length changed from {number(before)} to {number(after)} tokens "
        f"({signed(100 * (after / before - 1), 0)} %).{together}",
        means,
        "Sort the samples by length and check whether the change in length is useful. If not, add a length "
        "term to the reward (--reward length:WORDS), --missing-eos-penalty, or a loss that averages over "
        "tokens.",
    )


def clipped(run: RunRecord) -> Sign | None:
    """Check for many completions truncated at max_new_tokens."""
    ratio, where = late(run, "completions/clipped_ratio"), latest_samples(run)
    if ratio is None:
        ended = run.figure("eos_after")
        ratio, where = None if ended is None else 1 - ended, "On held-out prompts"
    if ratio is None or ratio < CLIPPED_NOTE:
        return None
    limit = run.setting("max_new_tokens")
    tokens = "max_new_tokens" if limit is None else f"max_new_tokens ({round(limit)})"
    return Sign(
        "clipped",
        "worry" if ratio >= CLIPPED_WORRY else "note",
        "Many completions are truncated",
        f"{where}, {percent(ratio)} of the completions reached {tokens} without an end token.",
        "The reward of a truncated completion rates only its beginning, and the model does not learn when to "
        "stop.",
        "Raise --max-new-tokens, or reward ending with --missing-eos-penalty. A short limit is fine if only "
        "the beginning matters, as in a quick demonstration.",
    )


_REMEDIES: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "tie": (
        "ties",
        (
            ("", "use a more fine-grained reward"),
            ("n", "more completions per prompt (--n)"),
            ("tie", "a smaller --tie"),
        ),
    ),
    "identical": (
        "identical texts",
        (
            ("temperature", "use a higher --temperature"),
            ("max_new_tokens", "a larger --max-new-tokens"),
            ("n", "more completions per prompt (--n)"),
        ),
    ),
    "unusable": (
        "unusable rewards",
        (("", "check the output of the reward or judge for these prompts; it did not return a number"),),
    ),
}
"""By reason: its name, and remedies, each with the setting that the method must have ("" for any method)."""


def _remedies(run: RunRecord, why: str) -> str:
    name, known = _REMEDIES[why]
    return f"{name}: {', or '.join(text for setting, text in known if not setting or setting in run.config)}"


def dead_pairs(run: RunRecord) -> Sign | None:
    """Check for many groups without a training pair, or many dropped pairs of the data."""
    counts = {why: sum(run.curve(f"pairs/dropped_{why}")[1]) for why in _REMEDIES}
    kept = run.curve("pairs/kept")[1]
    total, dropped, noun = sum(kept) + sum(counts.values()), sum(counts.values()), "groups"
    if {"pairing", "partner"} & run.config.keys():  # a group can give many pairs
        noun = "pairs of candidates"
    if not total:
        counts, noun = {"same": run.figure("pairs_dropped") or 0.0}, "pairs"
        dropped, total = counts["same"], counts["same"] + (run.figure("pairs") or 0.0)
    if not total or dropped / total < DEAD_NOTE:
        return None
    names = {why: name for why, (name, _) in _REMEDIES.items()}
    reasons = ", ".join(f"{names.get(why, 'identical texts')} ({count(n)})" for why, n in counts.items() if n)
    idle = sum(n == 0 for n in kept)
    empty = f" {count(idle)} of {count(len(kept))} steps had no pair and made no update." if idle else ""
    advice = "; ".join(_remedies(run, why) for why, n in counts.items() if n and why in _REMEDIES)
    return Sign(
        "dead_pairs",
        "worry" if dropped / total >= DEAD_WORRY else "note",
        "Many pairs are unusable",
        f"{percent(dropped / total)} of {count(total)} {noun} gave no training pair. Reasons: "
        f"{reasons}.{empty}",
        "Palate drops them, so they do no harm. But they cost compute, and the batches are smaller than "
        "configured.",
        f"For {advice}."
        if advice
        else "Chosen and rejected are the same text, or become the same when truncated. Check the data, or "
        "raise --max-length.",
    )


def kl_runs_away(run: RunRecord) -> Sign | None:
    """Check for a large KL, or one that grows faster and faster."""
    last = before = None
    if run.setting("max_kl") is None:  # within a bound it does not run away
        name = "kl/fresh" if run.curve("kl/fresh")[1] else "objective/kl" if run.fresh else ""
        last, before = late(run, name), third_quarter(run, name)
    kl = max((k for k in (last, run.figure("kl")) if k is not None), default=None)
    if kl is None:
        return None
    grows = last is not None and before is not None and last > KL_FLOOR and last >= KL_GROWTH * before
    if kl < KL_NOTE and not grows:
        return None
    rate = f", up from {number(before)} in the third quarter" if before is not None and grows else ""
    start = "the reference" if kl == last else "the model before training"
    reward, earlier = late(run, "objective/scores"), third_quarter(run, "objective/scores")
    stuck = reward is not None and earlier is not None and reward <= earlier
    return Sign(
        "kl_runs_away",
        "worry" if kl >= KL_WORRY or grows else "note",
        "KL runs away" if grows else "The model is far from its starting point",
        f"The KL to {start} is {number(kl)} nats per completion{rate}."
        + (
            f" The reward did not rise in the last quarter ({number(earlier)}, then {number(reward)})."
            if stuck
            else ""
        ),
        "KL measures how far the model's texts have moved. A large KL often means that the model exploits "
        "the reward (reward hacking): the reward rises, but the texts get worse.",
        "Read the samples with the highest reward. If they are bad, use a larger --beta, a lower --lr or "
        "fewer steps, or take the last checkpoint with good samples.",
    )


def sampler_gap(run: RunRecord) -> Sign | None:
    """Check for differences between sampler and learner that are larger than rounding errors."""
    gap = late(run, "sampling/sampling_logp_difference/mean")
    resolved = run.description.get("resolved")
    kind = resolved.get("dtype") if isinstance(resolved, dict) else None
    limit = GAP_NOTE.get(str(kind), max(GAP_NOTE.values()))
    if gap is None or gap < limit or run.config.get("ahead"):  # which has steps between the two
        return None
    most = run.curve("sampling/sampling_logp_difference/max")[1]
    at_most = f", and up to {number(max(most))}" if most else ""
    return Sign(
        "sampler_gap",
        "worry" if gap >= 2 * limit else "note",
        "Sampler and learner differ",
        f"Their log-probabilities of the same token differ by {number(gap)} nats on average{at_most} "
        f"({kind or 'unknown dtype'}; at most {number(limit)} is expected).",
        "The training samples do not come exactly from the policy that is trained, which can bias training.",
        "Try --dtype float32, also for a server that samples. If the difference remains, try --no-fast or "
        "--rollouts local. If that helps, please report the model as a bug.",
    )


def skipped_updates(run: RunRecord) -> Sign | None:
    """Check for updates that were skipped because loss or gradient was not finite."""
    steps, counts = run.curve("skipped_updates")
    if not counts or not max(counts):
        return None
    skipped, share = max(counts), max(counts) / len(counts)
    first = next(step for step, count in zip(steps, counts, strict=True) if count)
    return Sign(
        "skipped_updates",
        "worry" if share >= SKIPPED_WORRY else "note",
        "Updates were skipped",
        f"{count(skipped)} of {count(len(counts))} updates were skipped, the first at step "
        f"{count(first)}, because loss or gradient was not finite.",
        "A skipped update leaves the weights unchanged, so the model is not damaged. A few can come from "
        "unusual texts; many mean that training is unstable.",
        "Use a lower --lr, more --warmup-steps, or --dtype float32.",
    )


def _against_chance(
    run: RunRecord, key: str, names: tuple[str, str, str], titles: tuple[str, str], label: str
) -> Sign | None:
    """Check for a rate whose 95 % interval is not entirely above 0.5."""
    rate, low, high = (run.figure(name) for name in names)
    if rate is None or low is None or high is None or low > CHANCE:
        return None
    worse = high < CHANCE
    return Sign(
        key,
        "worry" if worse else "note",
        titles[worse],
        f"{label} is {percent(rate)}, 95 % interval {interval(low, high)}.",
        "The whole interval is below 50 %, so the model is worse than chance."
        if worse
        else "The interval includes 50 %, which is chance level. Training may have had an effect, but these "
        "data do not show it.",
        "Check that chosen and rejected are not swapped, and that a higher reward means a better completion."
        if worse
        else "Evaluate on more held-out prompts (four times as many halve the interval), or train longer.",
    )


def accuracy_is_chance(run: RunRecord) -> Sign | None:
    """Check for a held-out accuracy that is not above chance."""
    return _against_chance(
        run,
        "accuracy_is_chance",
        ("accuracy_after", "accuracy_low", "accuracy_high"),
        ("Held-out accuracy is not above chance", "Held-out accuracy is below chance"),
        "Accuracy on held-out pairs",
    )


def ranks_by_length(run: RunRecord) -> Sign | None:
    """Check for a reward model that is not better than always preferring the longer completion."""
    accuracy, longer = run.figure("accuracy_after"), run.figure("longer_wins")
    rate, low, high = (run.figure(f"accuracy_shorter_{end}") for end in ("after", "low", "high"))
    worse = high is not None and high < CHANCE
    if accuracy is None or longer is None or not (worse or CHANCE < longer >= accuracy):
        return None
    on_shorter = "" if rate is None else (
        f" On pairs whose chosen completion is shorter, its accuracy is {percent(rate)}, 95 % interval "
        f"{interval(low, high)}."
    )  # fmt: skip
    return Sign(
        "ranks_by_length",
        "worry" if worse else "note",
        "The reward follows length",
        f"Accuracy on held-out pairs is {percent(accuracy)}. Always preferring the longer completion would "
        f"give {percent(longer)}.{on_shorter}",
        "The reward model may have learnt to prefer long texts. A policy trained with it will then write "
        "longer texts, not better ones.",
        "Train on pairs of similar length, or on more pairs whose chosen completion is shorter. When you use "
        "this reward model, add a length term (--reward length:WORDS).",
    )


def win_rate_is_chance(run: RunRecord) -> Sign | None:
    """Check for a win rate against the model before training that is not above chance."""
    return _against_chance(
        run,
        "win_rate_is_chance",
        ("win_rate", "win_rate_low", "win_rate_high"),
        ("No improvement is shown", "The model got worse"),
        "The win rate against the model before training",
    )


def overfits(run: RunRecord) -> Sign | None:
    """Check for a held-out loss that has risen from its lowest value."""
    steps, losses = run.curve("eval_loss")
    if rounds(run) > 1:  # losses of different rounds cannot be compared
        return None
    if len(losses) < 3 or min(losses) <= 0 or losses[-1] < (1 + OVERFIT) * min(losses):
        return None
    best = steps[losses.index(min(losses))]
    beta = ", a larger --beta" if "beta" in run.config and "anchor" not in run.config else ""
    return Sign(
        "overfits",
        "note",
        "The held-out loss rises again",
        f"It was lowest at step {count(best)} ({number(min(losses))}) and is {number(losses[-1])} at the "
        f"end.",
        f"After step {count(best)}, the model memorised its training {unit(run)}s instead of learning what "
        "generalises (overfitting).",
        f"Use fewer epochs, a lower --lr{beta}, or more data; or use the checkpoint nearest to that step.",
    )


SIGNS: tuple[Callable[[RunRecord], Sign | None], ...] = (
    win_rate_is_chance,
    accuracy_is_chance,
    position_decides,
    ranks_by_length,
    chosen_falls,
    kl_runs_away,
    length_drift,
    clipped,
    dead_pairs,
    data_truncated,
    overfits,
    skipped_updates,
    sampler_gap,
    value_useless,
    entropy_collapses,
    steps_too_long,
)
