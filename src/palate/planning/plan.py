"""The plan of a run: upper bounds from its configuration and data, expectations from a pilot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from palate.annotate import Annotator, annotator
from palate.config import ModelConfig, RewardConfig, Sampling, tokens_per_pass
from palate.method import Method
from palate.model.codec import Codec
from palate.model.device import resolve
from palate.model.load import load_codec
from palate.planning.counts import Measurement, critics_of, measurements, samples, training
from palate.planning.judging import Asked, Bill, Questions, asked, prices_of
from palate.planning.memory import Bytes, Setup, memory_of
from palate.planning.network import network_of, parallel
from palate.planning.pilot import Pilot, pilot
from palate.planning.reading import PlannedData, read_data
from palate.planning.speed import CHECKPOINTS, Draws, Flops, Seconds, flops_of
from palate.pool.facts import note_for_plans
from palate.run.judging import model_options
from palate.spending import Spending
from palate.types import Prompt

MODELS = ("model:", "ranker:", "local:")
"""Beginnings of rewards and judges that load a model here."""


@dataclass(frozen=True)
class Bound:
    """An amount: at most, and as expected; None if nothing is expected or known."""

    most: float
    expected: float | None


@dataclass(frozen=True)
class Plan:
    """The cost of a run.

    Attributes:
        method: the method's name.
        completions: completions sampled, by part of the run.
        sampled: tokens sampled.
        read: prompt tokens read while sampling.
        learned: tokens in updates.
        training: the method's own bounds.
        measured: the measurements.
        annotating: the annotator's work.
        verdicts, judge_read, judge_written, dollars: of a judge; None without one.
        priced: False if a price is unknown, which then counts 0.
        memory: of one device.
        sharded: the same if the devices share weights and optimizer; None for one device.
        flops: expected, or at most without a pilot.
        seconds: expected; None without a pilot.
        notes: sentences about what the figures leave out.
    """

    method: str
    completions: Mapping[str, int]
    sampled: Bound
    read: Bound
    learned: Bound
    training: Spending
    measured: Sequence[Measurement]
    annotating: Asked
    verdicts: Bound | None
    judge_read: Bound | None
    judge_written: Bound | None
    dollars: Bound | None
    priced: bool
    memory: Bytes
    sharded: Bytes | None
    flops: Flops
    seconds: Seconds | None
    notes: Sequence[str]


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens: mean and longest of prompts, of the data's completions, and of samples."""

    prompt: float
    longest_prompt: int
    given: float
    longest_given: int
    sampled: float | None
    longest_sampled: float
    limit: int


def plan_run(method: Method, cfg: Any, *, count: int = 16, devices: int = 1) -> Plan:
    """Return the plan of a run with this configuration.

    Args:
        method, cfg: the method and its configuration, as for a run.
        count: completions of the pilot; 0 loads no model.
        devices: devices that share a batch.

    Raises:
        PalateError: the data, the model or the judge cannot be used, as in the run.
    """
    codec = load_codec(cfg, head="lm" if method.learner is None else _head(cfg))
    data = read_data(method, cfg, codec)
    spending = training(method, cfg, data.sizes.rows)
    setup = setup_of(method, cfg, spending, data, codec, devices)
    trial = None
    if count:
        rows = min(setup.rows, 64)
        trial = pilot(
            method, cfg, data.prompts, data.records, count, rows=rows, annotate=_free_annotator(cfg)
        )
    return assemble(method, cfg, spending, setup, data, codec, trial)


