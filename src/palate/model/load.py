"""Loading a model, its codec and its adapter from a hub id, a directory or the embedded file."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from palate.config import EMBEDDED, ModelConfig
from palate.errors import ModelError
from palate.model.codec import Codec
from palate.model.embedded import CACHED_AS, embedded_model
from palate.model.fast.probe import FastPath, fast_path
from palate.model.widened import checkpoint_options, has_bfloat16
from palate.rundir import model_in

Head = Literal["lm", "scalar"]

CLASSIFIER = "SEQ_CLS"
"""What peft calls the task of an adapter with a reward head."""

_NO_LIMIT = 1 << 20
"""Some tokenizers state a length limit of 1e30; anything above this says nothing."""


_LIBRARY_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError)
"""What transformers and its like raise about a model that they cannot load."""


@dataclass
class LoadedModel:
    """A network with what is needed to feed it and to write it back.

    `network` is the transformers model itself; with LoRA, the adapter's layers sit inside it and `peft`
    wraps it for switching the adapter off and for saving.
    """

    network: Any
    codec: Codec
    head: Head
    source: str
    peft: Any | None = None
    fresh_adapter: bool = False
    """The adapter was made here and still computes zero: the network with it equals the one without."""
    fast: FastPath | None = None
    """The fast ways of computing with it, or None where only the plain ones are right."""
    revision: int = 0
    """Counts changes of the weights; whoever changes them adds one."""
    adapter_off: bool = False
    """Whether it computes as the base model just now."""
    _dropout: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def keeps_logits(self) -> bool:
        """Whether the network can be asked for the logits of some positions only."""
        return "logits_to_keep" in inspect.signature(self.network.forward).parameters

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return torch.device(self.network.device)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the live weights."""
        return next(self.network.parameters()).dtype  # type: ignore[no-any-return]

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that learning changes."""
        return [(name, p) for name, p in self.network.named_parameters() if p.requires_grad]

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Compute as the base model does."""
        assert self.peft is not None, "only a model with an adapter can do without it"
        self.adapter_off = True
        try:
            with self.peft.disable_adapter():
                yield
        finally:
            self.adapter_off = False

    def sampling_network(self) -> Any:
        """The network to sample from: the live one, or a copy with a LoRA adapter added into its weights."""
        if self.fast is None or self.peft is None or self.adapter_off or not self.fast.can_merge():
            return self.network
        return self.fast.merged(self.revision)

    def save(self, directory: Path) -> None:
        """Write model (or adapter) and tokenizer in Hugging Face layout, as safetensors."""
        for key in self._dropout:
            setattr(self.network.config, key, self._dropout[key])
        try:
            if self.peft is not None:
                self.peft.save_pretrained(directory, save_embedding_layers=False)
            else:
                self.network.save_pretrained(directory)
        finally:
            for key in self._dropout:
                setattr(self.network.config, key, 0.0)
        self.codec.save(directory)


