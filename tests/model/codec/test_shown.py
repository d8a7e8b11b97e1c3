"""Answers as texts: prompt and completion together are the beginning of the template's rendering."""

from dataclasses import replace

import pytest

from palate.model.codec import Codec
from palate.model.codec.shown import show
from palate.types import Prompt

SPECIAL = ("<|im_end|>", "<s>", "<|im_start|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def codec_of(tokenizer, template=CHATML, **options):
    tokenizer.chat_template = template
    return Codec(tokenizer, eos_ids=[], **{"max_length": 1000, "name": "m", **options})


def rendered(codec, prompt, answer):
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return codec.tokenizer.apply_chat_template(turns, tokenize=False)


@pytest.mark.parametrize(
    "answer", ["Sure, a week.", " led by a space", "two\n\nlines \N{SNOWMAN}", "<think>"]
)
def test_the_texts_are_the_beginning_of_the_rendering(tokenizer_of, answer):
    codec = codec_of(tokenizer_of(SPECIAL))
    made, (completion,), (shown,) = codec.shown(Prompt("Hello there"), [answer])
    assert (made, (completion,)) == codec.answers(Prompt("Hello there"), [answer])
    assert shown.matches
    assert shown.prompt + shown.completion + "\n" == rendered(codec, "Hello there", answer)
    assert shown.prompt.endswith("<|im_start|>assistant\n")
    assert shown.completion == f"{answer}<|im_end|>"
    assert shown.tokens == shown.tokens_learnt == len(completion.token_ids)
    assert shown.prompt == codec.shown_prompt(Prompt("Hello there"))


def test_an_answer_beyond_the_context_is_shown_in_two_parts(tokenizer_of):
    codec = codec_of(tokenizer_of(SPECIAL))
    whole = codec.shown(Prompt("hi"), ["one two three four"])[2][0]
    codec.max_length = len(codec.prompt_ids(Prompt("hi"))) + 3
    _, (completion,), (shown,) = codec.shown(Prompt("hi"), ["one two three four"])
    assert (shown.tokens, shown.tokens_learnt, completion.finish) == (whole.tokens, 3, "length")
    assert shown.learnt
    assert shown.cut.endswith("<|im_end|>")
    assert shown.completion == whole.completion


def test_an_end_token_may_be_added_where_the_template_writes_none(tokenizer_of):
    codec = codec_of(tokenizer_of(SPECIAL), BARE)
    _, _, (shown,) = codec.shown(Prompt("hi"), ["yes"])
    assert shown.matches
    assert shown.completion.endswith("<|im_end|>")


def test_without_a_template_and_as_a_text(tokenizer_of):
    codec = codec_of(tokenizer_of(SPECIAL), None)
    _, _, (shown,) = codec.shown(Prompt("Hello"), [" there"])
    assert shown.matches
    assert (shown.prompt + shown.completion).endswith("Hello there<|im_end|>")
    _, _, (shown,) = codec.shown(Prompt(""), ["<|im_start|>user\nhi<|im_end|>"])
    assert shown.matches
    assert (shown.prompt + shown.completion).endswith("<|im_start|>user\nhi<|im_end|>")


def test_other_tokens_than_the_rendering_are_seen(tokenizer_of):
    codec = codec_of(tokenizer_of(SPECIAL))
    _, made, start = codec._made(Prompt("hi"), ["yes it is"], None)
    parts = codec._encoder, codec.decode, codec.end_ids
    ids = made[0].ids
    for changed in (
        (*ids[:start], ids[0], *ids[start + 1 :]),
        (*ids[: start - 1], *ids[start:]),
        (*ids[:-1], ids[0], ids[-1]),
    ):
        assert not show(replace(made[0], ids=changed), start, 100, ids[:start], *parts).matches
    assert show(made[0], start, 100, ids[:start], *parts).matches
    other_end = (*ids[:-1], codec.tokenizer.convert_tokens_to_ids("<s>"))
    ends = {ids[-1], other_end[-1]}
    assert not show(replace(made[0], ids=other_end), start, 100, ids[:start], *parts[:2], ends).matches
