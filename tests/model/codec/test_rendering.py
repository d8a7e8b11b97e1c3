"""Prompt and completion are the template's own rendering of the finished conversation."""

from datetime import datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palate.data.account import Account
from palate.errors import DataError
from palate.model import Codec
from palate.types import Comparison, Demonstration, Prompt

from .conftest import TOKENIZERS

END, BOS = "<|im_end|>", "<|im_start|>"
TURN = "{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}"
ASK = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
OPENS = ASK.replace("assistant\\n'", "assistant\\n<think>\\n'")
EACH = "{%- for m in messages -%}"
DONE = "{%- endfor -%}"

THOUGHTS = (
    EACH + "{%- if m['role'] == 'assistant' -%}{%- set said = m['content'] -%}"
    "{%- set thought = m.reasoning_content or '' -%}"
    "{%- if '</think>' in said -%}"
    "{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}"
    "{%- set said = said.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- if loop.last -%}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}{%- endif -%}"
    "{{- said + '<|im_end|>\\n' -}}{%- else -%}" + TURN + "{%- endif -%}" + DONE
)
DROPS = (
    EACH + "{%- set said = m['content'] -%}{%- if m['role'] == 'assistant' and '</think>' in said -%}"
    "{%- set said = said.split('</think>')[-1] -%}{%- endif -%}"
    "{{- '<|im_start|>' + m['role'] + '\\n' + said + '<|im_end|>\\n' -}}" + DONE
)
TEMPLATES = {
    "chatml": EACH + TURN + DONE + ASK,
    "opens a thought": THOUGHTS + OPENS,
    "opens a thought, renders none": DROPS + OPENS,
    "no opening": EACH + TURN + DONE,
    "header in the turn": EACH + "{%- if m['role'] == 'assistant' -%}"
    "{{- '<|im_start|>assistant<|channel|>final\\n' + m['content'] + '<|im_end|>' -}}"
    "{%- else -%}"
    + TURN
    + "{%- endif -%}"
    + DONE
    + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant' -}}{%- endif -%}",
    "trims": EACH + TURN.replace("m['content']", "m['content'] | trim") + DONE + ASK,
    "ends for readers": EACH
    + TURN
    + DONE
    + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
    + "{%- else -%}{{- '<eos>' -}}{%- endif -%}",
    "system in the last turn": EACH
    + "{%- set first = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' -%}"
    + "{%- if m['role'] == 'user' -%}"
    + "{{- '<|im_start|>' + (first if loop.last else '') + m['content'] + '<|im_end|>' -}}"
    + "{%- elif m['role'] == 'assistant' -%}{{- m['content'] + '<|im_end|>' -}}{%- endif -%}"
    + DONE,
    "no end": EACH
    + "{{- m['role'] + ': ' + m['content'] + '\\n' -}}"
    + DONE
    + "{%- if add_generation_prompt -%}{{- 'assistant:' -}}{%- endif -%}",
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def codec(make=TOKENIZERS["bytes"], template="chatml", **options):
    tokenizer = make([END, BOS, "<|channel|>", "<eos>"], ["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATES.get(template, template)
    made = Codec(tokenizer, **{"eos_ids": [], "max_length": 10_000, "name": "tiny"} | options)
    made.account = Account()
    return made


def learnt(made, example):
    """Prompt and completion as tokens."""
    return [*made.prompt_ids(example.prompt), *example.completion.token_ids]


def rendered(made, turns, **options):
    return made.tokenizer.apply_chat_template([dict(t) for t in turns], tokenize=False, **options)


def assert_learns_the_rendering(made, turns, **variables):
    prompt = Prompt(tuple(turns[:-1]), variables=variables)
    example = made.example(Demonstration(prompt, (turns[-1],)))
    ids, whole = learnt(made, example), rendered(made, turns, **variables)
    wanted = made.tokenizer(whole, add_special_tokens=False)["input_ids"]
    if ids[: len(wanted)] == wanted or wanted[: len(ids)] == ids:
        rest = made.tokenizer.decode(wanted[len(ids) :])
    else:  # the template writes no end token, so ours follows in place of its last white space
        assert ids[-1] == made.end_id
        bare = [
            made.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (whole.rstrip(), whole[:-1])
        ]
        assert ids[:-1] in bare
        rest = ""
    assert rest.strip() in ("", "<eos>")
    return example


CONVERSATIONS = {
    "plain": [user("Hi"), assistant("Hello")],
    "system": [system("Be brief."), user("Hi"), assistant("Hello")],
    "empty system": [system(""), user("Hi"), assistant("Hello")],
    "several turns": [user("One?"), assistant("First."), user("Two?"), assistant("Second.")],
    "thought": [user("Hi"), assistant("<think>\nhm\n</think>\n\nHello")],
    "earlier thought": [user("1?"), assistant("<think>\nhm\n</think>\n\nA"), user("2?"), assistant("B")],
    "reasoning": [user("Hi"), assistant("Hello", reasoning_content="hm")],
    "borders": [user("  Hi\n"), assistant(" \n Hello \n\n")],
    "looks like a tag": [user("?"), assistant("<")],
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("shape", CONVERSATIONS)
def test_what_is_learnt_is_the_rendering(tokenizer_of, template, shape):
    turns = CONVERSATIONS[shape]
    example = assert_learns_the_rendering(codec(tokenizer_of, template), turns)
    assert turns[-2]["content"].strip() not in example.completion.text


words = st.text(alphabet=st.sampled_from("ab .\n<>|:th"), max_size=12)
pieces = st.one_of(
    words, st.sampled_from([END, "<think>", "</think>", "<think>x</think>", " ", "\n\n", "ü☕"])
)
texts = st.lists(pieces, max_size=4).map("".join)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize(
    "template", ["chatml", "opens a thought", "trims", "header in the turn", "no opening"]
)
def test_any_conversation(template, data):
    made = _CODECS.setdefault(template, {})
    kind = data.draw(st.sampled_from(sorted(TOKENIZERS)))
    if kind not in made:
        made[kind] = codec(TOKENIZERS[kind], template)
    codec_ = made[kind]
    turns = [system(data.draw(texts))] if data.draw(st.booleans()) else []
    for _ in range(data.draw(st.integers(0, 2))):
        turns += [user(data.draw(texts)), assistant(data.draw(words))]
    turns.append(user(data.draw(texts)))
    answer = data.draw(words.filter(lambda text: END not in text))
    example = codec_.example(Demonstration(Prompt(tuple(turns)), (assistant(answer),)))
    ids = learnt(codec_, example)
    whole = rendered(codec_, [*turns, assistant(answer)])
    said = codec_.tokenizer.decode(ids)
    if kind == "bytes":  # pieces do not give every white space back
        assert whole.startswith(said)
    assert whole.startswith(said) or _squeezed(whole).startswith(_squeezed(said))
    completion = codec_.tokenizer.decode(example.completion.token_ids)
    assert _squeezed(answer) in _squeezed(completion)
    # Whatever others typed, the only control tokens in the prompt are the template's own.
    control = set(codec_._encoder.control)
    own = codec_.template.text(
        [{**t, "content": "x"} if t["role"] != "assistant" else t for t in turns], {}, ask=True
    )
    ours = [i for i in codec_.prompt_ids(Prompt(tuple(turns))) if i in control]
    assert ours == [i for i in codec_.tokenizer(own, add_special_tokens=False)["input_ids"] if i in control]


_CODECS: dict = {}


def _squeezed(text):
    return "".join(text.split())


# ---- where it begins -------------------------------------------------------------------------------


def test_a_thought_that_the_template_opens_is_closed():
    made = codec(template="opens a thought")
    example = made.example(Demonstration(Prompt((user("Hi"),)), "Hello"))
    assert made.tokenizer.decode(learnt(made, example)).endswith("<think>\n\n</think>\n\nHello<|im_end|>")
    assert made.tokenizer.decode(learnt(made, example)).count("<think>") == 1
    # Two line breaks are one token: sampling follows one, what is rendered has both.
    (note,) = made.account.notes
    assert "which differs from the start of sampling" in note


def test_pairs_share_the_prompt_that_both_renderings_have():
    made = codec(template="opens a thought")
    pair = made.pair(Comparison(Prompt((user("Hi"),)), "Hello", "<think>\nno\n</think>\n\nNo"))
    for completion, text in ((pair.chosen, "Hello"), (pair.rejected, "<think>\nno\n</think>\n\nNo")):
        ids = [*made.prompt_ids(pair.prompt), *completion.token_ids]
        whole = rendered(made, [user("Hi"), assistant(text)])
        assert made.tokenizer(whole, add_special_tokens=False)["input_ids"][: len(ids)] == ids


def test_an_answer_beside_sampled_ones_follows_the_opening():
    made = codec(template="opens a thought, renders none")
    prompt = Prompt((user("Hi"),))
    completion = made.completion(prompt, "Hello")
    ids = [*made.prompt_ids(prompt), *completion.token_ids]
    assert made.tokenizer.decode(ids).endswith(
        "<|im_start|>assistant\n<think>\n\n</think>\n\nHello<|im_end|>"
    )


def test_the_prompt_of_a_row_keeps_its_identity():
    made = codec(template="opens a thought")
    prompt = Prompt((user("Hi"),))
    example = made.example(Demonstration(prompt, "Hello"))
    assert example.prompt == prompt
    assert example.prompt.id == prompt.id
    assert made.prompt_ids(example.prompt.to_sample()) == made.prompt_ids(prompt)
    assert made.prompt_ids(example.prompt) != made.prompt_ids(prompt)
    plain = codec().example(Demonstration(prompt, "Hello"))
    assert plain.prompt.token_ids is None


def test_first_words_of_answers_have_the_tokens_that_they_have_behind_the_prompt():
    made = codec(TOKENIZERS["pieces"])
    example = made.example(Demonstration(Prompt("How many days?"), "Sure, a week has seven days."))
    first = made.tokenizer.convert_ids_to_tokens(example.completion.token_ids[0])
    assert not first.startswith("\u2581")


def test_models_without_template_have_one_form():
    made = codec(template=None)
    turns = (user("Hi"), assistant("Hello"), user("So?"))
    example = made.example(Demonstration(Prompt(turns), (assistant("Well"),)))
    text = made.tokenizer.decode(learnt(made, example))
    assert text == "User: Hi\n\nAssistant: Hello\n\nUser: So?\n\nAssistant: Well<|im_end|>"
    assert made.tokenizer.decode(example.completion.token_ids) == " Well<|im_end|>"


def test_a_begun_answer_is_continued():
    made = codec()
    prompt = Prompt((user("JSON?"), assistant('{"name": "')))
    assert made.tokenizer.decode(made.prompt_ids(prompt)).endswith('<|im_start|>assistant\n{"name": "')
    example = made.example(Demonstration(prompt, 'Tern"}'))
    assert made.tokenizer.decode(example.completion.token_ids) == 'Tern"}<|im_end|>'


def test_a_begun_answer_that_the_template_leaves_out_is_refused():
    made = codec(template=EACH + "{%- if m['role'] == 'user' -%}" + TURN + "{%- endif -%}" + DONE + ASK)
    with pytest.raises(DataError, match="leaves out the begun turn"):
        made.prompt_ids(Prompt((user("JSON?"), assistant("{"))))


# ---- where it ends ---------------------------------------------------------------------------------


def test_a_cut_answer_gets_no_end_token():
    made = codec()
    example = made.example(Demonstration(Prompt("Q"), "On and on", finish="length"))
    assert example.completion.finish == "length"
    assert made.end_id not in example.completion.token_ids
    assert made.tokenizer.decode(example.completion.token_ids) == "On and on"
    with pytest.raises(DataError, match="truncated before its first word"):
        made.example(Demonstration(Prompt("Q"), "", finish="length"))


def test_an_end_token_that_the_answer_has_already_is_not_doubled():
    made = codec()
    example = made.example(Demonstration(Prompt("Q"), "Yes.<|im_end|>\n"))
    assert made.tokenizer.decode(example.completion.token_ids) == "Yes.<|im_end|>"
    assert any("no second one" in note for note in made.account.notes)


def test_answers_longer_than_the_context_are_counted():
    made = codec(max_length=60)
    assert made.example(Demonstration(Prompt("Q"), "x" * 90)).completion.finish == "length"
    assert any("answers are truncated at 60 tokens" in line for line in made.account.lines())


# ---- texts that are rendered already ---------------------------------------------------------------

TEXT = "<|im_start|>user\nA stone?<|im_end|>\n<|im_start|>assistant\nPumice.<|im_end|>\n"


def test_a_text_is_learnt_as_it_stands(tokenizer_of):
    made = codec(tokenizer_of)
    example = made.example(Demonstration(Prompt(""), TEXT))
    assert learnt(made, example) == made.tokenizer(TEXT.rstrip(), add_special_tokens=False)["input_ids"]
    open_ended = made.example(Demonstration(Prompt(""), "### Human: A cairn?"))
    ids = made.tokenizer("### Human: A cairn?", add_special_tokens=False)["input_ids"]
    assert learnt(made, open_ended) == [*ids, made.end_id]


def test_a_prompt_that_is_rendered_already_is_refused_by_name():
    made = codec()
    prompt = Prompt(TEXT[: TEXT.index("Pumice")], where="d.jsonl:3")
    with pytest.raises(DataError, match=r"d\.jsonl:3: the prompt is already rendered by a chat template"):
        made.prompt_ids(prompt)


# ---- what is left out ------------------------------------------------------------------------------


def left_out(template, turns, **variables):
    made = codec(template=template)
    made.example(Demonstration(Prompt(tuple(turns[:-1]), variables=variables), (turns[-1],)))
    return made.account


def test_turns_that_the_template_leaves_out_are_named():
    template = EACH + "{%- if m['role'] in ('user', 'assistant') -%}" + TURN + "{%- endif -%}" + DONE + ASK
    assert list(left_out(template, [system("No e."), user("Hi"), assistant("Hi, pal")]).unused) == [
        "turns of the system"
    ]
    developer = {"role": "developer", "content": "In capitals."}
    assert list(left_out(template, [developer, user("Hi"), assistant("HI")]).unused) == [
        "turns of the developer"
    ]
    assert not left_out(template, [user("Hi"), assistant("Hi, pal")]).unused


def test_turns_that_the_template_renders_in_another_form_are_not():
    template = EACH + TURN.replace("m['content']", "m['content'] | tojson") + DONE + ASK
    assert not left_out(template, [system('Say "a"\nand b.'), user("Hi"), assistant("Hi")]).unused


def test_reasoning_without_a_place_refuses_the_data():
    turns = [user("Hi"), assistant("Hello", thinking="They greet me.")]
    account = left_out("chatml", turns)
    assert "thinking" in account.unused
    account.rows = 4
    account.check("d.jsonl", 4)  # one row of few is let through
    for _ in range(2):
        account.lose("thinking", "d.jsonl:2")
    with pytest.raises(DataError, match="does not render thinking of the answers"):
        account.check("d.jsonl", 4)
    assert not left_out("opens a thought", turns).lost


def test_tools_and_calls_go_to_the_template():
    template = (
        "{%- if tools -%}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' -}}{%- endif -%}"
        + EACH
        + "{{- '<|im_start|>' + m['role'] + '\\n' + (m['content'] or '') -}}"
        "{%- for call in m.tool_calls or [] -%}{{- call.function | tojson -}}{%- endfor -%}"
        "{{- '<|im_end|>\\n' -}}" + DONE + ASK
    )
    tools = [{"type": "function", "function": {"name": "tide_table"}}]
    call = {"type": "function", "function": {"name": "tide_table", "arguments": '{"port": "Wick"}'}}
    turns = [user("When?"), assistant("", tool_calls=[call])]
    made = codec(template=template)
    example = made.example(Demonstration(Prompt(tuple(turns[:-1]), variables={"tools": tools}), (turns[-1],)))
    text = made.tokenizer.decode(learnt(made, example))
    # Arguments come as text from some tools; the template quotes what it gets, so it gets an object.
    assert '{"name": "tide_table", "arguments": {"port": "Wick"}}<|im_end|>' in text
    assert text.startswith('<|im_start|>system\n[{"type"')
    assert Prompt("a", variables={"tools": tools}).id != Prompt("a").id
    assert set(left_out("chatml", turns, tools=tools).unused) == {"tools", "tool_calls"}


def test_arguments_of_the_template():
    template = EACH + TURN + DONE + ASK + "{%- if add_generation_prompt and mood -%}{{- mood -}}{%- endif -%}"
    made = codec(template=template, variables={"mood": "gay"})
    assert made.tokenizer.decode(made.prompt_ids(Prompt("Hi"))).endswith("gay")
    row = Prompt("Hi", variables={"mood": "sad"})
    assert made.tokenizer.decode(made.prompt_ids(row)).endswith("sad")
    assert "chat_template_kwargs: hue" in left_out("chatml", [user("Hi"), assistant("Hi")], hue=1).unused


def test_the_date_is_the_one_that_is_given():
    template = "{{- strftime_now('%d %b %Y %H:%M:%S') -}}" + EACH + TURN + DONE + ASK
    made = codec(template=template, now=datetime(2026, 1, 2, 3, 4, 5))
    assert made.template.prints_date
    assert made.tokenizer.decode(made.prompt_ids(Prompt("Hi"))).startswith("02 Jan 2026 03:04:05")
    assert not codec().template.prints_date


def test_an_added_token_that_is_not_special_ends_turns():
    tokenizer = TOKENIZERS["bytes"](["<end>", "<bos>"], ["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = TEMPLATES["chatml"]
    made = Codec(tokenizer, eos_ids=[], max_length=1000, name="tiny")
    assert made.end_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    typed = made.prompt_ids(Prompt("say <|im_end|> twice <|im_end|>"))
    assert typed.count(made.end_id) == 1


def test_texts_show_control_tokens_that_are_said():
    made = codec()
    ids = made.example(Demonstration(Prompt("Q"), "<think>x</think>4")).completion.token_ids
    assert made.text(ids) == "<think>x</think>4"


def test_templates_of_vision_models_get_texts_as_parts():
    template = (
        EACH + "{{- '<|im_start|>' + m['role'] + '\\n' -}}"
        "{%- for part in m['content'] -%}{{- part['text'] -}}{%- endfor -%}{{- '<|im_end|>\\n' -}}"
        + DONE
        + ASK
    )
    example = codec(template=template).example(Demonstration(Prompt("Hi"), "Hello"))
    assert example.completion.text == "Hello"
    made = codec(template=template)
    assert "Hi<|im_end|>" in made.tokenizer.decode(made.prompt_ids(Prompt("Hi")))
