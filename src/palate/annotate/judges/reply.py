"""What a server may reply, checked strictly: anything else is no answer."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from palate.errors import AnnotatorError


class _Part(BaseModel):
    # Numbers must be numbers and texts texts; further keys are a server's own affair.
    model_config = ConfigDict(extra="ignore", strict=True)


class Alternative(_Part):
    """A token that could have stood at a place, with its log-probability."""

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
        text: what the model wrote; empty if nothing.
        refused: the model or a filter in front of it declined.
        finish: why it stopped, such as "stop" or "length".
        tops: alternatives at the first place, the token that was written included; empty without log-probs.
        usage: tokens; None where the server does not say, or says nonsense.
    """

    text: str
    refused: bool
    finish: str
    tops: tuple[Alternative, ...]
    usage: Usage | None
    model: str
    fingerprint: str


def read_reply(body: bytes) -> Reply:
    """The one answer in a server's reply.

    Raises:
        AnnotatorError: it is not the JSON of one chat completion.
    """
    try:
        found = _Body.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise AnnotatorError(
            f"the reply is not a chat completion with one choice: {where}: {first['msg']}"
        ) from None
    choice = found.choices[0]
    places = (choice.logprobs and choice.logprobs.content) or []
    tops = {top.token: top for top in places[0].top_logprobs} if places else {}
    if places and tops:
        tops.setdefault(places[0].token, places[0])
    return Reply(
        text=choice.message.content or "",
        refused=choice.message.refusal is not None or choice.finish_reason == "content_filter",
        finish=choice.finish_reason or "",
        tops=tuple(Alternative(token=top.token, logprob=top.logprob) for top in tops.values()),
        usage=_usage(found.usage),
        model=found.model or "",
        fingerprint=found.system_fingerprint or "",
    )


def _usage(value: object) -> Usage | None:
    try:
        return Usage.model_validate(value)
    except ValidationError:
        return None
