"""Templates: Jinja files with the text of a judge's questions. A user can replace each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from palate.errors import AnnotatorError

Mode = Literal["pairwise", "score", "rubric"]

_NEEDS = {
    "pairwise": ("prompt", "first", "second", "label_first", "label_second"),
    "score": ("prompt", "completion"),
    "rubric": ("prompt", "completion"),
}
"""Variables that a template must use, since its question is incomplete without them."""

_MAY = ("criteria", "nonce", "reasoning", "labels")


class Template:
    """The text around a question.

    Values are inserted once and never read as template text, so braces in a completion stay braces. The
    environment is a sandbox without files: a template can only reach its variables.

    Attributes:
        mode: the kind of verdict that it asks for.
        hash: the hash of its text, part of every verdict's key.

    Args:
        text: the Jinja text.
        mode: pairwise (variables `prompt`, `first`, `second`, `label_first`, `label_second`), score or rubric
            (`prompt`, `completion`). All may use `criteria`, `nonce`, `reasoning` and `labels`.
        name: the name in messages.

    Raises:
        AnnotatorError: the text is not valid Jinja, lacks a variable that its mode needs, or uses an unknown
            one.
    """

    def __init__(self, text: str, mode: Mode, *, name: str) -> None:
        self.mode, self.name = mode, name
        self.hash = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, autoescape=False, keep_trailing_newline=False, trim_blocks=True
        )
        try:
            used = meta.find_undeclared_variables(environment.parse(text))
            self._compiled = environment.from_string(text)
        except TemplateError as error:
            raise AnnotatorError(f"judge template {name}: it is not valid Jinja: {error}") from error
        needs = _NEEDS[mode]
        missing = [variable for variable in needs if variable not in used]
        unknown = sorted(used - {*needs, *_MAY})
        if missing or unknown:
            wrong = f"lacks {{{{ {missing[0]} }}}}" if missing else f"uses {{{{ {unknown[0]} }}}}"
            raise AnnotatorError(
                f"judge template {name}: it {wrong}; a template for --judge-mode {mode} uses "
                f"{', '.join(needs)}, and may use {', '.join(_MAY)}"
            )

    @classmethod
    def load(cls, mode: Mode, path: Path | None = None, *, name: str | None = None) -> Template:
        """Return the template in a file, or one of Palate's own.

        Args:
            mode: the kind of verdict that it asks for.
            path: the file; Palate's own template if not given.
            name: the name of Palate's own template; the name of the mode if not given.

        Raises:
            AnnotatorError: the file cannot be read or used.
        """
        if path is None:
            own = name or mode
            text = resources.files(__package__).joinpath("templates", f"{own}.jinja").read_text("utf-8")
            return cls(text, mode, name=own)
        try:
            text = path.expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise AnnotatorError(f"judge template {str(path)!r} cannot be read: {reason}") from error
        return cls(text, mode, name=repr(str(path)))

    def render(
        self,
        *,
        prompt: str,
        texts: Sequence[str],
        labels: Sequence[str],
        nonce: str,
        criteria: str,
        reasoning: bool,
    ) -> str:
        """Return the question as text.

        Raises:
            AnnotatorError: the template fails.
        """
        names = ("first", "second") if self.mode == "pairwise" else ("completion",)
        values = dict(zip(names, texts, strict=True))
        if self.mode == "pairwise":
            values |= {"label_first": labels[0], "label_second": labels[1]}
        try:
            return self._compiled.render(
                values, prompt=prompt, labels=labels, nonce=nonce, criteria=criteria, reasoning=reasoning
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise AnnotatorError(f"judge template {self.name} fails: {error}") from error
