from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from palate.annotate import scored
from palate.learn import Policy
from palate.loops.candidates import Candidates, draw
from palate.methods.oaif import OAIFConfig
from palate.run import Run
from palate.select import Drop, top_k
from palate.testing import ScriptedScorer, tiny_policy
from palate.types import Completion, Group, Prompt


def group(*texts: str, name: str = "q") -> Group:
    """Completions of one letter, whose place in the alphabet is what they are worth."""
    return Group(Prompt(name), tuple(Completion(text, tuple(map(ord, text))) for text in texts))


def worth(text: str) -> float:
    return float(ord(text[0]) - ord("a"))


score = scored(ScriptedScorer(worth))


@pytest.fixture
def policy(tiny: str) -> Policy:
    return tiny_policy(Path(tiny))


def test_repetitions_are_drawn_but_are_no_candidates(policy: Policy, tmp_path: Path) -> None:
    prompts = [Prompt("one", {"gold": "x"}), Prompt("two", {"gold": "x"})]
    cfg = OAIFConfig(data="-", temperature=0.02, max_new_tokens=4, output=tmp_path / "run")
    with Run(cfg, method="oaif") as run:
        few = draw(policy, prompts, 6, cfg.sampling, run, texts=["gold"])
        again = draw(policy, prompts, 6, cfg.sampling, run, texts=["gold"])
        other = draw(policy, prompts, 6, replace_temperature(cfg), run)
        later = draw(policy, prompts, 6, replace_temperature(cfg), run, 1)
    assert few == again
    assert other.sampled != later.sampled
    assert [len(g.completions) for g in few.sampled] == [6, 6]
    kept = sum(len(g.completions) for g in few.groups)
    assert kept < 14
    assert few.dropped[Drop.IDENTICAL] == 14 - kept
    assert all(g.completions[-1].text == "x" for g in few.groups)
    assert other.dropped[Drop.IDENTICAL] == 0


def replace_temperature(cfg: OAIFConfig):  # type: ignore[no-untyped-def]
    return cfg.sampling.model_copy(update={"temperature": 1.0})


def test_numbers_tell_candidates_from_pairs() -> None:
    groups = [group("a", "b", "c", "d")]
    twice = [replace(groups[0], completions=groups[0].completions + groups[0].completions[:1])]
    candidates = Candidates(twice, groups, groups, {Drop.IDENTICAL: 1})
    candidates = candidates.annotated(score).thinned(lambda g: top_k(g, 2))
    numbers = candidates.numbers({Drop.TIE: 3}, kept=7)
    assert numbers["objective/scores"] == 1.5  # of 0, 1, 2, 3
    assert numbers["candidates/scores"] == 2.5  # of 2, 3
    assert (numbers["candidates/kept"], numbers["candidates/dropped"]) == (2, 3)
    assert (numbers["candidates/dropped_identical"], numbers["candidates/dropped_passed_over"]) == (1, 2)
    assert (numbers["pairs/kept"], numbers["pairs/dropped"], numbers["pairs/dropped_tie"]) == (7, 3, 3)


def test_what_was_not_scored_is_not_called_unusable() -> None:
    groups = [group("a", "b")]
    numbers = Candidates(groups, groups, groups, {}).numbers({}, kept=1)
    assert not [name for name in numbers if "scores" in name or name == "objective/unusable"]
    (none,) = [g.annotated((None, 1.0)) for g in groups]
    assert Candidates(groups, [none], [none], {}).numbers({}, kept=0)["objective/unusable"] == 1
