"""Sampling and scoring of one shard. A bad row gets an error, and the others of its shard go through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from palate.annotate import Annotator
from palate.config import RewardConfig, Sampling
from palate.errors import AGAIN, AnnotatorError, DataError, RunError
from palate.memory import content_key
from palate.model import LoadedModel, Snapshot
from palate.model.rollouts import Drawn
from palate.pool import Entry, prompt_key
from palate.pool.facts import Scope
from palate.pool.pool import tokens_key
from palate.select import distinct, same
from palate.types import Completion, Group, Prompt

EMPTY = "the completion is empty"
NO_REWARD = "the reward gave no number"

MANY = 8
"""Completions of several prompts that fail together from which the annotator is at fault, not the rows."""

FREE = ("length:", "regex:", "model:", "ranker:", "sentiment", "on-topic")
"""Rewards that compute from the text alone, at no price, so any process may compute them again."""

Sampler = Callable[[Sequence[Prompt]], Drawn]
"""Begins to sample the completions of some prompts; every prompt has room for them."""


@dataclass(frozen=True)
class Source:
    """The model of a pool: its tokens, and the function that samples from it.

    Attributes:
        model: the model; its codec renders the prompts.
        sampler: begins to sample n completions of each prompt.
        limit: most tokens of a completion.
        longest: most tokens of a prompt with its completion that a server takes; None without a server.
        refused: the reasons of a server that refuses prompts, by their tokens; the completions of such a
            prompt say nothing.
        ahead: number of shards that are begun before the completions of an earlier one are there.
        require_answer: raises an error if a server refuses any prompt, not only those of a shard.
    """

    model: LoadedModel
    sampler: Sampler
    limit: int
    longest: int | None = None
    refused: Mapping[Sequence[int], str] = field(default_factory=dict)
    ahead: int = 0
    require_answer: Callable[[], None] = lambda: None

    def require_room(self, prompt: Prompt) -> None:
        """Check that a prompt leaves room for a completion.

        Raises:
            DataError: it does not.
        """
        room = self.model.codec.room(prompt, need=self.limit)
        used = self.model.codec.max_length - room
        if self.longest is not None and used + self.limit > self.longest:
            raise DataError(
                f"{prompt.where or 'a prompt'}: the prompt has {used} tokens, which leaves no room for "
                f"{self.limit} new tokens, since the vLLM server takes at most {self.longest} in all; start "
                "it with a larger --max-model-len, or shorten or drop the prompt"
            )


def local_source(
    model: LoadedModel, n: int, sampling: Sampling, *, seed: int, observe: Callable[[str, int], None]
) -> Source:
    """Return a loaded model as a source. Its draws are those of a method's first round with the same seed."""
    snapshot = Snapshot(0, lambda: nullcontext(model), micro_batch_tokens=2048, observe=observe)
    return Source(
        model,
        lambda prompts: snapshot.begin(prompts, n, sampling, seed=seed),
        sampling.max_new_tokens,
    )


def split(prompts: Sequence[Prompt], size: int) -> list[range]:
    """Return the numbers of the prompts of each shard.

    Rows with the same prompt and other columns stay together: sampled in one call, they get different draws.
    `together` must have put them side by side.
    """
    shards: list[range] = []
    start = 0
    while start < len(prompts):
        end = min(start + size, len(prompts))
        while end < len(prompts) and prompts[end].id == prompts[end - 1].id:
            end += 1
        shards.append(range(start, end))
        start = end
    return shards


