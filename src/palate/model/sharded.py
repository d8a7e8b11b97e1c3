"""Models whose weights are divided among the processes, by FSDP2 of torch.

Each process has a part of every weight. A layer's weights are gathered for its forward and backward pass, and
its gradients are added up and divided again. Trained weights are float32 shards, which serve as the
optimizer's; layers compute in the model's number format.

Sampling needs all weights at every token, so it works on a gathered copy of the model in each process.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from palate.config import LearnerConfig, Sampling
from palate.errors import ConfigError
from palate.given import GivenModel
from palate.model.device import least_memory, require_apart, resolve
from palate.model.load import engine_for, load_model, say_uncompiled
from palate.model.loaded import Engine, Head, LoadedModel
from palate.model.outputs import Outputs, TokenValues
from palate.model.passes import Passes
from palate.model.plain.engine import PlainEngine
from palate.model.rows import Row
from palate.types import Record
from palate.world import current

log = logging.getLogger("palate")

_METHOD = "palate_compute"
"""The method of a sharded network that gathers its weights while a function computes with it."""


class ShardedEngine:
    """The engine of a sharded model; see `Engine` for the methods.

    Args:
        inner: computes with gathered weights.
        template: the network and peft's wrapper, with parameters that have a shape and no memory.
    """

    def __init__(self, inner: Engine, template: tuple[Any, Any]) -> None:
        self.inner = inner
        self._template = template
        self._gathered: LoadedModel | None = None

    def fill(self, model: LoadedModel, groups: Sequence[list[Row]], sampling: Sampling) -> Iterator[int]:
        """Fill rows with the gathered copy of `prepare`, which each process keeps until it learns."""
        assert self._gathered is not None, "`prepare` comes before"
        with self._gathered.without_adapter() if model.adapter_off else nullcontext():
            yield from self.inner.fill(self._gathered, groups, sampling)

    def prepare(self, model: LoadedModel) -> None:
        """Gather the current weights for `fill`; a collective."""
        if self._gathered is None:
            self._gathered = self.gathered(model)
        elif self._gathered.revision != model.revision:
            _fill(self._gathered.network, model, only_trained=True)
            self._gathered.revision = model.revision

    def gathered(self, model: LoadedModel) -> LoadedModel:
        """Return a copy of the model with all weights in each process; a collective."""
        _require_all(model)
        network, peft = _with_memory(self._template, model.device)
        network.to(model.device)  # the buffers, which the template has where the model was loaded
        _fill(network, model)
        return replace(model, network=network, peft=peft, engine=self.inner, sharded=False, adapter_off=False)

    def on_host(self, model: LoadedModel, *, saved: bool) -> LoadedModel:
        """Return a copy in the machine's memory, gathered weight by weight; a collective.

        Args:
            model: the sharded model.
            saved: True for what `LoadedModel.save` writes, in process 0 alone; False for all weights in every
                process.
        """
        _require_all(model)
        only_trained = saved and model.peft is not None and not model.whole_embeddings
        here = current().leads or not saved
        network, peft = _with_memory(self._template, "cpu" if here else "meta", only_trained=only_trained)
        _fill(network, model, only_trained=only_trained)
        return replace(model, network=network, peft=peft, engine=self.inner, sharded=False)

    def computing(self, model: LoadedModel) -> AbstractContextManager[None]:
        """Return the inner engine's context; a pass with gradient frees the copy of `prepare` first."""
        if torch.is_grad_enabled():
            self._gathered = None
        return self.inner.computing(model)

    def outputs(
        self, model: LoadedModel, records: Sequence[Record], *, statistics: bool = False, top_logits: int = 0
    ) -> Outputs:
        """Compute log-probabilities with gathered weights."""
        return _with_weights(
            model,
            lambda: self.inner.outputs(model, records, statistics=statistics, top_logits=top_logits),
        )

    def scores(self, model: LoadedModel, records: Sequence[Record]) -> Outputs:
        """Compute scores with gathered weights."""
        return _with_weights(model, lambda: self.inner.scores(model, records))

    def values(self, model: LoadedModel, records: Sequence[Record]) -> Outputs:
        """Compute values with gathered weights."""
        return _with_weights(model, lambda: self.inner.values(model, records))

    def batches(self, model: LoadedModel, records: Sequence[Record], budget: int) -> list[list[int]]:
        """Return the inner engine's batches."""
        return self.inner.batches(model, records, budget)

    def tokens(self, prompt: int, completions: Sequence[int]) -> int:
        """Return the inner engine's number of tokens."""
        return self.inner.tokens(prompt, completions)

    def passes(self, model: LoadedModel) -> Passes:
        """Return the passes in plain torch, which know divided weights."""
        return Passes()


