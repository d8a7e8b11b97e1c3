import json

import pytest

from palate.data import Account, read_comparisons, read_demonstrations, read_prompts
from palate.errors import DataError
from palate.types import Comparison, Demonstration, Prompt


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
U, A, B = user("Hi"), assistant("Hello"), assistant("Go away")


def said(read, source, **options):
    with pytest.raises(DataError) as caught:
        read(source, **options)
    return str(caught.value)


# Comparisons


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "The sky is", "chosen": " blue", "rejected": ""}, "The sky is", " blue", ""),
        ({"prompt": [U], "chosen": [A], "rejected": [B]}, (U,), (A,), (B,)),
        ({"prompt": [U], "chosen": "Hello", "rejected": "Go away"}, (U,), (A,), (B,)),
        ({"prompt": "Hi", "chosen": [A], "rejected": [B]}, (U,), (A,), (B,)),
        ({"prompt": "Hi", "chosen": A, "rejected": "Go away"}, (U,), (A,), (B,)),
        ({"prompt": [U], "chosen": [U, A], "rejected": [U, B]}, (U,), (A,), (B,)),
        # UltraFeedback as binarized by HuggingFaceH4
        ({"prompt": "Hi", "chosen": [U, A], "rejected": [U, B], "messages": [U, A]}, (U,), (A,), (B,)),
        ({"prompt": "Hi", "chosen": [SYSTEM, U, A], "rejected": [SYSTEM, U, B]}, (SYSTEM, U), (A,), (B,)),
        # implicit
        ({"chosen": [U, A], "rejected": [U, B]}, (U,), (A,), (B,)),
        ({"chosen": [U, A, user("?"), A], "rejected": [U, A, user("?"), B]}, (U, A, user("?")), (A,), (B,)),
        # Llama-Factory
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Hello"},
                "rejected": {"from": "gpt", "value": "Go away"},
            },
            (U,),
            (A,),
            (B,),
        ),
        ({"instruction": "Hi", "input": "you", "chosen": "a", "rejected": "b"}, "Hi\nyou", "a", "b"),
        ({"messages": [U], "chosen": "Hello", "rejected": "Go away"}, (U,), (A,), (B,)),
    ],
)
def test_comparisons(data, row, prompt, chosen, rejected):
    assert read_comparisons(data(row)) == ([Comparison(Prompt(prompt), chosen, rejected)], 0)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),  # not "The sky is bl"
        ("The sky is  blue.", "The sky is  green.", "The sky is"),
        ("The sky is", "The sky is blue", "The sky"),  # leaves something of each
        ("Say hello!", "Say hello?", "Say"),
        (
            "\n\nHuman: Hi\n\nAssistant: Hello",
            "\n\nHuman: Hi\n\nAssistant: He he",
            "\n\nHuman: Hi\n\nAssistant:",
        ),
        ("\n\nHuman: Hi\n\nAssistant: Hello", "\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant:"),
        (
            "\n\nHuman: Hi\n\nAssistant: Hm?\n\nHuman: So?\n\nAssistant: Yes",
            "\n\nHuman: Hi\n\nAssistant: Hm?\n\nHuman: So?\n\nAssistant: No",
            "\n\nHuman: Hi\n\nAssistant: Hm?\n\nHuman: So?\n\nAssistant:",
        ),
        (  # the later marker of one alone is not the cut
            "\n\nHuman: Hi\n\nAssistant: Yes\n\nHuman: So?\n\nAssistant: Yes",
            "\n\nHuman: Hi\n\nAssistant: No",
            "\n\nHuman: Hi\n\nAssistant:",
        ),
    ],
)
def test_the_prompt_that_two_texts_share(data, chosen, rejected, prompt):
    ((comparison,), _) = read_comparisons(data({"chosen": chosen, "rejected": rejected}))
    assert comparison.prompt.content == prompt
    assert prompt + comparison.chosen == chosen
    assert prompt + comparison.rejected == rejected
    (read,) = read_prompts(data({"chosen": chosen, "rejected": rejected}))
    assert read == comparison.prompt
    # As columns of the prompt the texts do not repeat it.
    assert read.columns == {"chosen": comparison.chosen, "rejected": comparison.rejected}


def test_margins_and_other_columns(data):
    source = data(
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2, "score_chosen": 7},
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": None},
    )
    (first, second), _ = read_comparisons(source)
    assert (first.margin, second.margin) == (2.0, None)
    assert first.prompt.columns == {"score_chosen": 7}


def test_equal_texts_are_left_out_and_counted(data):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    ties = [
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": [U], "chosen": [A], "rejected": [A]},
        {"prompt": [U], "chosen": "Hello", "rejected": [A]},
        {"prompt": [U], "chosen": [A], "rejected": [U, A]},
        {"chosen": [U, A], "rejected": [U, A]},
    ]
    comparisons, same = read_comparisons(data(good, *ties, good))
    assert (len(comparisons), same) == (2, 5)
    source = data(*ties)
    assert said(read_comparisons, source).startswith(
        f"{source}: chosen and rejected are the same in all 5 rows;"
    )


