"""Signs that people ask about most, found in a run's numbers and said in plain words.

Each sign is a pure function of a run's record: None where there is nothing to say, or where the run has
not the numbers to tell. A `note` is worth knowing, a `worry` worth acting on. The thresholds are rules of
thumb of ours, not of a paper; they are named and explained here, and a report says the numbers it saw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from palate.report.spans import ends, late, latest_samples, length_link, quarters, rounds, third_quarter
from palate.report.words import count, interval, number, percent, signed, unit
from palate.rundir import RunRecord

CHOSEN_FALL_NOTE, CHOSEN_FALL_WORRY = 0.02, 0.10
"""Fall of the chosen log-probability as a share of where it began: a share, since a sum over tokens is the
larger the longer the texts. Some per cent are usual with DPO; at a tenth, what was preferred has become less
likely by a factor that is seen in the samples."""
LENGTH_DRIFT_NOTE, LENGTH_DRIFT_WORRY = 1.25, 2.0
"""Mean length after over before, or before over after: a reader sees a quarter; twice is another style."""
LENGTH_LINK = 0.3
"""Rank correlation of gain in length and gain in reward from which the two are said to go together."""
CLIPPED_NOTE, CLIPPED_WORRY = 0.2, 0.8
"""Share of completions cut at max_new_tokens. Rewards of cut texts are rewards of beginnings."""
DEAD_NOTE, DEAD_WORRY = 0.2, 0.5
"""Share of groups (or of pairs of data) that gave nothing to learn from, though they were paid for."""
KL_NOTE, KL_WORRY = 10.0, 30.0
"""Nats per completion. Picking the best of n samples is log n - (n - 1) / n away: 10 nats are n = 60,000."""
KL_GROWTH = 2.0
"""The last quarter's mean KL over that of the quarter before, from which it is said to run away."""
KL_FLOOR = 2.0
"""Nats below which growth is no news: every run begins at 0."""
GAP_NOTE = {"float32": 1e-3, "bfloat16": 0.05}
"""Mean difference of the sampler's and the learner's log-probability of a token, in nats, by number format.
Rounding alone gives about 1e-6 and 0.01."""
SKIPPED_WORRY = 0.05
"""Share of updates left out for not being finite; fewer are a note."""
CHANCE = 0.5
"""What a coin scores, and a model against itself."""
OVERFIT = 0.05
"""How far the last held-out loss may lie above the lowest one, as a share of it."""

Level = Literal["note", "worry"]


@dataclass(frozen=True)
class Sign:
    """Something seen in a run: what, in numbers; what it means; what to do."""

    key: str
    level: Level
    title: str
    seen: str
    means: str
    do: str


def signs(run: RunRecord) -> list[Sign]:
    """Every sign that a run shows, worries first."""
    found = [sign for look in SIGNS if (sign := look(run)) is not None]
    return sorted(found, key=lambda sign: sign.level != "worry")


