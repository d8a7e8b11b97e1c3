"""A model that is already loaded, prepared for learning without a change to the caller's object."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from palate.config import ModelConfig
from palate.errors import ModelError
from palate.given import GivenModel
from palate.model.loaded import Head

FORMATS: dict[torch.dtype, Literal["float32", "bfloat16"]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
}
"""Number formats that a loaded model may have."""


def place_of(given: GivenModel, cfg: ModelConfig) -> tuple[torch.device, Literal["float32", "bfloat16"]]:
    """Return the device and the number format of a loaded model, which it keeps.

    Raises:
        ModelError: it is on several devices, has other formats or a mixture, or the configuration names
            another device or format.
    """
    weights = list(given.network.parameters())
    devices, formats = {p.device for p in weights}, {p.dtype for p in weights}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ModelError(f"model {given!s} is spread over {names}, expected it on one device")
    if len(formats) > 1 or not formats <= FORMATS.keys():
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in formats))
        raise ModelError(
            f"model {given!s} is in {names}, expected float32 or bfloat16; load it with dtype=torch.float32"
        )
    (device,), (dtype,) = devices, formats
    if cfg.device != "auto" and torch.empty(0, device=cfg.device).device != device:
        raise ModelError(
            f"device is {cfg.device} and model {given!s} is on {device}; move the model, or leave device out"
        )
    if cfg.dtype not in ("auto", FORMATS[dtype]):
        raise ModelError(
            f"dtype is {cfg.dtype} and model {given!s} is in {FORMATS[dtype]}; load it in that format, or "
            "leave dtype out"
        )
    return device, FORMATS[dtype]


def network_of(given: GivenModel, cfg: ModelConfig, head: Head) -> tuple[Any, dict[str, float]]:
    """Return a network like the given one, with the dropout rates that are switched off in it.

    The caller's object stays as it is. With LoRA the new network shares its weights, which stay frozen, and
    takes no memory of its own; without, it has a copy of them, which learns.

    Raises:
        ModelError: it does not fit the method; or it is to carry an adapter, and its weights are not those of
            its `name_or_path`, which is what a checkpoint of an adapter is loaded onto.
    """
    network = given.network
    _check_kind(given, head)
    base = str(Path(given).resolve()) if Path(given).is_dir() else str(given)
    if cfg.lora and (reason := _unlike(given, base, head)) is not None:
        raise ModelError(
            f"model {given!s} cannot carry an adapter, since {reason}, and a checkpoint could not be loaded "
            "again; save the model with save_pretrained and load it from there, or give lora=False"
        )
    shared = {id(p): nn.Parameter(p.data) for p in network.parameters()} if cfg.lora else {}
    with torch.no_grad():
        copied = copy.deepcopy(network, shared | {id(b): b for b in network.buffers()} if cfg.lora else {})
    copied.requires_grad_(True)
    copied.name_or_path = copied.config.name_or_path = base  # peft writes it into an adapter's configuration
    return copied, _switch_off_dropout(copied)


def tokenizer_of(given: GivenModel) -> Any:
    """Return a copy of the tokenizer, or the tokenizer of the model's `name_or_path` if none is given."""
    if given.tokenizer is not None:
        return copy.deepcopy(given.tokenizer)
    if not given.named:
        raise ModelError(f"model {given!s} has no name, so its tokenizer is not known; give tokenizer=")
    return AutoTokenizer.from_pretrained(str(given))


def _check_kind(given: GivenModel, head: Head) -> None:
    network, kind = given.network, type(given.network).__name__
    if hasattr(network, "peft_config") or getattr(network, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"model {given!s} has an adapter already; give the adapter's directory as model, or the model "
            "that merge_and_unload() returns"
        )
    if head == "scalar" and not (hasattr(network, "score") and network.config.num_labels == 1):
        raise ModelError(
            f"model {given!s} is a {kind}, expected a causal model with one output to train as a reward "
            "model; load it with AutoModelForSequenceClassification and num_labels=1, or give its name"
        )
    if head == "lm" and network.get_output_embeddings() is None:
        raise ModelError(
            f"model {given!s} is a {kind}, which cannot generate text; load it with AutoModelForCausalLM"
        )


def _switch_off_dropout(network: Any) -> dict[str, float]:
    """Set every dropout rate to zero; return those of the configuration, to save them with the model."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _rates(module):
            setattr(module, name, 0.0)
    rates = _rates(network.config)
    for name in rates:
        setattr(network.config, name, 0.0)
    return rates


def _rates(owner: Any) -> dict[str, float]:
    return {
        name: value
        for name, value in vars(owner).items()
        if "drop" in name and isinstance(value, float) and value
    }


# ---- The weights of a name -------------------------------------------------------------------------


def _unlike(given: GivenModel, base: str, head: Head) -> str | None:
    """Return why the weights are not those that `base` names; None if they are."""
    if not given.named:
        return "it has no name_or_path"
    stored = _stored(base)
    if not stored:
        return f"{base!r} has no weights to compare it with"
    prefix = f"{given.network.base_model_prefix}."
    by_weight: dict[int, list[str]] = {}  # tied weights have several names, of which a file has one
    for name, parameter in given.network.named_parameters(remove_duplicate=False):
        by_weight.setdefault(id(parameter), []).append(name)
    weights = dict(given.network.named_parameters(remove_duplicate=False))
    for names in by_weight.values():
        if head == "scalar" and names[0].startswith("score."):
            continue  # a checkpoint has it beside the adapter
        spellings = [s for name in names for s in (name, name.removeprefix(prefix), prefix + name)]
        name = next((name for name in spellings if name in stored), None)
        weight = weights[names[0]].detach()
        if name is None or not torch.equal(_tensor(stored[name], name).to(weight.dtype), weight.cpu()):
            return f"its weight {names[0]} is not that of {base!r}"
    return None


def _stored(base: str) -> dict[str, str]:
    """Return the safetensors file of each of a model's tensors; empty if it has no such files."""
    files: dict[str, str] = {}
    for path in _files(base):
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def _files(base: str) -> Iterator[str]:
    index = _cached(base, SAFE_WEIGHTS_INDEX_NAME)
    names = {SAFE_WEIGHTS_NAME}
    if index is not None:
        names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    yield from (path for name in sorted(names) if (path := _cached(base, name)) is not None)


def _cached(base: str, name: str) -> str | None:
    path: str | None = cached_file(
        base,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return path


def _tensor(path: str, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor
