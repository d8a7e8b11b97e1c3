"""The models of a chat: a run's checkpoint and its base model, each with its own conversation."""

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
"""Fields of the run's configuration that a chat reuses. `trust_remote_code` must be given each time."""


@dataclass
class Speaker:
    """A model with its own copy of the conversation."""

    name: Which
    source: str
    """The path or hub id that it was loaded from."""
    snapshot: Snapshot
    codec: Codec
    turns: list[tuple[str, str]] = field(default_factory=list)
    """The user's turns and the model's answers."""

    def answer(self, text: str, system: str, sampling: Sampling, seed: int) -> tuple[Completion, int]:
        """Return the answer to a turn, and the number of oldest turns that were dropped to make room.

        At most half of the context is reserved for the answer, so the answer may be shorter than
        `max_new_tokens`. A turn that is interrupted or fails is not added to the conversation.

        Raises:
            DataError: the turn alone fills the context, or the chat template rejects the conversation.
        """
        need, dropped = min(sampling.max_new_tokens, self.codec.max_length // 2), 0
        prompt = self._prompt(text, system, self.turns)
        while dropped < len(self.turns) and self._room(prompt) < need:
            dropped += 1
            prompt = self._prompt(text, system, self.turns[dropped:])
        new = min(sampling.max_new_tokens, self.codec.room(prompt))
        limits = {"max_new_tokens": new, "min_new_tokens": min(sampling.min_new_tokens, new)}
        (group,) = self.snapshot.sample([prompt], 1, sampling.model_copy(update=limits), seed=seed)
        (completion,) = group.completions
        self.turns = [*self.turns[dropped:], (text, completion.text)]
        return completion, dropped

    def _room(self, prompt: Prompt) -> int:
        return self.codec.max_length - len(self.codec.prompt_ids(prompt))

    def _prompt(self, text: str, system: str, turns: Sequence[tuple[str, str]]) -> Prompt:
        """Return the conversation up to a turn: as chat turns, or as one text without a chat template."""
        if not self.codec.has_template:
            history = "".join(f"{question}{answer}\n" for question, answer in turns)
            return Prompt(f"{system}\n{history}{text}" if system else history + text, where="this turn")
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
    """Load the base model of a run and its checkpoint; with an adapter, both share one set of weights.

    Args:
        run: the run's directory.
        step: the checkpoint's step; the last one if None.
        only: load only this model.
        device: the device to load to; the run's device if None.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        RunError: the directory has no run or no checkpoint, or the checkpoint is a reward model.
        ModelError: a model cannot be loaded.
    """
    base = _base(run, device, trust_remote_code)
    if only == "base":
        return [_speaker("base", _load_base(run, base))]
    path = checkpoint(run, step)
    _require_language_model(path)
    # The checkpoint's tokenizer has the chat template that the model was trained with.
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
    """Return the configuration of the run's base model, read from `config.json`."""
    config = read_description(run)["config"]
    fields: dict[str, Any] = {name: config[name] for name in FROM_THE_RUN if name in config}
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
        raise ModelError(f"the base model of the run {str(run)!r} cannot be loaded: {error}") from error


def _require_language_model(path: Path) -> None:
    """Raise RunError for a checkpoint with a reward head; loading it would add a random language head."""
    names = ("adapter_config.json", "config.json")
    config = next((read_object(path / name) for name in names if (path / name).is_file()), None)
    if config is None:
        return  # loading the model reports the error
    classifier = "ForSequenceClassification" in str(config.get("architectures"))
    if classifier or config.get("task_type") == "SEQ_CLS":
        raise RunError(f"checkpoint {str(path)!r} is a reward model and cannot generate text")


def _made_on(checkpoint: Path, model: str) -> bool:
    """Return True if the checkpoint is an adapter on `model`, and `model` is not an adapter itself."""
    if (Path(model).expanduser() / "adapter_config.json").is_file():
        return False
    adapter = read_object(checkpoint / "adapter_config.json") or {}
    below = Path(str(adapter.get("base_model_name_or_path")))
    if model == EMBEDDED:
        return below.name.startswith(CACHED_AS)
    return below in (Path(model), Path(model).expanduser().resolve())
