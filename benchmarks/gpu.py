"""Check and measure Palate on one GPU, in less than ten minutes on an H100 or H200.

    python benchmarks/gpu.py --output gpu.json --table gpu.md
    python benchmarks/gpu.py --device cpu --tiny

Each part prints one line and is independent of the others: a part that fails is a row with its error. Parts:

    flex      the flex attention kernel against attention segment by segment: equality, time forward and back
    packed    log-probabilities and one update: packed against padded batches, in float32 and in bfloat16
    masters   updates of bfloat16 weights with float32 masters against updates of float32 weights
    sampler   greedy completions against `generate` of transformers, and tokens per second of both
    memory    peak memory and seconds of a DPO step, beside the same loss on plain transformers

The figures of `--device cpu --tiny` say that the script works, not more.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("PALATE_FLEX", "1")  # the kernel is off by default; this script is there to try it

import torch
from common import anonymous_memory, arguments, finish, say
from torch.nn.functional import logsigmoid

from palate.config import Sampling
from palate.learn import CachedReference, Pairwise, Policy
from palate.losses import PAIR_LOSSES
from palate.model.fast import flex
from palate.model.fast.attention import Attention
from palate.model.fast.segments import Segments
from palate.testing import tiny_model, tiny_policy
from palate.types import Completion, Pair, Prompt

Figures = dict[str, float]


@dataclass(frozen=True)
class Setting:
    """The model and the sizes of all parts."""

    device: str
    model: str
    pairs: int
    prompt: int
    answer: int
    repeats: int

    def policy(self, dtype: str, *, fast: bool = True, **options: Any) -> Policy:
        """Load the model."""
        given = {"dtype": dtype, "device": self.device, "fast": fast, "lora": False, **options}
        return tiny_policy(Path(self.model), lr=1e-4, **given)

    def records(self, policy: Policy) -> list[Pair]:
        """Return random pairs; their lengths differ."""
        draw = torch.Generator().manual_seed(0)
        codec = policy.model.codec
        most = min(250, len(codec.tokenizer) - 1)

        def ids(count: int) -> tuple[int, ...]:
            tokens = torch.randint(10, most, (count,), generator=draw).tolist()
            return tuple(i for i in tokens if i not in codec.end_ids) or (10,)

        made = []
        for i in range(self.pairs):
            own, ends = ids(self.prompt + i % 7), (self.answer, self.answer // 2 + i % 5)
            answers = [Completion(f"{i} {n}", ids(n + 1)) for n in ends]
            made.append(Pair(Prompt(f"prompt {i}", token_ids=own), answers[0], answers[1]))
        return made


def synchronised(device: str) -> float:
    """Return the time when all work given to the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable[[], object], setting: Setting) -> float:
    """Return the median time of the work, after one run to warm up."""
    work()
    times = []
    for _ in range(setting.repeats):
        began = synchronised(setting.device)
        work()
        times.append(synchronised(setting.device) - began)
    return sorted(times)[len(times) // 2]


@contextmanager
def peak(setting: Setting) -> Iterator[Figures]:
    """Measure the most memory of the work inside, in GB: of the GPU, or of this process on a CPU."""
    held: Figures = {}
    if setting.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    yield held
    most = torch.cuda.max_memory_allocated() if setting.device == "cuda" else anonymous_memory()
    held["gb"] = round(most / 1e9, 3)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the distance of two tensors, relative to the norm of the second."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).norm() / other.norm().clamp_min(1e-30))


# ---- Parts -----------------------------------------------------------------------------------------


def flex_kernel(setting: Setting) -> Figures:
    """Compare the kernel with attention segment by segment."""
    if setting.device != "cuda":
        flex.compiled = lambda: flex.flex_attention  # type: ignore[assignment] - uncompiled
    heads, kv_heads, size = (16, 4, 64) if setting.device == "cuda" else (4, 2, 16)
    shape = [(setting.prompt + i, (setting.answer, setting.answer // 2)) for i in range(setting.pairs)]
    length, how = sum(p + sum(c) for p, c in shape), Attention(size**-0.5, None, None)
    dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
    learns = setting.device == "cuda"  # on a CPU the kernel has no gradient
    given = [
        torch.randn(1, n, length, size, device=setting.device, dtype=dtype, requires_grad=learns)
        for n in (heads, kv_heads, kv_heads)
    ]

    def run(way: Any) -> list[torch.Tensor]:
        output = way.attend(*given, how)
        gradients = torch.autograd.grad(output.float().square().sum(), given) if learns else ()
        return [output, *gradients]

    ways = {"kernel": flex.Blocks(shape), "segments": Segments(shape)}
    results = {name: run(way) for name, way in ways.items()}
    figures = {
        "distance": max(distance(*both) for both in zip(*results.values(), strict=True)),
        "tokens": float(length),
    }
    if setting.device == "cuda":
        figures["trusted"] = float(flex.trusted(given[0], given[1], how))
    for name, way in ways.items():
        figures[f"{name}_ms"] = 1e3 * seconds(lambda way=way: run(way), setting)
    return figures


def packed(setting: Setting) -> Figures:
    """Compare packed rows with padded batches."""
    figures: Figures = {}
    for dtype in ("float32", "bfloat16"):
        values = []
        for fast in (True, False):
            policy = setting.policy(dtype, fast=fast)
            records = setting.records(policy)
            values.append(policy.logps(records).values.float())
            figures[f"{dtype}_{'packed' if fast else 'padded'}_ms"] = 1e3 * seconds(
                lambda p=policy, r=records: p.logps(r), setting
            )
        figures[f"{dtype}_distance"] = distance(*values)
    return figures


def dpo_step(policy: Policy, records: Sequence[Pair]) -> Callable[[], float]:
    """Return a function that takes one step and returns its loss."""
    objective = Pairwise(PAIR_LOSSES["dpo"], 0.1, CachedReference(policy.snapshot()))
    return lambda: float(policy.update(records, objective)["loss"])


def masters(setting: Setting) -> Figures:
    """Compare three updates in bfloat16, whose small steps the masters keep, with those in float32."""
    figures: Figures = {}
    for dtype in ("float32", "bfloat16"):
        policy = setting.policy(dtype)
        step = dpo_step(policy, setting.records(policy))
        figures[f"{dtype}_first_loss"], _, figures[f"{dtype}_third_loss"] = step(), step(), step()
    figures["third_loss_difference"] = abs(figures["bfloat16_third_loss"] - figures["float32_third_loss"])
    return figures


def sampler(setting: Setting) -> Figures:
    """Compare greedy completions and speed with `generate`."""
    figures: Figures = {}
    policy = setting.policy("float32")
    prompts = [Prompt(f"prompt {i} " + "word " * (i % 4)) for i in range(setting.pairs)]
    count = setting.answer
    sampling = Sampling.model_validate({"max_new_tokens": count, "temperature": 1.0, "top_k": 1})
    groups = policy.snapshot().sample(prompts, 1, sampling, seed=0)
    network, codec = policy.model.network, policy.model.codec
    same = total = 0
    for group in groups:
        ids = torch.tensor([codec.prompt_ids(group.prompt)], device=setting.device)
        with torch.no_grad():
            made = network.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                eos_token_id=sorted(codec.end_ids), pad_token_id=codec.end_id,
            )  # fmt: skip
        theirs = made[0, ids.shape[1] :].tolist()
        same += list(group.completions[0].token_ids) == theirs[: len(group.completions[0].token_ids)]
        total += len(theirs)
    figures["equal_share"] = same / len(groups)
    free = Sampling.model_validate({"max_new_tokens": count})
    for dtype in ("float32", "bfloat16"):
        policy = setting.policy(dtype)
        seeds = iter(range(1000))
        tokens: list[int] = []

        def sample(policy: Policy = policy, seeds: Any = seeds, tokens: list[int] = tokens) -> None:
            drawn = policy.snapshot().sample(prompts, 4, free, seed=next(seeds))
            tokens.append(sum(len(c.token_ids) for group in drawn for c in group.completions))

        took = seconds(sample, setting)
        figures[f"{dtype}_tokens_per_second"] = sorted(tokens)[len(tokens) // 2] / took
    return figures


def memory(setting: Setting) -> Figures:
    """Measure a DPO step, and the same loss with plain transformers in the same number format."""
    figures: Figures = {}
    policy = setting.policy("bfloat16")
    records = setting.records(policy)
    with peak(setting) as held:
        figures["palate_seconds"] = seconds(dpo_step(policy, records), setting)
    figures["palate_gb"] = held["gb"]
    del policy  # a GPU has room for the next one only then
    if setting.device == "cuda":
        torch.cuda.empty_cache()
    network = setting.policy("bfloat16", fast=False).model.network
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6)
    rows = [(*r.prompt.token_ids, *c.token_ids) for r in records for c in r.completions if r.prompt.token_ids]
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=setting.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=setting.device)

    def plain() -> None:
        logits = network(ids, attention_mask=mask).logits[:, :-1].float()
        logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        sums = (logps * mask[:, 1:]).sum(-1).view(-1, 2)
        (-logsigmoid(0.1 * (sums[:, 0] - sums[:, 1])).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    with peak(setting) as held:
        figures["transformers_seconds"] = seconds(plain, setting)
    figures["transformers_gb"] = held["gb"]
    return figures


FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""Errors of a part that become a row of the table; a kernel may not compile, memory may be full."""

PARTS: Mapping[str, Callable[[Setting], Figures]] = {
    "flex": flex_kernel, "packed": packed, "masters": masters, "sampler": sampler, "memory": memory,
}  # fmt: skip


def table(result: Mapping[str, Any]) -> str:
    """Return all figures as a Markdown table."""
    lines = ["| part | figure | value |", "|---|---|---|"]
    for part, figures in result["parts"].items():
        if "error" in figures:
            lines.append(f"| {part} | error | {figures['error']} |".replace("\n", " "))
        else:
            lines += [f"| {part} | {name} | {value:.4g} |" for name, value in figures.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all parts."""
    given = arguments(
        str(__doc__),
        device={"choices": ["cuda", "cpu"], "default": "cuda"},
        model={"default": "smollm2"},
        tiny={"action": "store_true", "help": "a tiny model and small sizes"},
        table={"type": Path, "help": "also write a Markdown table to this file"},
        parts={"nargs": "+", "choices": list(PARTS), "default": list(PARTS)},
    )
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU; expected one, or give --device cpu --tiny")
    with tempfile.TemporaryDirectory() as place:
        if given.tiny:
            model = tiny_model(Path(place) / "model", chat=True)
            setting = Setting(given.device, model, pairs=4, prompt=20, answer=12, repeats=1)
        else:
            setting = Setting(given.device, given.model, pairs=16, prompt=400, answer=128, repeats=5)
        results: dict[str, Figures | dict[str, str]] = {}
        for part in given.parts:
            began = time.perf_counter()
            try:
                results[part] = PARTS[part](setting)
            except FAILURES as error:
                results[part] = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
            say(f"{part}: {time.perf_counter() - began:.0f} s {json.dumps(results[part])}")
    failed = sum("error" in figures for figures in results.values())
    detail = {"device": given.device, "tiny": given.tiny, "parts": results}
    if given.table is not None:
        given.table.write_text(table(detail))
    finish(given, detail, {"parts": float(len(results)), "failed": float(failed)})
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
