"""New prompts, written by a model after examples.

Yuan et al. 2024, arXiv:2401.10020, write them in the way of Self-Instruct (Wang et al. 2022).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from palate.config import Sampling
from palate.errors import RunError
from palate.making.filters import Left, PromptFilter
from palate.memory import key_of
from palate.model import Snapshot
from palate.types import Prompt

TOGETHER = 16
"""Number of replies that are sampled together; the next ones also see the prompts kept so far."""

BARREN = 8
"""Number of times in a row that no prompt may be kept before the maker gives up."""

REQUEST = (
    "Here are requests that different people sent to an assistant. Add further requests to the list: other "
    "people, other subjects, other kinds of request. Number them."
)

_NUMBERED = re.compile(r"^\s*(\d{1,4})\s*(?:\)|[.:](?!\d))\s*", re.MULTILINE)
"""The number of an item at the beginning of a line; the time 12:30 is none."""


@dataclass(frozen=True)
class Written:
    """New prompts, and the number of sampled replies that they come from."""

    prompts: tuple[Prompt, ...]
    replies: int


def write_prompts(
    writer: Snapshot,
    seeds: Sequence[str],
    count: int,
    sieve: PromptFilter,
    sampling: Sampling,
    *,
    seed: int,
    shots: int = 6,
    own_shots: int = 2,
    kept: list[str] | None = None,
) -> Written:
    """Let a model write new prompts, and keep those that pass the filter.

    A request shows a numbered list of `shots` seeds and up to `own_shots` kept prompts in random order, and
    the model continues the list. With a memory in the snapshot, an interrupted call with the same arguments
    does not sample again.

    Args:
        writer: the model.
        seeds: prompts to show; the filter should exclude them.
        count: the number of prompts to write.
        sieve: keeps or leaves out, and counts.
        sampling: the options.
        seed: the seed of shots and samples.
        kept: an empty list, to which the prompts are added as they are kept, so that they remain after an
            error.

    Raises:
        RunError: the model writes no prompt that passes.
    """
    kept = [] if kept is None else kept
    replies = barren = 0
    while len(kept) < count:
        rng = Random(f"{seed} {replies}")
        batch = [_request(seeds, kept, rng, shots, own_shots) for _ in range(TOGETHER)]
        groups = writer.sample(batch, 1, sampling, seed=int(key_of(seed, replies)[:8], 16), purpose="prompt")
        replies += len(groups)
        before = len(kept)
        for group in groups:
            (reply,) = group.completions
            number = _number(group.prompt)
            for text in listed(reply.text, number, truncated=reply.finish == "length", sieve=sieve):
                if len(kept) < count and sieve.takes(text):
                    kept.append(text)
        barren = barren + 1 if len(kept) == before else 0
        if barren == BARREN:
            reasons = ", ".join(f"{number} {reason}" for reason, number in sieve.left_out.most_common())
            raise RunError(
                f"the model wrote no usable prompt in {BARREN * TOGETHER} replies in a row, after "
                f"{len(kept)} of {count} (left out: {reasons or 'nothing'}); ask for fewer, give more and "
                "more varied seed prompts, raise the temperature, or use a larger model"
            )
    return Written(tuple(Prompt(text, where=f"written {i}") for i, text in enumerate(kept, 1)), replies)


def most_replies(count: int) -> int:
    """Return the most replies that `write_prompts` samples for so many prompts.

    At most `BARREN - 1` batches without a prompt come before each batch with at least one.
    """
    return count * BARREN * TOGETHER


def listed(reply: str, number: int, *, truncated: bool, sieve: PromptFilter | None = None) -> list[str]:
    """Return the items of a reply that continues a numbered list; white space within an item is collapsed.

    Models add remarks. So words before a list that starts again are no item. Where a list ends, its last item
    ends with its first paragraph, unless that ends with a colon. The last item of a truncated reply is left
    out, and counted in the filter, and so is an empty reply.

    Args:
        reply: the reply.
        number: the number of its first item, which the request has begun.
        truncated: the reply ended at the token limit.
        sieve: counts what is left out.
    """
    texts = _NUMBERED.split(reply)[::2]
    numbers = [number, *map(int, _NUMBERED.split(reply)[1::2])]
    items = []
    for i, text in enumerate(texts):
        last = i + 1 == len(texts)
        if not last and numbers[i + 1] > numbers[i]:
            items.append(" ".join(text.split()))
        elif last or i > 0:
            items.append(" ".join(_first_paragraph(text).split()))
    if truncated and items:
        items.pop()
        if sieve is not None:
            sieve.left_out[Left.TRUNCATED] += 1
    elif sieve is not None and not any(items):
        sieve.left_out[Left.EMPTY] += 1
    return [item for item in items if item]


def _first_paragraph(text: str) -> str:
    first, *_ = re.split(r"\n\s*\n", text.strip(), maxsplit=1)
    return text if first.endswith((":", "：")) else first


def _number(request: Prompt) -> int:
    """Return the number of the item that a request has begun; each item before it is one line."""
    begun = request.content[-1]
    assert not isinstance(begun, str), "a request has turns"
    return str(begun["content"]).count("\n") + 1


def _request(seeds: Sequence[str], kept: Sequence[str], rng: Random, shots: int, own_shots: int) -> Prompt:
    """Return a prompt whose answer is begun: a numbered list of examples, up to the next number."""
    own = _drawn(kept, own_shots, rng)
    shown = _drawn(seeds, shots + own_shots - len(own), rng) + own
    shown = _drawn(shown, len(shown), rng)
    items = "\n".join(f"{i}. {' '.join(text.split())}" for i, text in enumerate(shown, 1))
    begun = f"{items}\n{len(shown) + 1}."
    return Prompt(({"role": "user", "content": REQUEST}, {"role": "assistant", "content": begun}))


def _drawn(texts: Sequence[str], count: int, rng: Random) -> list[str]:
    """Return `count` texts in random order; only `random()` is stable across versions of Python."""
    keys = [rng.random() for _ in texts]
    return [texts[i] for i in sorted(range(len(texts)), key=keys.__getitem__)[:count]]
