"""Format numbers and write sentences for reports."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence

from palate.method import Way
from palate.methods import METHODS
from palate.rundir import RunRecord

MINUS = "\N{MINUS SIGN}"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with `digits` significant digits, a dash for None: `0.307`, `−105`, `1.10e−6`."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 7:
        return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace("-", MINUS)
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}e{int(power)}".replace("-", MINUS)


def count(value: float) -> str:
    """Return a whole number: `1,200`."""
    return f"{round(value):,}"


def signed(value: float, digits: int = 2) -> str:
    """Return a difference with its sign and `digits` decimals: `+0.53`; no sign if it rounds to zero."""
    text = f"{value:+,.{digits}f}".replace("-", MINUS)
    return text if text.strip(f"+{MINUS}0.") else text[1:]


def percent(rate: float | None) -> str:
    """Return a rate in per cent, with a no-break space: `94.0 %`."""
    return "\N{EN DASH}" if rate is None else f"{100 * rate:.1f}\N{NO-BREAK SPACE}%".replace("-", MINUS)


def interval(low: float | None, high: float | None) -> str:
    """Return the 95 % interval of a rate: `[87.5 %, 97.2 %]`; empty if unknown."""
    return "" if low is None or high is None else f"[{percent(low)}, {percent(high)}]"


def duration(seconds: float | None) -> str:
    """Return a duration: `42 s`, `4 min 51 s`, `2 h 05 min`; a dash if it is not known."""
    if seconds is None:
        return "\N{EN DASH}"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60:,} h {minutes % 60:02} min"


def moment(text: str) -> str:
    """Return an ISO 8601 time as `21 November 2026, 14:02`; any other text is returned as it is."""
    try:
        return time.strftime("%d %B %Y, %H:%M", time.strptime(text[:16], "%Y-%m-%dT%H:%M")).lstrip("0")
    except ValueError:
        return text


def ticks(values: Sequence[float]) -> list[str]:
    """Return labels for an axis' rising ticks, with just enough decimals to distinguish them."""
    step = min((b - a for a, b in itertools.pairwise(values)), default=abs(values[0]) if values else 0.0)
    largest = max(map(abs, values), default=0.0)
    if largest >= 1e6 or 0 < step < 1e-4:
        return [number(value, 1 + math.ceil(math.log10(largest / step))) for value in values]
    exact = (d for d in range(8) if all(abs(round(v, d) - v) <= 0.01 * step for v in values))
    decimals = next(exact, 8)
    return [f"{round(value, decimals) + 0.0:,.{decimals}f}".replace("-", MINUS) for value in values]


# ---- Sentences -------------------------------------------------------------------------------------


def unit(run: RunRecord) -> str:
    """Return the noun for the records of a batch, in the singular, such as "pair"."""
    way = _way(run)
    return "pair" if way is None else way.batches_of


def _way(run: RunRecord) -> Way | None:
    """Return the variant of the method that a run used; None for an unknown method."""
    method = METHODS.get(run.method)
    return None if method is None else method.variant(run.config.get("variant"))


def _writes(run: RunRecord) -> bool:
    """Return True if the method trains a policy or is unknown. A reward model cannot generate text."""
    method = METHODS.get(run.method)
    return method is None or "policy" in method.recipe.networks


def what_was_run(run: RunRecord) -> str:
    """Return a sentence with the method, model, data, reward and size of a run."""
    config = run.config
    model = _last_part(config.get("model"))
    adapter = f" (LoRA, rank {config.get('lora_rank')})" if config.get("lora") else " (all weights)"
    way = config.get("variant") or config.get("kind")
    method = f"{run.method} ({way})" if isinstance(way, str) else run.method
    trained = f"{method} trained {model}{adapter if 'lora' in config else ''}" if model else method
    data = f" on {_last_part(config['data'])}" if config.get("data") else ""
    rewards = config.get("reward")
    named = [str(reward) for reward in rewards] if isinstance(rewards, list) else []
    variant = _way(run)
    on_data = variant is not None and variant.learns_from != "prompts"
    aside = on_data or config.get("label") == "implicit"
    reward = f", {'evaluated' if aside else 'rewarded'} by {' + '.join(named)}" if named else ""
    batch = f" of {_several(size, unit(run))}" if (size := run.setting("batch_size")) else ""
    in_rounds = variant is None or "rounds" in variant.config.model_fields
    rounds = (in_rounds and run.setting("rounds")) or 0
    parts = f" in {_several(rounds, 'round')}" if rounds > 1 else ""
    steps = run.status.steps
    length = f": {_several(steps, 'step')}{batch}{parts}" if steps else ""
    return f"{trained}{data}{reward}{length}."


