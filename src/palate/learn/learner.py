"""Learners own weights and an optimizer; a policy is a learner with frozen snapshots to sample and score."""

from __future__ import annotations

import copy
import math
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Self, TypeVar

import torch
from torch import Tensor

from palate.config import LearnerConfig, OptimConfig, tokens_per_pass
from palate.errors import NonFiniteError, RunError
from palate.learn.meter import Meter, Metrics
from palate.learn.objective import Needs, Objective, accuracy_interval
from palate.learn.optim import Optimizer
from palate.learn.parts import batch_key, reference_rows, rows_at
from palate.memory import Memory
from palate.model import (
    LoadedModel,
    Outputs,
    Snapshot,
    TokenValues,
)
from palate.model.batched import batched_scores, batched_values, rounds
from palate.model.loaded import Head
from palate.model.rollouts import Observer, unobserved
from palate.model.sharded import load_divided, local_part, second, to_save
from palate.types import Record
from palate.world import current, own_part

R = TypeVar("R", bound=Record)

POLICY = "policy"
"""The default name of a learner."""

FLOAT32_GAP = 1e-2
"""Largest allowed difference between sampler and learner in a token's log-probability in float32, in nats."""

SERVED_GAP = 0.5
"""Largest allowed mean of that difference if a server samples, in nats: number formats explain a tenth."""

MOST_SKIPPED = 3
"""Number of skipped (not finite) updates in a row that ends training."""


