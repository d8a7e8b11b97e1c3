"""A server that speaks vLLM's protocol, with a tiny model of transformers behind it."""

from __future__ import annotations

import copy
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from palate.config import Sampling
from palate.model.sampling import restricted_logps
from palate.testing import Fault, FaultyServer

Override = Callable[[str, dict[str, Any], int], "dict[str, Any] | Fault | None"]
"""Returns a reply to a path, a body and a number, or None for the server's own reply."""


def refusal(status: int, message: str) -> Fault:
    """vLLM's reply to a request that it refuses."""
    return Fault(status, json.dumps({"error": {"message": message, "code": status}}).encode())


@cache
def network_of(directory: str) -> Any:
    """The network in a directory, which is read once for all servers."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


class FakeVLLM:
    """Samples as vLLM does: by the request's options and seed, from the base or from a loaded adapter.

    Another start draws other completions for the same seeds, unless its `salt` is the same: vLLM does not
    repeat its own bits, so a batch that is drawn twice must be noticed.

    Attributes:
        stale: it accepts weights and does not use them.
        partial: it does not use weights with this in their name.
        drawn: the latest completion of each seed.
        recorded: completions by seed, which it returns instead of drawing.
    """

    def __init__(
        self, model: str, override: Override = lambda path, body, number: None, **changes: Any
    ) -> None:
        self.version, self.longest, self.stale, self.processed = "0.32.0", 256, False, False
        self.salt, self.partial = 0, "no weight has this name"
        self.recorded: dict[int, dict[str, Any]] = {}
        vars(self).update(changes)
        self.log: list[tuple[str, str]] = []
        self.drawn: dict[int, dict[str, Any]] = {}
        self.override, self._lock = override, threading.Lock()
        self._model = model
        self._start()
        self.server = FaultyServer(self._answer)
        self.url = self.server.url.removesuffix("/v1")

    def _start(self) -> None:
        self.network: Any = copy.deepcopy(network_of(self._model))
        self.adapters: dict[str, str] = {}
        self.label = "default"

    def restart(self, model: str | None = None) -> None:
        """Start again under the same address, without anything that was published, or with another model."""
        with self._lock:
            self.salt += 1
            self._model = model or self._model
            self._start()

    def die(self) -> None:
        """Answer no more; a reply that is under way is lost."""
        self.server._server.shutdown()
        self.server._server.server_close()

    def reply(self, path: str, body: dict[str, Any]) -> Any:
        """The server's own reply to a request."""
        with self._lock:
            return self._reply(path, body)

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The bodies of the requests for completions, without those that test the server."""
        bodies = [body for body in self.server.requests if "sampling_params" in body]
        return [body for body in bodies if body["sampling_params"]["min_tokens"] == 0]

    def _answer(self, body: dict[str, Any], number: int) -> Any:
        path = self.server.paths[number]
        if (own := self.override(path, body, number)) is not None:
            return own
        return self.reply(path, body)

    def _reply(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "base", "parent": None, "max_model_len": self.longest}]}
        if path == "/version":
            return {"version": self.version}
        if path == "/v1/load_lora_adapter":
            name, place = body["lora_name"], body["lora_path"]
            if name in self.adapters:
                return refusal(400, f"The lora adapter '{name}' has already been loaded.")
            if self.stale:
                pass
            elif not isinstance(self.network, PeftModel):
                self.network = PeftModel.from_pretrained(self.network, place, adapter_name=name).eval()
            else:
                self.network.load_adapter(place, adapter_name=name)
            self.adapters[name] = place
            self.log.append(("load", name))
            return b"Success"
        if path == "/v1/unload_lora_adapter":
            if self.adapters.pop(body["lora_name"], None) is None:
                return refusal(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
            self.log.append(("unload", body["lora_name"]))
            return b"Success"
        if path == "/collective_rpc":
            place = Path(body["kwargs"]["weights_path"])
            if not self.stale:
                weights = load_file(place / "model.safetensors")
                own = {name: weights[name] for name in weights if self.partial not in name}
                self.network.load_state_dict(own, strict=False)
                self.network.tie_weights()
            self.log.append(("reload", place.name))
            return {"results": [None]}
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == "/update_weight_version":
            self.label = body["new_version"]
            return {"success": True}
        assert path == "/inference/v1/generate", path
        if body["model"] not in {"base", *self.adapters}:
            return refusal(404, f"The model `{body['model']}` does not exist. Valid aliases: base.")
        return self._generated(body)

    @torch.no_grad()
    def _generated(self, body: dict[str, Any]) -> dict[str, Any]:
        options, ids = body["sampling_params"], list(body["token_ids"])
        tests_the_server = options["min_tokens"] > 0
        if not tests_the_server and options["seed"] in self.recorded:
            return {"model": body["model"], "choices": [self.recorded[options["seed"]]], "usage": {}}
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        sampling = Sampling.model_validate({name: options[name] for name in names})
        random = torch.Generator().manual_seed(options["seed"] + self.salt)
        tokens: list[int] = []
        entries = []
        base = body["model"] == "base"
        if isinstance(self.network, PeftModel) and not base:
            self.network.set_adapter(body["model"])
        while len(tokens) < options["max_tokens"] and not (
            tokens and tokens[-1] in options["stop_token_ids"]
        ):
            inputs = torch.tensor([ids + tokens])
            if isinstance(self.network, PeftModel) and base:
                with self.network.disable_adapter():
                    logits = self.network(inputs).logits[:, -1].float()
            else:
                logits = self.network(inputs).logits[:, -1].float()
            barred = torch.zeros_like(logits, dtype=torch.bool)
            if len(tokens) < options["min_tokens"]:
                barred[:, options["stop_token_ids"]] = True
            restricted = restricted_logps(logits, sampling, barred=barred)
            token = int(torch.multinomial(restricted.exp(), 1, generator=random))
            logps = restricted if self.processed else logits.log_softmax(-1)
            tokens.append(token)
            entries.append({"token_id": token, "logprob": float(logps[0, token]), "rank": 1})
        ended = tokens[-1] in options["stop_token_ids"]
        choice = {
            "index": 0, "token_ids": tokens, "logprobs": {"content": entries},
            "finish_reason": "stop" if ended else "length", "stop_reason": tokens[-1] if ended else None,
            "weight_versions": [{"version": self.label, "start": 0, "end": len(tokens)}],
        }  # fmt: skip
        if not tests_the_server:
            self.drawn[options["seed"]] = choice
        return {"model": body["model"], "choices": [choice], "usage": {}}


Serve = Callable[..., FakeVLLM]


@pytest.fixture
def serve(tiny: str) -> Iterator[Serve]:
    """Start fake vLLM servers with the tiny model, each with draws of its own; they end with the test."""
    starts = itertools.count()
    with ExitStack() as stack:

        def started(override: Override = lambda path, body, number: None, **changes: Any) -> FakeVLLM:
            own = {"salt": next(starts)} | changes
            fake = FakeVLLM(own.pop("model", tiny), override, **own)
            stack.enter_context(fake.server)
            return fake

        yield started


@pytest.fixture
def refuse() -> Callable[[int, str], Fault]:
    """Returns vLLM's reply to a request that it refuses."""
    return refusal
