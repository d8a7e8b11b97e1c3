from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from palate.annotate.base import in_both_orders
from palate.annotate.judges.build import JudgeContext, judging
from palate.annotate.judges.judging import PairwiseJudge, metrics_of
from palate.annotate.judges.ledger import Ledger
from palate.annotate.judges.several import Cascade, Panel, ScorePanel
from palate.config import JudgeConfig
from palate.errors import BudgetError, ConfigError
from palate.testing import FaultyServer, judge_reply
from palate.types import Completion, Group, Prompt

Open = Callable[..., Any]


def done(text: str) -> Completion:
    return Completion(text, (1,))


def says(p: float) -> Callable[[dict[str, Any], int], Any]:
    """A judge that prefers the longer text with the probability p."""
    return lambda body, number: judge_reply(body, lambda a, b: p if len(a) > len(b) else 1 - p)


PAIRS = [(done("longer"), done("short")), (done("x"), done("yy"))]


def test_a_panel_takes_the_mean_and_counts_disagreement(open_court: Open) -> None:
    courts = [open_court(says(p)) for p in (0.9, 0.8, 0.4)]
    panel = Panel([court.judge for court in courts])
    verdicts = in_both_orders(panel, [Prompt("Q")] * 2, PAIRS)
    assert verdicts == pytest.approx([0.7, 0.3])
    metrics = metrics_of([court.bench for court in courts])
    assert metrics["judge/members_disagree"] == 1.0
    assert metrics["judge/verdicts"] == 4  # each has its own desk here, and the first one's budget is shown


def test_a_panel_needs_half_of_its_members(open_court: Open) -> None:
    good = open_court(says(0.9))
    silent = Silent(open_court(says(0.9)).bench)
    assert Panel([good.judge, silent])([Prompt("Q")], PAIRS[:1]) == pytest.approx([0.9])
    assert Panel([good.judge, silent, silent])([Prompt("Q")], PAIRS[:1]) == [None]


def test_a_member_with_one_order_only_does_not_vote(open_court: Open) -> None:
    class OneOrder(PairwiseJudge):
        def __call__(self, prompts: Any, pairs: Any) -> list[float | None]:
            return [0.9 if first.text == "longer" else None for first, _ in pairs]

    whole = open_court(says(0.6)).judge
    panel = Panel([whole, OneOrder(open_court(says(0.9)).bench)])
    assert in_both_orders(panel, [Prompt("Q")], PAIRS[:1]) == pytest.approx([0.6])
    assert panel([Prompt("Q")], PAIRS[:1]) == pytest.approx([0.75])  # it is asked in one order alone


class Fixed:
    """A scorer with given scores."""

    def __init__(self, *scores: float | None) -> None:
        self.name, self.scores = "fixed", scores

    def __call__(self, prompts: Any, completions: Any) -> list[float | None]:
        return list(self.scores)


def test_a_panel_that_scores_takes_the_mean_of_the_usable_scores() -> None:
    panel = ScorePanel([Fixed(4.0, 4.0, None), Fixed(2.0, None, None)])
    assert panel([Prompt("Q")] * 3, [done("a"), done("b"), done("c")]) == [3.0, 4.0, None]
    three = ScorePanel([Fixed(4.0), Fixed(None), Fixed(None)])
    assert three([Prompt("Q")], [done("a")]) == [None]


def test_a_member_without_a_score_does_not_lower_the_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")

    def grades(text: str) -> Callable[[dict[str, Any], int], Any]:
        return lambda body, number: {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}

    with FaultyServer(grades("Good.\nScore: 4")) as one, FaultyServer(grades("Hm")) as two:
        cfg = JudgeConfig(
            judge=f"server:a@{one.url}", judge_panel=(f"server:b@{two.url}",), judge_mode="rubric",
            judge_keys={two.url.split("/")[2]: "OPENAI_API_KEY"},
        )  # fmt: skip
        court = judging(JudgeContext(cfg), ledger=Ledger(), one_completion=True)
        (annotated,) = court.annotate([Group(Prompt("Q"), (done("a"),))])
    assert annotated.rewards == (4.0,)


class Silent(PairwiseJudge):
    """A judge that gives no usable verdict."""

    def __call__(self, prompts: Any, pairs: Any) -> list[float | None]:
        return [None] * len(pairs)


def test_a_cascade_asks_the_expert_about_unsure_pairs_only(open_court: Open) -> None:
    def unsure_about_x(body: dict[str, Any], number: int) -> Any:
        return judge_reply(body, lambda a, b: 0.55 if "x" in (a, b) else (0.9 if len(a) > len(b) else 0.1))

    cheap, expert = open_court(unsure_about_x), open_court(says(0.99))
    cascade = Cascade(cheap.judge, expert.judge, unsure=0.15)
    assert in_both_orders(cascade, [Prompt("Q")] * 2, PAIRS) == pytest.approx([0.9, 0.01])
    assert len(expert.server.requests) == 2  # both orders of one pair
    assert metrics_of([expert.bench])["judge/expert_asked"] == 0.5


def test_a_judge_that_always_takes_the_first_is_unsure(open_court: Open) -> None:
    biased = open_court(lambda body, number: judge_reply(body, lambda a, b: 0.99))
    expert = open_court(says(0.8))
    cascade = Cascade(biased.judge, expert.judge, unsure=0.1)
    assert in_both_orders(cascade, [Prompt("Q")] * 2, PAIRS) == pytest.approx([0.8, 0.2])


def test_several_judges_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with FaultyServer(says(0.9)) as one, FaultyServer(says(0.7)) as two:
        cfg = JudgeConfig(
            judge=f"server:a@{one.url}", judge_panel=(f"server:b@{two.url}",), max_verdicts=6,
            judge_keys={two.url.split("/")[2]: "OPENAI_API_KEY"},
        )  # fmt: skip
        court = judging(JudgeContext(cfg), ledger=Ledger())
        group = Group(Prompt("Q"), PAIRS[0])
        (annotated,) = court.annotate([group])
        assert annotated.rewards == pytest.approx((0.8, 0.2))
        assert court.metrics()["judge/verdicts"] == 4
        assert [count for count, _ in court.amounts(court.questions(group))] == [2, 2]
        with pytest.raises(BudgetError):
            court.annotate([Group(Prompt("Q"), PAIRS[1])])
        assert len(one.requests) + len(two.requests) == 6


def test_a_key_never_reaches_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-first-host")
    cfg = JudgeConfig(judge="server:a@https://one.example/v1", judge_expert="server:b@https://two.example/v1")
    with pytest.raises(ConfigError, match=r"--judge-keys two.example=NAME"):
        judging(JudgeContext(cfg), ledger=Ledger())
    with FaultyServer(says(0.9)) as plain:
        cfg = JudgeConfig(judge="server:a@https://one.example/v1", judge_panel=(f"server:b@{plain.url}",))
        court = judging(JudgeContext(cfg), ledger=Ledger())
        court.benches[1].desk.verdicts(court.questions(Group(Prompt("Q"), PAIRS[0])))
        assert plain.requests
        assert not any("sk-of-the-first-host" in str(headers) for headers in plain.headers)


def test_an_expert_needs_comparisons() -> None:
    cfg = JudgeConfig(judge="local:x", judge_expert="local:y", judge_mode="score")
    with pytest.raises(ConfigError, match="needs --judge-mode pairwise"):
        judging(JudgeContext(cfg), ledger=Ledger())
