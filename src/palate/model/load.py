"""Loading a model, its codec and its adapter from a hub id, a directory or the embedded file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from palate.config import ModelConfig
from palate.errors import ModelError
from palate.given import GivenModel
from palate.model.adapters import CLASSIFIER, continued_adapter, embedding_rows, fresh_adapter, settle, untie
from palate.model.codec import Codec
from palate.model.compiling import say_plain, settled
from palate.model.device import resolve
from palate.model.explain import explained
from palate.model.fast.engine import FastEngine
from palate.model.fast.few import few_disagree
from palate.model.fast.native import Kind
from palate.model.fast.probe import disagreement
from palate.model.freed import keep_freed_memory
from palate.model.given import network_of, tokenizer_of
from palate.model.loaded import Engine, Head, LoadedModel
from palate.model.plain.engine import PlainEngine
from palate.model.shared import FROZEN
from palate.model.source import find_source

log = logging.getLogger("palate")

_NO_LIMIT = 1 << 20
"""Tokens above which a tokenizer's length limit is ignored; some tokenizers state 1e30."""


def load_model(
    cfg: ModelConfig, *, head: Head = "lm", seed: int = 0, trainable: bool = True, on_host: bool = False
) -> LoadedModel:
    """Load the model that `cfg.model` names, or prepare the loaded model that it carries.

    If the directory has an adapter, it is trained further; a reward model can start from a language model's
    adapter. With `cfg.lora` false, the adapter is merged into the weights, and all weights are trained. A
    model without an adapter gets a new one if `cfg.lora` is true. A run's directory means its last
    checkpoint. Dropout is off everywhere, because policy and reference must be the same function at the
    start.

    Args:
        cfg: model, adapter, dtype, device.
        head: `lm` for token probabilities, `scalar` for one number per text, `value` for one number
            per token. A value head starts as a reward model's head if the model is one, else as zeros.
        seed: seed of the random initialisation of a new adapter or head.
        trainable: False loads the model for sampling or scoring only, without a new adapter.
        on_host: True leaves the weights in the machine's own memory, whatever the device. The model gets the
            plain engine, since a test there says nothing about the device; see `engine_for`.

    Raises:
        ModelError: the name has no usable model, the model needs permission to run its own code, or the
            device or the number format cannot be used.
        ConfigError: `cfg.compile` is `on`, and an obstacle prevents compiling.
    """
    device, dtype = resolve(cfg)
    given = cfg.model if isinstance(cfg.model, GivenModel) else None
    base, adapter = (
        find_source(cfg.model, head, trainable=trainable, base=cfg.base) if given is None else (given, None)
    )
    template = _template(cfg.chat_template)
    keep_freed_memory(device.type)
    with explained(cfg.model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # An adapter of a classifier includes its head.
        merged = adapter is not None and trainable and not cfg.lora
        if given is None:
            # A processor merges in float32 and a GPU does not, so one of them merges in every run.
            place = torch.device("cpu") if on_host or merged else device
            network, dropout = _network(base, cfg, head, dtype, place, trainable or adapter is not None)
            tokenizer = _tokenizer(base, adapter, cfg)
        else:
            (network, dropout), tokenizer = network_of(given, cfg, head), tokenizer_of(given)
        peft, own_embeddings = None, None
        if adapter is not None:
            own_embeddings = embedding_rows(adapter)
            if own_embeddings not in (None, network.get_input_embeddings().weight.shape[0]):
                network.resize_token_embeddings(own_embeddings)  # it was made with added tokens
            if merged:
                untie(network, adapter)
            peft = continued_adapter(network, adapter, head, trainable=trainable)
            if merged:
                network, peft = peft.merge_and_unload().requires_grad_(True), None
                network.to(torch.device("cpu") if on_host else device)
        elif trainable and cfg.lora:
            peft = fresh_adapter(network, cfg, head)
    if peft is not None:
        settle(peft, dtype)
    rows = network.get_input_embeddings().weight.shape[0]
    _check_vocabulary(rows, tokenizer, cfg.model, template)
    generation = network.generation_config if network.can_generate() else None
    codec = _codec(tokenizer, cfg, network.config, generation, template)
    if head != "lm":
        pad_id = _pad_id(network.config, codec, rows, adapter)
        network.config.get_text_config().pad_token_id = network.config.pad_token_id = pad_id
        if head == "scalar":
            codec.read_to_the_end(pad_id)
    network.eval()
    if not trainable:
        network.requires_grad_(False)
        FROZEN.add(network)
    elif cfg.checkpointing:
        network.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    fresh = peft is not None and adapter is None
    engine = PlainEngine() if on_host else engine_for(network, codec, cfg, head)
    compiles = settled(cfg.compile, device)
    if not on_host:
        say_uncompiled(compiles, engine, network, cfg)
    embeddings = own_embeddings is not None
    return LoadedModel(
        network, codec, head, cfg.model, engine, peft, fresh, embeddings, compiles=compiles, _dropout=dropout
    )


def say_uncompiled(compiles: str, engine: Engine, network: Any, cfg: ModelConfig) -> None:
    """Log why compiled functions are not used for a model, if they should be."""
    if compiles != "on":
        return
    if not isinstance(engine, FastEngine):
        say_plain(f"{cfg.model} is not compiled: it is on the plain path")
    elif Kind.of(network) is None:
        say_plain(f"{cfg.model} is not compiled: there are no functions for its kind of layers")


def load_codec(cfg: ModelConfig, *, head: Head = "lm") -> Codec:
    """Load the tokenizer with its chat template and end tokens, as `load_model` does, without any weights.

    Raises:
        ModelError: the name has no usable model, or the model needs permission to run its own code.
    """
    base, adapter = find_source(cfg.model, head, trainable=True, base=cfg.base)
    template = _template(cfg.chat_template)
    with explained(cfg.model):
        config = AutoConfig.from_pretrained(base, trust_remote_code=cfg.trust_remote_code)
        generation = _generation_config(base) if head == "lm" else None
        tokenizer = _tokenizer(base, adapter, cfg)
        rows = embedding_rows(adapter) if adapter is not None else None
    if head == "lm":
        _refuse_classifier(config, cfg)
    rows = rows or getattr(config.get_text_config(), "vocab_size", None)
    if rows is not None:
        _check_vocabulary(rows, tokenizer, cfg.model, template)
    codec = _codec(tokenizer, cfg, config, generation, template)
    if head == "scalar":
        codec.read_to_the_end(_pad_id(config, codec, rows or 1, adapter))
    return codec


def _codec(tokenizer: Any, cfg: ModelConfig, config: Any, generation: Any, template: str | None) -> Codec:
    return Codec(
        tokenizer,
        eos_ids=_end_ids(generation, config),
        max_length=_max_length(cfg, config, tokenizer),
        name=cfg.model,
        chat_template=template,
        variables=cfg.chat_template_kwargs,
    )


def _generation_config(source: str) -> GenerationConfig:
    """Return the generation config that a language model gets when it is loaded."""
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        return GenerationConfig.from_pretrained(
            source, config_file_name="config.json", _from_model_config=True
        )


def engine_for(network: Any, codec: Codec, cfg: ModelConfig, head: Head, *, few: bool = False) -> Engine:
    """Return the fast engine if its results equal the plain engine's; else the plain one, with a warning.

    Args:
        network: the network on its device, or with `few` on the processor.
        codec, cfg, head: as `load_model` gets and makes them.
        few: True to test a copy of the first layers on the device of `cfg`, which may not hold all of them.
    """
    if not cfg.fast:
        return PlainEngine()
    if few:
        problem = few_disagree(network, codec, head, resolve(cfg)[0])
    else:
        problem = disagreement(network, codec, head)
    if problem is None:
        return FastEngine()
    log.warning("%s falls back to the plain path, which is slower: %s", cfg.model, problem)
    return PlainEngine()


def _network(
    source: str, cfg: ModelConfig, head: Head, dtype: torch.dtype, device: torch.device, new_head: bool
) -> tuple[Any, dict[str, float]]:
    """Load a network without adapter and switch its dropout off; return it with its dropout rates."""
    trust = cfg.trust_remote_code
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
    dropout = {
        key: value
        for key, value in vars(config).items()
        if ("drop" in key and isinstance(value, float) and value)
    }
    for key in dropout:
        setattr(config, key, 0.0)
    options = {"config": config, "dtype": dtype, "trust_remote_code": trust, "use_safetensors": True}
    if head != "lm":
        config.num_labels = 1
        network, info = AutoModelForSequenceClassification.from_pretrained(
            source, output_loading_info=True, **options
        )
        if not hasattr(network, "score"):
            raise ModelError(
                f"model {cfg.model!r} is not a causal model, so a scalar head cannot read its last token"
            )
        missing = any("score" in key for key in info["missing_keys"])
        if missing and head == "value":
            nn.init.zeros_(network.score.weight)  # the first advantages are then plain returns
        elif missing and not new_head:
            # Otherwise transformers initialises a random head, and every reward is noise.
            raise ModelError(
                f"model {cfg.model!r} has no reward head (score.weight); is it a language model?"
            )
    else:
        _refuse_classifier(config, cfg)
        network = AutoModelForCausalLM.from_pretrained(source, **options)
    if getattr(network, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"model {cfg.model!r} is an adapter on the hub; download it and use its directory as --model"
        )
    return network.to(device), dropout


def _refuse_classifier(config: Any, cfg: ModelConfig) -> None:
    """Raise ModelError for a reward model: transformers would initialise a random head for tokens."""
    if any("SequenceClassification" in name for name in config.architectures or ()):
        raise ModelError(f"model {cfg.model!r} is a reward model and cannot generate text")


def _tokenizer(source: str, adapter: str | None, cfg: ModelConfig) -> Any:
    """Load the tokenizer from the adapter's directory if it has one; else from the base model."""
    own = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    return AutoTokenizer.from_pretrained(adapter if own else source, trust_remote_code=cfg.trust_remote_code)


def _template(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"chat template {str(path)!r} cannot be read: {error.strerror}") from error


def _end_ids(generation: Any, model: Any) -> list[int]:
    """Return the end tokens, those of the generation config first; only it has a chat model's end of turn."""
    end_ids: list[int] = []
    for config in (generation, model.get_text_config()):
        ids = None if config is None else config.eos_token_id
        end_ids += [ids] if isinstance(ids, int) else list(ids or [])
    return list(dict.fromkeys(end_ids))


def _max_length(cfg: ModelConfig, config: Any, tokenizer: Any) -> int:
    text = config.get_text_config()
    limits = [n for n in (text.to_dict().get(k) for k in ("max_position_embeddings", "n_positions")) if n]
    if tokenizer.model_max_length < _NO_LIMIT:
        limits.append(tokenizer.model_max_length)
    own = min(limits, default=None)
    if cfg.max_length is not None and own is not None and cfg.max_length > own:
        raise ModelError(
            f"max_length is {cfg.max_length}, but {cfg.model} supports at most {own} tokens; lower max_length"
        )
    return cfg.max_length or own or _NO_LIMIT


def _check_vocabulary(rows: int, tokenizer: Any, name: str, template: str | None) -> None:
    """Raise ModelError if texts can have tokens without a row in the embedding.

    Special tokens that no text contains, such as a padding token that a tokenizer class adds, need no row.
    """
    rendered = template or str(tokenizer.chat_template or "")
    ends = {tokenizer.bos_token, tokenizer.eos_token}
    special = set(tokenizer.all_special_tokens)
    beyond = sorted(
        (i, token)
        for token, i in tokenizer.get_vocab().items()
        if i >= rows and (token not in special or token in ends or token in rendered)
    )
    if beyond:
        first, token = beyond[0]
        raise ModelError(
            f"model {name!r} has {rows} rows in its embedding, but its tokenizer has tokens up to "
            f"{beyond[-1][0]} ({token!r} is {first}); resize the embedding and save the model, or use the "
            "tokenizer it was trained with"
        )


def _pad_id(config: Any, codec: Codec, rows: int, adapter: str | None) -> int | None:
    """Return the padding token of a classifier; a tokenizer that is saved with the model pads with it.

    The classifiers of transformers read the last token that is not padding. A classifier that has its head
    was trained to be read so, whatever its padding token is. A new head gets a padding token other than the
    end tokens, so that it is read at the end of a text.
    """
    tokenizer = codec.tokenizer
    if adapter is not None and PeftConfig.from_pretrained(adapter).task_type == CLASSIFIER:
        # An adapter has no model configuration, so its tokenizer names the token.
        own = (Path(adapter) / "tokenizer_config.json").is_file()
        pad: int | None = tokenizer.pad_token_id if own else config.get_text_config().pad_token_id
        return pad
    if any("SequenceClassification" in name for name in config.architectures or ()):
        known: int | None = config.get_text_config().pad_token_id
        return known
    named: list[int | None] = [tokenizer.pad_token_id, *reversed(tokenizer.all_special_ids)]
    added = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i < rows]
    spare: list[int] = [i for i in (*named, *reversed(added)) if i is not None and i not in codec.end_ids]
    if spare:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(spare[0])
        return spare[0]
    # A text that is scored ends with an end token, so any other token can stand for padding. The tokenizer
    # names none, since it would read this token in texts as padding.
    tokenizer.pad_token = None
    return next((i for i in reversed(range(rows)) if i not in codec.end_ids), None)
