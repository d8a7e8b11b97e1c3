from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from palate.cli import main
from palate.errors import DataError
from palate.labelling import measure

Row = dict[str, Any]
PAIRS = 1000


def write(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def planted(judge: Callable[[Random, str, str], float], *, longer: float = 0.6) -> list[Row]:
    """Rows as `palate annotate` writes them, of a judge that gives P(first shown wins).

    The data prefer the longer text in this share of the pairs.
    """
    rng, rows = Random(0), []
    for i in range(PAIRS):
        good, bad = ("good and long", "bad") if i < longer * PAIRS else ("good", "bad and long")
        shown_first, shown_second = judge(rng, good, bad), 1 - judge(rng, bad, good)
        p, agrees = (shown_first + shown_second) / 2, (shown_first + shown_second) >= 1
        order = (good, bad) if agrees else (bad, good)
        chosen = (shown_first, shown_second) if agrees else (1 - shown_second, 1 - shown_first)
        rows.append(
            {
                "prompt": f"Q{i}", "chosen": order[0], "rejected": order[1],
                "score_chosen": max(p, 1 - p), "score_rejected": min(p, 1 - p), "label": p != 0.5,
                "data_prefers": "chosen" if agrees else "rejected",
                "p_chosen_shown_first": chosen[0], "p_chosen_shown_second": chosen[1],
                "judge": "planted", "judge_verdicts": 2, "judge_tokens": 300, "judge_cost": 0.002,
            }
        )  # fmt: skip
    return rows


def figures(path: Path, rows: Sequence[Row], **options: Any) -> Row:
    return measure(str(write(path, rows)), **options)[0]


def test_always_first(tmp_path: Path) -> None:
    found = figures(tmp_path / "l.jsonl", planted(lambda rng, a, b: 0.9))
    exact = {
        "accuracy": 0.5,
        "ties": 1.0,
        "consistency": 0.0,
        "first_share": 1.0,
        "longer_share": 0.5,
        "kappa": 0,
    }
    assert {name: found[name] for name in exact} == exact
    assert found["cost_per_1000_verdicts"] == pytest.approx(1.0)
    assert found["tokens_per_verdict"] == 150


def test_longer_wins(tmp_path: Path) -> None:
    found = figures(tmp_path / "l.jsonl", planted(lambda rng, a, b: 0.8 if len(a) > len(b) else 0.2))
    exact = {"accuracy": 0.6, "ties": 0.0, "consistency": 1.0, "first_share": 0.5, "longer_share": 1.0,
             "longer_reference": 0.6}  # fmt: skip
    assert {name: found[name] for name in exact} == exact
    assert found["kappa"] == pytest.approx(0.2)
    assert found["ece"] == pytest.approx(0.2)
    assert found["length_coefficient"] is None


def test_random(tmp_path: Path) -> None:
    found = figures(tmp_path / "l.jsonl", planted(lambda rng, a, b: rng.choice([0.25, 0.75])))
    for name in ("accuracy", "ties", "consistency", "first_share", "longer_share"):
        assert found[name] == pytest.approx(0.5, abs=4 * 0.5 / PAIRS**0.5)
    assert abs(found["length_coefficient"]) < 4 * found["length_standard_error"]


def test_gold_with_noise(tmp_path: Path) -> None:
    wrong: dict[frozenset[str], bool] = {}

    def noisy(rng: Random, a: str, b: str) -> float:
        # The two calls about a pair are consecutive: the second repeats the outcome of the first.
        flip = wrong.pop(frozenset((a, b)), None)
        if flip is None:
            flip = wrong[frozenset((a, b))] = rng.random() < 0.2
        return 0.8 if a.startswith("good") != flip else 0.2

    found = figures(tmp_path / "l.jsonl", planted(noisy))
    assert found["accuracy"] == pytest.approx(0.8, abs=4 * 0.4 / PAIRS**0.5)
    assert (found["ties"], found["consistency"], found["first_share"]) == (0.0, 1.0, 0.5)
    assert found["kappa"] == pytest.approx(2 * found["accuracy"] - 1)
    assert found["ece"] == pytest.approx(abs(found["accuracy"] - 0.8), abs=1e-9)
    assert abs(found["length_coefficient"]) < 4 * found["length_standard_error"]


def test_rewards_have_no_order(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "chosen": "a", "rejected": "bb", "score_chosen": 2, "score_rejected": 1,
         "data_prefers": "rejected"},
        {"prompt": "R", "chosen": "a", "rejected": "bb", "score_chosen": 2, "score_rejected": 2},
        {"prompt": "S", "chosen": "a", "rejected": "bb", "score_chosen": None, "score_rejected": 1},
    ]  # fmt: skip
    found = figures(tmp_path / "l.jsonl", rows)
    assert (found["accuracy"], found["pairs"], found["unusable"], found["ties"]) == (0.25, 2, 1, 0.5)
    assert not found.keys() & {"consistency", "first_share", "ece", "cost_per_1000_verdicts"}