def load_divided(cfg: LearnerConfig, *, head: Head = "lm", seed: int = 0) -> LoadedModel:
    """Load a model for training, and divide its weights among the processes if `cfg.sharding` says so.

    A model that may be divided is loaded into the machine's own memory, since it may be too large for one
    device. Its engine is chosen by a test on the device and is the same in all processes. See `load_model`
    for the arguments.

    Raises:
        ConfigError: two processes have one GPU, or `cfg.sharding` does not fit the number of processes.
        ModelError: see `load_model`.
    """
    device, _ = resolve(cfg)
    require_apart(device)
    given = isinstance(cfg.model, GivenModel)
    on_host = current().size > 1 and cfg.sharding != "none" and not given
    model = load_model(cfg, head=head, seed=seed, on_host=on_host)
    divided = shards(cfg.sharding, model, device)
    if not divided:
        model.network.to(device)
    if on_host:
        model.engine = engine_for(model.network, model.codec, cfg, head, few=divided)
    # Batches depend on the engine, and each batch is a collective of sharded weights.
    if len(set(current().gather("the path of a model", type(model.engine).__name__))) > 1:
        log.warning("%s falls back to the plain path: the fast path is not right in every process", cfg.model)
        model.engine = PlainEngine()
    if on_host:
        say_uncompiled(model.compiles, model.engine, model.network, cfg)
    if divided and model.compiles == "on":
        log.warning("learning is not compiled, since the weights are divided among the processes")
    return shard(model, device) if divided else model