def load_model(cfg: ModelConfig, *, head: Head = "lm", seed: int = 0, trainable: bool = True) -> LoadedModel:
    """Load what `cfg.model` names.

    A directory with an adapter continues that adapter, a language model's also in a reward model that is to
    be trained from it, or without `cfg.lora` adds it to the weights, all of which then are trained. Without
    one, `cfg.lora` puts a fresh one on. A run's
    directory stands for its last checkpoint. Dropout is off everywhere: a policy is compared with its
    reference, and both must be the same function.

    Args:
        cfg: model, adapter, dtype, device.
        head: `lm` for token probabilities, `scalar` for one number per text.
        seed: of a fresh adapter's or head's random start.
        trainable: False loads for sampling or scoring only, without a fresh adapter.

    Raises:
        ModelError: nothing usable is found under that name, or it needs leave to run its own code.
    """
    device, dtype = resolve(cfg)
    source, adapter = _resolve(cfg, head, trainable)
    template = _template(cfg.chat_template)
    with _explained(cfg.model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # An adapter for classifiers brings its head.
        network, dropout = _network(source, cfg, head, dtype, device, trainable or adapter is not None)
        tokenizer = _tokenizer(source, adapter, cfg)
        peft = None
        if adapter is not None:
            peft = _continued(network, adapter, head, trainable)
            if trainable and not cfg.lora:
                network, peft = peft.merge_and_unload().requires_grad_(True), None
        elif trainable and cfg.lora:
            peft = get_peft_model(network, _lora(cfg, head), autocast_adapter_dtype=False)
    if peft is not None:
        # Parameters alone: buffers, such as the frequencies of rotary embeddings, keep the float32 they have.
        for parameter in peft.parameters():
            parameter.data = parameter.data.to(dtype)
        for module in peft.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # an adapter that is continued may have been made with dropout
    codec = Codec(
        tokenizer,
        eos_ids=_end_ids(network),
        max_length=_max_length(cfg, network.config, tokenizer),
        name=cfg.model,
        chat_template=template,
    )
    if head == "scalar":
        _set_unused_pad(network, codec)
    network.eval()
    if not trainable:
        network.requires_grad_(False)
    elif cfg.checkpointing:
        how = {"use_reentrant": False, **checkpoint_options(network)}
        network.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    fresh = peft is not None and adapter is None
    fast = fast_path(network, codec, cfg.model, scores=head == "scalar") if cfg.fast else None
    return LoadedModel(network, codec, head, cfg.model, peft, fresh, fast, _dropout=dropout)


def resolve(cfg: ModelConfig) -> tuple[torch.device, torch.dtype]:
    """The device and number format that `auto` stands for here.

    Raises:
        ModelError: the device is not to be had.
    """
    device = torch.device(_device(cfg.device))
    return device, _dtype(cfg.dtype, device)


def _network(
    source: str, cfg: ModelConfig, head: Head, dtype: torch.dtype, device: torch.device, new_head: bool
) -> tuple[Any, dict[str, float]]:
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
    if head == "scalar":
        config.num_labels = 1
        network, info = AutoModelForSequenceClassification.from_pretrained(
            source, output_loading_info=True, **options
        )
        if not hasattr(network, "score"):
            raise ModelError(
                f"model {cfg.model!r} is no causal model, so no scalar head can read its last token"
            )
        if not new_head and any("score" in key for key in info["missing_keys"]):
            # Without this, transformers makes up a random head and every reward is noise.
            raise ModelError(
                f"model {cfg.model!r} has no reward head (score.weight); is it a language model?"
            )
    else:
        if any("SequenceClassification" in name for name in config.architectures or ()):
            # Without this, transformers makes up a random head for tokens.
            raise ModelError(f"model {cfg.model!r} is a reward model, which writes nothing")
        network = AutoModelForCausalLM.from_pretrained(source, **options)
    if getattr(network, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"model {cfg.model!r} is an adapter on the hub; download it and give --model its directory"
        )
    return network.to(device), dropout


def _resolve(cfg: ModelConfig, head: Head, trainable: bool) -> tuple[str, str | None]:
    """(where the base model is, where the adapter is or None)."""
    if cfg.model == EMBEDDED:
        return str(embedded_model()), None
    path = Path(cfg.model)
    looks_local = path.exists() or cfg.model.startswith((".", "/", "~")) or cfg.model.count("/") > 1
    if not looks_local:
        return cfg.model, None
    path = path.expanduser()
    if not path.is_dir():
        raise ModelError(
            f"model {cfg.model!r} is not a directory; give a directory, a hub id or `{EMBEDDED}`"
        )
    path = model_in(path)
    if (path / "adapter_config.json").is_file():
        if not (path / "adapter_model.safetensors").is_file():
            raise ModelError(f"adapter {cfg.model!r} has no adapter_model.safetensors; pickles are not read")
        with _explained(cfg.model):
            adapter = PeftConfig.from_pretrained(str(path))
        if head == "scalar" and adapter.task_type != CLASSIFIER and not trainable:
            raise ModelError(f"adapter {cfg.model!r} has no reward head; is it a language model's?")
        if head == "lm" and adapter.task_type == CLASSIFIER:
            raise ModelError(f"adapter {cfg.model!r} is a reward model's, which writes nothing")
        return _base_of(cfg.model, str(adapter.base_model_name_or_path)), str(path)
    if not (path / "config.json").is_file():
        inside = sorted(p.name for p in path.iterdir())[:5]
        raise ModelError(
            f"directory {cfg.model!r} holds no model: expected config.json or adapter_config.json, "
            f"found {', '.join(inside) or 'nothing'}"
        )
    return str(path.resolve()), None  # an adapter made on it names it as it was loaded


def _base_of(name: str, base: str) -> str:
    """Where an adapter's base model is, as far as its name tells."""
    if not base.startswith(("/", ".")) or Path(base).is_dir():
        return base
    if Path(base).name.startswith(CACHED_AS):
        return str(embedded_model())  # the cache has moved, or is another user's
    raise ModelError(f"adapter {name!r} was made on {base!r}, which is not there; put that model back")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what transformers raises about a model that cannot be had into one sentence."""
    try:
        yield
    except (*_LIBRARY_ERRORS, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise ModelError(
                f"model {name!r} comes with Python code of its own; read it, then allow --trust-remote-code"
            ) from error
        local = os.path.isdir(name)
        near = difflib.get_close_matches(name, [EMBEDDED])
        hint = (
            "is it complete?"
            if local
            else f"did you mean `{EMBEDDED}`?"
            if near
            else f"check the id and the connection, or use `{EMBEDDED}`, which needs none"
        )
        raise ModelError(f"model {name!r} could not be loaded: {hint} ({text[:200]})") from error


def _tokenizer(source: str, adapter: str | None, cfg: ModelConfig) -> Any:
    """An adapter's directory may bring a tokenizer (with a chat template) of its own."""
    own = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    return AutoTokenizer.from_pretrained(adapter if own else source, trust_remote_code=cfg.trust_remote_code)


def _lora(cfg: ModelConfig, head: Head) -> LoraConfig:
    return LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM" if head == "lm" else CLASSIFIER,
    )


