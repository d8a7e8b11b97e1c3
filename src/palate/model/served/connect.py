"""The start of sampling by a vLLM server: one that runs, or one that is started beside the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from palate.config import ModelConfig, Rollouts, Sampling
from palate.errors import ConfigError
from palate.model.loaded import LoadedModel
from palate.model.rows import Row
from palate.model.served.api import API
from palate.model.served.process import ServerProcess
from palate.model.served.sampler import VLLMSampler, answered
from palate.model.served.wire import GENERATE, body_of, greeting, read_reply
from palate.model.source import find_source
from palate.world import current

KEY = "VLLM_API_KEY"
"""Environment variable with the server's key, for vLLM and for Palate."""

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters for which vLLM can reserve room."""

ADAPTERS = 2
"""Adapters that a started server can use at the same time: two versions overlap with `--ahead`."""

NAME = "policy"
"""Name of the base model on a started server."""

_PROBE = 16
"""Tokens that a server samples first, to show how it computes log-probabilities."""


def connected(
    cfg: Rollouts, model: LoadedModel, directory: Path, *, remember: Callable[[str], str],
    say: Callable[[str], None],
) -> VLLMSampler:  # fmt: skip
    """Return the sampler of the vLLM server that a configuration names; a collective.

    Args:
        cfg: the configuration of a run; it is a `ModelConfig`, too.
        model: the policy's model.
        directory: the run's directory, for the server's output and for published weights.
        remember: returns the engine's identity at the first start of the run, given the present one.
        say: shows a message.

    Raises:
        ConfigError: the server cannot be used as it was started.
        RunError: the server does not answer.
    """
    started: list[ServerProcess] = []

    def opening() -> list[Any]:
        if cfg.rollouts == "vllm":
            own, log, whole = arguments(cfg, model), directory / "vllm.log", model.peft is None
            started.append(ServerProcess(cfg.vllm_python, own, log, takes_weights=whole))
            return [started[0].url, started[0].key]
        return [cfg.rollouts.partition(":")[2], os.environ.get(KEY, "").strip()]

    def close() -> None:
        for process in started:
            process.close()

    with ExitStack() as undo:
        undo.callback(close)
        url, key = current().lead("the vLLM server", opening)
        ended = started[0].ended if started else lambda: None
        api = API(url, key=key, timeout=cfg.rollout_timeout, retries=cfg.rollout_retries, ended=ended)
        version, base, longest = current().lead("the server's model", partial(_greeted, api, model))
        undo.pop_all()
    identity = f"vLLM {version}"
    first = remember(identity)
    if first != identity:
        say(f"the run started with {first} and continues with {identity}; samples of both are in the journal")
    say(f"{identity} at {url} samples the policy's completions")
    return VLLMSampler(
        api,
        base=base,
        longest=longest,
        end_ids=model.codec.end_ids,
        directory=directory / "published",
        identity=first,
        close=close,
    )


def arguments(cfg: Rollouts, model: LoadedModel) -> Sequence[str]:
    """Return the arguments of a server for a policy.

    Raises:
        ConfigError: the policy is a loaded model, which has no files.
    """
    assert isinstance(cfg, ModelConfig), "a method's configuration has a model"
    if not isinstance(cfg.model, str) or type(cfg.model) is not str:
        raise ConfigError(
            "rollouts is vllm, which needs the files of the model, but the model is a Python object; save it "
            "and give its directory"
        )
    base = find_source(cfg.model, "lm", trainable=True, base=cfg.base).base
    own = ["--model", base, "--served-model-name", NAME, "--dtype", str(model.dtype).removeprefix("torch.")]
    own += ["--enable-scale-out", "--generation-config", "vllm", "--seed", "0"]
    if cfg.max_length is not None:
        own += ["--max-model-len", str(cfg.max_length)]
    if model.device.type == "cpu":
        own += ["--enforce-eager"]  # no compiler is needed then
    if model.peft is not None:
        rank = max(int(config.r) for config in model.peft.peft_config.values())
        room = next((size for size in RANKS if size >= rank), rank)
        own += ["--enable-lora", "--max-lora-rank", str(room), "--max-loras", str(ADAPTERS)]
    if cfg.trust_remote_code:
        own += ["--trust-remote-code"]
    return [*own, *cfg.vllm_args]


def _greeted(api: API, model: LoadedModel) -> list[Any]:
    """Return the server's version, its base model and its longest sequence, after a first completion.

    Raises:
        ConfigError: it returns other log-probabilities than the model's own.
    """
    base, longest = greeting(answered(api.get("/v1/models"), api, "list its models"), api.url)
    version = str(answered(api.get("/version"), api, "name its version")["version"])
    # From the likeliest token alone, log-probabilities after the restriction are all zero.
    options = Sampling.model_validate({"top_k": 1, "max_new_tokens": _PROBE, "min_new_tokens": _PROBE})
    row = Row((model.codec.end_id,), np.full(_PROBE, 0.5))
    reply = answered(api.post(GENERATE, body_of(row, options, base, ())), api, "sample")
    read_reply(reply, row, options, (), model=base)
    if not any(row.logps):
        raise ConfigError(
            f"the vLLM server at {api.url} returns log-probabilities after top-k and temperature; start it "
            "without --logprobs-mode processed_logprobs"
        )
    return [version, base, longest]
