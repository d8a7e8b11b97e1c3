from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from palate.annotate import Ranker, against_first, annotator, labels, question
from palate.annotate.base import in_both_orders
from palate.annotate.ranker import EPSILON
from palate.errors import AnnotatorError, DataError, ModelError
from palate.learn import Policy
from palate.model import Codec, TokenValues
from palate.select import pair_of_two
from palate.testing import ScriptedJudge, byte_tokenizer, tiny_model
from palate.types import Completion, Group, Pair, Prompt

PROMPTS = ["Hi", "What is it?", "Hi", "?"]
TEXTS = [("Hello.", "No"), ("a", "bcd" * 5), ("", "x"), ("same", "same")]


def done(text: str) -> Completion:
    return Completion(text, tuple(text.encode()) or (1,))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model with opinions: narrow weights would give nearly the same probabilities everywhere."""
    return tiny_model(tmp_path_factory.mktemp("wide"), chat=True, initializer_range=0.3)


@pytest.fixture(scope="module")
def ranker(wide: str) -> Ranker:
    return Ranker.load(wide, device="cpu", dtype="float32")


def verdicts(ranker: Ranker, texts: Sequence[tuple[str, str]]) -> list[float]:
    found = ranker([Prompt(p) for p in PROMPTS], [(done(a), done(b)) for a, b in texts])
    return [p for p in found if p is not None]


def averaged(ranker: Ranker, texts: Sequence[tuple[str, str]]) -> list[float]:
    found = in_both_orders(ranker, [Prompt(p) for p in PROMPTS], [(done(a), done(b)) for a, b in texts])
    return [p for p in found if p is not None]


# ---- Verdicts --------------------------------------------------------------------------------------


def test_probabilities_are_those_of_the_labels(wide: str, ranker: Ranker) -> None:
    # Hugging Face's own forward pass, one text at a time: the softmax over the logits of the two labels.
    model = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32).eval()
    codec = Codec(byte_tokenizer(chat=True), eos_ids=[257], max_length=256, name="wide")
    a, b = (codec.tokenizer(label, add_special_tokens=False)["input_ids"][0] for label in "AB")

    def says_a(prompt: str, first: str, second: str) -> float:
        ids = torch.tensor([codec.prompt_ids(question(codec, Prompt(prompt), first, second))])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1]
        return float(logits[[a, b]].softmax(-1)[0])

    expected = [says_a(prompt, one, two) for prompt, (one, two) in zip(PROMPTS, TEXTS, strict=True)]
    assert verdicts(ranker, TEXTS) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01  # there is something to tell apart


def test_the_order_of_the_two_is_nothing(ranker: Ranker) -> None:
    swapped = [(b, a) for a, b in TEXTS]
    sums = [p + q for p, q in zip(averaged(ranker, TEXTS), averaged(ranker, swapped), strict=True)]
    assert sums == pytest.approx([1.0] * 4, abs=1e-6)


def test_a_text_is_no_better_than_itself(ranker: Ranker) -> None:
    assert averaged(ranker, TEXTS)[3] == pytest.approx(0.5, abs=1e-7)


@dataclass
class Opinionated:
    """Log-odds of the label A: `better` in favour of the text "good", `first` of whatever is first."""

    better: float
    first: float

    def logps(self, records: Sequence[Group]) -> TokenValues:
        rows = []
        for record in records:
            good_first = record.prompt.text.index("good") < record.prompt.text.index("bad")
            rows += [[(self.better if good_first else -self.better) + self.first], [0.0]]
        return TokenValues(torch.tensor(rows), torch.ones(len(rows), 1, dtype=torch.bool))


def opinion(codec: Codec, better: float, first: float) -> float | None:
    ranker = Ranker(Opinionated(better, first), codec)  # type: ignore[arg-type]
    (p,) = in_both_orders(ranker, [Prompt("Q")], [(done("good"), done("bad"))])
    return p


def test_both_orders_count_alike(codec: Codec) -> None:
    # Odds of the label A are 3 * 2 = 6 where the good text is first, 3 / 2 where it is second: probabilities
    # 6/7 and 3/5.
    assert opinion(codec, math.log(2), math.log(3)) == pytest.approx((6 / 7 + 1 - 3 / 5) / 2)
    assert opinion(codec, 0.0, 30.0) == pytest.approx(0.5)  # always "A"


def test_certainty_is_kept_away_from_0_and_1(codec: Codec) -> None:
    assert opinion(codec, 1000.0, 0.0) == pytest.approx(1 - EPSILON)
    assert opinion(codec, -1000.0, 0.0) == pytest.approx(EPSILON)


def test_nothing_asked(ranker: Ranker) -> None:
    assert ranker([], []) == []


def test_a_policy_ranks_as_the_model_that_is_saved_of_it(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy()
    policy.save(tmp_path)
    live = Ranker(policy.snapshot(), policy.model.codec)
    saved = Ranker.load(str(tmp_path), device="cpu", dtype="float32")
    assert verdicts(live, TEXTS) == pytest.approx(verdicts(saved, TEXTS), abs=1e-6)


# ---- The question ----------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["chat", "plain"])
def codec(request: pytest.FixtureRequest) -> Codec:
    return Codec(byte_tokenizer(chat=request.param), eos_ids=[257], max_length=256, name="tiny")


def test_it_has_both_texts_in_order(codec: Codec) -> None:
    text = question(codec, Prompt("What is {first}?"), "one", "{second}").text
    assert text.index("What is {first}?") < text.index("one") < text.index("{second}")
    assert text != question(codec, Prompt("What is {first}?"), "{second}", "one").text


def test_a_conversation_is_told_with_its_roles(codec: Codec) -> None:
    turns = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"})
    assert "User: Hi\n\nAssistant: Yo" in question(codec, Prompt(turns), "a", "b").text


def test_without_a_template_the_text_ends_where_the_label_stands() -> None:
    plain = Codec(byte_tokenizer(), eos_ids=[257], max_length=256, name="tiny")
    assert question(plain, Prompt("Q"), "a", "b").text.endswith("Better answer:\n")


@given(st.text(max_size=300), st.text(max_size=300))
def test_it_fits_whatever_is_asked(first: str, second: str) -> None:
    codec = Codec(byte_tokenizer(chat=True), eos_ids=[257], max_length=256, name="tiny")
    asked = question(codec, Prompt("Which?"), first, second)
    assert len(codec.prompt_ids(asked)) < 256  # and the label
    assert asked.text.endswith("and nothing else.")


def kept(text: str, letter: str) -> int:
    """How many are left of a letter that the question's own words have not."""
    return text.count(letter)


