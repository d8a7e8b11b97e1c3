"""What methods share that learn from texts of the data beside the policy's own: a column as completions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from palate.errors import DataError
from palate.learn import Policy
from palate.types import AnchoredPair, Completion, Pair, Prompt


def from_column(policy: Policy, prompt: Prompt, column: str) -> Completion:
    """The text that a prompt's data row has in a column, as a completion.

    Raises:
        DataError: there is none.
    """
    value = prompt.columns.get(column)
    if isinstance(value, Sequence) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0].get("content")  # one turn of an assistant
    if not isinstance(value, str) or not value.strip():
        found = "missing" if column not in prompt.columns else repr(prompt.columns[column])[:60]
        raise DataError(
            f"{prompt.where or 'a prompt'}: column {column!r} is {found}; expected a text that answers the "
            f"prompt (it begins {prompt.text[:40]!r}); name another column or fill it"
        )
    return policy.model.codec.completion(prompt, value)


def check_columns(policy: Policy, prompts: Iterable[Prompt], columns: Sequence[str]) -> None:
    """Find out before anything is sampled whether `from_column` will do."""
    for prompt in prompts:
        for column in columns:
            from_column(policy, prompt, column)


def with_targets(policy: Policy, pairs: Iterable[Pair], column: str) -> list[Pair | AnchoredPair]:
    """The pairs, each with the text that its data row has in a column for an anchor."""
    return [AnchoredPair(pair, from_column(policy, pair.prompt, column)) for pair in pairs]
