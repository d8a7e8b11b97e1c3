"""Replies of a server, checked strictly: anything unexpected is rejected."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from palate.errors import AnnotatorError


class _Part(BaseModel):
    # Types are strict; further keys are ignored.
    model_config = ConfigDict(extra="ignore", strict=True)


class Alternative(_Part):
    """A candidate token at a position, with its log-probability."""

    token: str
    logprob: float


class _Place(Alternative):
    top_logprobs: list[Alternative] = Field(default_factory=list)


class _Logprobs(_Part):
    content: list[_Place] | None = None


class _Message(_Part):
    content: str | None = None
    refusal: str | None = None


class _Choice(_Part):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class Usage(_Part):
    """Tokens as the server counted them."""

    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(0, ge=0)


class _Body(_Part):
    choices: list[_Choice] = Field(min_length=1, max_length=1)
    model: str | None = None
    system_fingerprint: str | None = None
    usage: object = None


class Reply(BaseModel):
    """One answer of a server.

    Attributes:
        text: the model's text; may be empty.
        refused: the model or a filter in front of it refused.
        finish: the finish reason, such as "stop" or "length".
        tops: the candidates for the first token, the written one included; empty without log-probabilities.
        usage: token counts; None if the server gives none, or invalid ones.
    """

    text: str
    refused: bool
    finish: str
    tops: tuple[Alternative, ...]
    usage: Usage | None
    model: str
    fingerprint: str


def read_reply(body: bytes) -> Reply:
    """Return the one answer in a server's reply.

    Raises:
        AnnotatorError: the reply is not the JSON of one chat completion.
    """
    try:
        parsed = _Body.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise AnnotatorError(
            f"the reply is not a chat completion with one choice: {where}: {first['msg']}"
        ) from None
    choice = parsed.choices[0]
    places = (choice.logprobs and choice.logprobs.content) or []
    tops = {top.token: top for top in places[0].top_logprobs} if places else {}
    if places and tops:
        tops.setdefault(places[0].token, places[0])
    return Reply(
        text=choice.message.content or "",
        refused=choice.message.refusal is not None or choice.finish_reason == "content_filter",
        finish=choice.finish_reason or "",
        tops=tuple(Alternative(token=top.token, logprob=top.logprob) for top in tops.values()),
        usage=_usage(parsed.usage),
        model=parsed.model or "",
        fingerprint=parsed.system_fingerprint or "",
    )


def _usage(value: object) -> Usage | None:
    try:
        return Usage.model_validate(value)
    except ValidationError:
        return None
