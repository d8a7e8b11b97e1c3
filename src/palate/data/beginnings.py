"""The common beginning of two completions, which is the prompt if a row has no other."""

from __future__ import annotations

from collections.abc import Sequence

HH_TURN = "\n\nAssistant:"
"""The text before an answer in Anthropic's HH texts."""


def shared_text(chosen: str, rejected: str) -> int:
    """Return the length of the shared prompt: to the last shared turn in HH's texts, else whole words."""
    shared = agreement(chosen, rejected)
    if HH_TURN in chosen and HH_TURN in rejected:
        turn = chosen.rfind(HH_TURN, 0, shared)
        return turn + len(HH_TURN) if turn >= 0 else 0
    cut = min(shared, len(chosen) - 1, len(rejected) - 1)  # leaves something of each

    def ends_word(cut: int) -> bool:
        return not chosen[cut - 1].isspace() and chosen[cut].isspace() and rejected[cut].isspace()

    return next((at for at in range(cut, 0, -1) if ends_word(at)), 0)


def agreement(one: Sequence[object], other: Sequence[object]) -> int:
    """Return the number of equal characters or turns at the start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (mine, yours) in pairs if mine != yours), min(len(one), len(other)))