def shard(model: LoadedModel, device: torch.device) -> LoadedModel:
    """Divide a model's weights among the processes; the model itself must not be used afterwards.

    Every process has loaded the same model. Layer after layer moves to the device and leaves only a part
    there, so that the device never has the whole model.
    """
    dtype, network = model.dtype, model.network
    template = _with_memory((network, model.peft), "meta")
    mesh = init_device_mesh(device.type, (current().size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    kinds = set(getattr(network, "_no_split_modules", None) or ())
    layers = [module for module in network.modules() if type(module).__name__ in kinds]
    for module in (*reversed(layers), network):  # a layer within a layer comes before it
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor):
                whole = parameter.data.to(device)
                parameter.data = whole.float() if parameter.requires_grad else whole
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the number of all records, so gradients are summed. Gloo has no other
            # way to leave out the mean.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    setattr(network, _METHOD, lambda compute: compute())
    register_fsdp_forward_method(network, _METHOD)
    # FSDP takes the format of the gradients from the weights that are trained at its first pass. That pass
    # must not be one of the reference: while an adapter is off, peft says that nothing is trained.
    with torch.no_grad():
        getattr(network, _METHOD)(dict)
    return replace(model, engine=ShardedEngine(model.engine, template), sharded=True, computes_in=dtype)


def shards(sharding: str, model: LoadedModel, device: torch.device) -> bool:
    """Return whether to divide a model's weights: with `auto`, if training would not fit the device.

    Raises:
        ConfigError: one process cannot share weights.
    """
    several = current().size > 1
    if sharding == "full" and not several:
        raise ConfigError(
            "sharding is full, but one process has nobody to share weights with; use --processes N or "
            "torchrun, or --sharding auto"
        )
    if sharding != "auto" or not several or device.type != "cuda":
        return sharding == "full"
    weights = sum(p.numel() * p.element_size() for p in model.network.parameters())
    trained = sum(p.numel() for _, p in model.trained())
    return bool(weights + TRAINED_BYTES * trained > ROOM * least_memory(device))


TRAINED_BYTES = 16
"""Bytes per trained weight beside the weight: a float32 copy, its gradient and two moments."""

ROOM = 0.7
"""Share of an accelerator's memory for weights and optimizer; the rest is for activations."""


def to_save(model: LoadedModel) -> LoadedModel:
    """Return the model, or process 0's copy of what `LoadedModel.save` writes; a collective if sharded.

    The copy is in the machine's memory, since a device may have no room for it.
    """
    return model.engine.on_host(model, saved=True) if isinstance(model.engine, ShardedEngine) else model


def second(model: LoadedModel) -> LoadedModel:
    """Return a sharded copy of a sharded model, which does not change with it; a collective."""
    assert isinstance(model.engine, ShardedEngine), "the model is sharded"
    return shard(model.engine.on_host(model, saved=False), model.device)


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor with the parts of all processes; a collective for a divided one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(weight: Tensor, part: Tensor) -> Tensor:
    """Return this process's part of a tensor that is divided as a weight is; a number stays as it is."""
    if not isinstance(weight, DTensor) or part.dim() == 0:
        return part
    return DTensor.from_local(
        part,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


def _with_memory(
    pair: tuple[Any, Any], device: torch.device | str, *, only_trained: bool = False
) -> tuple[Any, Any]:
    """Return copies of a network and of peft's wrapper with new, empty parameters; buffers are copied.

    With `only_trained`, the other parameters have a shape and no memory.
    """
    network, _ = pair
    new: dict[int, Any] = {}
    for p in network.parameters():
        place = device if p.requires_grad or not only_trained else "meta"
        new[id(p)] = nn.Parameter(torch.empty_like(p, device=place), requires_grad=p.requires_grad)
    copied: tuple[Any, Any] = copy.deepcopy(pair, new)  # tied weights stay tied
    return copied


@torch.no_grad()
def _fill(network: Any, model: LoadedModel, *, only_trained: bool = False) -> None:
    """Copy the weights of a sharded model into a whole network.

    The network says which weights are trained: while the model's adapter is off, none of its own are.
    """
    targets = dict(network.named_parameters())
    for name, parameter in model.network.named_parameters():
        if targets[name].requires_grad or not only_trained:
            targets[name].copy_(whole_tensor(parameter))


def _with_weights(model: LoadedModel, compute: Callable[[], Outputs]) -> Outputs:
    """Compute outputs while the root's weights are gathered.

    FSDP finds the tensors that lead back to its weights only in plain containers.
    """
    _require_all(model)
    version = None

    def computed() -> dict[str, Any]:
        nonlocal version
        outputs = compute()
        version = outputs.version
        return {
            name: (_own(value.values), value.mask) if isinstance(value, TokenValues) else _own(value)
            for name, value in vars(outputs).items()
            if isinstance(value, TokenValues | Tensor)
        }

    made = getattr(model.network, _METHOD)(computed)
    fields: dict[str, Any] = {n: TokenValues(*v) if isinstance(v, tuple) else v for n, v in made.items()}
    return Outputs(**fields, version=version)


def _own(tensor: Tensor) -> Tensor:
    """Return a copy of a view: an operation in place on a view would cut the way back to FSDP."""
    return tensor.clone() if tensor._is_view() else tensor


def _require_all(model: LoadedModel) -> None:
    if current().size == 1:
        raise ConfigError(
            f"process 0 alone would compute with {model.source}, whose weights are divided among the "
            "processes, such as for a judge that is the policy itself; use --sharding none, or another judge"
        )