class Learner:
    """Weights, optimizer and schedule, updated by objectives over records.

    Args:
        model: a model from `load_model`, with head `lm`, `scalar` or `value`.
        cfg: optimisation options; `lr` must be set.
        total_steps: number of updates in the learning-rate schedule.
        name: distinguishes the learners of a run, such as a critic and the policy; lower-case letters,
            digits and `-`, since it names a directory in the run's checkpoints.

    Attributes:
        version: number of updates so far.
        skipped: number of updates skipped because the loss or the gradient was not finite.
        skipped_in_a_row: number of skipped updates since the last applied update.
        observe: receives reports of work, for progress and timing.
        micro_batch_tokens: most tokens in one forward and backward pass.
        memory: keeps samples and reference log-probabilities under `name`; None outside a run.
        lag: number of updates by which a sampler's version may be older to be compared with the learner.
        served: a server has sampled completions that it learns from, such as those of a pool.
    """

    def __init__(self, model: LoadedModel, cfg: OptimConfig, *, total_steps: int, name: str = POLICY) -> None:
        assert re.fullmatch(r"[a-z][a-z0-9-]*", name), f"{name!r} cannot name a learner"
        self.name = name
        self.model = model
        self.cfg = cfg
        self.version = 0
        self.skipped = self.skipped_in_a_row = 0
        self.observe: Observer = unobserved
        self.memory: Memory | None = None
        self.lag = 0
        self.served = False
        self.micro_batch_tokens = tokens_per_pass(cfg.micro_batch_tokens, on_cpu=model.device.type == "cpu")
        self.optimizer = Optimizer(model.trained(), cfg, total_steps=total_steps, passes=model.passes())

    @classmethod
    def load(
        cls, cfg: LearnerConfig, *, total_steps: int, seed: int = 0, head: Head = "lm", name: str = POLICY
    ) -> Self:
        """Load a model for training; see `load_model` for the values of `cfg.model` and the errors raised."""
        model = load_divided(cfg, head=head, seed=seed)
        return cls(model, cfg, total_steps=total_steps, name=name)

    def update(self, records: Sequence[R], objective: Objective[R]) -> Metrics:
        """Take one optimizer step on the mean loss of the records.

        Micro-batches depend on lengths only and affect only memory: each adds the gradient of its summed
        loss, divided by the number of all records. Several processes take a part of the records each; they
        add up their gradients, and all take the same step.

        If the loss or the gradient is not finite, the weights stay unchanged, and the update counts as
        skipped.

        Returns:
            Metrics under TRL's names: means over the records, or over tokens for metrics of tokens.

        Raises:
            NonFiniteError: the loss or the gradient is not finite for the third time in a row.
        """
        assert records, "no records to learn from; a method must skip such a step"
        needs = self._needs(objective)
        meter = Meter()
        learning_rate = self.optimizer.learning_rate()
        self.optimizer.drop_gradients()  # an interrupted update may have left some
        current().agree("the batch of an update", batch_key(records, self.version))
        own, refs = own_part(records), reference_rows(needs.ref, records)
        for batch in rounds(self.model, self.model.batches(own, self.micro_batch_tokens)):
            if not batch:
                self._pass_along(records[:1], needs)
                continue
            micro = [own[i] for i in batch]
            with self._training():
                computed = self._forward(micro, needs)
                outputs = replace(computed, ref_logps=rows_at(refs, batch), version=self.version)
                loss, numbers = objective(outputs, micro)
                (loss.sum() / len(records)).backward()  # type: ignore[no-untyped-call]
            meter.add({"loss": loss.detach(), **numbers})
            self.observe("learn", meter.add_tokens(outputs, micro, self.version, lag=self.lag))
            if not bool(loss.isfinite().all()):
                meter.problem = f"the loss is {float(loss.detach().sum())}"
            if (meter.problem or self._gap_is_wrong(meter)) and not self.model.sharded:
                break
        meter.share("metrics of an update")
        if meter.problem or self._gap_is_wrong(meter):
            self.optimizer.drop_gradients()
        if meter.problem:
            return self._skip(records, meter.result(), meter.problem)
        if self._gap_is_wrong(meter):
            raise RunError(self._explain_gap(meter))
        self.optimizer.sum_gradients()
        self._before_step()
        norm = self.optimizer.step()
        if not math.isfinite(norm):
            return self._skip(records, meter.result(), f"the gradient's norm is {norm}")
        self.skipped_in_a_row = 0
        self.version += 1
        self.model.revision += 1
        self.observe("learn", 0)
        skipped = {"skipped_updates": self.skipped} if self.skipped else {}
        return {**meter.result(), "grad_norm": norm, "learning_rate": learning_rate, **skipped}

    def numbers(self) -> dict[str, int]:
        """Return the numbers that an update changes, for `restore_state`."""
        return {
            "version": self.version,
            "updates": self.optimizer.steps,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def restore(self, state: Mapping[str, Tensor], *, version: int, updates: int) -> None:
        """Restore the optimizer's state after `updates` updates; existing snapshots do not change."""
        with self.restoring(version, updates):
            self.optimizer.restore(state, updates)

    @contextmanager
    def restoring(self, version: int, updates: int) -> Iterator[None]:
        """Restore the weights of the optimizer one by one within the context; see `restore`."""
        self._before_step()
        yield
        self.optimizer.steps = updates
        self.version = version
        self.model.revision += 1

    def _skip(self, records: Sequence[Record], metrics: Metrics, problem: str) -> Metrics:
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MOST_SKIPPED:
            owner = "" if self.name == POLICY else f" of the {self.name}"
            milder = "" if self.model.dtype == torch.float32 else " or with --dtype float32"
            raise NonFiniteError(
                f"{problem} at update {self.version + 1}{owner}, the {self.skipped_in_a_row}rd time in a "
                "row; the weights are unchanged, and the run's directory has the batch as nonfinite.jsonl. "
                f"Start a new run with a lower --lr{milder} in another --output; --model RUN "
                "starts it from this run's weights, which are then also its reference",
                records,
            )
        self.observe("learn", 0)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        return {**finite, "skipped_updates": self.skipped}

    @torch.no_grad()
    def measure(self, records: Sequence[R], objective: Objective[R]) -> Metrics:
        """Return the metrics of `update` without an update, for held-out records.

        The accuracy comes with its interval.
        """
        needs = self._needs(objective)
        meter = Meter()
        outcomes: list[tuple[float, str]] = []
        own, refs = own_part(records), reference_rows(needs.ref, records)
        for batch in rounds(self.model, self.model.batches(own, self.micro_batch_tokens)):
            if not batch:
                with self.model.computing():
                    self._forward(records[:1], needs)
                continue
            micro = [own[i] for i in batch]
            with self.model.computing():
                outputs = replace(self._forward(micro, needs), ref_logps=rows_at(refs, batch))
            loss, numbers = objective(outputs, micro)
            meter.add({"loss": loss.detach(), **numbers})
            meter.add_tokens(outputs, micro, None)
            ranked = numbers["rewards/accuracies"].tolist() if "rewards/accuracies" in numbers else ()
            outcomes += [(rate, record.prompt.id) for rate, record in zip(ranked, micro, strict=False)]
        meter.share("metrics of held-out records")
        parts = current().gather("ranks of held-out records", outcomes)
        return meter.result() | accuracy_interval([(rate, prompt) for part in parts for rate, prompt in part])

    @torch.no_grad()
    def scores(self, records: Sequence[Record]) -> Tensor:
        """Return the scalar head's score of every completion of the records, in order. (N,)"""
        return batched_scores(self.model, records, self.micro_batch_tokens)

    @torch.no_grad()
    def values(self, records: Sequence[Record]) -> TokenValues:
        """Return a value head's number before every token of the records' completions, in order. (N, T)"""
        return batched_values(self.model, records, self.micro_batch_tokens)

    def save(self, directory: Path) -> None:
        """Write the model (or its adapter) in Hugging Face layout, in process 0.

        All processes call it for a sharded model.
        """
        whole = to_save(self.model)
        if current().leads:
            whole.save(directory)

    def _gap_is_wrong(self, meter: Meter) -> bool:
        if self.lag:  # the gap has updates in it
            return False
        if self._samples_are_served:
            return meter.gap_mean > SERVED_GAP
        return meter.gap_max > FLOAT32_GAP and self.model.dtype == torch.float32

    @property
    def _samples_are_served(self) -> bool:
        return self.served or self.model.sampler is not None

    def _explain_gap(self, meter: Meter) -> str:
        if self._samples_are_served:
            return (
                f"the server's log-probabilities of its own tokens differ from those of {self.model.source} "
                f"by {meter.gap_mean:.2g} nats on average (at most {SERVED_GAP} is allowed), so it serves "
                "another model or old weights; start it with the model that is trained"
            )
        return (
            f"sampler and learner differ by {meter.gap_max:.2g} nats in the log-probability of the "
            f"same token of {self.model.source}, so training would use wrong probabilities; use "
            "--no-fast and report the problem"
        )

    def _needs(self, objective: Objective[R]) -> Needs:
        needs, head = objective.needs, self.model.head
        assert needs.head == head, f"{type(objective).__name__} reads head {needs.head!r}, not {head!r}"
        return needs

    def _forward(self, records: Sequence[Record], needs: Needs) -> Outputs:
        """Return the outputs of the model's head that the objective needs."""
        if needs.head == "scalar":
            return self.model.scores(records)
        if needs.head == "value":
            return self.model.values(records)
        return self.model.outputs(records, statistics=True, top_logits=needs.top_logits)

    def _pass_along(self, records: Sequence[Record], needs: Needs) -> None:
        """Take part in a forward and backward pass of the other processes, without a gradient of its own."""
        with self._training():
            outputs = self._forward(records, needs)
            for value in (outputs.scores, outputs.logps, outputs.values):
                if value is not None:
                    tensor = value if isinstance(value, Tensor) else value.values
                    (tensor.sum() * 0.0).backward()  # type: ignore[no-untyped-call]

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Set layers with gradient checkpointing to training mode, and restore them at the end.

        transformers recomputes activations only in training mode. The other layers stay in evaluation mode:
        training mode adds dropout, router noise and other effects that the reference does not have.
        """
        recomputing = [m for m in self.model.network.modules() if getattr(m, "gradient_checkpointing", False)]
        try:
            for module in recomputing:
                module.training = True
            with self.model.computing():
                yield
        finally:
            for module in recomputing:
                module.training = False

    def _before_step(self) -> None:
        """Prepare for a change of the weights; called before each change."""


class Policy(Learner):
    """A learner of a language model that can return frozen snapshots of itself."""

    def __init__(self, model: LoadedModel, cfg: OptimConfig, *, total_steps: int, name: str = POLICY) -> None:
        assert model.head == "lm", "a policy is a language model"
        super().__init__(model, cfg, total_steps=total_steps, name=name)
        self._held: weakref.WeakSet[Snapshot] = weakref.WeakSet()

    def snapshot(self) -> Snapshot:
        """Return the current policy, frozen; see `Snapshot` for the cost of holding one."""
        snapshot = Snapshot(
            self.version,
            lambda: nullcontext(self.model),
            micro_batch_tokens=self.micro_batch_tokens,
            observe=lambda stage, amount: self.observe(stage, amount),
            memory=lambda: self.memory,
            name=self.name,
        )
        self._held.add(snapshot)
        return snapshot

    def logps(self, records: Sequence[Record]) -> TokenValues:
        """Return the log-probability of each completion token of the records. (N, T), no gradient."""
        return self.snapshot().logps(records)

    def _before_step(self) -> None:
        """Give each snapshot that is still referenced its own copy of the weights."""
        if self._held:
            frozen = _frozen(self.model, self.version)
            for snapshot in self._held:
                snapshot._weights = frozen
            self._held.clear()


def _frozen(model: LoadedModel, version: int) -> Callable[[], AbstractContextManager[LoadedModel]]:
    """Return the current weights in the cheapest form that does not change with the model."""
    if model.peft is None and model.sharded:
        copied = second(model)
        return lambda: nullcontext(copied)
    if model.peft is None:
        # `requires_grad` stays on: otherwise torch uses another kernel, whose last bits differ.
        kept = replace(model, network=copy.deepcopy(model.network))
        return lambda: nullcontext(kept)

    if model.fresh_adapter and version == 0:

        @contextmanager
        def base() -> Iterator[LoadedModel]:
            with model.without_adapter():
                yield model

        return base

    adapter = [local_part(parameter.detach()).clone() for _, parameter in model.trained()]

    @contextmanager
    def swapped() -> Iterator[LoadedModel]:
        # In place, since a sharded model gathers its weights from the same memory each time.
        live = [local_part(parameter.detach()) for _, parameter in model.trained()]
        kept = [tensor.clone() for tensor in live]
        try:
            for tensor, own in zip(live, adapter, strict=True):
                tensor.copy_(own)
            model.revision += 1
            yield model
        finally:
            for tensor, own in zip(live, kept, strict=True):
                tensor.copy_(own)
            model.revision += 1

    return swapped
