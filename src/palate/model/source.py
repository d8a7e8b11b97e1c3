"""Search for the files of a model's name."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from peft import PeftConfig

from palate.config import EMBEDDED
from palate.errors import ModelError
from palate.model.adapters import CLASSIFIER
from palate.model.embedded import CACHED_AS, embedded_model
from palate.model.explain import explained
from palate.model.loaded import Head
from palate.rundir import model_in


class Source(NamedTuple):
    """Location of a model's files: hub id or directory of the base, and the adapter's directory or None."""

    base: str
    adapter: str | None


def find_source(name: str, head: Head, *, trainable: bool) -> Source:
    """Find the base model and the adapter of a model's name.

    Args:
        name: a hub id, a directory of a model, an adapter or a run, or `smollm2`.
        head: the required head.
        trainable: True for training, which can create a missing reward head.

    Raises:
        ModelError: the directory does not exist, or has no model that fits the head.
    """
    if name == EMBEDDED:
        return Source(str(embedded_model()), None)
    path = Path(name)
    looks_local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if not looks_local:
        return Source(name, None)
    path = path.expanduser()
    if not path.is_dir():
        raise ModelError(f"model {name!r} is not a directory; give a directory, a hub id or `{EMBEDDED}`")
    path = model_in(path)
    if (path / "adapter_config.json").is_file():
        return _adapted(name, path, head, trainable=trainable)
    if not (path / "config.json").is_file():
        inside = sorted(p.name for p in path.iterdir())[:5]
        raise ModelError(
            f"directory {name!r} holds no model: expected config.json or adapter_config.json, "
            f"found {', '.join(inside) or 'nothing'}"
        )
    return Source(str(path.resolve()), None)  # an adapter of this model saves the path


def _adapted(name: str, path: Path, head: Head, *, trainable: bool) -> Source:
    """Find an adapter's base model, and check that the adapter fits the head."""
    if not (path / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"adapter {name!r} has no adapter_model.safetensors; save it as safetensors, since pickles are "
            "not read"
        )
    with explained(name):
        adapter = PeftConfig.from_pretrained(str(path))
    if head == "scalar" and adapter.task_type != CLASSIFIER and not trainable:
        raise ModelError(f"adapter {name!r} has no reward head; is it an adapter of a language model?")
    if head == "lm" and adapter.task_type == CLASSIFIER:
        raise ModelError(f"adapter {name!r} is part of a reward model and cannot generate text")
    return Source(_base_of(name, str(adapter.base_model_name_or_path)), str(path))


def _base_of(name: str, base: str) -> str:
    """Return the location of an adapter's base model; `base` is the location that the adapter states."""
    if not base.startswith(("/", ".")) or Path(base).is_dir():
        return base
    if Path(base).name.startswith(CACHED_AS):
        return str(embedded_model())  # the cache has moved or belongs to another user
    raise ModelError(
        f"adapter {name!r} was trained on the model {base!r}, which does not exist; restore that model"
    )
