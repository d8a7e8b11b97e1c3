"""AdamW on float32 copies of the trained weights, for live weights of any format."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from palate.config import OptimConfig, check_warmup
from palate.errors import ConfigError
from palate.model.passes import Passes
from palate.model.sharded import like, local_part, whole_tensor
from palate.world import current


class Optimizer:
    """Accumulates gradients in float32 over micro-batches, clips, steps, and updates the live weights.

    Accumulation in bfloat16 would lose the contributions of small micro-batches, and a step of lr x update
    is often below bfloat16's resolution of the weight. So gradients and weights have float32 copies.

    Args:
        parameters: names and live parameters.
        cfg: optimisation options; `cfg.lr` must be set.
        total_steps: length of the schedule in steps.
        passes: computes what an update does with all gradients or weights; by default in plain torch.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        cfg: OptimConfig,
        *,
        total_steps: int,
        passes: Passes | None = None,
    ) -> None:
        assert cfg.lr is not None, "lr must be set"
        self.cfg = cfg
        self.lr = cfg.lr
        self.total_steps = total_steps
        self.steps = 0
        self._passes = Passes() if passes is None else passes
        self.names = [name for name, _ in parameters]
        self.live = [p for _, p in parameters]
        self.master = [p if cfg.masters == "live" else _master(p) for p in self.live]
        matrices = [m for m in self.master if m.dim() > 1]
        vectors = [m for m in self.master if m.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": cfg.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        betas = (cfg.adam_beta1, cfg.adam_beta2)
        self._adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=cfg.lr, betas=betas, eps=cfg.adam_eps, fused=True
        )
        for live, master in zip(self.live, self.master, strict=True):
            if live is not master:
                live.register_post_accumulate_grad_hook(_move_gradient(self._passes, master))  # type: ignore[no-untyped-call]

    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        return self.lr * lr_factor(self.steps, self.cfg, self.total_steps)

    def step(self) -> float:
        """Apply the accumulated gradients and clear them; gradients that are not finite are only cleared.

        Returns:
            The norm of the gradient before clipping.

        Raises:
            ConfigError: at the first step, if the warm-up takes all steps.
        """
        if self.steps == 0:
            self._check_warmup()
        gradients = [m.grad for m in self.master if m.grad is not None]
        own = float(whole_tensor(self._passes.norm(gradients)))
        # Functions may fail to compile in one process and not in another, and all must take the same step.
        norm = current().gather("the norm of a gradient", own)[0]
        if not math.isfinite(norm):
            self.drop_gradients()
            return norm
        # AdamW divides gradients by `grad_scale` as it reads them, which saves a pass.
        excess = (norm + 1e-6) / self.cfg.max_grad_norm
        scale = torch.tensor(excess, dtype=torch.float32)
        self._adamw.grad_scale = scale if excess > 1 else None  # type: ignore[attr-defined]
        for group in self._adamw.param_groups:
            group["lr"] = self.learning_rate()
        self._adamw.step()
        with torch.no_grad():
            for live, master in zip(self.live, self.master, strict=True):
                if live is not master:
                    self._passes.narrow(master, live)
        self.drop_gradients()
        self.steps += 1
        return norm

    def restart(self, *, total_steps: int, lr: float | None = None) -> None:
        """Reset moments and schedule but keep the weights, as at the start of a round."""
        self.drop_gradients()
        self._adamw.state.clear()
        self.steps = 0
        self.total_steps = total_steps
        self._check_warmup()
        self.lr = self.lr if lr is None else lr

    def _check_warmup(self) -> None:
        try:
            check_warmup(self.cfg.warmup_steps, self.total_steps)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def drop_gradients(self) -> None:
        """Clear the accumulated gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def sum_gradients(self) -> None:
        """Add up the gradients of all processes.

        A parameter without gradient in every process stays without, so that AdamW leaves it alone.
        """
        world = current()
        if world.size == 1 or any(isinstance(master, DTensor) for master in self.master):
            return  # FSDP has added them up
        own = np.array([master.grad is not None for master in self.master])
        there = np.any(world.gather("gradients to add", own), axis=0)
        for master, some in zip(self.master, there, strict=True):
            if some and master.grad is None:
                master.grad = torch.zeros_like(master)
        world.sum("gradients", [m.grad for m in self.master if m.grad is not None])

    def gradients(self) -> list[Tensor | None]:
        """Return the accumulated gradient of each trained parameter, float32; None if there is none."""
        return [master.grad for master in self.master]

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a step changes, by `KIND/PARAMETER`; weights are the optimizer's copies."""
        tensors = {f"weight/{n}": m.detach() for n, m in zip(self.names, self.master, strict=True)}
        for name, master in zip(self.names, self.master, strict=True):
            for kind, value in self._adamw.state.get(master, {}).items():
                tensors[f"{kind}/{name}"] = value.detach()
        return tensors

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Restore the tensors that `state` returned after `steps` steps, and update the live weights."""
        kinds = {key.split("/", 1)[0] for key in state}
        for name in self.names:
            own = {kind: state[f"{kind}/{name}"] for kind in kinds if f"{kind}/{name}" in state}
            # A state that belongs to another optimizer must not change with this one.
            self.restore_weight(name, {k: v if k == "weight" else v.clone() for k, v in own.items()})
        self.steps = steps

    @torch.no_grad()
    def restore_weight(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Restore one weight from its tensors by kind, of which the moments become the optimizer's own."""
        i = self.names.index(name)
        live, master = self.live[i], self.master[i]
        local_part(master).copy_(tensors["weight"])
        if live is not master:
            self._passes.narrow(master, live)
        self._adamw.state.pop(master, None)
        if len(tensors) > 1:
            # The fused step keeps its step count on the device of the weights.
            self._adamw.state[master] = {
                kind: like(master, value.to(master.device))
                for kind, value in tensors.items()
                if kind != "weight"
            }


def lr_factor(step: int, cfg: OptimConfig, total_steps: int) -> float:
    """Return the fraction of the peak learning rate at a step from 0: linear warm-up, then the schedule."""
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps))
    left = 1.0 - progress if cfg.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return cfg.final_lr_ratio + (1.0 - cfg.final_lr_ratio) * left


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().float(), requires_grad=True)


def _move_gradient(passes: Passes, master: nn.Parameter) -> Callable[[Tensor], None]:
    def move(live: Tensor) -> None:
        assert live.grad is not None
        if master.grad is None:
            master.grad = live.grad.float()
        else:
            passes.add(live.grad, master.grad)
        live.grad = None

    return move
