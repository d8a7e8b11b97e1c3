"""The methods that fit what a user has, best first, and what the others miss.

Reasons come from three sources: the declared recipes, the declared spending, and a measured comparison of
methods at equal cost (`measured.json`, written by experiments/measured.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from pydantic import ValidationError

from palate.config import JudgeConfig, ModelConfig, RewardConfig, Sampling, tokens_per_pass
from palate.errors import ConfigError
from palate.method import Method, Way
from palate.methods import METHODS
from palate.model.device import resolve
from palate.planning.counts import critics_of, is_annotated
from palate.planning.judging import Questions, asked
from palate.planning.memory import Setup, memory_of
from palate.planning.network import Network, network_of, parallel
from palate.planning.options import ChooseOptions
from palate.planning.speed import CHUNK, Draws, Rates
from palate.spending import Rows, Spending
from palate.types import Prompt

BYTES_PER_TOKEN = 4
"""Mean bytes of a token of the judge's question."""

Annotator = str
"""`reward`, `judge`, `own` (the method brings its judge), `trained` (a reward model from the user's pairs),
or `none`."""

IMPLIED: Mapping[str, tuple[str, ...]] = {
    "prompts": ("prompts", "pairs", "demonstrations", "ranks"),
    "pairs": ("pairs", "ranks"),
    "demonstrations": ("demonstrations", "pairs", "ranks"),
}
"""Kinds of data by the assets that contain them, the asset itself first."""


@dataclass(frozen=True)
class Choice:
    """A method for a user.

    Attributes:
        name, summary: of the method.
        missing: what the user lacks; empty if the method fits.
        reasons_for, reasons_against: in plain words.
        commands: what to type, in order.
        win_rate: measured share of held-out prompts won against the model before training; None if it was not
            measured.
        memory: gigabytes of a device.
        dollars: for the judge; None if its price is not given.
        hours: on this machine; None if nothing was timed.
    """

    name: str
    summary: str
    missing: tuple[str, ...]
    reasons_for: tuple[str, ...] = ()
    reasons_against: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    win_rate: float | None = None
    memory: float | None = None
    dollars: float | None = None
    hours: float | None = None


@dataclass(frozen=True)
class Case:
    """One way to run a method with one source of labels, and its cost."""

    method: Method
    cfg: Any
    way: Way
    source: str
    annotator: Annotator
    spending: Spending
    memory: float
    dollars: float
    hours: float | None


def choose(options: ChooseOptions, rates: Rates | None = None) -> list[Choice]:
    """Return a choice for each method that trains a policy: those that fit first, best first.

    Args:
        options: what the user has.
        rates: of this machine; they are measured if `hours` is given and they are not.

    Raises:
        ModelError: the model cannot be used.
    """
    values = {"model": options.model, "lora": options.lora, "dtype": options.dtype}
    network = network_of(ModelConfig.model_validate(values))
    if options.hours is not None and rates is None:
        rates = measured_rates(options)
    choices = [_choice(m, options, network, rates) for m in METHODS.values() if m.learner is None]
    return sorted(choices, key=lambda c: (bool(c.missing), -(c.win_rate or 0.5), c.name))


def measured_rates(options: ChooseOptions) -> Rates:
    """Return the rates of the model on this machine, from a few completions of built-in prompts."""
    from palate.model.load import load_codec
    from palate.planning.pilot import pilot
    from palate.planning.reading import read_data

    method = METHODS["oaif"]
    given = {"data": "everyday", "reward": "length:40", "limit": 64, "max_new_tokens": options.max_new_tokens}
    shared = {"model": options.model, "lora": options.lora, "dtype": options.dtype}
    cfg: Any = method.configure({**given, **shared})
    data = read_data(method, cfg, load_codec(cfg))
    return pilot(method, cfg, data.prompts, (), 16, rows=32).rates


