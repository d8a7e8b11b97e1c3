import json

import pytest

from palate.data import read_prompts
from palate.errors import DataError
from palate.types import Prompt


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


@pytest.mark.parametrize(
    ("row", "content", "rest"),
    [
        ({"prompt": " The sky is", "n": 1}, " The sky is", {"n": 1}),
        ({"prompt": [U], "messages": [U, A]}, (U,), {"messages": [U, A]}),
        ({"prompt": U}, (U,), {}),
        ({"messages": [SYSTEM, U, A, user("More"), B], "n": 1}, (SYSTEM, U, A, user("More")), {"n": 1}),
        ({"messages": [U, A, user("More")]}, (U, A, user("More")), {}),
        ({"prompt": None, "messages": [U, A]}, (U,), {"prompt": None}),
        ({"chosen": [U, A], "rejected": [U, B]}, (U,), {"chosen": [A], "rejected": [B]}),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "Hi", {"chosen": "a", "rejected": "b"}),
        ({"prompt": [{"from": "human", "value": "Hi"}]}, (U,), {}),
        ({"prompt": [{**U, "from": None, "tool_calls": None}]}, (U,), {}),
        ({"prompt": [{**U, "name": "Ann"}]}, ({**U, "name": "Ann"},), {}),  # a template may read it
        ({"prompt": [U, A]}, (U, A), {}),  # a begun answer
        (
            {"prompt": [user([{"type": "text", "text": "H"}, {"type": "text", "text": "i"}])]},
            (U,),
            {},
        ),
        ({"prompt": "Hi", "system": "Be brief."}, (SYSTEM, U), {}),
        ({"prompt": "Hi", "system": ""}, "Hi", {}),
        ({"messages": [U, A], "system_prompt": "Be brief."}, (SYSTEM, U), {}),
        ({"instruction": "So?", "history": [["Hi", "Hello"]]}, (U, A, user("So?")), {}),
        ({"prompt": json.dumps([SYSTEM, U])}, (SYSTEM, U), {}),
        ({"prompt": str([SYSTEM, U])}, (SYSTEM, U), {}),
        ({"prompt": '["role", "from"]'}, '["role", "from"]', {}),
        ({"instruction": "Hi"}, "Hi", {}),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "Hi", {"output": "Hello"}),
        (
            {"instruction": "Translate:", "input": "Hallo", "history": []},
            "Translate:\nHallo",
            {"history": []},
        ),
        ({"instruction": "Hi", "system": "Be brief."}, (SYSTEM, U), {}),
        ({"instruction": "no", "prompt": "Hi"}, "Hi", {"instruction": "no"}),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, (U,), {}),
        ({"conversations": [U, A], "system": "Be brief."}, (SYSTEM, U), {}),
        ({"conversations": [SYSTEM, U, A], "system": "no"}, (SYSTEM, U), {"system": "no"}),
    ],
)
def test_prompts(data, row, content, rest):
    source = data(row)
    (prompt,) = read_prompts(source)
    assert prompt == Prompt(content)
    assert dict(prompt.columns) == rest
    assert prompt.where == f"{source}:1"


def test_a_map_takes_exactly_the_column_it_names(data):
    source = data({"instruction": "Hi", "input": "x", "prompt": "no"})
    (prompt,) = read_prompts(source, columns={"prompt": "instruction"})
    assert prompt.content == "Hi"
    assert prompt.columns == {"input": "x", "prompt": "no"}


