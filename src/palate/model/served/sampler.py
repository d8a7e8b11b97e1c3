"""Sampling by a vLLM server, from versions of a policy that are published to it.

An adapter is published as a directory under a name that is never used again: vLLM caches prefixes by the
adapter's name. All weights are published as a checkpoint that replaces the server's weights, with a label
that its replies repeat. A reply of another name or label is refused.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from palate import eventloop
from palate.config import Sampling
from palate.errors import AGAIN, ConfigError, RunError
from palate.model.loaded import Fill, LoadedModel
from palate.model.rows import Row
from palate.model.served.api import API, RefusedError
from palate.model.served.weights import OTHER_GAP, Probe, allowed, probed, sample_gap, write_untied
from palate.model.served.wire import (
    GENERATE,
    OF_ONE_ROW,
    answered,
    body_of,
    explained,
    first_completion,
    read_reply,
)
from palate.model.sharded import to_save
from palate.rundir.writing import writing
from palate.types import Group
from palate.world import current

T = TypeVar("T")

PROBE = {"max_new_tokens": 16, "min_new_tokens": 16}
"""Options of the completions that test a server."""

BATCHES = 2
"""Batches that are sampled at once: the second fills the server while the first ends."""

UNLOAD = "/v1/unload_lora_adapter"

UNLOAD_LIMIT = 5.0
"""Seconds for the removal of all adapters at the end; nothing depends on it, so a slow server keeps them."""


@dataclass(eq=False)
class Published:
    """Weights that the server has.

    Attributes:
        name: the model's name in requests.
        users: number of batches that are being sampled from them.
    """

    owner: VLLMSampler
    name: str
    users: int = 0

    def begin(self, work: Callable[[Fill], T]) -> Future[T]:
        """Call a function in the background, with the function that samples from these weights."""
        return self.owner.begin(self, work)


class VLLMSampler:
    """Samples with a vLLM server; a `Sampler`.

    Attributes:
        identity: the engine, its version and its model, as part of the memory's keys.
        longest: the most tokens of a prompt with its completion.
        excuse: receives a row that the server refuses by itself, and the reason, and fills the row; None lets
            the refusal end the batch.

    Args:
        api: the server.
        base: the name of its base model.
        longest: see above.
        end_ids: the tokens that end a completion.
        directory: a directory that the server can read, for published weights.
        identity: see above.
        prefix: the beginning of the names of published weights, which no other run has.
        untied: the server's model has a head of its own, while the policy's shares the embedding's weights.
        close: called at the end.
    """

    def __init__(
        self, api: API, *, base: str, longest: int, end_ids: frozenset[int], directory: Path, identity: str,
        prefix: str, untied: bool = False, close: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.identity, self._untied = identity, untied
        self._api, self._base, self.longest, self._end_ids = api, Published(self, base), longest, end_ids
        self.excuse: Callable[[Row, str], None] | None = None
        self._adopted: Published | None = None
        self._directory, self._close = directory, close
        self._label: str | None = None
        self._probe: Probe | None = None
        self._prefix, self._count = prefix, 0
        self._changed = threading.Condition()
        self._names: list[Published] = []
        self._latest: tuple[weakref.ref[Any], int, Published] | None = None
        self._pool = ThreadPoolExecutor(BATCHES, thread_name_prefix="palate-vllm")
        # Inside `World.lead` and in other threads the number of processes reads otherwise.
        self._processes = current().size
        self._rooms: dict[int, asyncio.Semaphore] = {}
        self._running: set[Future[None]] = set()
        self._closed = False

    def publish(self, model: LoadedModel) -> Published:
        """Make the model's current weights available on the server, unless they are; a collective.

        Raises:
            ConfigError: the server cannot take weights of this kind.
            RunError: the server does not answer.
        """
        if model.adapter_off:
            return self._base
        if self._adopted is not None:
            return self._adopted
        known = self._latest
        if known is not None and known[0]() is model.network and known[1] == model.revision:
            return known[2]
        self._count += 1
        name = f"{self._prefix}-{self._count}"
        whole = to_save(model)
        if model.peft is not None:
            current().lead("publish an adapter", partial(self._publish_adapter, whole, name))
            new = Published(self, name)
            self._names.append(new)
        else:
            with self._changed:  # the server has one set of weights
                self._changed.wait_for(lambda: self._base.users == 0)
            current().gather("no process samples", None)
            current().lead("publish weights", partial(self._publish_weights, whole, name))
            self._label, new = name, self._base
        self._latest = (weakref.ref(model.network), model.revision, new)
        self._unload(keep=new)
        return new

    def adopt(self, name: str) -> None:
        """Sample from weights that the server has under a name, and publish none.

        They are the model's own: those of the server's start, or published by another process.
        """
        self._adopted = Published(self, name)

    def require_own(self, model: LoadedModel, groups: Sequence[Group]) -> None:
        """Check that the server sampled completions with the model's weights; this sends no request.

        Raises:
            RunError: it has others, such as those of an earlier checkpoint.
        """
        gap, tokens = sample_gap(model, groups)
        most = allowed(model, tokens)
        if not gap <= most:
            raise RunError(
                f"the vLLM server at {self._api.url} samples with another model than {model.source}: the "
                f"log-probabilities of {tokens} sampled tokens differ by {gap:.2g} nats on average (at most "
                f"{most:.2g} is allowed); start the server with the model, then {AGAIN}"
            )

    def require_answer(self, model: LoadedModel, sampling: Sampling) -> None:
        """Ask for a completion of one token, to learn if the server or a prompt causes a refusal.

        Raises:
            ConfigError, RunError: the server refuses this, too, or does not answer.
        """
        first_completion(self._api, self.publish(model).name, model.codec.end_id, sampling)

    def begin(self, weights: Published, work: Callable[[Fill], T]) -> Future[T]:
        """Call a function in the background; the weights stay on the server until it returns."""
        with self._changed:
            weights.users += 1

        def working() -> T:
            try:
                return work(partial(self._fill, weights))
            finally:
                with self._changed:
                    weights.users -= 1
                    self._changed.notify_all()

        return self._pool.submit(working)

    def close(self) -> None:
        """Stop sampling, remove what was published, and end a server that the run has started."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for future in list(self._running):
            future.cancel()
        self._pool.shutdown(wait=True)
        if current().leads:
            self._unload_all()
            shutil.rmtree(self._directory, ignore_errors=True)
        eventloop.run(self._api.close())
        self._close()

    # -- sampling ----------------------------------------------------------------------------------

    def _fill(self, weights: Published, groups: Sequence[list[Row]], sampling: Sampling) -> Iterator[int]:
        """Fill rows with tokens from the server; see `Fill`.

        All batches and all processes together send at most `sampling_rows` requests at once: others would
        wait in the server, and their time would run out there.
        """
        rows = [row for group in groups for row in group]
        self._require_room(rows, sampling)
        filled: SimpleQueue[int | None] = SimpleQueue()

        async def one(row: Row, room: asyncio.Semaphore) -> None:
            async with room:
                body = body_of(row, sampling, weights.name, self._end_ids)
                try:
                    reply = await self._api.post(GENERATE, body)
                except RefusedError as error:
                    if self.excuse is None or error.status not in OF_ONE_ROW:
                        raise
                    self.excuse(row, str(error))
                    return
            self._check(read_reply(reply, row, sampling, self._end_ids, model=weights.name))
            filled.put(len(row.tokens))

        async def everything() -> None:
            most = max(1, (sampling.sampling_rows or len(rows)) // self._processes)
            room = self._rooms.setdefault(most, asyncio.Semaphore(most))
            try:
                async with asyncio.TaskGroup() as tasks:
                    for row in rows:
                        tasks.create_task(one(row, room))
            finally:
                filled.put(None)  # after the last row, or after a failure

        future = eventloop.begin(everything())
        self._running.add(future)
        if self._closed:
            future.cancel()
        try:
            while (tokens := filled.get()) is not None:
                yield tokens
            wait([future])
            if (failure := self._failure(future)) is not None:
                raise failure
        finally:
            future.cancel()
            self._running.discard(future)

    def _failure(self, future: Future[None]) -> BaseException | None:
        """Return the first error of the tasks behind a finished future."""
        if future.cancelled():
            return RunError("sampling was stopped")
        error = future.exception()
        first = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
        return explained(first, self._api, "sample") if isinstance(first, RefusedError) else first

    def _check(self, label: str | None) -> None:
        """Refuse a reply of other weights than those that were published last, or replied first."""
        if self._label is None:
            self._label = label
        if label != self._label:
            raise RunError(
                f"the vLLM server's weights are {label!r}, expected {self._label!r}: another program has "
                "exchanged them, or the server was started again; use a server of its own for each run that "
                f"trains all weights, and {AGAIN}"
            )

    def _require_room(self, rows: Sequence[Row], sampling: Sampling) -> None:
        most = max((len(row.prompt_ids) for row in rows), default=0) + sampling.max_new_tokens
        if most > self.longest:
            raise ConfigError(
                f"a prompt and {sampling.max_new_tokens} new tokens need {most} tokens, but the vLLM server "
                f"takes {self.longest}; start it with a larger --max-model-len, or lower --max-new-tokens"
            )

    # -- publishing --------------------------------------------------------------------------------

    def _publish_adapter(self, model: LoadedModel, name: str) -> None:
        if model.whole_embeddings:
            raise ConfigError(
                f"the adapter of {model.source} has whole embeddings, which vLLM does not serve; use "
                "--rollouts local, or --no-lora if the adapter is trained"
            )
        assert model.peft is not None, "it has an adapter"
        path = self._write(name, partial(model.peft.save_pretrained, save_embedding_layers=False))
        body = {"lora_name": name, "lora_path": str(path.resolve())}
        # The server has loaded it if the reply to an earlier attempt was lost: no other run has this name.
        self._send("/v1/load_lora_adapter", body, "load an adapter", fine="already been loaded")
        if self._count > 1:
            return
        gap = self._probed(model, name).gap()
        if not gap <= OTHER_GAP:
            raise ConfigError(
                f"the vLLM server at {self._api.url} has loaded the policy's adapter, but its "
                f"log-probabilities differ from the policy's by {gap:.2g} nats on average (at most "
                f"{OTHER_GAP} is allowed), so it does not compute with it; use another version of vLLM, "
                "--no-lora or --rollouts local"
            )

    def _publish_weights(self, model: LoadedModel, name: str) -> None:
        save = partial(write_untied, model.network) if self._untied else model.network.save_pretrained
        path = self._write(name, save)
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(path.resolve())}}
        self._send("/collective_rpc", reload, "load all weights")
        answer = self._send("/reset_prefix_cache", {}, "forget what the old weights computed")
        if isinstance(answer, dict) and answer.get("success") is False:
            raise RunError(
                f"the vLLM server at {self._api.url} keeps what its old weights computed, since it is busy; "
                "use a server of its own for each run that trains all weights"
            )
        self._send("/update_weight_version", {"new_version": name}, "label its weights")
        shutil.rmtree(path, ignore_errors=True)
        probe = self._probed(model, self._base.name)
        if self._probe is None or not probe.repeats(self._probe):
            self._probe = probe
        elif probe.has_changed(self._probe, model.dtype):
            raise ConfigError(
                f"the vLLM server at {self._api.url} has loaded the policy's weights, but still computes "
                f"with older ones: its log-probabilities of {len(probe.tokens)} tokens are exactly those of "
                "an earlier version; use another version of vLLM, LoRA or --rollouts local"
            )
        gap = probe.gap()
        if not gap <= allowed(model):
            raise ConfigError(
                f"the vLLM server at {self._api.url} has loaded the policy's weights, but its "
                f"log-probabilities differ from the policy's by {gap:.2g} nats on average (at most "
                f"{allowed(model)} is allowed), as in vLLM's CPU build if head and embedding share their "
                "weights; use LoRA, or --rollouts vllm, which avoids this"
            )

    def _probed(self, model: LoadedModel, name: str) -> Probe:
        """Return the server's completion from published weights, with the model's own log-probabilities."""
        row = first_completion(self._api, name, model.codec.end_id, Sampling.model_validate(PROBE))
        return probed(model, row.prompt_ids, row.tokens, row.logps)

    def _write(self, name: str, save: Callable[[Path], None]) -> Path:
        """Write weights into a directory that appears when it is complete."""
        path = self._directory / name
        part = path.with_name(f".{name}.part")
        try:
            with writing(path):
                part.mkdir(parents=True)
                save(part)
                os.replace(part, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)  # a part that stays would take room on a full disk
        return path

    def _unload(self, keep: Published) -> None:
        """Remove adapters that no process samples from; several processes agree on them."""
        with self._changed:
            busy = [p.name for p in self._names if p.users or p is keep]
        needed = {name for names in current().gather("adapters in use", busy) for name in names}
        for old in [p for p in self._names if p.name not in needed]:
            self._names.remove(old)
            if current().leads:
                # A server that was started again has lost it, which is as good.
                body = {"lora_name": old.name}
                self._send(UNLOAD, body, "unload an adapter", fine="cannot be found")
                shutil.rmtree(self._directory / old.name, ignore_errors=True)

    def _unload_all(self) -> None:
        """Remove the adapters from the server, which may be another person's, unless it is gone or slow."""

        async def sent() -> None:
            async with asyncio.timeout(UNLOAD_LIMIT):
                for old in self._names:
                    with suppress(RefusedError):
                        await self._api.post(UNLOAD, {"lora_name": old.name}, retries=0)

        if self._names:
            with suppress(RunError, TimeoutError):
                eventloop.run(sent())

    def _send(self, path: str, body: dict[str, Any], doing: str, *, fine: str = "") -> Any:
        """Send a request from the main thread; a refusal with the words `fine` is as good as a success."""

        async def sent() -> Any:
            try:
                return await self._api.post(path, body)
            except RefusedError as error:
                if not fine or fine not in error.text:
                    raise
                return None

        return answered(sent(), self._api, doing)
