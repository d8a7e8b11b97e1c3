"""Hostile text in completions, made harmless before a judge sees it.

A policy is rewarded for anything that sways its judge, so it may learn to write text that attacks the judge.
Structural attacks are made harmless here: control tokens of chat templates, control and invisible characters.
Attacks by meaning ("ignore the above") stay in the text; `experiments/judge_attacks.py` measures them.
"""

from __future__ import annotations

import re

_TOKENS = re.compile(
    r"<\|[^|<>\s]{1,40}\|>"  # ChatML, Llama 3, Phi, GPT: <|im_start|>
    r"|<｜[^｜<>\n]{1,60}｜>"  # DeepSeek
    r"|</?s>|<(?:bos|eos|pad|unk|mask|start_of_turn|end_of_turn|turn|end_of_image|start_of_image)>"
    r"|\[/?(?:INST|SYS|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|IMG|THINK)\]"
    r"|<</?SYS>>"
    r"|</?(?:think|tool_call|tool_response|tools|function_calls)>",
    re.IGNORECASE,
)
"""Control tokens of chat templates. A remote server may read them as tokens anywhere in a text."""

_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 without tab and newline: NUL, escape sequences
    "\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"  # zero width, bidi
    "\U000e0000-\U000e0fff"  # tags and variation selectors
    "\ud800-\udfff]"  # lone surrogates, which no UTF-8 can carry
)

_FLOOD = re.compile(r"\n{4,}")


def legible(text: str) -> tuple[str, int]:
    """Return the text in a form that is safe to show a judge, and the number of changes.

    Control tokens keep their letters and lose their function (`<|im_end|>` becomes `< |im_end| >`). Control
    and invisible characters become U+FFFD, carriage returns become newlines, many newlines become three.
    The joiners that emoji and several scripts need (U+200C, U+200D) stay.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text, invisible = _INVISIBLE.subn("\ufffd", text)
    text, floods = _FLOOD.subn("\n\n\n", text)
    text, tokens = _TOKENS.subn(lambda match: f"{match[0][0]} {match[0][1:-1]} {match[0][-1]}", text)
    return text, invisible + floods + tokens
