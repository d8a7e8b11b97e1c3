"""Measure cost against prompt length and completions per prompt, with and without Palate's fast path.

The work is sampling and one update for 2 prompts with 32 new tokens per completion, forced to full length. An
update is forward, backward and optimizer step on all weights of SmolLM2-135M-Instruct; the loss is the
negative log-likelihood of all completions. `fast` computes each prompt once and shares it among its
completions, `padded` is the same model with --no-fast: transformers' `generate` with its KV cache, and
right-padded batches with the prompt in every row. `fast` also has its own layers, head and sampler, so the
two differ even if there is little to share; the growth of the difference is the result. Each side is a
separate process; the two take turns.

    python benchmarks/scaling.py                    # prints a table and draws docs/scaling.svg
    python benchmarks/scaling.py --lengths 100 400 --completions 2 8 --json

The last line has padded seconds over fast ones at the ends of both axes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import ROOT, Side, arguments, clock, compute_dtype, finish, in_turns, median, prompts, say, serve

PROMPTS, NEW = 2, 32
LENGTHS, COMPLETIONS = (100, 200, 400, 800, 1600), (2, 4, 8, 16)
AT_LENGTH, AT_COMPLETIONS = 400, 4
"""The fixed value of the other axis."""


class NegativeLogLikelihood:
    """The negative log-likelihood of all completions of a prompt."""

    @property
    def needs(self) -> Any:
        """Return the requirements: log-probabilities only."""
        from palate.learn import Needs

        return Needs()

    def __call__(self, outputs: Any, records: Any) -> tuple[Any, dict[str, Any]]:
        """Return the loss of each prompt. (R,)"""
        return -outputs.logps.sum().view(len(records), -1).sum(-1), {}


def worker(kind: str, dtype: str) -> Any:
    """Sample, then train on the samples."""
    from palate.config import LearnerConfig, Sampling
    from palate.learn import Policy
    from palate.quiet import quiet_libraries
    from palate.types import Prompt

    quiet_libraries()
    cfg = LearnerConfig.model_validate(
        {"lora": False, "dtype": dtype, "lr": 1e-9, "masters": "live", "fast": kind == "fast"}
    )
    policy = Policy.load(cfg, total_steps=1000)
    objective = NegativeLogLikelihood()

    def work(length: int, n: int, seed: int = 0) -> dict[str, float]:
        asked = [Prompt(text) for text in prompts(PROMPTS, length)]
        options = Sampling(max_new_tokens=NEW, min_new_tokens=NEW, sampling_rows=PROMPTS * n)
        began = clock()
        groups = policy.snapshot().sample(asked, n, options, seed=seed)
        sampled = clock()
        policy.update(groups, objective)
        return {
            "prompt_tokens": max(len(policy.model.codec.prompt_ids(prompt)) for prompt in asked),
            "sampling_seconds": round(sampled - began, 3),
            "learning_seconds": round(clock() - sampled, 3),
        }

    return work


def measured(sides: list[Side], runs: int, length: int, n: int) -> dict[str, Any]:
    """Return the medians of both sides at one point."""
    say(f"{length} tokens, {n} completions")
    found = in_turns(sides, runs, length=length, n=n)
    stages = ("sampling_seconds", "learning_seconds")
    medians = {name: {key: median(rows, key) for key in stages} for name, rows in found.items()}
    total = {name: sum(stage.values()) for name, stage in medians.items()}
    return {
        "prompt_tokens": found["fast"][0]["prompt_tokens"],
        "completions": n,
        **medians,
        "rows": found,
        "padded_over_fast": round(total["padded"] / total["fast"], 2),
    }


def draw(by_length: list[dict[str, Any]], by_completions: list[dict[str, Any]], file: Path) -> None:
    """Draw the seconds of both stages over both axes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    points = (
        (by_length, "prompt_tokens", "prompt tokens"),
        (by_completions, "completions", "completions a prompt"),
    )
    for axis, (rows, key, label) in zip(axes, points, strict=True):
        for side, colour in (("padded", "tab:red"), ("fast", "tab:blue")):
            for stage, style in (("sampling", "--"), ("learning", "-")):
                axis.plot(
                    [row[key] for row in rows],
                    [row[side][f"{stage}_seconds"] for row in rows],
                    style, color=colour, marker="o", markersize=3, label=f"{stage}, {side}",
                )  # fmt: skip
        axis.set_xlabel(label)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    given = arguments(
        __doc__ or "",
        dtype={"default": "auto", "choices": ["auto", "bfloat16", "float32"]},
        lengths={"nargs": "+", "type": int, "default": list(LENGTHS), "help": "prompt tokens, about"},
        completions={"nargs": "+", "type": int, "default": list(COMPLETIONS), "help": "of each prompt"},
        plot={"type": Path, "help": "where the curves go; docs/scaling.svg, if all points are measured"},
    )
    if given.worker:
        serve(worker(*given.worker))
        return
    dtype = compute_dtype(given.dtype)
    sides = [Side(kind, "scaling.py", kind, dtype) for kind in ("padded", "fast")]
    by_length = [measured(sides, given.runs, length, AT_COMPLETIONS) for length in given.lengths]
    by_completions = [measured(sides, given.runs, AT_LENGTH, n) for n in given.completions]
    for side in sides:
        side.close()
    whole = (*given.lengths,) == LENGTHS and (*given.completions,) == COMPLETIONS
    if given.plot or whole:
        draw(by_length, by_completions, given.plot or ROOT / "docs" / "scaling.svg")
    detail = {
        "dtype": dtype,
        "prompts": PROMPTS,
        "new_tokens": NEW,
        "runs": given.runs,
        "by_length": by_length,
    }
    last = {
        f"{key}_{row[key]}": row["padded_over_fast"]
        for key, rows in (("prompt_tokens", by_length), ("completions", by_completions))
        for row in (rows[0], rows[-1])
    }
    finish(given, {**detail, "by_length": by_length, "by_completions": by_completions}, last)


if __name__ == "__main__":
    main()
