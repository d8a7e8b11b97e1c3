"""A real server: llama.cpp on the embedded model's own file."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from palate.annotate.base import in_both_orders
from palate.annotate.judges.desk import Desk
from palate.annotate.judges.judging import Bench, PairwiseJudge
from palate.annotate.judges.local import LocalModel
from palate.annotate.judges.prices import Price
from palate.annotate.judges.server import ServerModel, ServerOptions
from palate.annotate.judges.template import Template
from palate.config import EMBEDDED
from palate.launch import train
from palate.methods import METHODS
from palate.testing import LlamaServer, tiny_model
from palate.types import Completion, Prompt

pytestmark = pytest.mark.embedded


@pytest.fixture(scope="module")
def server() -> LlamaServer:
    pytest.importorskip("xllamacpp")
    return LlamaServer()


PAIRS = [
    ("Name a fruit.", "An apple is a fruit.", "asdf qwer"),
    ("What is the capital of France?", "It is Paris.", "No."),
    ("Say hello.", "Hello, how are you?", "Hello!"),
    ("Count to three.", "One, two, three.", "Three, one."),
]


def verdicts(model: Any) -> list[float | None]:
    judge = PairwiseJudge(Bench(Desk(model), Template.load("pairwise"), samples=2))
    texts = [(Completion(a, (1,)), Completion(b, (1,))) for _, a, b in PAIRS]
    return in_both_orders(judge, [Prompt(prompt) for prompt, _, _ in PAIRS], texts)


def opened(server: LlamaServer, **options: Any) -> ServerModel:
    price = Price(0.0, 0.0, "given")
    found = ServerOptions(mass=0.0, timeout=120, **options)
    return ServerModel("smollm2", server.url, key="none", price=price, options=found)


def test_the_server_and_the_model_in_this_process_say_the_same(server: LlamaServer) -> None:
    # The same weights: four bits a number there, and the same numbers in bfloat16 or float32 here.
    remote = verdicts(opened(server))
    local = verdicts(LocalModel.load(EMBEDDED, model_options={"dtype": "float32"}, mass=0.0))
    both = [(p, q) for p, q in zip(remote, local, strict=True) if p is not None and q is not None]
    assert len(both) >= 2  # a label may be missing among the 20 likeliest tokens
    assert [p for p, _ in both] == pytest.approx([q for _, q in both], abs=0.1)


def test_sampled_verdicts_are_parsed_strictly(server: LlamaServer) -> None:
    model = opened(server, logprobs=False, max_tokens=4)
    desk = Desk(model)
    judge = PairwiseJudge(Bench(desk, Template.load("pairwise"), samples=2))
    judge([Prompt("Q")], [(Completion("yes", (1,)), Completion("no", (1,)))])
    counts = desk.ledger.counts()
    assert sum(counts.values()) == 2
    assert counts.keys() <= {"ok", "unparsed", "cut"}


def test_oaif_with_a_real_server(server: LlamaServer, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt, _, _ in PAIRS))
    given = {
        "model": tiny_model(tmp_path / "policy"),
        "data": str(prompts),
        "output": tmp_path / "run",
        "dtype": "float32",
        "device": "cpu",
        "lora": False,
        "fresh_prompts": 0,
        "max_new_tokens": 8,
        "steps": 2,
        "batch_size": 4,
        "max_dead_steps": 3,
        "judge": {
            "model": f"server:smollm2@{server.url}",
            "label_mass": 0.0,
            "timeout": 120.0,
            "probe_pairs": 0,
        },
    }
    outcome = train("oaif", METHODS["oaif"].configure(given))
    with sqlite3.connect(tmp_path / "run" / "journal.db") as db:
        rows = db.execute(
            "SELECT status, label_mass, prompt_tokens, completion_tokens FROM verdicts"
        ).fetchall()
    assert 0 < len(rows) == outcome.summary["judge_verdicts"] <= 16
    assert {status for status, *_ in rows} <= {"ok", "unparsed"}
    assert sum(status == "ok" for status, *_ in rows) > 0
    # An answer that ends before its first token has no log-probabilities: that verdict is unparsed.
    assert all(0 <= mass <= 1 for status, mass, *_ in rows if status == "ok")
    assert all(read > 50 and written <= 1 for *_, read, written in rows)
    assert outcome.summary["judge_tokens"] == sum(read + written for *_, read, written in rows)
