"""The engine that samples a pool: Palate's own, or a vLLM server that has the model's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.config import Sampling
from palate.errors import RunError
from palate.model import LoadedModel
from palate.model.rollouts import SERVED_ROWS, Drawn
from palate.pooling.config import PoolConfig
from palate.pooling.shards import Source, local_source
from palate.types import Group

if TYPE_CHECKING:
    from palate.model.rows import Row
    from palate.model.served.sampler import VLLMSampler

AHEAD = 1
"""Shards that a server samples while the process waits for an earlier one, or scores it."""

KEPT = "finished shards are kept"


@dataclass(frozen=True)
class Served:
    """A vLLM server with the weights of a pool, as workers need it.

    Attributes:
        identity: its name and version.
        weights: the model's name in requests.
    """

    identity: str
    weights: str


@contextmanager
def serving(
    cfg: PoolConfig, model: LoadedModel, directory: Path, *, say: Callable[[str], None]
) -> Iterator[Served]:
    """Let a vLLM server sample from a model within the context; see `open_server`."""
    served = open_server(cfg, model, directory, say=say)
    sampler: Any = model.sampler
    del model  # if workers sample, no other reference keeps it in memory
    try:
        yield served
    finally:
        sampler.close()


def open_server(
    cfg: PoolConfig, model: LoadedModel, directory: Path, *, say: Callable[[str], None] = lambda text: None,
    served: Served | None = None,
) -> Served:  # fmt: skip
    """Let a vLLM server sample from a model.

    Args:
        cfg: the options, which name the server.
        model: the model.
        directory: the pool's directory.
        say: shows a message.
        served: the server that another process has opened, with the weights; None to publish them.

    Raises:
        ConfigError: the server has another model, or cannot be used as it was started.
        RunError: the server does not answer, or is another one than `served`.
    """
    from palate.model.served.connect import connected  # loads an HTTP client

    with ExitStack() as undo:
        sampler = connected(
            cfg, model, directory, remember=lambda identity: identity, say=say, fixed=True, kept=KEPT
        )
        undo.callback(sampler.close)
        if served is not None:
            if sampler.identity != served.identity:
                raise RunError(
                    f"a worker reaches {sampler.identity}, but the process that began the pool "
                    f"{served.identity}; let all servers behind one address have the same version"
                )
            sampler.adopt(served.weights)
        weights = sampler.publish(model).name
        undo.pop_all()
    model.sampler = sampler
    return Served(sampler.identity, weights)


def source_of(
    model: LoadedModel, n: int, sampling: Sampling, *, seed: int, observe: Callable[[str, int], None],
    workers: int = 1,
) -> Source:  # fmt: skip
    """Return a model as a source, which samples with the model's server if it has one.

    Args:
        model, n, sampling, seed, observe: as in `local_source`.
        workers: number of processes that share the server.
    """
    sampler: Any = model.sampler
    if sampler is None:
        return local_source(model, n, sampling, seed=seed, observe=observe)
    rows = max(1, (sampling.sampling_rows or SERVED_ROWS) // workers)
    shared = sampling.model_copy(update={"sampling_rows": rows})
    source = local_source(model, n, shared, seed=seed, observe=observe)
    refused: dict[Sequence[int], str] = {}

    def excuse(row: Row, why: str) -> None:
        refused[row.prompt_ids] = why
        row.add(model.codec.end_id, 0.0, 0.0)  # a completion has a token; the pool leaves it out

    sampler.excuse = excuse
    return replace(
        source,
        sampler=lambda prompts: _Checked(source.sampler(prompts), sampler, model, refused),
        longest=sampler.longest,
        refused=refused,
        require_answer=cache(partial(sampler.require_answer, model, shared)),  # one answer is enough
        ahead=AHEAD,
    )


@dataclass(frozen=True)
class _Checked:
    """Completions of a server, which are compared with the model; see `Drawn`.

    A server that is started again with another model has the same name. The comparison sends no request, so
    complete samples outlive the server.

    Attributes:
        drawn, sampler, model: the completions, their server and its model.
        refused: the prompts without completions, by their tokens.
    """

    drawn: Drawn
    sampler: VLLMSampler
    model: LoadedModel
    refused: Mapping[Sequence[int], str]

    def ready(self) -> bool:
        return self.drawn.ready()

    def groups(self) -> list[Group]:
        groups = self.drawn.groups()
        ids = self.model.codec.prompt_ids
        sampled = [g for g in groups if not self.refused or tuple(ids(g.prompt)) not in self.refused]
        self.sampler.require_own(self.model, sampled)
        return groups