def chosen_falls(run: RunRecord) -> Sign | None:
    """Likelihood displacement: preferred texts become less likely while the margin grows.

    Razin et al. 2024, arXiv:2410.08847. Told from held-out pairs, else from the first and last quarter of the
    steps, and only where the pairs are data: of a policy's own samples it would say something else.
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
        else f", of rejected ones from {number(end[0], 4)} to {number(end[1], 4)}"
    )
    return Sign(
        "chosen_falls",
        "worry" if fall >= CHOSEN_FALL_WORRY else "note",
        "Chosen completions became less likely",
        f"On {where}, the log-probability of chosen completions went from {number(first, 4)} to "
        f"{number(last, 4)} nats ({percent(fall)} down){other}.",
        "The loss asks only that chosen gains on rejected; both may fall, and what they lose goes to texts "
        "that are in neither (likelihood displacement). A fall of some per cent is common and harmless. It "
        f"is a problem from about {100 * CHOSEN_FALL_WORRY:.0f} %, or where the samples below got worse.",
        "Compare the samples before and after. If they got worse: a larger --beta, a lower --lr or fewer "
        "steps; train on the chosen completions first; or learn from the model's own samples (oaif).",
    )


def length_drift(run: RunRecord) -> Sign | None:
    """Completions became longer or shorter, and whether reward goes with length."""
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
    together = "" if link is None else f" Gain in length and gain in reward: rank correlation {signed(link)}."
    means = (
        "Reward and length go together here, so the reward may be paying for length and not for what you "
        "want."
        if link is not None and link * (1 if longer else -1) >= LENGTH_LINK
        else "Rewards and judges often prefer longer texts, and summed log-probabilities favour a drift."
    )
    return Sign(
        "length_drift",
        "worry" if ratio >= LENGTH_DRIFT_WORRY else "note",
        f"Completions became {'longer' if longer else 'shorter'}",
        f"Mean length went from {number(before)} to {number(after)} tokens "
        f"({signed(100 * (after / before - 1), 0)} %).{together}",
        means,
        "Sort the samples by length and see what the added words say. Then add a length term to the reward "
        "(--reward length:WORDS), use --missing-eos-penalty, or a loss that is averaged over tokens.",
    )


def clipped(run: RunRecord) -> Sign | None:
    """Many completions are cut at max_new_tokens."""
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
        "Many completions are cut off",
        f"{where}, {percent(ratio)} of the completions reached {tokens} without an end.",
        "A cut completion is scored by its beginning alone, and it teaches nothing about when to stop.",
        "Raise --max-new-tokens, or make stopping pay with --missing-eos-penalty. Short limits are fine "
        "where only the beginning matters, as in a quick demonstration.",
    )


_REMEDIES: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "tie": (
        "ties",
        (("", "a finer reward"), ("n", "more completions a prompt (--n)"), ("tie", "a smaller --tie")),
    ),
    "identical": (
        "identical texts",
        (
            ("temperature", "a higher --temperature"),
            ("max_new_tokens", "a longer --max-new-tokens"),
            ("n", "more completions a prompt (--n)"),
        ),
    ),
    "unusable": (
        "unusable rewards",
        (("", "see what the reward or judge says of these prompts; it gave no number"),),
    ),
}
"""Against each reason: what it is called, and remedies with the setting that a method needs for them."""


def _remedies(run: RunRecord, why: str) -> str:
    name, known = _REMEDIES[why]
    return f"{name}: {', or '.join(text for setting, text in known if not setting or setting in run.config)}"


def dead_pairs(run: RunRecord) -> Sign | None:
    """Groups that gave no pair, or pairs of data that were left out."""
    counts = {why: sum(run.curve(f"pairs/dropped_{why}")[1]) for why in _REMEDIES}
    kept = run.curve("pairs/kept")[1]
    total, dropped, what = sum(kept) + sum(counts.values()), sum(counts.values()), "groups"
    if {"pairing", "partner"} & run.config.keys():  # many pairs of a group
        what = "pairs of candidates"
    if not total:
        counts, what = {"same": run.figure("pairs_dropped") or 0.0}, "pairs"
        dropped, total = counts["same"], counts["same"] + (run.figure("pairs") or 0.0)
    if not total or dropped / total < DEAD_NOTE:
        return None
    reasons = ", ".join(f"{count(n)} {why}" for why, n in counts.items() if n)
    idle = sum(n == 0 for n in kept)
    nothing = (
        f" In {count(idle)} of {count(len(kept))} steps no pair was left, and nothing was learnt."
        if idle
        else ""
    )
    advice = "; ".join(_remedies(run, why) for why, n in counts.items() if n and why in _REMEDIES)
    return Sign(
        "dead_pairs",
        "worry" if dropped / total >= DEAD_WORRY else "note",
        "Many pairs say nothing",
        f"{percent(dropped / total)} of {count(total)} {what} gave nothing to learn from: "
        f"{reasons}.{nothing}",
        "They are left out, never made into labels, so nothing is learnt wrongly; but their samples and "
        "rewards were paid for, and the batches are smaller than was asked for.",
        f"Against {advice}."
        if advice
        else "Chosen and rejected are the same text, or become so when cut: look at the data, or raise "
        "--max-length.",
    )


def kl_runs_away(run: RunRecord) -> Sign | None:
    """The policy is far from where it began, or moves off faster and faster."""
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
    rate = f", after {number(before)} in the quarter before it" if before is not None and grows else ""
    reward, earlier = late(run, "objective/scores"), third_quarter(run, "objective/scores")
    stuck = reward is not None and earlier is not None and reward <= earlier
    return Sign(
        "kl_runs_away",
        "worry" if kl >= KL_WORRY or grows else "note",
        "KL runs away" if grows else "The model is far from where it began",
        f"KL to the start is {number(kl)} nats per completion{rate}."
        + (
            f" In that time the reward did not rise ({number(earlier)}, then {number(reward)})."
            if stuck
            else ""
        ),
        "KL says how far the text has moved from the model that you began with. Much of it for little "
        "reward is the mark of a reward being gamed: read the samples of highest reward.",
        "A larger --beta, a lower --lr, or fewer steps: take the last checkpoint with good samples.",
    )


def sampler_gap(run: RunRecord) -> Sign | None:
    """Sampler and learner disagree on the same tokens by more than rounding."""
    gap = late(run, "sampling/sampling_logp_difference/mean")
    resolved = run.description.get("resolved")
    kind = resolved.get("dtype") if isinstance(resolved, dict) else None
    limit = GAP_NOTE.get(str(kind), max(GAP_NOTE.values()))
    if gap is None or gap < limit:
        return None
    most = run.curve("sampling/sampling_logp_difference/max")[1]
    at_most = f", and up to {number(max(most))}" if most else ""
    return Sign(
        "sampler_gap",
        "worry" if gap >= 2 * limit else "note",
        "Sampler and learner differ",
        f"Their log-probabilities of one token differ by {number(gap)} nats in the mean{at_most} "
        f"({kind or 'number format unknown'}; {number(limit)} is what to expect at most).",
        "What is learnt from was then not quite sampled from the policy that learns.",
        "Try --dtype float32. If it stays, try --no-fast; if that mends it, please report the model.",
    )


def skipped_updates(run: RunRecord) -> Sign | None:
    """Updates left out since loss or gradient were not finite."""
    steps, counts = run.curve("skipped_updates")
    if not counts or not max(counts):
        return None
    skipped, share = max(counts), max(counts) / len(counts)
    first = next(step for step, count in zip(steps, counts, strict=True) if count)
    return Sign(
        "skipped_updates",
        "worry" if share >= SKIPPED_WORRY else "note",
        "Updates were left out",
        f"{count(skipped)} of {count(len(counts))} updates were left out, the first at step "
        f"{count(first)}: loss or gradient was not a finite number.",
        "The weights stayed as they were, so the run is sound. A few come from single odd texts; many "
        "mean that training is unstable.",
        "A lower --lr, some --warmup-steps, or --dtype float32.",
    )


def _against_chance(
    run: RunRecord, key: str, names: tuple[str, str, str], titles: tuple[str, str], what: str, trials: str
) -> Sign | None:
    """A rate whose interval does not lie above one half."""
    rate, low, high = (run.figure(name) for name in names)
    if rate is None or low is None or high is None or low > CHANCE:
        return None
    worse = high < CHANCE
    return Sign(
        key,
        "worry" if worse else "note",
        titles[worse],
        f"{what} {percent(rate)}, 95 % interval {interval(low, high)}.",
        "The whole interval lies below one half: the run has made it worse."
        if worse
        else "The interval has one half in it, which a coin reaches. There may be an effect; this does "
        "not show it.",
        "Look whether chosen and rejected, or the sign of the reward, are swapped."
        if worse
        else f"Measure on more {trials} (the interval halves with four times as many), or train longer.",
    )


def accuracy_is_chance(run: RunRecord) -> Sign | None:
    """Held-out pairs are ranked no better than by a coin."""
    return _against_chance(
        run,
        "accuracy_is_chance",
        ("accuracy_after", "accuracy_low", "accuracy_high"),
        ("Held-out accuracy does not beat a coin", "Held-out accuracy is worse than a coin's"),
        "Held-out pairs that the model ranks as the data do:",
        "held-out prompts",
    )


def ranks_by_length(run: RunRecord) -> Sign | None:
    """A reward model that is no better than preferring what is longer."""
    accuracy, longer = run.figure("accuracy_after"), run.figure("longer_wins")
    rate, low, high = (run.figure(f"accuracy_shorter_{end}") for end in ("after", "low", "high"))
    worse = high is not None and high < CHANCE
    if accuracy is None or longer is None or not (worse or CHANCE < longer >= accuracy):
        return None
    on_shorter = "" if rate is None else (
        f" Where the shorter one is better, it is right in {percent(rate)} of the pairs, 95 % interval "
        f"{interval(low, high)}."
    )  # fmt: skip
    return Sign(
        "ranks_by_length",
        "worry" if worse else "note",
        "The reward follows length",
        f"Of held-out pairs it ranks {percent(accuracy)} as the data do; to prefer the longer completion "
        f"gives {percent(longer)}.{on_shorter}",
        "What it pays for may be length, and a policy that is trained against it will then write longer.",
        "Train on pairs of like lengths, or on more in which the shorter one is better; when you use it, "
        "weigh in a length term (--reward length:WORDS).",
    )


def win_rate_is_chance(run: RunRecord) -> Sign | None:
    """The model does not beat the one it was."""
    return _against_chance(
        run,
        "win_rate_is_chance",
        ("win_rate", "win_rate_low", "win_rate_high"),
        ("No gain over the start is shown", "It loses against the start"),
        "Win rate against the model before:",
        "held-out prompts",
    )


def overfits(run: RunRecord) -> Sign | None:
    """The held-out loss has been lower than it is."""
    steps, losses = run.curve("eval_loss")
    if rounds(run) > 1:  # each begins with a loss of its own
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
        f"From there on, the run learnt its own {unit(run)}s more than what they have in common.",
        f"Fewer epochs, a lower --lr{beta}, or more data; or use the checkpoint nearest to that step.",
    )


SIGNS: tuple[Callable[[RunRecord], Sign | None], ...] = (
    win_rate_is_chance,
    accuracy_is_chance,
    ranks_by_length,
    chosen_falls,
    kl_runs_away,
    length_drift,
    clipped,
    dead_pairs,
    overfits,
    skipped_updates,
    sampler_gap,
)
