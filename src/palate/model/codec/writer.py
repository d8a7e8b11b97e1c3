"""Write the conversations of rows as text: prompts as they are opened for sampling, and finished answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from palate.data.account import RowError
from palate.errors import DataError
from palate.model.codec.encoder import Encoder
from palate.model.codec.finished import Finished, Finisher
from palate.model.codec.parts import Asked, turn_of
from palate.model.codec.template import Refused, Rendering, Span
from palate.types import Comparison, Content, Demonstration, Finish, Message, Prompt, said

Row = Prompt | Comparison | Demonstration
"""A row of data without tokens."""


class Piece(NamedTuple):
    """The part of a finished conversation that must be tokenised, since the opening's tokens are known."""

    text: str
    typed: list[Span]
    """Parts of it that look like control tokens but are plain text."""
    chars: int
    """The number of characters before it, whose tokens are those of the opening."""


class Writer:
    """Renders prompts and their answers.

    It keeps the renderings of the rows in `remember`, so a row whose texts were tokenised ahead is rendered
    once.

    Args:
        finisher: renders and finds answers.
        encoder: its pattern names the control tokens.
        templated: False for a model without a chat template, which gets texts as they are.
        opening: the text that the template puts before an answer.
        name: the model's name, for messages.
    """

    def __init__(
        self, finisher: Finisher, encoder: Encoder, *, templated: bool, opening: str, name: str
    ) -> None:
        self._finisher, self._encoder = finisher, encoder
        self._templated, self._opening, self._name = templated, opening, name
        self._opened: dict[str, Rendering] = {}
        self._finished: dict[tuple[str, str | int, Finish], tuple[Finished, Piece]] = {}
        self.ends: Sequence[str] = ()
        """The texts of the tokens that end a completion."""
        self.to_the_end = False
        """True to keep the whole rendering behind an answer, not only the token that closes it."""

    # -- prompts -----------------------------------------------------------------------------------

    def opened(self, prompt: Prompt) -> Rendering:
        """Return the text after which the completion starts.

        Raises:
            RowError: the chat template refuses the prompt, or the prompt is already rendered.
        """
        if prompt.id in self._opened:
            return self._opened[prompt.id]
        if not self._templated and isinstance(prompt.content, str):
            spans = (match.span() for match in self._encoder.pattern.finditer(prompt.content))
            return Rendering(prompt.content, tuple(spans))
        self._refuse_rendered(prompt)
        try:
            return self._finisher.open(turns_of(prompt), prompt.variables)
        except Refused as error:
            raise self._refusal(prompt, error) from error

    # -- answers -----------------------------------------------------------------------------------

    def without_end(self, turn: Message) -> tuple[Message, str | None]:
        """Return the turn without an end token in its text, since the template writes one, and that token."""
        words = said(turn)
        end = next((end for end in self.ends if words.rstrip().endswith(end)), None)
        if not self._templated or end is None:
            return turn, None
        return {**turn, "content": words.rstrip().removesuffix(end)}, end

    def finished(
        self, prompt: Prompt, content: Content, finish: Finish, opened: Rendering
    ) -> tuple[Finished, Piece]:
        """Return the conversation with an answer from data, and the part of it to tokenise.

        An end token in the answer's text is left out, and an answer that was cut stays open.

        Raises:
            RowError: the chat template refuses the conversation.
        """
        made = self._finished.get((prompt.id, _key(content), finish))
        if made is not None:
            return made
        finished = self.finish(prompt, self.without_end(turn_of(content))[0], opened)
        return finished, self._piece(finished, opened, finish)

    def finish(self, prompt: Prompt, turn: Message, opened: Rendering) -> Finished:
        """Return the conversation with the assistant's turn.

        Raises:
            RowError: the chat template refuses the conversation.
        """
        if not self._templated and isinstance(prompt.content, str):
            whole = prompt.content + said(turn)
            return Finished(whole, opened.typed, len(prompt.content), len(whole), len(whole))
        try:
            return self._finisher.finish(turns_of(prompt), turn, prompt.variables, opened.text)
        except Refused as error:
            raise self._refusal(prompt, error) from error

    def _piece(self, finished: Finished, opened: Rendering, finish: Finish) -> Piece:
        end = len(finished.text) if self.to_the_end else finished.stop
        text = finished.text[: finished.close if finish == "length" else end]
        typed = [span for span in finished.typed if span[1] <= len(text)]
        chars = self._encoder.settled(opened.text, opened.typed)
        if not (chars and text.startswith(opened.text[:chars]) and self._encoder.pattern.match(text, chars)):
            return Piece(text, typed, 0)
        return Piece(text[chars:], [(b - chars, e - chars) for b, e in typed if b >= chars], chars)

    def text_row(self, text: str) -> str:
        """Return a text that is learnt unchanged, without white space behind its end token."""
        return text.rstrip() if text.rstrip().endswith(tuple(self.ends)) else text

    # -- ahead -------------------------------------------------------------------------------------

    def remember(self, rows: Iterable[Row], known: Mapping[str, Asked]) -> list[str]:
        """Render rows, keep the renderings, and return the texts that must be tokenised.

        Args:
            rows: the rows.
            known: prompts that are tokenised already, by id.
        """
        texts: list[str] = []
        for row in rows:
            try:
                texts += self._texts(row, known)
            except DataError:  # raised again where the row is used
                continue
        return texts

    def forget(self, rows: Iterable[Row]) -> None:
        """Forget the renderings of rows."""
        for row in rows:
            prompt, contents, finishes = parts_of(row)
            self._opened.pop(prompt.id, None)
            for content, finish in zip(contents, finishes, strict=True):
                self._finished.pop((prompt.id, _key(content), finish), None)

    def _texts(self, row: Row, known: Mapping[str, Asked]) -> Iterator[str]:
        prompt, contents, finishes = parts_of(row)
        if prompt.content == "" and contents and isinstance(contents[0], str):
            yield from (self.text_row(str(content)) for content in contents)
            return
        if prompt.id in known:
            opened = known[prompt.id].rendering
        else:
            opened = self._opened[prompt.id] = self.opened(prompt)
            if not opened.typed:
                yield opened.text
        for content, finish in zip(contents, finishes, strict=True):
            made = self.finished(prompt, content, finish, opened)
            self._finished[prompt.id, _key(content), finish] = made
            if not made[1].typed:
                yield made[1].text

    # -- refusals ----------------------------------------------------------------------------------

    def _refuse_rendered(self, prompt: Prompt) -> None:
        content = prompt.content
        if isinstance(content, str) and self._opening and content.rstrip().endswith(self._opening):
            raise RowError(
                f"{prompt.where or 'a prompt'}: the prompt is already rendered by a chat template (it ends "
                f"with {self._opening!r}); expected the words of the turns. Give the turns as a list, or the "
                "prompt and its answer together in a column `text`, which is learnt unchanged.",
                prompt.where,
            )

    def _refusal(self, prompt: Prompt, error: Refused) -> RowError:
        where = prompt.where or "a prompt"
        return RowError(f"{where}: the chat template of {self._name} refuses it: {error}", prompt.where)


def turns_of(prompt: Prompt) -> tuple[Message, ...]:
    """Return the prompt as turns; a text is one turn of the user."""
    content = prompt.content
    return ({"role": "user", "content": content},) if isinstance(content, str) else content


def parts_of(row: Row) -> tuple[Prompt, tuple[Content, ...], tuple[Finish, ...]]:
    """Return a row's prompt, its answers and their finish reasons."""
    if isinstance(row, Prompt):
        return row, (), ()
    if isinstance(row, Demonstration):
        return row.prompt, (row.completion,), (row.finish,)
    return row.prompt, (row.chosen, row.rejected), (row.chosen_finish, row.rejected_finish)


def _key(content: Content) -> str | int:
    """Return a key of an answer while its row lives: the text, or the identity of its turns."""
    return content if isinstance(content, str) else id(content)
