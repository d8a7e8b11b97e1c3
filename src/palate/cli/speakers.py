"""Models that one talks with: what each has heard and said, and which of a run's models they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from palate.config import EMBEDDED, ModelConfig, Sampling
from palate.errors import ConfigError, ModelError, RunError
from palate.model import LoadedModel, Snapshot, load_model
from palate.model.codec import Codec
from palate.model.embedded import CACHED_AS
from palate.model.snapshot import Weights
from palate.rundir import checkpoint, read_description, read_object
from palate.settings import load_config
from palate.types import Completion, Content, Prompt

Which = Literal["checkpoint", "base"]

FROM_THE_RUN = ("model", "dtype", "device", "max_length", "chat_template", "fast")
"""What a run's configuration says of its model. Leave to run a model's own code is asked for each time."""


@dataclass
class Speaker:
    """A model, and its own side of a conversation."""

    name: Which
    source: str
    """What it was loaded from."""
    snapshot: Snapshot
    codec: Codec
    turns: list[tuple[str, str]] = field(default_factory=list)
    """What was said to it, and what it answered."""

    def answer(self, text: str, system: str, sampling: Sampling, seed: int) -> tuple[Completion, int]:
        """Answer a turn, and how many of the oldest turns had to be forgotten for it.

        At most half of the context is kept free for the answer, which may have less room than it is allowed.
        A turn that is interrupted, or cannot be answered, was never said.

        Raises:
            DataError: the turn alone fills the context, or the chat template refuses the conversation.
        """
        need, forgotten = min(sampling.max_new_tokens, self.codec.max_length // 2), 0
        prompt = self._prompt(text, system, self.turns)
        while forgotten < len(self.turns) and self._room(prompt) < need:
            forgotten += 1
            prompt = self._prompt(text, system, self.turns[forgotten:])
        new = min(sampling.max_new_tokens, self.codec.room(prompt))
        limits = {"max_new_tokens": new, "min_new_tokens": min(sampling.min_new_tokens, new)}
        (group,) = self.snapshot.sample([prompt], 1, sampling.model_copy(update=limits), seed=seed)
        (completion,) = group.completions
        self.turns = [*self.turns[forgotten:], (text, completion.text)]
        return completion, forgotten

    def _room(self, prompt: Prompt) -> int:
        return self.codec.max_length - len(self.codec.prompt_ids(prompt))

    def _prompt(self, text: str, system: str, turns: Sequence[tuple[str, str]]) -> Prompt:
        """The conversation up to a turn: chat turns, or for a model without a chat template one text."""
        if not self.codec.has_template:
            said = "".join(f"{asked}{answered}\n" for asked, answered in turns)
            return Prompt(f"{system}\n{said}{text}" if system else said + text, where="this turn")
        content: Content = (
            *([{"role": "system", "content": system}] if system else []),
            *(
                {"role": role, "content": words}
                for turn in turns
                for role, words in zip(("user", "assistant"), turn, strict=True)
            ),
            {"role": "user", "content": text},
        )
        return Prompt(content, where="this turn")


def speakers(
    run: Path,
    *,
    step: int | None = None,
    only: Which | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> list[Speaker]:
    """The base model of a run and its checkpoint, loaded; with an adapter, both are one set of weights.

    Args:
        run: the run's directory.
        step: of the checkpoint; the last one if None.
        only: leave out the other one.
        device: where to, instead of where the run was.
        trust_remote_code: run code that comes with the model.

    Raises:
        RunError: there is no run, no checkpoint, or one of a reward model.
        ModelError: a model cannot be loaded.
    """
    base = _base(run, device, trust_remote_code)
    if only == "base":
        return [_speaker("base", _load_base(run, base))]
    path = checkpoint(run, step)
    _require_language_model(path)
    # Its tokenizer brings the chat template that it was trained with.
    model = load_model(base.model_copy(update={"model": str(path), "chat_template": None}), trainable=False)
    trained = _speaker("checkpoint", model)
    if only == "checkpoint":
        return [trained]
    if model.peft is not None and _made_on(path, base.model):

        @contextmanager
        def without_adapter() -> Iterator[LoadedModel]:
            with model.without_adapter():
                yield model

        return [_speaker("base", model, without_adapter, source=base.model), trained]
    return [_speaker("base", _load_base(run, base)), trained]


def _speaker(
    name: Which, model: LoadedModel, weights: Weights | None = None, source: str | None = None
) -> Speaker:
    snapshot = Snapshot(0, weights or (lambda: nullcontext(model)), micro_batch_tokens=2048)
    return Speaker(name, source or model.source, snapshot, model.codec)


def _base(run: Path, device: str | None, trust_remote_code: bool) -> ModelConfig:
    """What the run started from, as its `config.json` says."""
    found = read_description(run)["config"]
    fields: dict[str, Any] = {name: found[name] for name in FROM_THE_RUN if name in found}
    fields["trust_remote_code"] = trust_remote_code
    if device is not None:
        fields["device"] = device
    try:
        return load_config(ModelConfig, file=None, flags={}, base=fields)
    except ConfigError as error:
        raise RunError(f"{str(run / 'config.json')!r} cannot be used: {error}") from None


def _load_base(run: Path, base: ModelConfig) -> LoadedModel:
    try:
        return load_model(base, trainable=False)
    except ModelError as error:
        raise ModelError(f"the base model of the run {str(run)!r} cannot be had: {error}") from error


def _require_language_model(path: Path) -> None:
    """Raise RunError for a checkpoint with a reward head: a language head would be made up for it."""
    names = ("adapter_config.json", "config.json")
    found = next((read_object(path / name) for name in names if (path / name).is_file()), None)
    if found is None:
        return  # loading reports what is wrong
    classifier = "ForSequenceClassification" in str(found.get("architectures"))
    if classifier or found.get("task_type") == "SEQ_CLS":
        raise RunError(f"checkpoint {str(path)!r} is a reward model's, which scores text and writes none")


def _made_on(checkpoint: Path, model: str) -> bool:
    """Whether an adapter sits right on a model; a run that continued an adapter started from that one."""
    if (Path(model).expanduser() / "adapter_config.json").is_file():
        return False
    adapter = read_object(checkpoint / "adapter_config.json") or {}
    below = Path(str(adapter.get("base_model_name_or_path")))
    if model == EMBEDDED:
        return below.name.startswith(CACHED_AS)
    return below in (Path(model), Path(model).expanduser().resolve())
