"""Search for the files of a model's name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from peft import PeftConfig
from transformers.utils.hub import cached_file

from palate.config import EMBEDDED
from palate.data.identity import file_key
from palate.errors import ModelError
from palate.memory import key_of
from palate.model.adapters import CLASSIFIER
from palate.model.embedded import CACHED_AS, embedded_model
from palate.model.explain import explained
from palate.model.loaded import Head
from palate.rundir import model_in

log = logging.getLogger("palate")

_FILES = ("*.safetensors", "config.json", "adapter_config.json", "tokenizer*.json", "*.jinja")
"""The files that a model's outputs depend on."""


class Source(NamedTuple):
    """Location of a model's files: hub id or directory of the base, and the adapter's directory or None."""

    base: str
    adapter: str | None


def find_source(name: str, head: Head, *, trainable: bool, base: str | None = None) -> Source:
    """Find the base model and the adapter of a model's name.

    Args:
        name: a hub id, a directory of a model, an adapter or a run, or `smollm2`.
        base: the base model of the adapter; None for the one that the adapter names.
        head: the required head.
        trainable: True for training, which can create a missing reward head.

    Raises:
        ModelError: the directory does not exist, or has no model that fits the head.
    """
    source = _named(name, head, trainable=trainable, base=base)
    if base is not None and source.adapter is None:
        raise ModelError(f"model {name!r} is a whole model, so --base {base} does nothing; leave it out")
    return source


def model_key(name: str, head: Head) -> str:
    """Return a key of a model's files, and of those of the base of an adapter; all are read.

    A model on the hub counts by its commit.

    Raises:
        ModelError: the directory does not exist, or has no model that fits the head.
    """
    source = find_source(name, head, trainable=False)
    return key_of([_place_key(place) for place in source if place is not None])


def _place_key(place: str) -> str | dict[str, str]:
    folder = Path(place)
    if not folder.is_dir():
        try:
            return Path(str(cached_file(place, "config.json"))).parent.name
        except OSError:  # loading the model explains it
            return place
    files = {file for pattern in _FILES for file in folder.glob(pattern)}
    # The state of an optimizer, beside the weights in a run's checkpoint, has no effect.
    return {file.name: file_key(file) for file in files if not file.name.startswith("state")}


def _named(name: str, head: Head, *, trainable: bool, base: str | None) -> Source:
    if name == EMBEDDED:
        return Source(str(embedded_model()), None)
    path = Path(name)
    looks_local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if not looks_local:
        return Source(name, None)
    path = path.expanduser()
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise ModelError(f"model {name!r} {problem}; give a directory, a hub id or `{EMBEDDED}`")
    path = model_in(path)
    if (path / "adapter_config.json").is_file():
        return _adapted(name, path, head, trainable=trainable, base=base)
    if not (path / "config.json").is_file():
        inside = sorted(p.name for p in path.iterdir())[:5]
        raise ModelError(
            f"directory {name!r} holds no model: expected config.json or adapter_config.json, "
            f"found {', '.join(inside) or 'nothing'}"
        )
    return Source(str(path.resolve()), None)  # an adapter of this model saves the path


def _adapted(name: str, path: Path, head: Head, *, trainable: bool, base: str | None) -> Source:
    """Find an adapter's base model, and check that the adapter fits the head."""
    if not (path / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"adapter {name!r} has no adapter_model.safetensors; save it as safetensors, since pickles are "
            "not read"
        )
    with explained(name):
        adapter = PeftConfig.from_pretrained(str(path))
    if head != "lm" and adapter.task_type != CLASSIFIER and not trainable:
        raise ModelError(f"adapter {name!r} has no reward head; is it an adapter of a language model?")
    if head == "lm" and adapter.task_type == CLASSIFIER:
        raise ModelError(f"adapter {name!r} is part of a reward model and cannot generate text")
    if base is not None:
        return Source(_given_base(base), str(path))
    return Source(_base_of(name, path, str(adapter.base_model_name_or_path)), str(path))


def _given_base(base: str) -> str:
    """Return the place of the base model that the user names."""
    if base == EMBEDDED:
        return str(embedded_model())
    path = Path(base).expanduser()
    if not path.is_dir():
        return base  # a hub id; loading says if there is no such model
    path = model_in(path)
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"--base {base!r} is an adapter; give the whole model that it was trained on")
    return str(path.resolve())


def _base_of(name: str, adapter: Path, base: str) -> str:
    """Return the place of an adapter's base model, which the adapter names `base`."""
    if not base.startswith(("/", ".")) or Path(base).is_dir():
        return base
    if Path(base).name.startswith(CACHED_AS):
        return str(embedded_model())  # the cache has moved or belongs to another user
    beside = _moved_with(adapter.resolve(), Path(base))
    if beside is not None:
        log.warning("the base of adapter %s has moved from %s to %s", name, base, beside)
        return str(beside)
    raise ModelError(
        f"adapter {name!r} was trained on the model {base!r}, which does not exist; restore that model, "
        "or name its new place with --base"
    )


def _moved_with(adapter: Path, base: Path) -> Path | None:
    """Find a base model that moved together with its adapter: the end of its path is the same in a new place.

    The longest matching end wins, then the nearest parent directory.
    """
    for count in range(len(base.parts) - 1, 0, -1):
        for parent in adapter.parents:
            place = parent.joinpath(*base.parts[-count:])
            if place != base and (place / "config.json").is_file() and any(place.glob("*.safetensors")):
                return place
    return None
