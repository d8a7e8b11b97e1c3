"""Answers from data as texts for people: what comes before them, what is learnt, what is cut off."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from palate.model.codec.encoder import Encoder
from palate.model.codec.parts import Answered


@dataclass(frozen=True)
class Shown:
    """A prompt with an answer as they are rendered, special tokens included.

    Attributes:
        prompt, learnt, cut: the texts, one behind the other; `cut` is beyond the model's context.
        tokens: of the answer, without the context's limit.
        tokens_learnt: of them, those that are learnt.
        matches: whether all tokens are the beginning of what the tokenizer makes of the template's rendering.
            Only an end token may be added, where the template writes none.
    """

    prompt: str
    learnt: str
    cut: str
    tokens: int
    tokens_learnt: int
    matches: bool

    @property
    def completion(self) -> str:
        """The whole answer."""
        return self.learnt + self.cut


def show(
    answered: Answered,
    start: int,
    room: int,
    before: Sequence[int],
    encoder: Encoder,
    decode: Callable[[Sequence[int]], str],
    end_ids: Collection[int],
) -> Shown:
    """Return an answer as texts.

    Args:
        answered: the conversation with its answer.
        start: the number of its tokens before the answer.
        room: the most tokens of the answer that are learnt.
        before: the tokens before the answer; one that is not in the conversation, if `start` is 0.
        encoder, decode: texts to tokens and back.
        end_ids: the tokens that end a completion.
    """
    ids, whole, lead = answered.ids, answered.whole, answered.lead
    read = encoder.encode(whole.text, whole.typed)
    wanted = (*ids[:lead], *read.ids)
    added = ids[-1] in end_ids and wanted[: len(ids)] != ids  # by Palate, where the template writes none
    own = len(ids) - added
    matches = wanted[:own] == ids[:own] and not (added and wanted[own : own + 1] and wanted[own] in end_ids)

    def text_of(count: int) -> str:
        if not matches or not read.ends or count <= lead:
            return decode(ids[:count])
        text = decode(ids[:lead]) + whole.text[: read.ends[min(count, own) - lead - 1]]
        return text + decode(ids[own:count])

    learnt = min(len(ids), start + room)
    prompt, until, end = (text_of(count) for count in (start, learnt, len(ids)))
    return Shown(
        prompt=prompt or decode(before),
        learnt=until[len(prompt) :],
        cut=end[len(until) :],
        tokens=len(ids) - start,
        tokens_learnt=learnt - start,
        matches=matches,
    )
