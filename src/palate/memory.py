"""A memory of costly results: samples and log-probabilities, by keys of everything that they depend on.

Models and learners look into a `Memory` before they compute. Within a run, the journal is their memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from palate.types import Completion, Group, Prompt

Purpose = Literal["completion", "verdict", "prompt", "probe"]
"""The use of sampled text: a completion of the policy, a judge's verdict, a new prompt, or a completion that
only probes the judge."""

Logps = np.ndarray[Any, np.dtype[np.float32]]
"""Log-probabilities of the tokens of one completion. float32 (T,)"""


class Memory(Protocol):
    """Stores and returns samples and log-probabilities by key."""

    def completions(self, key: str) -> list[tuple[Completion, ...]] | None:
        """Return the chunk of a key, the completions of each of its prompts; None if it is not known."""

    def keep_completions(
        self,
        key: str,
        version: int,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        *,
        purpose: Purpose = "completion",
    ) -> None:
        """Keep a chunk that one version of a policy has sampled."""

    def logps(self, keys: Sequence[str]) -> list[Logps] | None:
        """Return the token log-probabilities of each key; None unless all keys are known."""

    def keep_logps(self, version: int, logps: Mapping[str, Logps]) -> None:
        """Keep token log-probabilities under one version of a policy; known keys stay as they are."""


def key_of(*parts: Any) -> str:
    """Return a key of everything that a result depends on: 32 hex digits, the same in every process.

    Args:
        parts: JSON values; other objects are represented by their `repr`.
    """
    text = json.dumps(parts, sort_keys=True, default=_as_json, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def content_key(prompt: Prompt, completion: Completion) -> str:
    """Return a key of the contents of a prompt and a completion."""
    return key_of(prompt.id, completion.token_ids, completion.text, completion.finish)


def group_key(group: Group) -> str:
    """Return a key of a prompt with several completions, in their order."""
    return key_of([content_key(group.prompt, c) for c in group.completions])


def _as_json(value: Any) -> Any:
    """Return an array's full content, since `repr` omits its middle; return the `repr` of other objects."""
    return [str(value.dtype), value.tolist()] if isinstance(value, np.ndarray) else repr(value)
