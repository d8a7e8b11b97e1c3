"""A language model that reads two completions and says which one is better: the pairwise ranker."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache

from palate.annotate.base import Annotator, Judge, in_both_orders
from palate.annotate.judges.records import Question
from palate.annotate.judges.template import Template
from palate.config import ModelConfig
from palate.errors import ModelError
from palate.model import Codec, Snapshot, load_model
from palate.types import Completion, Group, Prompt

LABELS = ("A", "B")
"""The labels of the completion shown first and of the completion shown second."""

EPSILON = 1e-4
"""Probabilities are kept this far from 0 and 1, where their logit would be infinite."""

_OPENING = "\n\nBetter answer:\n"
"""The text after the question if no chat template opens the model's turn."""


class Ranker:
    """Returns the probability that the first of two completions is better, from those of two labels.

    The pairwise ranker of SLiC-HF (Zhao et al. 2023, arXiv:2305.10425) and RSO (Liu et al. 2023,
    arXiv:2309.06657). P(A) and P(B) are normalised to add up to 1; the result stays `EPSILON` away from 0 and
    1. Like every judge it answers for the given order; `against_first` and `judged` ask in both orders.

    Args:
        snapshot: a language model that was trained as a ranker.
        codec: the codec of that model.
        name: for messages.

    Raises:
        ModelError: the model's tokenizer has no single token for one of the labels.
    """

    def __init__(self, snapshot: Snapshot, codec: Codec, *, name: str = "ranker") -> None:
        self.name = name
        self._snapshot = snapshot
        self._codec = codec
        self._labels = labels(codec)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        fast: bool = True,
    ) -> Ranker:
        """Load a ranker from a hub id or a directory: a language model, or an adapter on one.

        Raises:
            ModelError: it cannot be loaded, or has no label tokens.
        """
        options = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code, "fast": fast}
        cfg = ModelConfig.model_validate({"model": name, "lora": False, **options})
        model = load_model(cfg, trainable=False)
        snapshot = Snapshot(0, lambda: nullcontext(model), micro_batch_tokens=8192)
        return cls(snapshot, model.codec, name=f"ranker:{name}")

    def __call__(
        self, prompts: Sequence[Prompt], pairs: Sequence[tuple[Completion, Completion]]
    ) -> list[float | None]:
        """Return P(first preferred) for each pair as shown, in (0, 1)."""
        if not pairs:
            return []
        rows = [
            Group(question(self._codec, prompt, first.text, second.text), self._labels)
            for prompt, (first, second) in zip(prompts, pairs, strict=True)
        ]
        # Both labels are alternatives for the same token, so a softmax over their log-probabilities suffices.
        logps = self._snapshot.logps(rows).sum().view(-1, 2)
        says_first = logps.double().softmax(-1)[:, 0]  # (pairs,)
        return [float(p) for p in says_first.clamp(EPSILON, 1 - EPSILON)]


def against_first(judge: Judge) -> Annotator:
    """Annotate by the logit of the probability of winning against the group's first completion.

    The first completion gets 0, and any other y gets logit P(y preferred to the first), as in RSO (Liu et al.
    2023, arXiv:2309.06657). RSO's fixed completion is a random sample, and so is the first of a policy's
    samples. n completions take n - 1 comparisons. Rewards of different groups are not comparable. A
    completion without a usable verdict gets no reward; neither does the first if no other completion has one.
    """

    def annotate(groups: Sequence[Group]) -> list[Group]:
        others = [(group, completion) for group in groups for completion in group.completions[1:]]
        verdicts = in_both_orders(
            judge,
            [group.prompt for group, _ in others],
            [(completion, group.completions[0]) for group, completion in others],
        )
        logits = iter([_logit(p) for p in verdicts])
        results = []
        for group in groups:
            rewards = [next(logits) for _ in group.completions[1:]]
            first = None if all(reward is None for reward in rewards) else 0.0
            results.append(group.annotated((first, *rewards)))
        return results

    return annotate


def _logit(p: float | None) -> float | None:
    if p is None:
        return None
    p = min(max(p, EPSILON), 1 - EPSILON)
    return math.log(p) - math.log1p(-p)


def labels(codec: Codec) -> tuple[Completion, Completion]:
    """Return the two labels as completions of one token.

    Raises:
        ModelError: a label is more than one token, or both labels are the same token.
    """
    first, second = (_tokens(codec, label) for label in LABELS)
    if len(first) != 1 or len(second) != 1 or first == second:
        raise ModelError(
            f"the tokenizer of {codec.name} makes the tokens {first} of {LABELS[0]} and {second} of "
            f"{LABELS[1]}; a ranker answers with one of two tokens, so use another model"
        )
    return Completion(LABELS[0], tuple(first), "length"), Completion(LABELS[1], tuple(second), "length")


def question(codec: Codec, prompt: Prompt, first: str, second: str) -> Prompt:
    """Return the question about two texts in this order, from `judges/templates/ranker.jinja`.

    As for every judge, the texts stand between marks that they cannot contain, without control tokens.

    Texts that do not fit into the model's context are truncated at their end, the longer one first.

    Raises:
        DataError: the prompt alone leaves no room for them.
    """
    rendered = _asked(codec, prompt, first, second)
    over = len(codec.prompt_ids(rendered)) + 1 - codec.max_length
    if over <= 0:
        return rendered
    empty = _asked(codec, prompt, "", "")
    keep = codec.room(empty) - 1
    ids = _tokens(codec, first), _tokens(codec, second)
    while over > 0:  # repeat if a truncated text takes more tokens than were kept
        kept = [max(0, keep // 2, keep - len(other)) for other in reversed(ids)]
        rendered = _asked(codec, prompt, *(codec.text(text[:n]) for text, n in zip(ids, kept, strict=True)))
        over = len(codec.prompt_ids(rendered)) + 1 - codec.max_length
        keep -= over
    return rendered


def _asked(codec: Codec, prompt: Prompt, first: str, second: str) -> Prompt:
    text = Question(_template(), prompt.content, (first, second), LABELS).render(sys.maxsize)
    return Prompt(text if codec.has_template else text + _OPENING, where=prompt.where)


@cache
def _template() -> Template:
    return Template.load("pairwise", name="ranker")


def _tokens(codec: Codec, text: str) -> list[int]:
    return list(codec.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