def assemble(
    method: Method,
    cfg: Any,
    spending: Spending,
    setup: Setup,
    data: PlannedData,
    codec: Codec,
    trial: Pilot | None,
) -> Plan:
    """Return the plan from the bounds of training, the sizes of the model, the data and a pilot."""
    measured = measurements(method, cfg, spending, data.sizes)
    lengths = lengths_of(cfg, data, codec, trial)
    completions = {"training": spending.sampled} | {m.name: m.completions for m in measured if m.completions}
    total, replies = sum(completions.values()), spending.replies * getattr(cfg, "new_prompt_tokens", 0)
    drawn = spending.prompts + sum(m.completions for m in measured)
    sampled = Bound(total * lengths.limit + replies, _times(total, lengths.sampled))
    read = Bound(drawn * lengths.longest_prompt, drawn * lengths.prompt)
    learned = learned_tokens(method, cfg, spending, lengths)
    work = work_of(cfg, spending, measured)
    bill = _bill(cfg, work, data, codec, trial) if work.questions else None
    rank = setup.rank
    scored = spending.referenced + sum(m.scored for m in measured)
    if setup.critics and isinstance(getattr(cfg, "value_clip", None), float):
        scored += 2 * spending.referenced  # the policy itself, and the value function
    scored_tokens = scored * (lengths.prompt / 2 + (lengths.sampled or lengths.given or lengths.limit))
    ways = {
        "read": read.expected or read.most, "sampled": sampled.expected or sampled.most,
        "scored": scored_tokens, "learned": learned.expected or learned.most,
    }  # fmt: skip
    seconds = None
    if trial is not None:
        seconds = seconds_of(cfg, spending, setup, trial, lengths, completions, ways, work, bill)
    return Plan(
        method.name, completions, sampled, read, learned, spending, measured, work,
        verdicts=None if bill is None else bill.verdicts,
        judge_read=None if bill is None else bill.read,
        judge_written=None if bill is None else bill.written,
        dollars=None if bill is None else bill.dollars,
        priced=bill is None or bill.priced,
        memory=memory_of(setup, per_token=None if trial is None else trial.saved),
        sharded=memory_of(setup, sharded=True) if setup.devices > 1 else None,
        flops=flops_of(setup.network, rank=rank, **ways),
        seconds=seconds,
        notes=tuple(_notes(method, cfg, spending, trial, bill)),
    )  # fmt: skip


# ---- Parts -------------------------------------------------------------------------------------------


def lengths_of(cfg: Any, data: PlannedData, codec: Codec, trial: Pilot | None) -> Lengths:
    """Return the lengths of prompts, of completions in the data, and of the pilot's completions."""
    prompts = [r.prompt for r in data.records] if data.records else list(data.prompts)
    sizes = [len(codec.prompt_ids(prompt)) for prompt in prompts] or [0]
    given = [len(c.token_ids) for record in data.records for c in record.completions] or [0]
    own = trial.lengths if trial is not None else []
    limit = cfg.max_new_tokens if isinstance(cfg, Sampling) else 0
    return Lengths(
        fmean(sizes), max(sizes), fmean(given), max(given), fmean(own) if own else None,
        max(own, default=limit), limit,
    )  # fmt: skip


def learned_tokens(method: Method, cfg: Any, spending: Spending, lengths: Lengths) -> Bound:
    """Return the tokens of all updates: each record's prompt once, and its completions."""
    from_data = method.way_of(cfg).learns_from != "prompts"
    records = spending.steps * cfg.batch_size / getattr(cfg, "mini_batches", 1)
    most = max(lengths.longest_given, lengths.limit if spending.sampled else 0)
    if from_data:
        own = lengths.given
        if spending.sampled and lengths.sampled is not None:  # half of each pair is sampled, as in SPIN
            own = (own + lengths.sampled) / 2
        each: float | None = own
    else:
        each = lengths.sampled
    expected = None if each is None else records * lengths.prompt + spending.learned * each
    return Bound(records * lengths.longest_prompt + spending.learned * most, expected)


def work_of(cfg: Any, spending: Spending, measured: Sequence[Measurement]) -> Asked:
    """Return the annotator's work in training and in measurements; `eval_reward` scores the latter."""
    held_out = [group for one in measured for group in one.groups]
    apart = bool(getattr(cfg, "eval_reward", ()))
    own = [*spending.annotations, *([] if apart else held_out)]
    work = asked(own, sum(one.pairs for one in measured), spending.questions, cfg)
    return work + Asked(sum(group.scored for group in held_out)) if apart else work