def evidence(method: str, case_annotator: Annotator) -> Mapping[str, Any] | None:
    """Return the measured row of a method that fits the source of its labels; None without one."""
    order = {"trained": ("model",), "none": ("data",)}.get(case_annotator, ("gold", "model", "data"))
    rows = {row["labels"]: row for row in _measured() if row["method"] == method}
    return next((rows[labels] for labels in order if labels in rows), None)


@cache
def _measured() -> Sequence[Mapping[str, Any]]:
    text = resources.files("palate.planning").joinpath("measured.json").read_text(encoding="utf-8")
    rows: Sequence[Mapping[str, Any]] = json.loads(text)
    return rows


# ---- One method ------------------------------------------------------------------------------------


def _choice(method: Method, options: ChooseOptions, network: Network, rates: Rates | None) -> Choice:
    """Return the best fitting case of a method, or what its nearest case misses."""
    cases = list(_cases(method, options, network, rates))
    lacking: list[tuple[str, ...]] = []
    fitting: list[Case] = []
    for case in cases:
        over = tuple(_over(case, options))
        if over:
            lacking.append(over)
        else:
            fitting.append(case)
    if not fitting:
        missing = min(lacking, key=len) if lacking else (_needs(method),)
        return Choice(method.name, method.summary, missing)
    best = max(fitting, key=lambda case: (_rate(case) or 0.5, case.annotator in ("reward", "none")))
    row = evidence(method.name, best.annotator)
    return Choice(
        method.name, method.summary, (), tuple(_for(best, row, options)), tuple(_against(best, row)),
        tuple(_commands(best, options)), _rate(best), round(best.memory, 2),
        None if best.annotator == "judge" and not options.priced else round(best.dollars, 2),
        None if best.hours is None else round(best.hours, 2),
    )  # fmt: skip


def _cases(method: Method, options: ChooseOptions, network: Network, rates: Rates | None) -> Iterator[Case]:
    """Yield the cases of a method whose data and annotator the user has."""
    counts = options.counts
    for way in method.ways:
        source = next((name for name in IMPLIED[way.learns_from] if name in counts), None)
        if source is None:
            continue
        for annotator, values in _annotators(way, counts):
            given = {"data": "DATA", "model": options.model, "lora": options.lora, "dtype": options.dtype}
            if way.variants:
                given["variant"] = way.config.model_fields["variant"].default
            if issubclass(way.config, Sampling):
                given["max_new_tokens"] = options.max_new_tokens
            try:
                cfg: Any = method.configure({**given, **values})
            except (ConfigError, ValidationError):
                continue  # the method cannot use this annotator
            if way.learns_from == "prompts" and not (is_annotated(cfg) or annotator == "none"):
                continue
            rows = Rows(counts[source], counts[source])
            assert way.spends is not None
            spending = way.spends(cfg, rows)
            dollars = _dollars(cfg, spending, options) if annotator == "judge" else 0.0
            memory = _memory(cfg, spending, options, network, annotator) / 1e9
            hours = None if rates is None else _hours(cfg, spending, options, network, rates)
            yield Case(method, cfg, way, source, annotator, spending, memory, dollars, hours)


def _annotators(way: Way, counts: Mapping[str, int]) -> Iterator[tuple[Annotator, dict[str, Any]]]:
    """Yield the annotators that the user has for a way, with their settings."""
    if way.learns_from != "prompts":
        yield "none", {}
        return
    if not issubclass(way.config, RewardConfig):
        return
    yield "own", {}
    if "reward" in counts:
        yield "reward", {"reward": "length:40"}
    if "judge" in counts:
        yield "judge", {"judge": "local:JUDGE"}
    if "pairs" in counts or "ranks" in counts:
        yield "trained", {"reward": "length:40"}


def _needs(method: Method) -> str:
    """Return what the method's ways learn from, with their annotators."""
    parts = []
    for way in method.ways:
        needs: str = way.learns_from
        if way.learns_from == "prompts" and not _judges_itself(method, way):
            needs += " with " + " or ".join(_takes(method, way))
        parts.append(needs)
    return f"needs {', or '.join(dict.fromkeys(parts))}"


