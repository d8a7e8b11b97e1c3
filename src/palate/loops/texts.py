"""Completions from columns of the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from palate.errors import DataError
from palate.learn import Policy
from palate.run import Run
from palate.types import AnchoredPair, Completion, Pair, Prompt

MANY = 0.2
"""Share of texts longer than `max_new_tokens` from which `warn_of_long_texts` warns."""


def from_column(policy: Policy, prompt: Prompt, column: str) -> Completion:
    """Return the text in a column of a prompt's data row, as a completion.

    Raises:
        DataError: the column is missing or holds no text.
    """
    value = prompt.columns.get(column)
    if isinstance(value, Sequence) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0].get("content")  # a single assistant turn
    if not isinstance(value, str) or not value.strip():
        content = "missing" if column not in prompt.columns else repr(prompt.columns[column])[:60]
        raise DataError(
            f"{prompt.where or 'a prompt'}: column {column!r} is {content}; expected a text that answers the "
            f"prompt, which starts with {prompt.text[:40]!r}; use another column or fill it"
        )
    return policy.model.codec.completion(prompt, value)


def check_columns(policy: Policy, prompts: Iterable[Prompt], columns: Sequence[str]) -> None:
    """Raise the errors of `from_column` before sampling starts."""
    for prompt in prompts:
        for column in columns:
            from_column(policy, prompt, column)


def warn_of_long_texts(completions: Sequence[Completion], most: int, run: Run) -> None:
    """Warn if many texts of the data are longer than any sample can be, so that length alone separates them.

    Args:
        completions: the completions of the data.
        most: `max_new_tokens` of the samples.
        run: its display shows the warning.
    """
    longer = sum(len(completion.token_ids) > most for completion in completions)
    if longer > MANY * len(completions):
        run.display.say(
            f"{longer} of {len(completions)} texts of the data are longer than max_new_tokens ({most}), "
            "where samples are truncated, so the policy learns from the difference in length; raise "
            "max_new_tokens"
        )


def with_targets(policy: Policy, pairs: Iterable[Pair], column: str) -> list[Pair | AnchoredPair]:
    """Return the pairs, each anchored at the text in a column of its data row."""
    return [AnchoredPair(pair, from_column(policy, pair.prompt, column)) for pair in pairs]
