"""Convert arguments of `palate.train` to a method's configuration, with the errors of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palate.config import MethodConfig
from palate.data.rows import BUILT_IN
from palate.errors import ConfigError
from palate.given import GivenModel, is_model
from palate.method import Method
from palate.near import near, setting_near
from palate.settings import load_config, offered

EVERYDAY_HELD_OUT = 16
"""Default number of held-out prompts of `everyday` in `palate.train`."""


def method_named(name: str, methods: Mapping[str, Method]) -> Method:
    """Return a method by its name.

    Raises:
        ConfigError: no method has this name.
    """
    if name not in methods:
        meant = near(name, methods)
        advice = f" did you mean {meant!r}?" if meant is not None else ""
        raise ConfigError(f"unknown method {name!r};{advice} `palate methods` lists the methods")
    return methods[name]


def configured(
    method: Method, cfg: MethodConfig | Path | str | None, settings: Mapping[str, Any], tokenizer: Any = None
) -> MethodConfig:
    """Return the configuration of a run.

    Args:
        method: the method; its fields are the names of the settings.
        cfg: a whole configuration; or a YAML file, which the settings override; or None.
        settings: values by field name. A model, data and rewards may be Python objects; see `palate.given`.
        tokenizer: the tokenizer of a model that is given as an object.

    Raises:
        ConfigError: a setting is unknown, missing or invalid, or a configuration is given besides settings.
    """
    values = dict(settings) if tokenizer is None else _with_tokenizer(settings, tokenizer)
    if isinstance(cfg, MethodConfig):
        if values:
            raise ConfigError(
                f"both a {type(cfg).__name__} and {' and '.join(values)} are given; give a configuration, or "
                "settings by name"
            )
        return cfg
    if cfg is not None and not isinstance(cfg, str | Path):
        raise ConfigError(
            f"the configuration is a {type(cfg).__name__}, expected a {method.config.__name__} or the path "
            "of a YAML file; give settings by name, as steps=50"
        )
    options = method.options
    known = offered(options)
    for name in values:
        if name not in known:
            meant = setting_near(name, known)
            advice = f" did you mean {meant}?" if meant is not None else ""
            raise ConfigError(
                f"unknown setting {name};{advice} `palate run {method.name} --help` lists the settings"
            )
    return load_config(
        options,
        file=None if cfg is None else Path(cfg),
        flags=values,
        base=_held_out(method, values),
        choose=method.choose,
        python=True,
    )


def _held_out(method: Method, values: Mapping[str, Any]) -> dict[str, Any]:
    """Default held-out prompts for `everyday`, so that a first run has samples from before and after."""
    learns_from = method.variant(values.get("variant")).learns_from
    if values.get("data") != BUILT_IN or learns_from != "prompts" or "eval_data" in values:
        return {}
    return {"eval_data": BUILT_IN, "eval_limit": EVERYDAY_HELD_OUT}


def _with_tokenizer(settings: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    model = settings.get("model")
    if not is_model(model):
        raise ConfigError(
            f"tokenizer is given and model is {model!r}, expected a loaded model; a name brings its own "
            "tokenizer"
        )
    return {**settings, "model": GivenModel(model, tokenizer)}
