"""From texts to the token ids of one model, and back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from palate.errors import DataError, ModelError
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
)

PLAIN_CHAT = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The layout of chat rows for a model without a chat template."""

_SLOT = "\ue000{}\ue001"
_SLOTS = re.compile("\ue000(\\d+)\ue001")


MOST_PROMPTS = 1 << 16
"""Prompts whose tokens are remembered; a judge that reads two answers makes a new prompt of every pair."""


class Codec:
    """A tokenizer with its chat template, end tokens and length limit.

    A text prompt becomes a user turn if the model has a chat template and stays text otherwise. What
    users write is never read as special tokens: `<|im_end|>` in a prompt is seven characters of text.

    Args:
        tokenizer: a transformers tokenizer.
        eos_ids: every token that ends a completion, by the model's configuration.
        max_length: longest prompt and completion together, in tokens.
        name: the model's name, for messages.
        chat_template: Jinja text that replaces the tokenizer's own.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        eos_ids: Sequence[int],
        max_length: int,
        name: str,
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.name = name
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        self.has_template = bool(tokenizer.chat_template)
        special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        # The line above leaves out special tokens that no attribute names.
        special |= {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._special = {i: text for i, text in special.items() if text}
        eos = [*eos_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
        turn_end = self._turn_end()
        if turn_end is not None:
            eos.insert(0, turn_end)
        if not eos:
            raise ModelError(
                f"model {name} names no end token (eos_token_id), so no completion could ever end"
            )
        self.end_id = eos[0]
        """The token that closes a completion which comes from data."""
        self.end_ids = frozenset(eos)
        """Every token at which sampling ends."""
        self._prompts: dict[str, tuple[int, ...]] = {}

    # -- to tokens ---------------------------------------------------------------------------------

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids after which the completion starts; at least one."""
        if prompt.id not in self._prompts:
            if len(self._prompts) >= MOST_PROMPTS:
                self._prompts.clear()
            try:
                self._prompts[prompt.id] = tuple(self._encode_prompt(prompt.content))
            except TemplateError as error:
                where = prompt.where or "a prompt"
                raise DataError(f"{where}: the chat template of {self.name} refuses it: {error}") from error
        return self._prompts[prompt.id]

    def completion(self, prompt: Prompt, content: Content) -> Completion:
        """A completion from data, closed by the end token, or cut (and left open) at `max_length`.

        Raises:
            DataError: the prompt alone fills the model's context.
        """
        text = content if isinstance(content, str) else content[0]["content"]
        room = self.room(prompt)
        ids = [*self._text_ids(text), self.end_id]
        finish: Finish = "eos" if len(ids) <= room else "length"
        return Completion(text=text, token_ids=tuple(ids[:room]), finish=finish)

    def pair(self, row: Comparison) -> Pair:
        """The comparison in tokens."""
        chosen, rejected = (self.completion(row.prompt, text) for text in (row.chosen, row.rejected))
        return Pair(row.prompt, chosen, rejected, row.margin)

    def example(self, row: Demonstration) -> Example:
        """The demonstration in tokens."""
        return Example(row.prompt, self.completion(row.prompt, row.completion))

    def room(self, prompt: Prompt, *, need: int = 1) -> int:
        """Tokens left for a completion.

        Raises:
            DataError: fewer than `need` are.
        """
        used = len(self.prompt_ids(prompt))
        if self.max_length - used < need:
            raise DataError(
                f"{prompt.where or 'a prompt'}: the prompt has {used} tokens, which leaves no room for "
                f"{need} new in the {self.max_length} that {self.name} takes; shorten or drop it "
                f"(it begins {prompt.text[:40]!r})"
            )
        return self.max_length - used

    # -- to text -----------------------------------------------------------------------------------

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def save(self, directory: Path) -> None:
        """Write the tokenizer, chat template included."""
        self.tokenizer.save_pretrained(directory)

    # -- inside ------------------------------------------------------------------------------------

    def _encode_prompt(self, content: Content) -> list[int]:
        if not self.has_template:
            # Neither a text nor `PLAIN_CHAT` has special tokens of its own; the tokenizer puts its BOS.
            text = content if isinstance(content, str) else self._render(content, add_generation_prompt=True)
            ids = self._ids(text, plain=True, add_special_tokens=True)
            while ids and ids[-1] in self.end_ids:
                ids.pop()  # some tokenizers end every text; a prompt goes on
            # A causal model needs one token to predict from.
            return ids or [
                self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.end_id
            ]
        messages = ({"role": "user", "content": content},) if isinstance(content, str) else content
        if not any(special in m["content"] for m in messages for special in self._special.values()):
            return self._ids(self._render(messages, add_generation_prompt=True))
        # Text that looks like a special token: tokenise template and texts apart, the texts as mere text.
        joined: list[int] = []
        slots = tuple({**m, "content": _SLOT.format(i)} for i, m in enumerate(messages))
        for i, piece in enumerate(_SLOTS.split(self._render(slots, add_generation_prompt=True))):
            joined += self._text_ids(messages[int(piece)]["content"]) if i % 2 else self._ids(piece)
        return joined

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=None if self.has_template else PLAIN_CHAT,
            )
        )

    def _text_ids(self, text: str) -> list[int]:
        return self._ids(text, plain=True)

    def _ids(self, text: str, *, plain: bool = False, add_special_tokens: bool = False) -> list[int]:
        if not text:
            return []
        encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, split_special_tokens=plain)
        return list(encoded["input_ids"])

    def _turn_end(self) -> int | None:
        """The special token that the chat template puts after an assistant's turn, if it does."""
        if not self.has_template:
            return None
        turns = ({"role": "user", "content": "?"}, {"role": "assistant", "content": _SLOT.format(0)})
        try:
            pieces = _SLOTS.split(self._render(turns, add_generation_prompt=False), maxsplit=1)
        except TemplateError as error:
            raise ModelError(f"the chat template of {self.name} cannot be used: {error}") from error
        ids = self._ids(pieces[-1].lstrip()) if len(pieces) > 1 else []
        return ids[0] if ids and ids[0] in self._special else None