SCORED = [
    {"prompt": p, "completion": c, "score": score, "data_score": gold, "stars": -gold}
    for p, c, score, gold in (("Q", "a", 5.0, 3), ("Q", "b", 4.0, 2), ("Q", "c", 1.0, 1), ("R", "d", 5.0, 1),
                              ("R", "e", 2.0, 2))
]  # fmt: skip


def test_scores(tmp_path: Path) -> None:
    found = figures(tmp_path / "l.jsonl", SCORED)
    assert (found["kind"], found["prompts"]) == ("scores", 2)
    assert (found["pairwise"], found["best"], found["exact"]) == (0.75, 0.5, 0.5)
    assert (found["spearman"], found["kendall"]) == (pytest.approx(0.0), pytest.approx(0.0))
    assert (found["pairwise_strict"], found["ties"], found["unusable"]) == (0.75, 0.0, 0)
    assert figures(tmp_path / "l.jsonl", SCORED, gold="stars")["pairwise"] == 0.25


PAIR = {"prompt": "Q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q", "chosen": "a", "rejected": "b"}, "it has no label"),
        (
            {"prompt": "Q", "chosen": "a", "rejected": "b", "p_chosen_shown_first": 2},
            "expected a probability",
        ),
        (
            {"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": "x", "score_rejected": 1},
            "score_chosen is",
        ),
        ({"prompt": "Q", "completion": "a", "score": 1}, "--gold"),
        ({**PAIR, "score_chosen": 10**400, "score_rejected": 1}, "score_chosen is 1000"),
        ({**PAIR, "score_chosen": 2, "score_rejected": 1, "judge_cost": "free"}, "judge_cost is 'free'"),
        ({"prompt": "Q"}, "it has no score"),
        ({**PAIR, "score_chosen": 2, "score_rejected": 1, "judge_verdicts": 2}, "the annotator itself made"),
    ],
)
def test_a_row_that_cannot_be_measured_is_named(tmp_path: Path, row: Row, message: str) -> None:
    path = write(tmp_path / "l.jsonl", [row])
    with pytest.raises(DataError, match=message) as error:
        measure(str(path))
    assert "l.jsonl:1" in str(error.value)


def test_the_command_prints_a_table_json_and_a_page(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = planted(lambda rng, a, b: 0.8 if len(a) > len(b) else 0.2)
    rows[-1] |= {"prompt": "<script>alert(1)</script>"}
    data, page = write(tmp_path / "l.jsonl", rows), tmp_path / "judge.html"
    assert main(["evaluate", "judge", "--data", str(data), "--html", str(page)]) == 0
    shown = capfd.readouterr().out
    assert "60.0\N{NO-BREAK SPACE}%" in shown
    assert "no finite estimate" in shown
    html = page.read_text()
    assert "planted" in html
    assert "Cohen&#39;s kappa" in html
    assert "<script" not in html
    assert main(["evaluate", "judge", "--data", str(data), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["accuracy"] == 0.6
    assert main(["evaluate", "judge", "--data", str(tmp_path / "none.jsonl")]) == 2


def test_references_that_are_all_equal_are_named_as_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "Q", "completion": text, "score": 1, "data_score": 3} for text in "ab"]
    data = write(tmp_path / "l.jsonl", rows)
    assert main(["evaluate", "judge", "--data", str(data)]) == 0
    assert "no prompt has two completions with different reference scores" in capsys.readouterr().out


def test_a_page_without_disagreements_claims_no_agreement(tmp_path: Path) -> None:
    rows = [{**PAIR, "p_chosen_shown_first": None, "p_chosen_shown_second": None}]
    data, page = write(tmp_path / "l.jsonl", rows), tmp_path / "judge.html"
    assert main(["evaluate", "judge", "--data", str(data), "--html", str(page)]) == 0
    assert "No measured pair has another winner than in the reference." in page.read_text()
