"""The start of sampling by a vLLM server: one that runs, or one that is started beside the run."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from palate.config import ModelConfig, Rollouts, Sampling
from palate.errors import ConfigError
from palate.model.loaded import LoadedModel
from palate.model.served.api import API
from palate.model.served.process import ServerProcess
from palate.model.served.sampler import PROBE, VLLMSampler
from palate.model.served.weights import OTHER_GAP, allowed, is_tied, probed, write_untied
from palate.model.served.wire import answered, first_completion, greeting, how_to_start
from palate.model.source import find_source
from palate.rundir.files import PUBLISHED
from palate.rundir.writing import writing
from palate.world import current

KEY = "VLLM_API_KEY"
"""Environment variable with the server's key, for vLLM and for Palate."""

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters for which vLLM can reserve room."""

ADAPTERS = 2
"""Adapters that a started server can use at the same time: two versions overlap with `--ahead`."""

BASE = f"{PUBLISHED}/base"
"""Directory in that of the run for the base model, if the server needs a copy."""

NAME = "policy"
"""Name of the base model on a started server."""


def connected(
    cfg: Rollouts, model: LoadedModel, directory: Path, *, remember: Callable[[str], str],
    say: Callable[[str], None], fixed: bool = False, kept: str = "finished samples are in the journal",
) -> VLLMSampler:  # fmt: skip
    """Return the sampler of the vLLM server that a configuration names; a collective.

    Args:
        cfg: the configuration of a run; it is a `ModelConfig`, too.
        model: the policy's model.
        directory: the run's directory, for the server's output and for published weights.
        remember: returns the engine's identity at the first start of the run, given the present one.
        say: shows a message.
        fixed: the model never changes, so a server that has all of its weights keeps them.
        kept: the work that an interruption does not lose, for messages.

    Raises:
        ConfigError: the server cannot be used as it was started.
        RunError: the server does not answer.
    """
    if cfg.rollouts == "vllm":
        _require_one_machine()
    started: list[ServerProcess] = []

    def opening() -> list[Any]:
        if cfg.rollouts == "vllm":
            own, log = arguments(cfg, model, None if fixed else directory / BASE), directory / "vllm.log"
            takes_weights = model.peft is None and not fixed
            started.append(ServerProcess(cfg.vllm_python, own, log, takes_weights=takes_weights))
            return [started[0].url, started[0].key]
        return [cfg.rollouts.partition(":")[2], os.environ.get(KEY, "").strip()]

    def close() -> None:
        for process in started:
            process.close()

    with ExitStack() as undo:
        undo.callback(close)
        url, key = current().lead("the vLLM server", opening)
        ended = started[0].ended if started else lambda: None
        timeout, retries = cfg.rollout_timeout, cfg.rollout_retries
        advice = how_to_start(adapter=model.peft is not None, fixed=fixed)
        api = API(url, key=key, timeout=timeout, retries=retries, ended=ended, kept=kept, advice=advice)
        version, base, longest, token, *probe = current().lead(
            "the server's model", partial(_greeted, api, model)
        )
        _require_base(api, model, *probe, fixed=fixed)
        undo.pop_all()
    identity = f"vLLM {version}"
    first = remember(identity)
    if first != identity:
        say(f"the run started with {first} and continues with {identity}; samples of both are in the journal")
    say(f"{identity} at {url} samples the completions")
    sampler = VLLMSampler(
        api,
        base=base,
        longest=longest,
        end_ids=model.codec.end_ids,
        directory=directory / PUBLISHED,
        identity=first,
        prefix=f"palate-{token}",
        untied=cfg.rollouts == "vllm" and needs_untied(model),
        close=close,
    )
    if fixed and model.peft is None:
        sampler.adopt(base)
    return sampler


def _require_one_machine() -> None:
    """Check that all processes can reach a server on the loopback address of process 0; a collective.

    Raises:
        ConfigError: they run on several machines.
    """
    machines = dict.fromkeys(current().gather("machines", socket.gethostname()))
    if len(machines) > 1:
        raise ConfigError(
            f"rollouts is vllm, but the processes run on {len(machines)} machines ({', '.join(machines)}), "
            "and the server would be reachable from one of them only; start a server that all machines "
            "reach, and give --rollouts vllm:URL"
        )


ROOM = 0.4
"""Share of the memory of the device, or of the machine on a CPU, for a server beside a run;
vLLM's own default is 0.92."""


def needs_untied(model: LoadedModel) -> bool:
    """Return whether a server on this device would keep old weights in a head that shares the embedding's.

    vLLM's CPU build packs the head's weights when it loads a model, and does not pack them again later.
    """
    return model.peft is None and model.device.type == "cpu" and is_tied(model.network)


def arguments(cfg: Rollouts, model: LoadedModel, untied: Path | None) -> Sequence[str]:
    """Return the arguments of a server for a policy.

    Args:
        cfg, model: as in `connected`.
        untied: a new directory for a copy of the model whose head has weights of its own, if one is needed;
            None for a model that never changes.

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
    own = ["--model", base]
    if untied is not None and needs_untied(model):
        with writing(untied):
            untied.mkdir(parents=True, exist_ok=True)
            write_untied(model.network, untied)
        own = ["--model", str(untied), "--tokenizer", base]
    own += ["--served-model-name", NAME, "--dtype", dtype_of(model)]
    own += ["--enable-scale-out", "--generation-config", "vllm", "--seed", "0"]
    own += ["--gpu-memory-utilization", str(ROOM)]
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
    """Return facts about the server.

    They are its version, its base model, its longest sequence, a name for what is published, and 16 tokens of
    the base model with their log-probabilities.

    Raises:
        ConfigError: it returns other log-probabilities than the model's own.
    """
    base, longest = greeting(answered(api.get("/v1/models"), api, "list its models"), api.url)
    version = str(answered(api.get("/version"), api, "name its version")["version"])
    # From the likeliest token alone, log-probabilities after the restriction are all zero.
    likeliest = Sampling.model_validate({**PROBE, "top_k": 1})
    row = first_completion(api, base, model.codec.end_id, likeliest)
    if not any(row.logps):
        raise ConfigError(
            f"the vLLM server at {api.url} returns log-probabilities after top-k and temperature; start it "
            "without --logprobs-mode processed_logprobs"
        )
    return [version, base, longest, secrets.token_hex(4), row.tokens, row.logps]


def _require_base(
    api: API, model: LoadedModel, tokens: list[int], logps: list[float], *, fixed: bool
) -> None:
    """Check that the server's base model is that of the adapter, or a model that never changes; a collective.

    Whole weights that change are tested when they are published, whatever the server had before.

    Raises:
        ConfigError: it is another model.
    """
    if model.whole_embeddings or (model.peft is None and not fixed):  # the former cannot be published
        return
    with nullcontext() if model.peft is None else model.without_adapter():
        gap = probed(model, (model.codec.end_id,), tokens, logps).gap()
    most = allowed(model) if model.peft is None else OTHER_GAP
    if not gap <= most:
        name = model.source if model.peft is None else f"the base model of {model.source}"
        own = f"the same model and --dtype {dtype_of(model)}" if fixed else "the model that is trained"
        raise ConfigError(
            f"the vLLM server at {api.url} serves another model: its log-probabilities of {len(tokens)} "
            f"tokens differ from those of {name} by {gap:.2g} nats on average (at most {most} is allowed); "
            f"start it with {own}"
        )


def dtype_of(model: LoadedModel) -> str:
    """Return a model's number format as vLLM names it."""
    return str(model.dtype).removeprefix("torch.")