def how_it_ended(run: RunRecord) -> str:
    """Return the state, step and time of a run; for an unfinished run, also the reason and how to resume."""
    status = run.status
    total = f" of {count(status.steps)}" if status.steps else ""
    at = f"at step {count(status.step)}{total}" if status.step else "before the end of the first step"
    took = f" after {duration(status.seconds)}" if status.seconds else ""
    resume = "To resume it from its last checkpoint, repeat the same command (without --overwrite)."
    match status.state:
        case "finished":
            return f"It finished{took}."
        case "running":
            return f"It is running, {at}{took}; run `palate report` again for newer figures."
        case "interrupted":
            return f"It was interrupted {at}{took}. {resume}"
        case "killed":
            return f"It was killed {at}{took}. {resume}"
        case "failed":
            return f"It failed {at}{took}: {(status.reason or 'no reason was recorded').rstrip('. ')}."


def best_figures(run: RunRecord) -> str:
    """Return sentences with the main results of a run; empty if nothing was measured."""
    results = []
    if (rate := run.figure("win_rate")) is not None:
        bounds = interval(run.figure("win_rate_low"), run.figure("win_rate_high"))
        on = f" on {_several(n, 'held-out prompt')}" if (n := run.figure("compared")) else ""
        results.append(f"Its win rate against the model before training is {percent(rate)} {bounds}{on}.")
    if (accuracy := run.figure("accuracy_after")) is not None:
        bounds = interval(run.figure("accuracy_low"), run.figure("accuracy_high"))
        pairs = f" ({_several(n, 'pair')})" if (n := run.figure("held_out_pairs")) else ""
        results.append(f"Its accuracy on held-out pairs is {percent(accuracy)} {bounds}{pairs}.")
    losses = run.figure("loss_before"), run.figure("loss_after")
    if losses[0] is not None and losses[1] is not None:
        on = f" on {_several(n, 'held-out demonstration')}" if (n := run.figure("held_out")) else ""
        results.append(f"The loss changed from {number(losses[0])} to {number(losses[1])}{on}.")
    before, after = run.figure("reward_before"), run.figure("reward_after")
    if before is not None and after is not None:
        results.append(f"Mean reward changed from {number(before)} to {number(after)}.")
    elif (scores := run.curve("objective/scores")[1]) and len(run.rows) > 1:
        first, last = number(scores[0]), number(scores[-1])
        if len(scores) > 1:
            where = "step" if run.fresh else "round"
            results.append(
                f"On fresh samples, mean reward changed from {first} in the first {where} to {last}."
            )
        elif not run.fresh:
            results.append(f"The training samples were drawn once; their mean reward is {first}.")
    return " ".join(" ".join(results).split())


def unmeasured(runs: Sequence[RunRecord]) -> str:
    """Return the end of a sentence that names the flags for held-out measurements; empty if all are set."""
    flags = [
        f"--{name.replace('_', '-')}{why}"
        for name, why in (("eval_data", ""), ("reward", " to compare completions"))
        if any(name in run.config for run in runs) and not any(run.config.get(name) for run in runs)
    ]
    return f"; add {' and '.join(flags)}" if flags else ""


def unsampled(runs: Sequence[RunRecord]) -> str:
    """Return the end of a sentence that explains why finished runs have no samples."""
    if not any(_writes(run) for run in runs):
        return ": a reward model cannot generate text"
    return ": runs save samples only with held-out prompts (--eval-data) and a reward (--reward)"


def _several(n: float, noun: str) -> str:
    return f"{count(n)} {noun}{'' if n == 1 else 's'}"


def _last_part(value: object) -> str:
    """Return the last part of a path or a hub id."""
    return "" if value is None else str(value).rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