def setup_of(
    method: Method, cfg: Any, spending: Spending, data: PlannedData, codec: Codec, devices: int
) -> Setup:
    """Return what the memory of a run depends on."""
    device, dtype = resolve(cfg)
    on_cpu = device.type == "cpu"
    can_sample = samples(method, cfg)
    n = max(1, getattr(cfg, "n", 1), getattr(cfg, "candidates", 1))
    prompts = [len(codec.prompt_ids(p)) for p in data.prompts] or [0]
    each_step = cfg.batch_size * n if method.recipe.judged == "each step" else 0
    each_call = max(each_step, spending.early) or math.inf
    calls = spending.sampled or 2 * min(getattr(cfg, "fresh_prompts", 0), data.sizes.fitting)
    network, rows = network_of(cfg), 0
    each_record = max(2, spending.learned // max(1, spending.steps * cfg.batch_size))  # completions
    if can_sample:
        most = cfg.sampling_rows or parallel(network, n, max(prompts) + cfg.max_new_tokens)
        rows = int(min(most, each_call, max(1, calls)))
    longest = max(
        (
            len(codec.prompt_ids(r.prompt)) + sum(len(c.token_ids) for c in r.completions)
            for r in data.records
        ),
        default=max(prompts) + each_record * getattr(cfg, "max_new_tokens", 0),
    )
    budget = tokens_per_pass(cfg.micro_batch_tokens, on_cpu=on_cpu)
    total = cfg.batch_size * longest // devices
    keeps = spending.referenced > 0
    return Setup(
        network, dtype.itemsize, cfg.lora_rank if cfg.lora else None, cfg.masters == "float32",
        cfg.checkpointing, on_cpu, cfg.fast, keeps, critics_of(cfg), asked_models(cfg, dtype.itemsize),
        tokens=min(max(budget, longest), max(total, 1)),
        rows=max(1, rows // devices) if rows else 0,
        slots=max(1, rows // n) if rows else 0,
        longest_prompt=max(prompts),
        new_tokens=getattr(cfg, "max_new_tokens", 0),
        devices=devices,
        each_step=each_step,
    )  # fmt: skip


def asked_models(cfg: Any, size: int) -> int:
    """Return the bytes of models that are only asked and share no weights with the policy."""
    specs = [
        str(s).rpartition("*")[2].strip() for name in ("reward", "eval_reward") for s in _listed(cfg, name)
    ]
    specs += [spec for name in ("judge", "judge_expert") if (spec := getattr(cfg, name, None))]
    specs += list(getattr(cfg, "judge_panel", ()))
    if getattr(cfg, "new_prompts", None) not in (None, "sft"):
        specs.append(f"local:{cfg.new_prompts}")
    names = {spec.partition(":")[2] for spec in specs if spec.startswith(MODELS)}
    total = 0
    for name in names - {cfg.model}:
        model = ModelConfig.model_validate({"model": name, "trust_remote_code": cfg.trust_remote_code})
        total += network_of(model).parameters * size
    return total


def seconds_of(
    cfg: Any,
    spending: Spending,
    setup: Setup,
    trial: Pilot,
    lengths: Lengths,
    completions: Mapping[str, int],
    tokens: Mapping[str, float],
    work: Asked,
    bill: Billed | None,
) -> Seconds:
    """Return the expected time, from the pilot's rates."""
    rates, mean = trial.rates, lengths.sampled or 0.0
    later, sampling = spending.sampled - spending.early, 0.0
    each_of = {"training": setup.each_step or round(later / max(1, later // max(1, setup.rows)))}
    for name, count in {**completions, "training": later, "early": spending.early}.items():
        each = count if name == "early" else each_of.get(name, max(1, count // 2))
        draws = Draws(count, each, mean, lengths.longest_sampled, count * lengths.prompt / max(1, _n(cfg)))
        sampling += draws.seconds(rates, setup.rows or 1)
    learning = tokens["learned"] * rates.update + spending.steps * rates.apply
    if setup.critics:
        learning *= 2
    annotating: float | None = work.scored * rates.score
    if bill is not None:
        specs = (cfg.judge or "", *cfg.judge_panel)
        if any(spec.startswith("server:") for spec in specs):
            annotating = None
        else:
            annotating = (bill.read.expected or 0) * rates.forward
            annotating += (bill.written.expected or 0) * (rates.row + rates.step / max(1, setup.rows))
    return Seconds(
        rates.load, sampling, tokens["scored"] * rates.forward, learning * (1 + CHECKPOINTS), annotating
    )


@dataclass(frozen=True)
class Billed:
    """A judge's bill: verdicts, tokens and dollars."""

    verdicts: Bound
    read: Bound
    written: Bound
    dollars: Bound
    priced: bool


def _bill(cfg: Any, work: Asked, data: PlannedData, codec: Codec, trial: Pilot | None) -> Billed:
    prices = prices_of(cfg)
    questions = Questions(cfg)
    prompts = data.prompts
    longest = max((len(token.encode()) for token in codec.tokenizer.get_vocab()), default=1)
    most = prices.most(work.questions, questions.most_tokens(prompts, cfg.max_new_tokens * longest))
    most = _limited(most, cfg)
    mean = None if trial is None or not trial.groups else mean_question(questions, trial, codec)
    likely = None if mean is None else prices.expected(work.questions, mean)

    def both(name: str) -> Bound:
        return Bound(getattr(most, name), getattr(likely, name, None))

    return Billed(both("verdicts"), both("read"), both("written"), both("dollars"), priced=prices.known)


def mean_question(questions: Questions, trial: Pilot, codec: Codec) -> float:
    """Return the mean tokens of a question about the pilot's completions, in the policy's tokens."""
    pairs = [(g.prompt, c.text) for g in trial.groups for c in g.completions]
    texts = [
        questions.text(prompt, (text, pairs[i - 1][1])) for i, (prompt, text) in enumerate(pairs)
    ]  # two completions of different prompts are as long as two of one
    return fmean(len(codec.prompt_ids(Prompt(text))) for text in texts)


def _limited(bill: Bill, cfg: Any) -> Bill:
    """Return the bill within the configuration's own limits, which the run never exceeds."""
    limited = bill
    if cfg.max_verdicts is not None:
        limited = replace(limited, verdicts=min(limited.verdicts, cfg.max_verdicts))
    if cfg.max_cost is not None:
        limited = replace(limited, dollars=min(limited.dollars, cfg.max_cost))
    return limited


def _free_annotator(cfg: Any) -> Annotator | None:
    """Return the annotator of rewards that compute here; a judge is never asked by a plan."""
    if not isinstance(cfg, RewardConfig) or not cfg.reward:
        return None
    return annotator(cfg.reward, missing_eos_penalty=cfg.annotator_penalty, **model_options(cfg))


def _notes(
    method: Method, cfg: Any, spending: Spending, trial: Pilot | None, bill: Billed | None
) -> list[str]:
    notes = []
    if trial is not None and trial.groups:
        notes.append(
            f"expected lengths are those of {len(trial.lengths)} completions of the model before training; "
            "training may change them"
        )
    if bill is not None and not bill.priced:
        notes.append("the judge's price is unknown and counts 0; give --price-in and --price-out")
    if (
        bill is not None
        and trial is not None
        and any(spec.startswith("server:") for spec in (cfg.judge or "", *cfg.judge_panel))
    ):
        notes.append("the time of the judge's server is not included")
    if bill is not None:
        notes.append(
            "a judge's tokens are bounded by its texts' bytes, so that the bound is far above the "
            "expectation; --max-cost and --max-judge-tokens limit them"
        )
    if getattr(cfg, "pool", None) is not None:
        notes.append(note_for_plans(cfg.pool))
    if spending.replies:
        notes.append("replies with new prompts are bounded by the fewest usable prompts per reply")
    if getattr(cfg, "max_kl", None) is not None:
        notes.append("training may end earlier, at --max-kl")
    return notes


def _head(cfg: Any) -> Any:
    return "lm" if getattr(cfg, "kind", "") == "ranker" else "scalar"


def _listed(cfg: Any, name: str) -> Sequence[Any]:
    return getattr(cfg, name, ()) or ()


def _n(cfg: Any) -> int:
    return int(getattr(cfg, "n", 1))


def _times(count: float, each: float | None) -> float | None:
    return None if each is None else count * each
