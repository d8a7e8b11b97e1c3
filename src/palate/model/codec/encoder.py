"""Convert texts to token ids, with the position of each token in the text."""

from __future__ import annotations

import re
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from transformers import PreTrainedTokenizerFast

from palate.model.codec.template import Span


@dataclass(frozen=True)
class Encoded:
    """A text as tokens."""

    ids: tuple[int, ...]
    given: tuple[int, ...] = ()
    whole: Any = None
    """The tokenizer's own encoding, from which the ends of the tokens are read if something needs them."""
    placed: Callable[[], Any] | None = None
    """Makes that encoding, if the tokens were made without their places, which is faster."""

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The end of each token in the text, in characters; empty if the tokenizer gives none."""
        return self.given if self._encoding is None else tuple(end for _, end in self._encoding.offsets)

    @cached_property
    def _encoding(self) -> Any:
        return self.whole if self.placed is None else self.placed()

    def up_to(self, place: int) -> int:
        """Return the number of tokens that end at or before a position in the text."""
        at = None if self._encoding is None else self._encoding.char_to_token(place)
        return bisect_right(self.ends, place) if at is None else at


class Encoder:
    """A tokenizer that can read parts of a text as plain letters.

    Args:
        tokenizer: a transformers tokenizer.
        written: the texts that the chat template writes; added tokens that occur there are control tokens.
    """

    def __init__(self, tokenizer: Any, written: str) -> None:
        self.tokenizer = tokenizer
        special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        # The line above misses special tokens that no attribute names.
        added = tokenizer.added_tokens_decoder
        special |= {i: token.content for i, token in added.items() if token.special}
        self.special = {i: text for i, text in special.items() if text}
        self.control = {
            **{i: t.content for i, t in added.items() if t.content.strip() and t.content in written},
            **self.special,
        }
        """Control tokens by id: special tokens, and added tokens that the chat template writes."""
        self.pattern = _any_of(self.control.values())
        self._weak = frozenset(self.control.values()) - frozenset(self.special.values())
        self._fast = bool(getattr(tokenizer, "is_fast", False))
        own = (type(tokenizer)._encode_plus, type(tokenizer).__call__) if self._fast else ()
        # A tokenizer with a call of its own may change texts; for others the backend can be asked directly.
        self._usual = own == (PreTrainedTokenizerFast._encode_plus, PreTrainedTokenizerFast.__call__)
        self._ahead: dict[str, Encoded] = {}
        self._lock = threading.Lock()  # the options of a call are set in the tokenizer, which threads share
        self._newline, self._puts_space = self._plain("\n").ids, True
        self._puts_space = self._behind("x", split=False).ids != self._plain("x").ids
        self.before = self._before()
        """Tokens that the tokenizer puts in front of every text, such as its BOS."""

    def encode(self, text: str, typed: Sequence[Span] = ()) -> Encoded:
        """Tokenise a text; the spans `typed` are plain letters even if they look like control tokens."""
        if not text:
            return Encoded(())
        if not typed:
            return self._plain(text)
        ids: list[int] = []
        ends: list[int] = []
        for begin, end, letters in self._pieces(text, typed):
            part = (
                self._letters(text[begin:end], first=begin == 0)
                if letters
                else (
                    self._plain(text[begin:end]) if begin == 0 else self._behind(text[begin:end], split=False)
                )
            )
            ids += part.ids
            ends += [begin + place for place in part.ends]
        return Encoded(tuple(ids), tuple(ends))

    def ahead(self, texts: Iterable[str]) -> None:
        """Tokenise texts together, on all cores, for the calls of `encode` until `forget`."""
        distinct = list(dict.fromkeys(text for text in texts if text))
        if not self._fast or not distinct:
            return
        if not self._usual:
            self._ahead |= dict(zip(distinct, self._call(distinct), strict=True))
            return
        backend = self.tokenizer.backend_tokenizer
        with self._lock:
            if backend.encode_special_tokens:
                backend.encode_special_tokens = False
            encodings = backend.encode_batch_fast(distinct, add_special_tokens=False)
        self._ahead |= {
            text: Encoded(tuple(encoding.ids), placed=partial(self._whole, text))
            for text, encoding in zip(distinct, encodings, strict=True)
        }

    def forget(self, texts: Iterable[str]) -> None:
        """Forget the tokens of texts."""
        for text in texts:
            self._ahead.pop(text, None)

    def up_to(self, place: int, text: str, typed: Sequence[Span], encoded: Encoded) -> int:
        """Return the number of tokens of an encoded text that end at or before a position in it."""
        if encoded.whole is not None or encoded.placed is not None or encoded.given:
            return encoded.up_to(place)
        begun = self.encode(text[:place], [(b, min(e, place)) for b, e in typed if b < place]).ids
        both = zip(begun, encoded.ids, strict=False)
        return next((n for n, (mine, theirs) in enumerate(both) if mine != theirs), len(begun))

    def before_last_control(self, text: str, typed: Sequence[Span], encoded: Encoded, chars: int) -> int:
        """Return the number of tokens before the last control token of a text; it begins at `chars` > 0."""
        at = [n for n, token in enumerate(encoded.ids) if token in self.control]
        if typed or len(at) != sum(1 for _ in self.pattern.finditer(text)):
            return encoded.up_to(chars)
        return at[-1]

    def settled(self, text: str, typed: Sequence[Span]) -> int:
        """Return the length of the beginning of a text, in characters, that no appended text can change.

        That is up to the last control token, because a tokenizer reads the texts between control tokens
        separately.
        """
        if self._puts_space or not self._fast:
            return 0
        inside = sorted(typed)
        real = (m for m in self.pattern.finditer(text) if not inside or not _overlaps(m.span(), inside))
        return max((match.start() for match in real), default=0)

    def letters(self, text: str) -> tuple[int, ...]:
        """Tokenise a text as plain letters, without control tokens."""
        return self.encode(text, [m.span() for m in self.pattern.finditer(text)]).ids

    def behind(self, text: str) -> tuple[int, ...]:
        """Tokenise a text that continues another text."""
        return self._behind(text, split=False).ids if text else ()

    # -- inside ------------------------------------------------------------------------------------

    def _pieces(self, text: str, typed: Sequence[Span]) -> Iterator[tuple[int, int, bool]]:
        """Yield begin and end of the pieces to tokenise separately, and True for a piece of plain letters."""
        inside = sorted(typed)
        real = [m.span() for m in self.pattern.finditer(text) if not _overlaps(m.span(), inside)]
        done = 0
        for begin, end in zip([0, *(e for _, e in real)], [*(b for b, _ in real), len(text)], strict=True):
            if not _overlaps((begin, end), inside):
                continue
            if done < begin:
                yield done, begin, False
            yield begin, end, True
            done = end
        if done < len(text):
            yield done, len(text), False

    def _letters(self, text: str, *, first: bool) -> Encoded:
        """Tokenise without control tokens: special ones are off, others are split after one letter."""
        cuts = [m.start() + 1 for m in self.pattern.finditer(text) if m[0] in self._weak]
        ids: list[int] = []
        ends: list[int] = []
        for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            piece = text[begin:end]
            at_start = first and begin == 0
            part = self._plain(piece, split=True) if at_start else self._behind(piece, split=True)
            ids += part.ids
            ends += [begin + place for place in part.ends]
        return Encoded(tuple(ids), tuple(ends))

    def _plain(self, text: str, *, split: bool = False) -> Encoded:
        known = None if split else self._ahead.get(text)
        return self._call([text], split=split)[0] if known is None else known

    def _behind(self, text: str, *, split: bool) -> Encoded:
        """Tokenise a text in the middle of a line; some tokenizers put a space before the first word."""
        if self._puts_space:
            after = self._plain("\n" + text, split=split)
            n = len(self._newline)
            if after.ids[:n] == self._newline:
                return Encoded(after.ids[n:], tuple(place - 1 for place in after.ends[n:]))
        return self._plain(text, split=split)

    def _whole(self, text: str) -> Any:
        return self._call([text])[0].whole

    def _call(self, texts: list[str], *, split: bool = False) -> list[Encoded]:
        with self._lock:
            encoded = self.tokenizer(
                texts,
                add_special_tokens=False,
                split_special_tokens=split,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        each = encoded.encodings if self._fast else [None] * len(texts)
        return [Encoded(tuple(ids), whole=w) for ids, w in zip(encoded["input_ids"], each, strict=True)]

    def _before(self) -> tuple[int, ...]:
        ids = tuple(self.tokenizer("x", add_special_tokens=True)["input_ids"])
        bare = self._plain("x").ids
        at = next((n for n in range(len(ids)) if ids[n : n + len(bare)] == bare), 0)
        return ids[:at]


def _any_of(texts: Any) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _overlaps(span: Span, sorted_spans: Sequence[Span]) -> bool:
    at = bisect_right(sorted_spans, (span[1],)) - 1
    return any(b < span[1] and span[0] < e for b, e in sorted_spans[max(0, at - 1) : at + 1])