def _judges_itself(method: Method, way: Way) -> bool:
    """Return True if the way needs no annotator."""
    variant = {"variant": way.variants[0]} if way.variants else {}
    try:
        return is_annotated(method.configure({"data": "DATA", **variant}))
    except (ConfigError, ValidationError):
        return False


def _takes(method: Method, way: Way) -> list[str]:
    taken = []
    for name, values in (("a reward", {"reward": "length:40"}), ("a judge", {"judge": "local:JUDGE"})):
        variant = {"variant": way.variants[0]} if way.variants else {}
        try:
            method.configure({"data": "DATA", **variant, **values})
        except (ConfigError, ValidationError):
            continue
        taken.append(name)
    return taken or ["its own judge"]


def _over(case: Case, options: ChooseOptions) -> Iterator[str]:
    """Yield the limits that a case exceeds."""
    if options.memory is not None and case.memory > options.memory:
        yield f"needs about {case.memory:.1f} GB of memory, you have {options.memory:g}"
    if options.money is not None and case.dollars > options.money:
        yield f"the judge costs up to {case.dollars:,.0f} dollars, you have {options.money:g}"
    if options.hours is not None and case.hours is not None and case.hours > options.hours:
        yield f"takes about {case.hours:.1f} hours here, you have {options.hours:g}"


# ---- Costs -----------------------------------------------------------------------------------------


