"""One request and its reply."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from palate.config import Sampling
from palate.errors import ConfigError, RunError
from palate.model.rows import Row
from palate.model.sampling import row_uniforms
from palate.model.served.api import API, RefusedError
from palate.model.served.wire import body_of, explained, greeting, how_to_start, read_reply

END = frozenset({7})


def options(**changes: Any) -> Sampling:
    return Sampling.model_validate({"max_new_tokens": 4, **changes})


def row(seed: int = 0, prompt: str = "p", seen: int = 0, sample: int = 0) -> Row:
    return Row((1, 2), row_uniforms(seed, prompt, seen, sample, 4))


def reply(tokens: list[int], **changes: Any) -> dict[str, Any]:
    content = [{"token_id": token, "logprob": -0.5 - i} for i, token in enumerate(tokens)]
    choice: dict[str, Any] = {"token_ids": tokens, "logprobs": {"content": content}, "finish_reason": "stop"}
    choice["weight_versions"] = [{"version": "default", "start": 0, "end": len(tokens)}]
    return {"model": "m", "choices": [{**choice, **changes}]}


def read(answer: Any, sampling: Sampling | None = None, into: Row | None = None) -> str | None:
    return read_reply(answer, into or row(), sampling or options(), END, model="m")


def test_a_request_sets_every_option_that_a_models_generation_config_may_have() -> None:
    body = body_of(row(), options(temperature=0.7, top_k=3, min_new_tokens=1), "m", END)
    assert body["token_ids"] == [1, 2]
    params = body["sampling_params"]
    assert {
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
    } <= params.keys()
    assert {"frequency_penalty", "max_tokens", "min_tokens", "stop_token_ids", "seed", "n"} <= params.keys()
    assert (params["temperature"], params["top_k"], params["top_p"], params["min_tokens"]) == (0.7, 3, 1.0, 1)
    assert (params["ignore_eos"], params["stop_token_ids"]) == (True, [7])


def test_every_request_has_its_own_seed_which_does_not_depend_on_the_batch() -> None:
    places = [(0, "p", 0, 0), (1, "p", 0, 0), (0, "q", 0, 0), (0, "p", 1, 0), (0, "p", 0, 1)]
    seeds = [body_of(row(*place), options(), "m", END)["sampling_params"]["seed"] for place in places]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [body_of(row(*p), options(), "m", END)["sampling_params"]["seed"] for p in places]
    assert all(0 <= seed < 2**53 for seed in seeds)  # exact in JSON


def test_a_reply_fills_the_row_with_its_end_token() -> None:
    own = row()
    assert read(reply([3, 7]), into=own) == "default"
    assert (own.tokens, own.logps, own.restricted) == ([3, 7], [-0.5, -1.5], [-0.5, -1.5])


def test_log_probabilities_of_a_restricted_distribution_are_unknown() -> None:
    own = row()
    read(reply([3, 7]), options(temperature=0.5), own)
    assert own.logps == [-0.5, -1.5]
    assert np.isnan(own.restricted).all()


def test_a_reply_up_to_the_limit_needs_no_end_token() -> None:
    own = row()
    read(reply([3, 4, 5, 6], finish_reason="length"), into=own)
    assert own.tokens == [3, 4, 5, 6]


def without(answer: dict[str, Any], key: str) -> dict[str, Any]:
    answer = copy.deepcopy(answer)
    del answer["choices"][0][key]
    return answer


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({**reply([3, 7]), "model": "base"}, "answered with model 'base', but 'm' was asked"),
        (
            reply([3, 4], finish_reason="length"),
            "2 tokens .* without an end token; expected an end token or 4",
        ),
        (reply([], finish_reason="abort"), "0 tokens .*'abort'"),
        (reply([3, 7], logprobs={"content": [{"token_id": 3, "logprob": -1.0}]}), "with 1 log-probabilities"),
        (
            reply([3, 7], logprobs={"content": [{"token_id": t, "logprob": -9999.0} for t in (3, 7)]}),
            "finite",
        ),
        (reply([3, 7], weight_versions=[{"version": "a"}, {"version": "b"}]), "exchanged its weights within"),
        (without(reply([3, 7]), "logprobs"), "lacks something .KeyError: 'logprobs'"),
        (reply([3, 7], token_ids=None), "lacks something"),
        ({"error": "x"}, "lacks something"),
        (None, "lacks something"),
    ],
)
def test_other_replies_are_refused(answer: Any, words: str) -> None:
    with pytest.raises(RunError, match=words):
        read(answer)


@pytest.mark.parametrize(
    ("status", "text", "kind", "words"),
    [
        (403, "Scale-out endpoints are disabled.", ConfigError, "--enable-scale-out"),
        (401, "Unauthorized", ConfigError, "VLLM_API_KEY"),
        (404, "Not Found", ConfigError, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        (404, "The model `x` does not exist.", RunError, "has lost the policy's weights"),
        (400, "max_lora_rank is 16", RunError, "refused to sample: HTTP 400: max_lora_rank is 16"),
    ],
)
def test_refusals_say_what_to_do(status: int, text: str, kind: type[Exception], words: str) -> None:
    advice = how_to_start(adapter=True, fixed=False)
    api = API("http://127.0.0.1:1", key="", timeout=1, retries=0, advice=advice)
    with pytest.raises(kind, match=words):
        raise explained(RefusedError(status, text), api, "sample")


def test_advice_names_only_settings_that_a_model_needs() -> None:
    # With VLLM_SERVER_DEV_MODE, anyone who reaches the server can exchange its weights.
    advice = {how_to_start(adapter=a, fixed=f): (a, f) for a in (False, True) for f in (False, True)}
    assert [kind for words, kind in advice.items() if "DEV_MODE" in words] == [(False, False)]
    assert [kind for words, kind in advice.items() if "LORA" in words] == [(True, True)]  # for both


@pytest.mark.parametrize("models", [{}, {"data": []}, {"data": [{"id": "a", "parent": "b"}]}, {"data": None}])
def test_a_server_without_a_base_model_is_no_vllm(models: Any) -> None:
    with pytest.raises(ConfigError, match="lists no base model"):
        greeting(models, "http://127.0.0.1:1")