def test_swapped_columns(data):
    source = data({"prompt": "a", "chosen": "b", "rejected": "c"})
    ((comparison,), _) = read_comparisons(source, columns={"chosen": "rejected", "rejected": "chosen"})
    assert (comparison.chosen, comparison.rejected) == ("c", "b")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "chosen": "b"},
            "rejected is missing; expected a text or a list of chat turns. Columns: ",
        ),
        ({"prompt": "a", "rejected": "b"}, "chosen is missing; expected"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "chosen is null; expected"),
        (
            {"prompt": "a", "chosen": 3, "rejected": "b"},
            "chosen is a number; expected a text or a list of chat",
        ),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt is an empty text; expected"),
        (
            {"prompt": [U], "chosen": [A, U, B], "rejected": [B]},
            "after the prompt, chosen has the turns: assistant, user, assistant; expected exactly one",
        ),
        (
            {"prompt": [U], "chosen": [U], "rejected": [B]},
            "after the prompt, chosen has the turns: nothing; expected exactly one",
        ),
        (
            {"prompt": [U], "chosen": [A], "rejected": [user("no")]},
            "after the prompt, rejected has the turns: user; expected exactly one",
        ),
        (
            {"prompt": "Who?", "chosen": [U, A], "rejected": [U, B]},
            "prompt is not among the turns that chosen and rejected share; expected the same prompt.",
        ),
        (
            {"chosen": [U, A, user("?"), A], "rejected": [U, B]},
            "after the prompt, chosen has the turns: assistant, user, assistant; expected exactly one",
        ),
        (
            {"chosen": [A], "rejected": [B]},
            "prompt is missing; expected one, or the same first turns in chosen",
        ),
        (
            {"chosen": [U, A], "rejected": [user("Ho"), B]},
            "prompt is missing; expected one, or the same first",
        ),
        (
            {"chosen": [U, A, A], "rejected": [U, A, B]},
            "in chosen the turn to answer is a turn of the assistant;",
        ),
        (
            {"chosen": "Hello", "rejected": [U, B]},
            "prompt is missing; expected one, where chosen or rejected is a",
        ),
        (
            {"chosen": "yes", "rejected": "no"},
            "prompt is missing; expected one, or the same words at the start",
        ),
        (
            {"chosen": "\n\nHuman: a b\n\nAssistant: c", "rejected": "\n\nHuman: a d\n\nAssistant: e"},
            "prompt is missing; expected one, or the same words at the start",
        ),
        ({"prompt": "a", "chosen": " ", "rejected": "c"}, "chosen is empty; expected the better text"),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "Try --map prompt=question."),
    ],
)
def test_bad_comparisons(data, row, message):
    source = data({"prompt": "fine", "chosen": "a", "rejected": "b"}, row)
    text = said(read_comparisons, source)
    assert text.startswith(f"{source}:2: ")
    assert message in text
    assert f"Columns: {', '.join(row)}." in text


# Demonstrations


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "The sky is", "completion": " blue"}, "The sky is", " blue"),
        ({"prompt": [U], "completion": [A]}, (U,), (A,)),
        ({"prompt": "Hi", "completion": [A]}, (U,), (A,)),
        ({"prompt": [U], "completion": "Hello"}, (U,), (A,)),
        ({"prompt": [U], "completion": [U, A]}, (U,), (A,)),
        ({"messages": [SYSTEM, U, A]}, (SYSTEM, U), (A,)),
        ({"prompt": "Hi", "messages": [U, A, user("More"), B]}, (U, A, user("More")), (B,)),
        ({"messages": [U, A, user("Bye")]}, (U,), (A,)),
        ({"text": "Once upon a time"}, "", "Once upon a time"),
        ({"instruction": "Hi", "input": "you", "output": "Hello"}, "Hi\nyou", "Hello"),
        ({"instruction": "Hi", "system": "Be brief.", "output": "Hello"}, (SYSTEM, U), (A,)),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            (U,),
            (A,),
        ),
    ],
)
def test_demonstrations(data, row, prompt, completion):
    assert read_demonstrations(data(row)) == [Demonstration(Prompt(prompt), completion)]


def test_chosen_texts_as_demonstrations(data):
    source = data({"prompt": "a", "chosen": "b", "rejected": "c"})
    assert "Try --map completion=chosen." in said(read_demonstrations, source)
    (demonstration,) = read_demonstrations(source, columns={"completion": "chosen"})
    assert demonstration == Demonstration(Prompt("a"), "b")
    assert demonstration.prompt.columns == {"rejected": "c"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "completion is missing; expected prompt with completion, messages, or text."),
        ({"completion": "a"}, "prompt is missing; expected"),
        ({"prompt": "a", "completion": " "}, "the completion is empty; expected something to imitate."),
        ({"prompt": "a", "completion": 3}, "completion is a number; expected"),
        (
            {"prompt": "a", "completion": [A, U, B]},
            "after the prompt, completion has the turns: assistant, user, assistant; expected exactly one",
        ),
        ({"messages": [U]}, "messages have no turn of the assistant; expected one to imitate."),
        ({"messages": [A]}, "messages has no turn to answer; expected a turn of the user"),
        ({"messages": [U, assistant("")]}, "the completion is empty; expected something to imitate."),
        (
            {"text": [U, A]},
            "text is a list; expected a text; a list of turns is named by --map messages=text.",
        ),
        ({"text": ""}, "the completion is empty; expected something to imitate."),
    ],
)
def test_bad_demonstrations(data, row, message):
    source = data({"prompt": "fine", "completion": "a"}, row)
    text = said(read_demonstrations, source)
    assert text.startswith(f"{source}:2: ")
    assert message in text


def test_a_pair_that_is_marked_false_is_left_out(tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    path.write_text("".join(json.dumps({**row, "label": label}) + "\n" for label in (True, False, 0)))
    account = Account()
    kept, _ = read_comparisons(str(path), account=account)
    assert len(kept) == 2  # a number is another column's business
    assert account.dropped_rows == 1
    assert len(read_comparisons(str(path), marked=True)[0]) == 3