def together(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts with those of the same content side by side, otherwise in their order."""
    alike: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        alike.setdefault(prompt.id, []).append(prompt)
    return [prompt for own in alike.values() for prompt in own]


@dataclass(frozen=True)
class BegunShard:
    """A shard whose prompts are being sampled.

    Attributes:
        source: the model that samples.
        known: an entry without completions for each row of the shard.
        fitting: the rows that are sampled, in order.
        drawn: their completions; None if no prompt has room for them.
    """

    source: Source
    known: Mapping[int, Entry]
    fitting: Sequence[int]
    drawn: Drawn | None

    def ready(self) -> bool:
        """Return whether `entries` waits for no completion."""
        return self.drawn is None or self.drawn.ready()

    def entries(self) -> list[Entry]:
        """Wait for the completions; a prompt that cannot be sampled has an error.

        Raises:
            ConfigError, RunError: the server fails, or refuses all of several prompts, or any prompt.
        """
        entries = dict(self.known)
        groups = self.drawn.groups() if self.drawn is not None else []
        for row, group in zip(self.fitting, groups, strict=True):
            ids = tuple(self.source.model.codec.prompt_ids(group.prompt)) if self.source.refused else ()
            if (why := self.source.refused.get(ids)) is not None:
                entries[row] = replace(entries[row], error=f"the vLLM server refuses the prompt: {why}")
                continue
            errors = tuple(None if c.text.strip() else EMPTY for c in group.completions)
            entries[row] = replace(entries[row], completions=group.completions, errors=errors)
        if self.fitting and not any(entries[row].completions for row in self.fitting):
            if len(self.fitting) > 1:
                raise RunError(
                    f"all of {len(self.fitting)} prompts fail: {entries[self.fitting[0]].error}; finished "
                    f"shards are kept: repair the cause, then {AGAIN}"
                )
            self.source.require_answer()
        return [entries[row] for row in self.known]


def sample_shard(source: Source, prompts: Sequence[Prompt], rows: range) -> list[Entry]:
    """Sample the completions of a shard's prompts; see `begin_shard`."""
    return begin_shard(source, prompts, rows).entries()


def begin_shard(source: Source, prompts: Sequence[Prompt], rows: range) -> BegunShard:
    """Begin to sample the completions of a shard's prompts; a prompt without room for them gets an error.

    Raises:
        DataError: none of several prompts can be sampled.
    """
    entries: dict[int, Entry] = {}
    fitting: list[int] = []
    failed: DataError | None = None
    for row in rows:
        prompt = prompts[row]
        try:
            source.require_room(prompt)
        except DataError as error:
            failed = failed or error
            entries[row] = Entry(row, prompt_key(prompt), "", error=str(error))
        else:
            tokens = tokens_key(source.model.codec, prompt)
            entries[row] = Entry(row, prompt_key(prompt), tokens)
            fitting.append(row)
    if failed is not None and not fitting and len(rows) > 1:
        raise failed
    drawn = source.sampler([prompts[row] for row in fitting]) if fitting else None
    return BegunShard(source, entries, fitting, drawn)


class Scoring:
    """Scores the completions of shards.

    Args:
        annotate: the annotator; None leaves the completions without rewards.
        scope: the texts that its rewards depend on.
    """

    def __init__(self, annotate: Annotator | None, scope: Scope) -> None:
        self.annotate, self._scope = annotate, scope
        self._excused: dict[str, str] = {}
        self._works = False

    def excuse(self, prompt: Prompt, completion: Completion, error: AnnotatorError) -> None:
        """Note the error of a reward function for a row, which gets no reward."""
        self._excused[content_key(prompt, completion)] = str(error)

    def __call__(self, entries: Sequence[Entry], prompts: Sequence[Prompt]) -> list[Entry]:
        """Return the entries with rewards and errors.

        Raises:
            AnnotatorError: the annotator fails for all of several prompts.
            BudgetError: a limit of the judge is reached.
        """
        if self.annotate is None:
            return list(entries)
        groups = [Group(prompts[e.row], e.completions) for e in entries if e.completions]
        unlike = [distinct(group) if self._scope == "group" else group for group in groups]
        scored = iter(zip(groups, self._rated(unlike, first=not self._works), strict=True))
        results = [self._entry(e, *next(scored)) if e.completions else e for e in entries]
        self._require_some(results)
        return results

    # -- inside ------------------------------------------------------------------------------------

    def _rated(self, groups: Sequence[Group], *, first: bool = False) -> list[tuple[Group, str | None]]:
        """Return each group with rewards; if the annotator fails for it, with None and the error.

        After an error the groups are halved until the failing ones are alone, and a failing group is asked
        about by completion, if its rewards do not depend on each other.

        Args:
            groups: the groups.
            first: nothing has had a reward so far, so the annotator itself may be at fault.

        Raises:
            AnnotatorError: `first`, and the annotator also fails for three groups by themselves.
        """
        assert self.annotate is not None
        if not groups:
            return []
        try:
            return [(group, None) for group in self.annotate(groups)]
        except AnnotatorError as error:
            if (
                first
                and len(groups) > 2
                and not self._rates_any(groups[0], groups[-1], groups[len(groups) // 2])
            ):
                raise
            if len(groups) > 1:
                half = len(groups) // 2
                return [*self._rated(groups[:half]), *self._rated(groups[half:])]
            group, why = groups[0], str(error)
        singles = [replace(group, completions=(c,)) for c in group.completions]
        if len(singles) == 1 or self._scope != "completion":
            return [(group.annotated((None,) * len(singles)), why)]
        rated = self._rated(singles)
        for single, reason in rated:
            if reason is not None:
                self._excused[content_key(group.prompt, single.completions[0])] = reason
        return [(group.annotated(tuple((single.rewards or (None,))[0] for single, _ in rated)), None)]

    def _rates_any(self, *groups: Group) -> bool:
        return any(r is not None for g in groups for r in self._rated([g])[0][0].rewards or ())

    def _entry(self, entry: Entry, group: Group, rated: tuple[Group, str | None]) -> Entry:
        """Return an entry with the rewards of its distinct completions, repetitions included."""
        scored, why = rated
        place: Sequence[int] = range(len(entry.completions))
        if len(scored.completions) < len(entry.completions):  # repetitions were left out
            place = [
                next(j for j, kept in enumerate(scored.completions) if same(kept, c))
                for c in entry.completions
            ]
        given = scored.rewards or (None,) * len(scored.completions)
        rewards = tuple(given[j] for j in place)
        parts = {name: tuple(values[j] for j in place) for name, values in scored.parts.items()}
        errors = tuple(
            error or (None if reward is not None else self._reason(group.prompt, c, why))
            for c, reward, error in zip(entry.completions, rewards, entry.errors, strict=True)
        )
        return replace(entry, rewards=rewards, parts=parts, errors=errors)

    def _reason(self, prompt: Prompt, completion: Completion, why: str | None) -> str:
        return why or self._excused.get(content_key(prompt, completion), NO_REWARD)

    def _require_some(self, entries: Sequence[Entry]) -> None:
        """Raise AnnotatorError if nothing has had a reward so far and several prompts fail together."""
        scored = [entry for entry in entries if entry.completions]
        self._works = self._works or any(r is not None for e in scored for r in e.rewards or ())
        if self._works or len(scored) < 2 or sum(len(e.completions) for e in scored) < MANY:
            return
        first = next(error for error in scored[0].errors if error is not None)
        raise AnnotatorError(
            f"no completion of {len(scored)} prompts has a reward; the first reason: {first}"
        )


def scores_anywhere(cfg: RewardConfig) -> bool:
    """Return whether any process may score: a judge or a function may cost money, and its answers must be
    stored at once.
    """
    own = [str(spec).rpartition("*")[2].strip() for spec in cfg.reward]
    return cfg.judge is None and not cfg.label_noise and bool(own) and all(s.startswith(FREE) for s in own)


def counts_of(entries: Sequence[Entry]) -> dict[str, int]:
    """Return the numbers of prompts, completions, tokens and bad rows of a shard."""
    completions = [c for entry in entries for c in entry.completions]
    errors = [error for entry in entries for error in entry.errors]
    return {
        "prompts": len(entries),
        "failed_prompts": sum(not entry.completions for entry in entries),
        "completions": len(completions),
        "tokens": sum(len(c.token_ids) for c in completions),
        "truncated": sum(c.finish == "length" for c in completions),
        "empty": sum(error == EMPTY for error in errors),
        "without_reward": sum(r is None for entry in entries for r in entry.rewards or ()),
    }


def added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """Return the sums of two counts."""
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def first_errors(entries: Sequence[Entry], prompts: Sequence[Prompt]) -> list[tuple[str, Any]]:
    """Return the place and the error of each bad row."""
    return [
        (prompts[entry.row].where or prompts[entry.row].text[:60], error)
        for entry in entries
        for error in ((entry.error,) if not entry.completions else entry.errors)
        if error is not None
    ]
