"""Damage data files at random and read them: each ends well or with one clear sentence, never in a traceback.

    python benchmarks/damage.py --files 2000 --seed 0 [--output FILE]

Each file is a valid one with a few mutations: bytes flipped, cut or repeated, lines dropped or joined, values
replaced by others, keys renamed, files truncated. It is read by all three readers and put into the tokens of
a small tokenizer with a chat template, as a run does before it trains. Then `palate inspect --json` and
`palate run` with a tiny model get it, in this process. Each must end with exit code 0, or with exit code 2
and one line on stderr, within a minute. Standard output of `inspect` has JSON only. A run that ends with 0
has an account in its `config.json` in which every row of the file is used, skipped or left out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
from common import ROOT, commit, versions

from palate import data, testing
from palate.cli import main as palate
from palate.errors import PalateError
from palate.model.codec import Codec
from palate.types import Comparison, Demonstration, Prompt

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1e308, float("nan"), "", " ", "\u0000", "<end>", "\ue000", [], {}, [[]], [None],
    [{}], {"role": None}, [{"role": "user"}], [{"role": "assistant", "content": []}], "[{'role': 'user'}]",
    '[{"role": "user", "content": 1}]', "[" * 500, {"content": {"text": 1}}, [{"type": "image"}], "ü" * 5_000,
)  # fmt: skip


def user(text: str) -> dict[str, Any]:
    """A turn of the user."""
    return {"role": "user", "content": text}


def valid_rows(random_: random.Random) -> list[dict[str, Any]]:
    """A few rows of one of the forms that are read."""
    answer, other = ({"role": "assistant", "content": text} for text in ("A ling.", "A whale."))
    tool = {"type": "function", "function": {"name": "tide", "parameters": {}}}
    call = {"type": "function", "function": {"name": "tide", "arguments": {"port": "Wick"}}}
    called = [user("When?"), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "4"}]
    shared = [{"from": "human", "value": "A fish?"}, {"from": "gpt", "value": "A ling."}]
    forms: list[dict[str, Any]] = [
        {"prompt": "A fish?", "chosen": "A ling.", "rejected": "A whale.", "margin": 1.0},
        {"messages": [user("A fish?"), answer], "tools": [tool], "label": True},
        {"messages": [*called, answer]},
        {"chosen": [user("A fish?"), answer], "rejected": [user("A fish?"), other]},
        {"instruction": "A fish?", "input": "of the sea", "output": "A ling.", "history": [["Hi", "Hello"]]},
        {"conversations": shared, "system": "Brief."},
        {"instruction": "A fish?", "generations": ["A ling.", "A whale."], "ratings": [5, 1]},
        {
            "input": {"messages": [user("A fish?")]},
            "preferred_output": [answer],
            "non_preferred_output": [other],
        },
        {"text": "Once upon a time", "finish": "length"},
        {"prompt": [user("A fish?"), {"role": "assistant", "content": "A"}], "completion": " ling."},
    ]
    return [json.loads(json.dumps(random_.choice(forms))) for _ in range(random_.randint(1, 6))]


def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every container in a value with each of its keys."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            found.append((value, key))
            places(value[key], found)
    return found


def damage_values(rows: list[dict[str, Any]], random_: random.Random) -> None:
    """Replace, rename or drop a few values."""
    for _ in range(random_.randint(0, 4)):
        container, key = random_.choice(places(rows, []))
        if isinstance(container, dict) and random_.random() < 0.3:
            container[random_.choice(("role", "content", "prompt", "zzz", ""))] = container.pop(key)
        else:
            container[key] = copy.deepcopy(random_.choice(ODD))


def damage_bytes(content: bytes, random_: random.Random) -> bytes:
    """Flip, cut, repeat or insert bytes."""
    damaged = bytearray(content)
    for _ in range(random_.randint(0, 3)):
        at = random_.randrange(len(damaged) + 1)
        kind = random_.randrange(4)
        if kind == 0 and at < len(damaged):
            damaged[at] ^= 1 << random_.randrange(8)
        elif kind == 1:
            del damaged[at : at + random_.randint(1, 40)]
        elif kind == 2:
            damaged[at:at] = damaged[max(0, at - 20) : at]
        else:
            damaged[at:at] = random_.choice((b"\n", b"\x00", b"\xff\xfe", b'"', b"}", b",", b"\r\n"))
    return bytes(damaged)


def write(rows: list[dict[str, Any]], folder: Path, random_: random.Random) -> Path:
    """A damaged file of a random kind."""
    kind = random_.choice(("jsonl", "jsonl", "jsonl", "json", "csv", "tsv", "parquet"))
    path = folder / f"data.{kind}"
    if kind == "parquet":
        try:
            data.write_rows(path, [row for row in rows if isinstance(row, dict)])
            content = path.read_bytes()
        except PalateError:  # mixed types make no table
            content = b"PAR1"
    elif kind == "json":
        content = json.dumps(rows).encode()
    elif kind == "jsonl":
        content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    else:
        comma = "," if kind == "csv" else "\t"
        names = list(dict.fromkeys(str(name) for row in rows if isinstance(row, dict) for name in row))
        quoted = [[json.dumps(str(row.get(n, ""))) for n in names] for row in rows if isinstance(row, dict)]
        content = "\n".join(comma.join(line) for line in [names, *quoted]).encode()
    path.write_bytes(damage_bytes(content, random_))
    return path


def read(path: Path, codec: Codec) -> Counter[str]:
    """Read the file in three ways, as a run does; which ended how."""
    ends: Counter[str] = Counter()
    tokenize: dict[Callable[..., Any], Callable[[Any], object]] = {
        data.read_prompts: lambda row: codec.room(row),
        data.read_comparisons: lambda row: codec.pair(row),
        data.read_demonstrations: lambda row: codec.example(row),
    }
    for reader, make in tokenize.items():
        account = codec.account = data.Account(max_bad_rows=0.5)
        try:
            rows = reader(str(path), account=account)
            rows = rows[0] if isinstance(rows, tuple) else rows
            for row in rows:
                assert isinstance(row, Prompt | Comparison | Demonstration)
                try:
                    make(row)
                except PalateError as error:
                    account.skip(error)
            account.check(str(path), len(rows))
            list(account.lines())
            json.dumps(account.summary())
            ends["read"] += 1
        except PalateError as error:
            ends["refused" if str(error) else "refused without a word"] += 1
    return ends


LONGEST = 60
"""Seconds after which a command counts as hung."""


class Hung(BaseException):
    """A command took too long. No `except Exception` catches it."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Raise Hung if the context takes longer than `LONGEST`."""

    def stop(*_: object) -> None:
        raise Hung(f"longer than {LONGEST} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def command(*words: object) -> tuple[int, str]:
    """Run a command line in this process and check its ending; return its exit code and standard output."""
    out, complaints = io.StringIO(), io.StringIO()
    with in_time(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(complaints):
        code = palate([str(word) for word in words])
    said = complaints.getvalue()
    assert code in (0, 2), f"exit code {code}"
    assert "Traceback" not in out.getvalue() + said, said
    if code == 2:
        (last,) = said.strip().splitlines()[-1:] or [""]
        assert last.startswith("palate: "), f"exit code 2 after {said!r}"
    return code, out.getvalue()


def rows_in(path: Path) -> int | None:
    """The number of rows of a file, counted without Palate; None if it is not clear what a row is."""
    content = path.read_bytes()
    if path.suffix == ".jsonl":
        return sum(bool(line.removeprefix(b"\xef\xbb\xbf").strip()) for line in content.split(b"\n"))
    try:
        if path.suffix == ".parquet":
            return int(pyarrow.parquet.read_metadata(path).num_rows)
        if path.suffix == ".json":
            value = json.loads(content)
            return len(value) if isinstance(value, list) else None
    except Exception:  # damaged: Palate decides
        return None
    return None


def inspect_it(path: Path, model: str, random_: random.Random, ends: Counter[str]) -> str:
    """Give a file to `palate inspect`; return a method for its rows, or a random one if it is refused."""
    method = random_.choice(("", "", "", "sft", "dpo", "oaif", "reward-model"))
    words = ["inspect", path, "--model", model, "--json", "--rows", 100]
    words += ["--method", method] if method else []
    code, out = command(*words, "--max-bad-rows", random_.choice((0.01, 0.5, 1)))
    lines = [json.loads(line) for line in out.splitlines()]
    assert all({"prompt", "completion", "matches_template"} <= line.keys() for line in lines)
    assert bool(lines) == (code == 0)
    ends[f"inspect: exit code {code}"] += 1
    if not lines:
        return random_.choice(("sft", "dpo", "oaif", "reward-model"))
    if "rejected" in lines[0]:
        return random_.choice(("dpo", "reward-model"))
    return "sft" if lines[0]["completion"] else "oaif"


def train_on_it(
    path: Path, model: str, method: str, place: Path, random_: random.Random, ends: Counter[str]
) -> None:
    """Give a file to `palate run`, and check its account of the rows."""
    words: list[object] = ["run", method, "--model", model, "--data", path, "--steps", 1, "--batch-size", 2]
    words += ["--dtype", "float32", "--overwrite", "--output", place, "--device", "cpu", "--no-fast"]
    words += ["--max-bad-rows", random_.choice((0.01, 0.5, 1)), *random_.choice(((), (), ("--strict",)))]
    if method == "oaif":
        words += ["--reward", "length:5", "--max-new-tokens", 4, "--fresh-prompts", 0]
    code, _ = command(*words)
    ends[f"run: exit code {code}"] += 1
    if code == 0:
        (account,) = json.loads((place / "config.json").read_text())["data"].values()
        left = sum(account["skipped"].values()) + sum(part["rows"] for part in account["dropped"].values())
        assert account["rows"] == account["used"] + left, f"rows are not accounted for: {account}"
        expected = rows_in(path)
        assert expected is None or account["rows"] == expected, f"{expected} rows became {account}"
        ends["run: all rows used" if not left else "run: some rows skipped or left out, and named"] += 1


def main() -> None:
    """Damage and read files; print each one that fails, and exit with 1 if there are any."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file for the figures")
    given = parser.parse_args()
    codec = Codec(testing.byte_tokenizer(chat=True), eos_ids=[257], max_length=256, name="tiny")
    ends: Counter[str] = Counter()
    began = time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = testing.tiny_model(folder / "model", chat=True)
        for number in range(given.first, given.files):
            random_ = random.Random(f"{given.seed}:{number}")
            rows = valid_rows(random_)
            damage_values(rows, random_)
            path = write(rows, folder, random_)
            try:
                ends.update({f"readers: {end}": n for end, n in read(path, codec).items()})
                method = inspect_it(path, model, random_, ends)
                train_on_it(path, model, method, folder / "run", random_, ends)
            except (Exception, Hung):  # this is the fault that the script looks for
                traceback.print_exc()
                print(
                    f"file {number} of seed {given.seed}: {path.name}\n{path.read_bytes()[:2000]!r}",
                    flush=True,
                )
                ends["failures"] += 1
    figures = {"files": given.files - given.first, "seed": given.seed, "ends": dict(sorted(ends.items()))}
    print(figures)
    if given.output is not None:
        sys.path.insert(0, str(ROOT / "experiments"))
        from machine import machine

        seconds = round(time.time() - began)
        detail = {"machine": machine(), "of": {"commit": commit(), **versions()}, "seconds": seconds}
        given.output.write_text(json.dumps(detail | figures, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if ends["failures"] else 0)


if __name__ == "__main__":
    main()