def _continued(network: Any, adapter: str, head: Head, trainable: bool) -> Any:
    """The network with an adapter on it. A language model's adapter gets a new head for a reward model."""
    config = PeftConfig.from_pretrained(adapter)
    if head == "lm" or config.task_type == CLASSIFIER:
        return PeftModel.from_pretrained(
            network, adapter, is_trainable=trainable, autocast_adapter_dtype=False
        )
    config.task_type, config.inference_mode = CLASSIFIER, False
    peft = get_peft_model(network, config, autocast_adapter_dtype=False)
    head_too = get_peft_model_state_dict(peft, save_embedding_layers=False)
    known = {**head_too, **load_peft_weights(adapter, device="cpu")}
    left = set_peft_model_state_dict(peft, known).unexpected_keys
    if left:
        raise ModelError(f"adapter {adapter!r} changes {left[0]}, which a reward model does not have")
    return peft


def _template(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"chat template {str(path)!r} cannot be read: {error.strerror}") from error


def _end_ids(network: Any) -> list[int]:
    """End tokens of the generation config first: chat models name their end of turn only there."""
    found: list[int] = []
    generation = network.generation_config if network.can_generate() else None
    for config in (generation, network.config.get_text_config()):
        ids = None if config is None else config.eos_token_id
        found += [ids] if isinstance(ids, int) else list(ids or [])
    return list(dict.fromkeys(found))


def _max_length(cfg: ModelConfig, config: Any, tokenizer: Any) -> int:
    text = config.get_text_config()
    limits = [n for n in (text.to_dict().get(k) for k in ("max_position_embeddings", "n_positions")) if n]
    if tokenizer.model_max_length < _NO_LIMIT:
        limits.append(tokenizer.model_max_length)
    own = min(limits, default=None)
    if cfg.max_length is not None and own is not None and cfg.max_length > own:
        raise ModelError(f"max_length is {cfg.max_length}, but {cfg.model} takes at most {own} tokens")
    return cfg.max_length or own or _NO_LIMIT


def _set_unused_pad(network: Any, codec: Codec) -> None:
    """Sequence classifiers read the last token that is not padding: padding with the end token hides it."""
    tokenizer = codec.tokenizer
    spare = [i for i in (tokenizer.pad_token_id, *reversed(tokenizer.all_special_ids)) if i is not None]
    spare = [i for i in spare if i not in codec.end_ids]
    network.config.get_text_config().pad_token_id = spare[0] if spare else 0
    if spare:  # and whoever pads with the tokenizer that is saved beside the model pads alike
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(spare[0])


def _device(name: str) -> str:
    if name.startswith("mps"):
        raise ModelError(f"device {name!r} cannot be used: sampling needs float64, which it lacks; use cpu")
    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(
                f"device {name!r} is not to be had here: {str(error).splitlines()[0]}"
            ) from error
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    return torch.bfloat16 if has_bfloat16(device) else torch.float32
