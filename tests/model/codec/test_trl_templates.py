"""The chat templates of the models that people train, as TRL's wheel has them: an optional extra."""

import importlib.util
import re
from pathlib import Path

import pytest

from palate.data import Account
from palate.model import Codec
from palate.types import Demonstration, Prompt

from .conftest import TOKENIZERS

found = importlib.util.find_spec("trl")
FOLDER = Path(str(found.origin)).parent / "chat_templates" if found and found.origin else None
FILES = sorted(FOLDER.glob("*.jinja")) if FOLDER else []
pytestmark = pytest.mark.skipif(not FILES, reason="TRL is an optional extra, and its templates are not here")

CONTROL = re.compile(
    r"<\|[a-zA-Z_/]+\|>|<｜[^｜>]{1,40}｜>|<(?:start|end)_of_\w+>|\[/?INST\]|<\|?turn\|?>|\[gMASK\]|</s>"
)
PLAIN = ["<think>", "</think>"]
IN_PARTS = ("idefics", "smolvlm", "llava")
"""Vision models, whose templates take texts as parts of a list."""


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "tide_table",
            "description": "High water",
            "parameters": {
                "type": "object",
                "properties": {"port": {"type": "string", "description": "where"}},
                "required": ["port"],
            },
        },
    }
]
CALL = {
    "type": "function",
    "id": "abcdefghi",
    "function": {"name": "tide_table", "arguments": {"port": "Wick"}},
}
CALLED = [user("When?"), assistant("", tool_calls=[CALL])]
SHAPES = {
    "plain": [user("Hi there"), assistant("Hello you")],
    "system": [system("Be brief."), user("Hi"), assistant("Hello")],
    "empty system": [system(""), user("Hi"), assistant("Hello")],
    "several turns": [user("One?"), assistant("First."), user("Two?"), assistant("Second.")],
    "reasoning": [user("Is 91 prime?"), assistant("No.", reasoning_content="91 = 7 * 13.")],
    "thought": [user("Is 91 prime?"), assistant("<think>\n91 = 7 * 13.\n</think>\n\nNo.")],
    "earlier thoughts": [
        user("One?"),
        assistant("<think>\nhm\n</think>\n\nFirst."),
        user("Two?"),
        assistant("<think>\nhm hm\n</think>\n\nSecond."),
    ],
    "tools": [user("When?"), assistant("At noon.")],
    "tool call": CALLED,
    "tool result": [
        *CALLED,
        {"role": "tool", "name": "tide_table", "content": "04:12", "tool_call_id": "abcdefghi"},
        assistant("At 4.12."),
    ],
    "borders": [system(" S \n"), user("  Hi \n"), assistant(" \n Hello  \n\n")],
    "control-like": [
        user("say <|im_end|> or </think> or <|eot_id|> x <end_of_turn>"),
        assistant("No <|x|> thanks <"),
    ],
    "developer": [{"role": "developer", "content": "Be brief."}, user("Hi"), assistant("Hello")],
    "prefill": [user("JSON please"), assistant('{"name": "'), assistant('Tern"}')],
}


def codec(file):
    text = file.read_text("utf-8")
    special = ["<eos>", "<bos>", *sorted(set(CONTROL.findall(text)))]
    tokenizer = TOKENIZERS["bytes"](special, PLAIN)
    tokenizer.chat_template = text
    made = Codec(tokenizer, eos_ids=[], max_length=100_000, name=file.stem)
    made.account = Account()
    return made


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_prompt_and_completion_are_the_rendering(file):
    made = codec(file)
    compared = 0
    for name, turns in SHAPES.items():
        variables = {"tools": TOOLS} if name.startswith("tool") else {}
        finished = turns
        if name == "prefill":
            finished = [*turns[:-2], assistant(turns[-2]["content"] + turns[-1]["content"])]
        if file.stem.startswith(IN_PARTS):
            finished = [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in finished]
        try:
            wanted = made.tokenizer.apply_chat_template(finished, tokenize=False, **variables)
        except Exception:  # this template does not render this shape, for whatever reason
            continue
        example = made.example(Demonstration(Prompt(tuple(turns[:-1]), variables=variables), (turns[-1],)))
        ids = [*made.prompt_ids(example.prompt), *example.completion.token_ids]
        text = made.tokenizer.decode(ids)
        if not wanted.startswith(text):  # the template writes no end token: ours takes the place of its end
            assert ids[-1] == made.end_id
            text = made.tokenizer.decode(ids[:-1])
            assert not wanted.removeprefix(text).strip(), name
        assert wanted.startswith(text), name
        if name != "control-like":  # where text stays text, that reads the same
            tokens = made.tokenizer(wanted, add_special_tokens=False)["input_ids"]
            assert tokens[: len(ids) - 1] == ids[:-1], name
        assert turns[-2]["content"].strip() not in made.tokenizer.decode(example.completion.token_ids), name
        compared += 1
    assert compared >= 5
