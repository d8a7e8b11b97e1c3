"""A finished pool, read by a method in place of sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from palate.annotate import Annotator
from palate.config import RewardConfig, Sampling
from palate.errors import ConfigError, DataError
from palate.learn.state import start_hash
from palate.memory import key_of
from palate.model import LoadedModel
from palate.model.codec import Codec
from palate.pool.facts import annotator_facts, changed_rewards, listed, missing_shards, read_facts, shard_path
from palate.pool.rows import Entry, prompt_key, read_shard
from palate.rundir import read_summary
from palate.types import Completion, Group, Prompt

NO_MATTER = frozenset({"sampling_rows"})
"""Sampling options that do not change the distribution of the completions."""

BILL = ("completions", "tokens", "verdicts", "cost", "seconds")
"""The parts of a pool's bill."""


class Pool:
    """The candidates of a pool, with their rewards.

    Args:
        directory: the pool's directory.

    Attributes:
        facts: the facts that the candidates depend on.

    Raises:
        ConfigError: the directory holds no pool, or a pool that is not finished.
        RunError: a file cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.facts = directory, read_facts(directory)
        self._rewards: dict[str, Entry] = {}
        self._used = self._tokens = 0
        missing = missing_shards(directory, self.facts)
        if missing:
            raise ConfigError(
                f"{self} is not finished: {self.facts.shards - len(missing)} of {self.facts.shards} files "
                "are written; run the `palate pool` command that began it again"
            )

    def __str__(self) -> str:
        """Return the pool's name in messages."""
        return f"the pool in {str(self.directory)!r}"

    def require(self, model: LoadedModel, sampling: Sampling, n: int, cfg: RewardConfig) -> None:
        """Check that the candidates are those that a method would sample and score itself.

        Args:
            model: the policy before training.
            sampling: the method's sampling options.
            n: number of completions that the method needs of each prompt.
            cfg: the method's reward or judge.

        Raises:
            ConfigError: the model, an option, or the reward is another one. The message names the difference.
        """
        facts, dtype = self.facts, str(model.dtype).removeprefix("torch.")
        if dtype != facts.dtype:
            raise ConfigError(
                f"{self} was sampled in {facts.dtype}, but the policy is in {dtype}; give --dtype "
                f"{facts.dtype}, or make another pool"
            )
        if (own := start_hash(model)) != facts.weights:
            raise ConfigError(
                f"{self} was sampled from the model {facts.model} (weights {facts.weights[:12]}), but the "
                f"policy starts from {model.source} (weights {own[:12]}); give --model {facts.model} as it "
                "was then, or make another pool"
            )
        if n > facts.n:
            raise ConfigError(
                f"{self} has {facts.n} completions of each prompt, but the method needs {n}; lower --n, or "
                f"make a pool with --n {n}"
            )
        here = sampling.model_dump(mode="json")
        self._same(facts.sampling, here, [name for name in here if name not in NO_MATTER], "was sampled with")
        if facts.annotator is None:
            return
        given = annotator_facts(cfg) or {}
        if not given:
            raise ConfigError(
                f"{self} was scored by {self._scored_by()}, but no reward is given here; give the same"
            )
        self._same(facts.annotator, given, [name for name in given if name != "code"], "was scored with")
        if changed := changed_rewards(facts.annotator, given):
            raise ConfigError(
                f"{self} was scored by another version of {', '.join(changed)}; restore it, or make another "
                "pool"
            )

    def groups(
        self, prompts: Sequence[Prompt], n: int, codec: Codec, say: Callable[[str], None] = lambda text: None
    ) -> list[Group]:
        """Return the first n completions of each prompt, without rewards, in the order of the prompts.

        A prompt that the pool could not sample is left out, and `say` receives the count and a reason.

        Raises:
            ConfigError: the pool lacks a prompt.
            DataError: no prompt has completions, or the policy's template gives other tokens for one.
        """
        wanted = {prompt_key(prompt): prompt for prompt in prompts}
        keys = frozenset(wanted)
        entries: dict[str, Entry] = {}
        for number in range(self.facts.shards):
            path = shard_path(self.directory, number)
            entries |= {entry.key: entry for entry in read_shard(path, keys=keys, n=n)}
        self._require_all(wanted, entries)
        self._require_tokens(wanted, entries, codec)
        self._rewards = entries
        usable = {key: entry for key, entry in entries.items() if entry.completions}
        failed = [entry for entry in entries.values() if not entry.completions]
        if not usable:
            raise DataError(
                f"{self} has no completions of these prompts; the first reason: {failed[0].error}"
            )
        if failed:
            say(
                f"{self} has no completions of {len(failed)} of {len(entries)} prompts, which are left out; "
                f"the first reason: {failed[0].error}"
            )
        groups = [Group(prompt, usable[key].completions) for key, prompt in wanted.items() if key in usable]
        self._used = sum(len(group.completions) for group in groups)
        self._tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
        return groups

    def annotator(self, annotate: Annotator) -> Annotator:
        """Return an annotator that gives the pool's rewards for its groups, and asks `annotate` for others.

        Rewards that depend on all completions of a group are computed again, because the method may compare
        other ones. A judge's verdicts are in the pool's file of verdicts, and cost nothing.
        """
        if self.facts.annotator is None or self.facts.scope == "group":
            return annotate

        def annotated(groups: Sequence[Group]) -> list[Group]:
            known = [self._known(group) for group in groups]
            unknown = [group for group, there in zip(groups, known, strict=True) if there is None]
            others = iter(annotate(unknown) if unknown else [])
            return [next(others) if there is None else there for there in known]

        return annotated

    def bill(self) -> dict[str, float]:
        """Return the cost of the candidates that were read: their part of the pool's cost."""
        total: Mapping[str, Any] = read_summary(self.directory) or {}
        annotator = self.facts.annotator or {}
        judge, scored = annotator.get("judge"), self._used if annotator else 0
        share = self._used / max(1, int(total.get("completions") or self._used or 1))
        return {
            "pool_completions": self._used,
            "pool_tokens": self._tokens,
            "pool_verdicts": round(share * float(total.get("judge_verdicts") or 0)) if judge else scored,
            "pool_cost": share * float(total.get("judge_cost") or 0.0),
            "pool_seconds": round(share * float(total.get("seconds") or 0.0), 1),
        }

    # -- inside ------------------------------------------------------------------------------------

    def _same(
        self, there: Mapping[str, Any], here: Mapping[str, Any], names: Sequence[str], verb: str
    ) -> None:
        other = [name for name in names if there.get(name) != here[name]]
        if other:
            flags = " ".join(f"--{name.replace('_', '-')}" for name in other)
            raise ConfigError(
                f"{self} {verb} {listed({**dict.fromkeys(other), **there}, other)}, but here it is "
                f"{listed(here, other)}; give the same {flags}, or make another pool"
            )

    def _scored_by(self) -> str:
        annotator = self.facts.annotator or {}
        return str(annotator.get("judge") or " + ".join(annotator.get("reward", ())))

    def _require_all(self, wanted: Mapping[str, Prompt], entries: Mapping[str, Entry]) -> None:
        lacking = [prompt for key, prompt in wanted.items() if key not in entries]
        if lacking:
            raise ConfigError(
                f"{self} lacks {len(lacking)} of {len(wanted)} prompts, the first is {_named(lacking[0])}; "
                "make it from the same data with the same columns, or use fewer prompts with --limit"
            )

    def _require_tokens(
        self, wanted: Mapping[str, Prompt], entries: Mapping[str, Entry], codec: Codec
    ) -> None:
        for key, prompt in wanted.items():
            if entries[key].completions and tokens_key(codec, prompt) != entries[key].tokens:
                raise DataError(
                    f"{self} was sampled after other tokens of the prompt {_named(prompt)}; give the same "
                    "--chat-template and --chat-template-kwargs, or make another pool"
                )

    def _known(self, group: Group) -> Group | None:
        """Return the group with the pool's rewards; None if a completion has none there."""
        entry = self._rewards.get(prompt_key(group.prompt))
        if entry is None or entry.rewards is None:
            return None
        place: dict[Completion, int] = {}
        for i, completion in enumerate(entry.completions):
            place.setdefault(completion, i)
        if any(completion not in place for completion in group.completions):
            return None
        at = [place[completion] for completion in group.completions]
        if self.facts.scope == "first" and at[0] != 0:
            return None
        parts = {name: tuple(values[i] for i in at) for name, values in entry.parts.items()}
        return replace(group, rewards=tuple(entry.rewards[i] for i in at), parts={**group.parts, **parts})


def _named(prompt: Prompt) -> str:
    return f"{prompt.text[:60]!r} {prompt.where}".rstrip()


def tokens_key(codec: Codec, prompt: Prompt) -> str:
    """Return a key of the tokens that completions of a prompt follow."""
    return key_of(codec.prompt_ids(prompt))
