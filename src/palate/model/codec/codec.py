"""Convert conversations to token ids of one model, and back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from palate.data.account import TRUNCATED, Account, RowError
from palate.errors import ModelError
from palate.memory import key_of
from palate.model.codec.encoder import Encoder
from palate.model.codec.finished import Finisher
from palate.model.codec.left_out import Witness
from palate.model.codec.parts import Answered, Asked, closing, opening_of, other_start, shared, turn_of
from palate.model.codec.shown import Shown, show
from palate.model.codec.template import TEMPLATE_ERRORS, ChatTemplate, Refused, Rendering
from palate.model.codec.writer import Row, Writer, turns_of
from palate.types import (
    Comparison,
    Completion,
    Content,
    Demonstration,
    Example,
    Finish,
    Message,
    Pair,
    Prompt,
    said,
)

MOST_PROMPTS = 1 << 16
"""Prompts in the cache of tokens; it is bounded because a pairwise judge makes a new prompt of every pair."""

BLOCK = 512
"""Rows that are tokenised together."""

R = TypeVar("R", bound=Row)

_NOT_SAID = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id")
"""Attributes of tokenizers that name tokens which are not part of a model's text."""


class Codec:
    """A tokenizer with its chat template, end tokens and length limit.

    A text prompt becomes a user turn if the model has a chat template and stays text otherwise. An answer
    from data is learnt as the template renders the finished conversation: prompt and completion together are
    the beginning of that rendering, in tokens. Only text of the assistant can contain control tokens:
    `<|im_end|>` in a user's turn is ordinary characters, but in answers from data it is the token.

    Args:
        tokenizer: a transformers tokenizer.
        eos_ids: every token that ends a completion, by the model's configuration.
        max_length: maximum length of prompt plus completion, in tokens.
        name: the model's name, for messages.
        chat_template: Jinja text that replaces the tokenizer's own.
        variables: values for the chat template besides the turns, such as `enable_thinking`.
        now: the date that templates print; the time of loading if None.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        eos_ids: Sequence[int],
        max_length: int,
        name: str,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.name = name
        self.account = Account(strict=True)
        """The account that counts parts that the template leaves out, and unexpected changes."""
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        self.has_template = bool(tokenizer.chat_template)
        self.template = ChatTemplate(tokenizer, variables=variables or {}, now=now or datetime.now())
        try:
            self._encoder = Encoder(tokenizer, self.template.literals())
            self.template.mark_control(self._encoder.pattern)
            finisher = Finisher(self.template, self._encoder.pattern)
        except (Refused, *TEMPLATE_ERRORS) as error:
            raise ModelError(f"the chat template of {name} cannot be used: {error}") from error
        self._witness = Witness(self.template)
        eos = [*eos_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
        turn_end = finisher.turn_end() if self.has_template else None
        if turn_end is not None:
            eos.insert(0, tokenizer.convert_tokens_to_ids(turn_end))
        if not eos:
            raise ModelError(f"model {name} has no end token (eos_token_id), so no completion could ever end")
        self.end_id = eos[0]
        """The token that closes a completion from data if the template writes none."""
        self.end_ids = frozenset(eos)
        """Every token at which sampling ends."""
        ends = [text for i in self.end_ids if (text := self._encoder.control.get(i))]
        finisher.close_with(ends)
        not_said = {getattr(tokenizer, attribute, None) for attribute in _NOT_SAID}
        self._not_said = self.end_ids | {i for i in not_said if i is not None}
        opening = opening_of(self.template, self._encoder.pattern) if self.has_template else ""
        self._writer = Writer(
            finisher, self._encoder, templated=self.has_template, opening=opening, name=name
        )
        self._writer.ends = ends
        self._asked: dict[str, Asked] = {}
        self._pad_id: int | None = None

    def read_to_the_end(self, pad_id: int | None) -> None:
        """Make answers from data end where the classifiers of transformers read a conversation.

        That is the last token of the template's rendering that is not the padding token. Without a template,
        the rendering is the text and an end token.
        """
        self._writer.to_the_end, self._pad_id = self.has_template, pad_id

    def keep_date(self, now: datetime) -> None:
        """Set the date that the chat template prints."""
        self.template.now = now
        self._asked.clear()

    @property
    def identity(self) -> str:
        """A key of everything on which the tokens of a row depend."""
        tokenizer, backend = self.tokenizer, getattr(self.tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else [repr(tokenizer), sorted(tokenizer.get_vocab())]
        template = [
            repr(tokenizer.chat_template),
            self.template.variables,
            dict(tokenizer.special_tokens_map),
        ]
        date = self.template.now.isoformat() if self.template.prints_date else None
        ends = [self.end_id, sorted(self.end_ids), self._writer.to_the_end, self._pad_id]
        return key_of(type(tokenizer).__name__, rules, template, date, ends, self.max_length)

    # -- to tokens ---------------------------------------------------------------------------------

    def in_blocks(self, rows: Iterable[R], size: int = BLOCK) -> Iterator[list[R]]:
        """Yield rows in blocks whose tokens are made ahead, on all cores, for the calls below.

        While the caller works on a block, a thread tokenises the next one. The results of the calls are the
        same without it.
        """
        waiting: deque[tuple[list[R], list[str], Future[None]]] = deque()

        def take() -> list[R]:
            waiting[0][2].result()
            return waiting[0][0]

        def forget() -> None:
            block, texts, _ = waiting.popleft()
            self._writer.forget(block)
            self._encoder.forget(texts)

        rows = iter(rows)
        with ThreadPoolExecutor(1, "palate-tokens") as thread:
            while block := list(islice(rows, size)):
                texts = self._writer.remember(block, self._asked)
                waiting.append((block, texts, thread.submit(self._encoder.ahead, texts)))
                if len(waiting) > 1:
                    yield take()
                    forget()
            if waiting:
                yield take()
                forget()

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the token ids after which the completion starts; at least one.

        Raises:
            DataError: the chat template refuses the prompt.
        """
        return prompt.token_ids if prompt.token_ids is not None else self._ask(prompt).ids

    def pair(self, row: Comparison) -> Pair:
        """Return the comparison in tokens.

        Raises:
            DataError: the chat template refuses it, or the prompt alone fills the model's context.
        """
        contents, finishes = (row.chosen, row.rejected), (row.chosen_finish, row.rejected_finish)
        prompt, (chosen, rejected) = self.answers(row.prompt, contents, finishes)
        return Pair(prompt, chosen, rejected, row.margin)

    def example(self, row: Demonstration) -> Example:
        """Return the demonstration in tokens.

        Raises:
            DataError: the chat template refuses it, or the prompt alone fills the model's context.
        """
        prompt, (completion,) = self.answers(row.prompt, (row.completion,), (row.finish,))
        return Example(prompt, completion)

    def answers(
        self, prompt: Prompt, contents: Sequence[Content], finishes: Sequence[Finish] | None = None
    ) -> tuple[Prompt, tuple[Completion, ...]]:
        """Return answers from data as completions of one prompt, each as the template renders it.

        Args:
            prompt: the prompt of the answers.
            contents: N answers, a text or one turn of the assistant each.
            finishes: the finish reason of each; "length" leaves it open, without an end token.

        Returns:
            The prompt, with the common first tokens of all N renderings, and N completions.

        Raises:
            DataError: the chat template refuses the conversation, or the prompt fills the model's context.
        """
        prompt, made, start = self._made(prompt, contents, finishes)
        room = self.room(prompt)
        return prompt, tuple(self._completion(prompt, a, start, room) for a in made)

    def shown(
        self, prompt: Prompt, contents: Sequence[Content], finishes: Sequence[Finish] | None = None
    ) -> tuple[Prompt, tuple[Completion, ...], tuple[Shown, ...]]:
        """Return the same as `answers`, and every answer as texts for people."""
        prompt, made, start = self._made(prompt, contents, finishes)
        room, before = self.room(prompt), self.prompt_ids(prompt)
        completions = tuple(self._completion(prompt, a, start, room) for a in made)
        texts = (show(a, start, room, before, self._encoder, self.decode, self.end_ids) for a in made)
        return prompt, completions, tuple(texts)

    def shown_prompt(self, prompt: Prompt) -> str:
        """Return what sampling follows, as text with all special tokens.

        Raises:
            DataError: the chat template refuses the prompt.
        """
        opened = self._ask(prompt)
        lead = () if self.has_template else self._encoder.before
        return self.decode(lead) + opened.rendering.text

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the tokens as text, special ones included."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def _made(
        self, prompt: Prompt, contents: Sequence[Content], finishes: Sequence[Finish] | None
    ) -> tuple[Prompt, list[Answered], int]:
        """A prompt, its answers in tokens, and the number of tokens that come before each of them."""
        finishes = finishes or ["eos"] * len(contents)
        with_text = prompt.content == "" and isinstance(contents[0], str)
        if with_text:
            made = [self._text_row(str(c), f) for c, f in zip(contents, finishes, strict=True)]
        else:
            made = [self._answered(prompt, c, f) for c, f in zip(contents, finishes, strict=True)]
        start = min([answered.start for answered in made] + [shared([answered.ids for answered in made])])
        before = made[0].ids[:start]
        if not before:  # a causal model needs one token to predict from
            before, start = self._first(), 0
        if with_text or before != self._ask(prompt).ids:
            prompt = replace(prompt, token_ids=before)
        return prompt, made, start

    def completion(self, prompt: Prompt, content: Content, finish: Finish = "eos") -> Completion:
        """Return an answer from data that starts where sampling starts, for use beside sampled completions.

        If the template renders finished conversations from another point (for example because it opens a
        thought for sampling), the answer is the rendering after the opening; an opened thought is closed
        first.

        Raises:
            DataError: the chat template refuses the conversation, or the prompt fills the model's context.
        """
        made, (completion,) = self.answers(prompt.to_sample(), (content,), (finish,))
        if made.token_ids is None or prompt.content == "":
            return completion
        opened = self._ask(prompt.to_sample())
        finished = self._writer.finish(prompt, turn_of(content), opened.rendering)
        end = finished.close if finish == "length" else finished.stop
        if finished.text.startswith(opened.rendering.text):
            rest = finished.text[len(opened.rendering.text) : end]
        else:
            rest = closing(opened.rendering.text) + finished.text[finished.start : end].lstrip("\n")
        ids = self._encoder.behind(rest)
        ids = ids if finish == "length" or (ids and ids[-1] in self.end_ids) else (*ids, self.end_id)
        room = self.room(prompt)
        finish = "length" if len(ids) > room else finish
        return replace(completion, token_ids=ids[:room], finish=finish)

    def room(self, prompt: Prompt, *, need: int = 1) -> int:
        """Return the number of tokens left for a completion.

        Raises:
            DataError: fewer than `need` tokens are left.
        """
        used = len(self.prompt_ids(prompt))
        if self.max_length - used < need:
            raise RowError(
                f"{prompt.where or 'a prompt'}: the prompt has {used} tokens, which leaves no room for "
                f"{need} new tokens, since {self.name} takes at most {self.max_length} in all; shorten or "
                f"drop the prompt (it begins {prompt.text[:40]!r})",
                prompt.where,
                "the prompt leaves no room for a completion",
            )
        return self.max_length - used

    # -- to text -----------------------------------------------------------------------------------

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of the tokens, without end tokens and other special tokens, such as padding."""
        kept = [i for i in token_ids if i not in self._not_said]
        return self.decode(kept)

    def save(self, directory: Path) -> None:
        """Write the tokenizer, chat template included."""
        self.tokenizer.save_pretrained(directory)

    # -- inside ------------------------------------------------------------------------------------

    def _ask(self, prompt: Prompt) -> Asked:
        if prompt.id not in self._asked:
            if len(self._asked) >= MOST_PROMPTS:
                self._asked.clear()
            self._asked[prompt.id] = self._opened(prompt)
        return self._asked[prompt.id]

    def _opened(self, prompt: Prompt) -> Asked:
        rendering = self._writer.opened(prompt)
        if rendering.typed and self.has_template:
            self.account.note("text that looks like control tokens is read as text", prompt.where)
        # A template writes its own BOS.
        before = () if self.has_template else self._encoder.before
        encoded = self._encoder.encode(rendering.text, rendering.typed)
        chars = self._encoder.settled(rendering.text, rendering.typed)
        last = self._encoder.before_last_control
        same = last(rendering.text, rendering.typed, encoded, chars) if chars else 0
        return Asked(rendering, (*before, *encoded.ids) or self._first(), same)

    def _answered(self, prompt: Prompt, content: Content, finish: Finish) -> Answered:
        opened = self._ask(prompt.to_sample())
        turn, end = self._writer.without_end(turn_of(content))
        if end is not None:
            self.account.note(f"answers already end with {end}, so Palate adds no second one", prompt.where)
        finished, (text, typed, chars) = self._writer.finished(prompt, content, finish, opened.rendering)
        if self.has_template or not isinstance(prompt.content, str):
            self._report_left_out(prompt, turn, finished.text)
        cut, lead = finish == "length", 0 if self.has_template else len(self._encoder.before)
        before = () if self.has_template else self._encoder.before
        before = opened.ids[: opened.same_tokens] if chars else before
        encoded = self._encoder.encode(text, typed)
        ids = (*before, *encoded.ids)
        count = len(opened.ids)
        if not typed and finished.start == len(opened.rendering.text) and ids[:count] == opened.ids:
            start = count  # the usual case, for which the places of tokens are not needed
        else:
            start = len(before) + self._encoder.up_to(finished.start - chars, text, typed, encoded)
        to_the_end = self._writer.to_the_end
        if not cut and (len(ids) == start or (ids[-1] not in self.end_ids and not to_the_end)):
            ids = (*ids, self.end_id)
        while not cut and len(ids) > 1 and ids[-1] == self._pad_id:
            ids, start = ids[:-1], min(start, len(ids) - 2)
        if ids[:start] != opened.ids and self.has_template:
            self.account.note(other_start(opened, finished, self.account.notes), prompt.where)
        words = said(turn)
        if set(turn) - {"role", "content"}:
            words = self.text(ids[start:])
        return Answered(ids, start, words, finish, Rendering(finished.text, finished.typed), lead)

    def _report_left_out(self, prompt: Prompt, turn: Message, text: str) -> None:
        """Count the parts of a finished conversation that its rendering lacks."""
        for name, in_answer in self._witness.left_out([*turns_of(prompt), turn], prompt.variables, text):
            lost = in_answer and name in ("reasoning_content", "thinking", "reasoning")
            (self.account.lose if lost else self.account.leave)(name, prompt.where)

    def _text_row(self, text: str, finish: Finish) -> Answered:
        """Return a text that is learnt unchanged, with its control tokens as tokens."""
        whole = self._writer.text_row(text)
        ids = self._encoder.encode(whole).ids
        before = self._encoder.before
        lead = 0 if ids[: len(before)] == before else len(before)
        ids = (*before[:lead], *ids)
        if finish != "length" and ids[-1] not in self.end_ids:
            ids = (*ids, self.end_id)
        start = len(before) or 1
        return Answered(ids, start if len(ids) > start else 0, text, finish, Rendering(whole), lead)

    def _completion(self, prompt: Prompt, answered: Answered, start: int, room: int) -> Completion:
        ids = answered.ids[start:]
        if not ids:
            raise RowError(
                f"{prompt.where or 'a row'}: the answer is truncated before its first word", prompt.where
            )
        finish = answered.finish
        if len(ids) > room:
            finish = "length"
            self.account.note(f"{TRUNCATED} at {self.max_length:,} tokens (--max-length)", prompt.where)
        return Completion(text=answered.text, token_ids=ids[:room], finish=finish)

    def _first(self) -> tuple[int, ...]:
        bos = self.tokenizer.bos_token_id
        return (bos if bos is not None else self.end_id,)
