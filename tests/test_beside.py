from __future__ import annotations

from pathlib import Path

import pytest

from palate.beside import beside


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("data", "a.jsonl", "{}/a.jsonl"),
        ("data", "set:config", "{}/set:config"),
        ("data", "everyday", "everyday"),
        ("data", "owner/name", "owner/name"),
        ("data", "~/a.jsonl", "~/a.jsonl"),
        ("data", "/a.jsonl", "/a.jsonl"),
        ("data", "", ""),
        ("data", None, None),
        ("model", "set", "{}/set"),
        ("model", "smollm2", "smollm2"),
        ("base", "set", "{}/set"),
        ("output", "set", "set"),
        ("verdict_cache", "a.jsonl", "a.jsonl"),
        ("reward", "r.py:f", "{}/r.py:f"),
        ("reward", ["-0.5 * r.py:f", "sentiment"], ["-0.5 * {}/r.py:f", "sentiment"]),
        ("reward", "sentiment", "sentiment"),
        ("reward", "r:f", "r:f"),
        ("reward", "model:set", "model:{}/set"),
        ("reward", "2*ranker:set", "2*ranker:{}/set"),
        ("reward", "regex:r.py:f", "regex:r.py:f"),
        ("judge", "local:set", "local:{}/set"),
        ("judge", "server:set@http://x", "server:set@http://x"),
        ("judge", "self", "self"),
    ],
)
def test_a_path_beside_the_file(tmp_path: Path, field: str, value: object, expected: object) -> None:
    for name in ("a.jsonl", "r.py", "everyday", "smollm2", "sentiment", "self"):
        (tmp_path / name).write_text("")
    (tmp_path / "set").mkdir()
    texts = [one.format(tmp_path) for one in expected] if isinstance(expected, list) else expected
    assert beside(field, value, tmp_path) == (texts.format(tmp_path) if isinstance(texts, str) else texts)
