"""The protocol of a vLLM server: tokens in, tokens out."""

from __future__ import annotations

import math
from collections.abc import Collection, Coroutine, Mapping
from typing import Any, TypeVar

import numpy as np

from palate import eventloop
from palate.config import Sampling
from palate.errors import AGAIN, ConfigError, RunError
from palate.model.rows import Row
from palate.model.sampling import NOT_FINITE, restricts
from palate.model.served.api import API, START, RefusedError

T = TypeVar("T")

GENERATE = "/inference/v1/generate"

OF_ONE_ROW = frozenset({400, 413, 422})
"""Statuses of refusals that concern the prompt of a request, not the server."""

_UNKNOWN = math.nan
"""Log-probability under a restricted sampling distribution, which the server does not return."""

_LOST = -9000.0
"""vLLM writes log-probabilities that are not finite as -9999."""


def body_of(row: Row, sampling: Sampling, model: str, end_ids: Collection[int]) -> dict[str, Any]:
    """Return the request for one row.

    Every option is set: a server takes those that are missing from the model's own generation config. The
    seed comes from the row's first random number, so it depends on the run's seed, the prompt, its occurrence
    and the index of the completion, and on nothing else.
    """
    # vLLM knows a stop text in its own decoding; the tokens are cut by ours.
    stop = {"stop": list(sampling.stop), "include_stop_str_in_output": True} if sampling.stop else {}
    return {
        "model": model,
        "token_ids": list(row.prompt_ids),
        "sampling_params": {
            "n": 1,
            "seed": int(row.uniforms[0] * 2**53),
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "min_tokens": sampling.min_new_tokens,
            "max_tokens": sampling.max_new_tokens,
            "ignore_eos": True,  # our end tokens count, which the next line names
            "stop_token_ids": sorted(end_ids),
            "logprobs": 0,
            "detokenize": bool(sampling.stop),
            "skip_special_tokens": False,
            **stop,
        },
    }


def read_reply(
    reply: Any, row: Row, sampling: Sampling, end_ids: Collection[int], *, model: str
) -> str | None:
    """Fill a row with the tokens of a reply; return the label of the weights that sampled them, if any.

    Args:
        reply: the JSON of the reply.
        row: a row without tokens.
        sampling, end_ids: the options of the request.
        model: the name that was asked for.

    Raises:
        RunError: the reply is of another model or of several versions, is cut short, or has another form.
    """
    try:
        served, choice = reply["model"], reply["choices"][0]
        tokens = [int(token) for token in choice["token_ids"]]
        entries = choice["logprobs"]["content"]
        logps = [float(entry["logprob"]) for entry in entries]
        same = tokens == [entry["token_id"] for entry in entries]
        labels = {span["version"] for span in choice.get("weight_versions") or ()}
        stopped = isinstance(choice.get("stop_reason"), str)
        reason = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RunError(
            f"the vLLM server's reply lacks something ({type(error).__name__}: {error}); expected the tokens "
            "and log-probabilities of vLLM's generate endpoint, as version 0.32 writes them"
        ) from error
    if served != model:
        raise RunError(f"the vLLM server answered with model {served!r}, but {model!r} was asked")
    if len(labels) > 1:
        raise RunError(
            f"the vLLM server exchanged its weights within a completion ({', '.join(sorted(labels))}); "
            "another program uses the same server"
        )
    whole = bool(tokens) and (tokens[-1] in end_ids or len(tokens) == sampling.max_new_tokens or stopped)
    if not (whole and same):
        raise RunError(
            f"the vLLM server returned {len(tokens)} tokens with {len(logps)} log-probabilities (finish "
            f"reason {reason!r}), without an end token; expected an end token or "
            f"{sampling.max_new_tokens} tokens"
        )
    if not all(logp > _LOST for logp in logps):
        raise RunError(NOT_FINITE)
    # Under temperature 1 without restrictions, the sampling distribution is the model's.
    own = sampling.temperature == 1.0 and not restricts(sampling) and sampling.min_new_tokens == 0
    for token, logp in zip(tokens, logps, strict=True):
        row.add(token, logp, logp if own else _UNKNOWN)
    return labels.pop() if labels else None


def how_to_start(*, adapter: bool, fixed: bool) -> str:
    """Return advice with the options of a server.

    Args:
        adapter: the model has an adapter, which the server loads.
        fixed: the model never changes, so the server need not let anyone exchange its weights.
    """
    if adapter:
        return f"{START} --enable-lora, and with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
    return START if fixed else f"{START}, and with VLLM_SERVER_DEV_MODE=1 in its environment"


def first_completion(api: API, model: str, first: int, sampling: Sampling) -> Row:
    """Return a completion of one token that tests a server; it takes `max_new_tokens` tokens."""
    row = Row((first,), np.full(sampling.max_new_tokens, 0.5))
    reply = answered(api.post(GENERATE, body_of(row, sampling, model, ())), api, "sample")
    read_reply(reply, row, sampling, (), model=model)
    return row


def answered(request: Coroutine[Any, Any, T], api: API, doing: str) -> T:
    """Return the answer to a request from the main thread, and explain a refusal."""
    try:
        return eventloop.run(request)
    except RefusedError as error:
        raise explained(error, api, doing) from error


def explained(error: RefusedError, api: API, doing: str) -> RunError | ConfigError:
    """Return the error of a refused request, with the remedy if it is known."""
    if error.status in (401, 403) and "scale-out" not in error.text.lower():
        return ConfigError(
            f"the vLLM server at {api.url} refused the key ({error}); put its key into the environment "
            "variable VLLM_API_KEY"
        )
    if error.status in (403, 404, 405) and "does not exist" not in error.text:
        return ConfigError(f"the vLLM server at {api.url} cannot {doing} ({error}); {api.advice}")
    if error.status == 404:
        return RunError(
            f"the vLLM server at {api.url} has lost the policy's weights ({error}), perhaps because it was "
            f"started again; {AGAIN}"
        )
    return RunError(f"the vLLM server at {api.url} refused to {doing}: {error}")


def greeting(models: Mapping[str, Any], url: str) -> tuple[str, int]:
    """Return the name of a server's base model and its longest sequence, from its list of models."""
    try:
        base = next(m for m in models["data"] if m.get("parent") is None)
        return str(base["id"]), int(base["max_model_len"])
    except (KeyError, TypeError, ValueError, StopIteration):
        raise ConfigError(
            f"the server at {url} lists no base model; expected the address of a vLLM server"
        ) from None