def test_the_longer_text_is_cut_first(codec: Codec) -> None:
    free = 256 - 1 - len(codec.prompt_ids(question(codec, Prompt("Q"), "", "")))
    for first, second, expected in [
        ("z" * 10, "q" * 250, (10, free - 10)),
        ("z" * 250, "q" * 10, (free - 10, 10)),
        ("z" * 250, "q" * 250, (free // 2, free // 2)),
        ("z" * (free - 20), "q" * 20, (free - 20, 20)),  # just fits
    ]:
        text = question(codec, Prompt("Q"), first, second).text
        assert (kept(text, "z"), kept(text, "q")) == expected


def test_a_prompt_without_room_is_named(codec: Codec) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:3: the prompt has \d+ tokens"):
        question(codec, Prompt("x" * 250, where="data.jsonl:3"), "a", "b")


def test_labels_are_single_tokens(codec: Codec) -> None:
    first, second = labels(codec)
    assert (codec.text(first.token_ids), codec.text(second.token_ids)) == ("A", "B")
    assert len(first.token_ids) == len(second.token_ids) == 1


def test_a_tokenizer_without_labels(monkeypatch: pytest.MonkeyPatch, codec: Codec) -> None:
    def spelled(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [1, *text.encode()]}

    monkeypatch.setattr(codec, "tokenizer", spelled)
    with pytest.raises(
        ModelError, match=r"makes the tokens \[1, 65\] of A and \[1, 66\] of B; a ranker answers"
    ):
        labels(codec)


# ---- As an annotator -------------------------------------------------------------------------------


def judge(p: float | None) -> ScriptedJudge:
    """Prefers the second of a group to its first with probability p, whatever the order."""
    return ScriptedJudge(lambda first, second: p if p is None or first > second else 1 - p)


def group(*texts: str) -> Group:
    return Group(Prompt("Q"), tuple(map(done, texts)))


def test_rewards_are_logits_against_the_first() -> None:
    asked = []

    def prefer(first: str, second: str) -> float:
        asked.append((first, second))
        return {("b", "a"): 0.75, ("a", "b"): 0.25, ("c", "a"): 0.1, ("a", "c"): 0.9}.get(
            (first, second), 0.5
        )

    one, two, alone = against_first(ScriptedJudge(prefer))(
        [group("a", "b", "c"), group("d", "e"), group("f")]
    )
    comparisons = [("b", "a"), ("c", "a"), ("e", "d")]  # n - 1 of a group, all in one call
    assert asked == comparisons + [(second, first) for first, second in comparisons]
    # log(0.75 / 0.25) = log 3, log(0.1 / 0.9) = -log 9
    assert one.rewards == pytest.approx((0.0, math.log(3), -math.log(9)))
    assert two.rewards == pytest.approx((0.0, 0.0))
    assert alone.rewards == (None,)  # nobody to compare it with


def test_two_completions_are_a_match() -> None:
    (found,) = against_first(judge(0.8))([group("a", "b")])
    made = pair_of_two(found)
    assert isinstance(made, Pair)
    assert (made.chosen.text, made.margin) == ("b", pytest.approx(math.log(4)))


@pytest.mark.parametrize("p", [None, math.nan, -0.1, 1.1])
def test_a_verdict_that_is_none(p: float | None) -> None:
    (found,) = against_first(judge(p))([group("a", "b", "c")])
    assert found.rewards == (None, None, None)


def test_a_verdict_that_is_lost() -> None:
    scripted = ScriptedJudge(lambda first, second: None if "b" in (first, second) else 0.5)
    (found,) = against_first(scripted)([group("a", "b", "c")])
    assert found.rewards == (0.0, None, 0.0)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_certainty_has_a_finite_reward(p: float) -> None:
    (found,) = against_first(judge(p))([group("a", "b")])
    assert found.rewards == (0.0, pytest.approx((2 * p - 1) * math.log((1 - EPSILON) / EPSILON)))


def test_another_number_of_verdicts() -> None:
    def few(prompts: object, pairs: object) -> list[float | None]:
        return [0.5]

    few.name = "few"  # type: ignore[attr-defined]
    with pytest.raises(AnnotatorError, match="judge few gave 1 verdicts for 4 pairs"):
        against_first(few)([group("a", "b", "c")])  # type: ignore[arg-type]


# ---- Behind --reward -------------------------------------------------------------------------------


def test_as_a_reward(wide: str, ranker: Ranker) -> None:
    texts = ("Hello.", "No", "Hm")
    (found,) = annotator([f"ranker:{wide}"], device="cpu")([group(*texts)])
    (expected,) = against_first(ranker)([group(*texts)])
    assert found.rewards == pytest.approx(expected.rewards, abs=0.1)  # bfloat16 where the processor has it


@pytest.mark.parametrize(
    "specs", [["ranker:x", "length:4"], ["length:4", "ranker:x"], ["0.5*ranker:x"], ["ranker:x", "ranker:y"]]
)
def test_a_ranker_has_no_scores_to_weigh(specs: list[str]) -> None:
    with pytest.raises(AnnotatorError, match=r"have a ranker, .* expected it alone and without a weight"):
        annotator(specs)


def test_the_penalty_for_cut_completions(wide: str) -> None:
    cut = Completion("a", (1,), "length")
    (found,) = annotator([f"ranker:{wide}"], missing_eos_penalty=0.5, device="cpu")(
        [Group(Prompt("Q"), (cut, cut))]
    )
    assert found.rewards == pytest.approx((-0.5, -0.5), abs=1e-6)