def test_limit_and_split(data, tmp_path):
    assert len(read_prompts(data({"prompt": "a"}, {"prompt": "b"}), limit=1)) == 1
    assert len(read_prompts("everyday", split="test", limit=3)) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "a", "n": 1},
            "prompt is missing; expected a text or a list of chat turns to answer. "
            "Columns: question, n. Try --map prompt=question.",
        ),
        ({"promtp": "a"}, "Columns: promtp. Try --map prompt=promtp."),
        ({"n": 1}, "Columns: n. If it has another name, give --map prompt=NAME."),
        ({"text": "a", "chosen": "b"}, "Columns: text, chosen. Try --map prompt=text."),
        ({}, "prompt is missing; expected a text or a list of chat turns to answer. Columns: none."),
        ({"prompt": None}, "prompt is null; expected a text or a list of chat turns to answer; fill it"),
        ({"prompt": " \n"}, "prompt is an empty text; expected something to answer. Columns: prompt."),
        ({"prompt": 3}, "prompt is a number; expected a text or a list of chat turns."),
        ({"prompt": True}, "prompt is true or false; expected"),
        ({"prompt": []}, "prompt is an empty list; expected at least one chat turn."),
        ({"prompt": ["Hi"]}, "turn 1 of prompt is a text; expected a turn such as"),
        (
            {"prompt": [U, {"role": "wizard", "content": "a"}]},
            "turn 2 of prompt has the role 'wizard'; expected "
            "one of system, developer, user, assistant, tool.",
        ),
        (
            {"prompt": [{"role": ["user"], "content": "a"}]},
            "turn 1 of prompt has the role ['user']; expected",
        ),
        ({"prompt": [{"content": "a"}]}, "turn 1 of prompt has no role; expected one of system,"),
        ({"prompt": [{"role": "user"}]}, "the content of turn 1 of prompt is null; expected a text."),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]},
            "the content of turn 1 of prompt has a part of type 'image_url'; expected parts of type 'text'.",
        ),
        (
            {"prompt": [{**U, "tool_calls": [{}]}]},
            "turn 1 of prompt is a turn of the user and calls tools; "
            "expected calls in turns of the assistant.",
        ),
        (
            {"prompt": [A]},
            "in prompt the turn to answer is a turn of the assistant; expected one of the user",
        ),
        ({"prompt": "a", "tools": "b"}, "tools is a text; expected a list of tools, or its JSON text."),
        ({"prompt": "a", "tools": [3]}, "a tool is a number; expected an object"),
        ({"prompt": "a", "chat_template_kwargs": 3}, "chat_template_kwargs is a number; expected an object"),
        ({"prompt": "a", "system": 3}, "system is a number; expected a text."),
        (
            {"prompt": [SYSTEM]},
            "in prompt the turn to answer is a turn of the system; expected one of the user",
        ),
        ({"prompt": [user(" ")]}, "in prompt the turn to answer is empty; expected something to answer."),
        ({"messages": [A]}, "messages has no turn to answer; expected a turn of the user"),
        ({"messages": "Hi"}, "messages is a text; expected a list of chat turns."),
        ({"instruction": 3}, "instruction is a number; expected a text."),
        ({"instruction": "a", "input": ["b"]}, "input is a list; expected a text."),
        ({"instruction": "a", "history": ["b"]}, "history is not a list of pairs; expected pairs of texts"),
        ({"conversations": [U, A], "system": 3}, "system is a number; expected a text."),
    ],
)
def test_bad_prompts(data, row, message):
    source = data({"prompt": "fine"}, row)
    text = said(read_prompts, source)
    assert text.startswith(f"{source}:2: ")
    assert message in text


def test_bad_maps(data):
    source = data({"instruction": "a", "n": 1}, {"instruction": "b", "more": 2})
    assert said(read_prompts, source, columns={"prompt": "instrction"}) == (
        f"{source}: no row has the column 'instrction' of --map prompt=instrction. "
        "Columns: instruction, n, more. Did you mean instruction?"
    )
    assert said(read_prompts, source, columns={"promt": "instruction"}) == (
        "--map promt=instruction: 'promt' is not a column that is read; expected one of prompt, chosen, "
        "rejected, completion, messages, text, margin, system, tools, chat_template_kwargs, label, finish, "
        "chosen_finish, rejected_finish on the left. Did you mean prompt?"
    )
    assert said(read_prompts, source, columns={"prompt": "n"}).startswith(f"{source}:1: prompt is a number;")
    assert said(read_prompts, source, columns={"prompt": "more"}).startswith(
        f"{source}:1: prompt (column 'more') is missing; expected a text or a list of chat turns to answer."
    )