def _memory(
    cfg: Any, spending: Spending, options: ChooseOptions, network: Network, annotator: Annotator
) -> int:
    device, dtype = resolve(cfg)
    on_cpu = device.type == "cpu"
    n = max(1, getattr(cfg, "n", 1))
    new = getattr(cfg, "max_new_tokens", 0)
    rows = min(rows_of(cfg, network, options), spending.sampled)
    longest = options.prompt_tokens + 2 * options.max_new_tokens
    others = network.parameters * dtype.itemsize if annotator == "trained" else 0
    setup = Setup(
        network, dtype.itemsize, cfg.lora_rank if cfg.lora else None, True, cfg.checkpointing, on_cpu,
        cfg.fast, spending.referenced > 0, critics_of(cfg), others,
        tokens=max(tokens_per_pass(None, on_cpu=on_cpu), longest), rows=rows,
        slots=max(1, rows // n) if rows else 0, longest_prompt=options.prompt_tokens, new_tokens=new,
        devices=options.devices,
    )  # fmt: skip
    whole = memory_of(setup).peak
    return min(whole, memory_of(setup, sharded=True).peak) if options.devices > 1 else whole


def question_tokens(cfg: JudgeConfig, prompt: int, completion: int) -> float:
    """Return the tokens of a question about completions of a given length, from the template's length."""
    questions = Questions(cfg)
    empty = len(questions.text(Prompt("?"), ("", "")).encode()) / BYTES_PER_TOKEN
    return empty + prompt + (1 + questions.compares) * completion


def _dollars(cfg: Any, spending: Spending, options: ChooseOptions) -> float:
    work = asked(spending.annotations, cfg.probe_pairs, spending.questions, cfg)
    read = question_tokens(cfg, options.prompt_tokens, options.max_new_tokens)
    repeats = cfg.judge_samples if cfg.judge_mode == "rubric" else 1
    written = 256 if cfg.judge_mode == "rubric" else 1
    each = read * options.price_in + written * options.price_out
    return work.questions * repeats * each / 1e6


def rows_of(cfg: Any, network: Network, options: ChooseOptions) -> int:
    """Return the number of completions sampled in parallel."""
    tokens = options.prompt_tokens + options.max_new_tokens
    return cfg.sampling_rows or parallel(network, max(1, getattr(cfg, "n", 1)), tokens)


def _hours(cfg: Any, spending: Spending, options: ChooseOptions, network: Network, rates: Rates) -> float:
    new = options.max_new_tokens
    rows = rows_of(cfg, network, options)
    draws = Draws(spending.sampled, CHUNK * rows, new, new, spending.prompts * options.prompt_tokens)
    learned = spending.learned * (new + options.prompt_tokens / 2)
    scored = spending.referenced * (new + options.prompt_tokens / 2)
    seconds = rates.load + draws.seconds(rates, rows) + learned * rates.update + scored * rates.forward
    return (seconds + spending.steps * rates.apply) / 3600


# ---- Words -----------------------------------------------------------------------------------------


def _rate(case: Case) -> float | None:
    row = evidence(case.method.name, case.annotator)
    return None if row is None else float(row["win_rate"])


def _for(case: Case, row: Mapping[str, Any] | None, options: ChooseOptions) -> Iterator[str]:
    cells = case.method.recipe.cells
    if row is not None:
        seeds = f"{row['seeds']} seed{'s' if row['seeds'] > 1 else ''}"
        yield (
            f"won {row['win_rate']:.2f} [{row['low']:.2f}, {row['high']:.2f}] against the model before "
            f"training in the comparison at equal cost ({seeds}), {row['kl']:.1f} nats away from it"
        )
    if case.spending.sampled and cells.unbiased_data == "yes":
        yield "learns from completions of the policy in training"
    if case.spending.sampled and cells.online_feedback == "yes":
        yield "gets feedback on new completions during training"
    if not case.spending.sampled:
        yield "samples nothing in training, so it is cheap"
    if case.annotator == "own":
        yield "needs no annotator: the policy judges itself"
    yield _costs(case, options)


def _costs(case: Case, options: ChooseOptions) -> str:
    parts = [f"about {case.memory:.1f} GB" + (f" of {options.memory:g}" if options.memory else "")]
    if case.annotator == "judge" and not options.priced:
        parts.append("and the judge, whose price is not given")
    elif case.annotator == "judge":
        limit = "" if options.money is None else f" of {options.money:g}"
        parts.append(f"{case.dollars:,.2f}{limit} dollars for the judge")
    if case.hours is not None:
        parts.append(
            f"about {case.hours:.1f}" + (f" of {options.hours:g} hours" if options.hours else " hours")
        )
    return "costs " + ", ".join(parts)


def _against(case: Case, row: Mapping[str, Any] | None) -> Iterator[str]:
    cells = case.method.recipe.cells
    if row is None:
        yield "not measured in the comparison at equal cost"
    elif row["low"] <= 0.5:
        yield "the comparison at equal cost does not show that it improves the model"
    if not case.spending.sampled:
        yield "its completions come from other sources and do not follow the policy"
    elif cells.online_feedback == "no":
        yield "labels its completions once, before training"
    if case.annotator == "trained":
        yield "a reward model must be trained on your pairs first"
    if case.source != IMPLIED[case.way.learns_from][0]:
        yield f"uses your {case.source} as {case.way.learns_from}"
    if case.spending.sampled:
        yield f"samples up to {case.spending.sampled:,} completions"
    if len(case.method.recipe.networks) > 2:
        yield f"trains or keeps {len(case.method.recipe.networks)} models"


def _commands(case: Case, options: ChooseOptions) -> Iterator[str]:
    data = f"{case.source}.jsonl"
    if case.annotator == "trained":
        yield f"palate run reward-model --data {data} --output runs/reward"
    words = ["palate run", case.method.name, "--data", data]
    if case.way.variants and case.way != case.method.ways[0]:
        words += ["--variant", case.cfg.variant]
    if case.way.learns_from == "demonstrations" and case.source == "pairs":
        words += ["--map", "completion=chosen"]
    by = {"reward": "--reward REWARD", "judge": "--judge JUDGE", "trained": "--reward model:runs/reward"}
    words += [by[case.annotator]] if case.annotator in by else []
    if case.annotator == "judge" and options.money is not None:
        words += ["--max-cost", f"{options.money:g}"]
    if options.model != "smollm2":
        words += ["--model", options.model]
    words += [] if options.lora else ["--no-lora"]
    yield " ".join(words)
