"""Against TRL's DPO trainer: the same loss and gradient on one fixed batch, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from palate.learn import Pairwise
from palate.losses import PAIR_LOSSES
from palate.testing import tiny_model, tiny_policy
from palate.types import Comparison, Pair, Prompt

trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")
datasets = pytest.importorskip("datasets")

ROWS = (
    ("What is rain?", "Water that falls from clouds.", "No."),
    ("Sing.", "La la la!", "I would rather not sing anything at all today, if that is fine with you."),
    ("Name a colour, any colour that you like.", "Blue", "Green is one"),
    ("Hi", "Hello there", "Hm"),
)
# (TRL's loss_type, ours, our reduction): TRL's "ipo" takes means over tokens, its "hinge" is hinge_norm.
LOSSES = (("sigmoid", "dpo", "sum"), ("ipo", "ipo", "mean"), ("hinge", "hinge_norm", "sum"))
BETA = 0.3
ROUNDING = 1000 * torch.finfo(torch.float32).eps
"""Both sum the log-probabilities of some 80 tokens, -450 in all, each in its own order, so that losses differ
by a few hundred eps. The error of a gradient is a share of its norm."""


def comparisons() -> list[Comparison]:
    return [
        Comparison(
            Prompt(({"role": "user", "content": prompt},)),
            ({"role": "assistant", "content": chosen},),
            ({"role": "assistant", "content": rejected},),
        )
        for prompt, chosen, rejected in ROWS
    ]


def trl_loss_and_gradients(
    policy_dir: str, ref_dir: str, loss_type: str, scratch: Path
) -> tuple[float, dict[str, torch.Tensor]]:
    rows = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for prompt, chosen, rejected in ROWS
    ]
    args = trl.DPOConfig(
        output_dir=str(scratch),
        loss_type=[loss_type],
        beta=BETA,
        per_device_train_batch_size=len(ROWS),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(ref_dir, dtype=torch.float32),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(policy_dir),
    )
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    named = trainer.model.named_parameters()
    return float(loss.detach()), {name: p.grad for name, p in named if p.grad is not None}


def our_loss_and_gradients(
    policy_dir: str, ref_dir: str, name: str, reduce: str, budget: int
) -> tuple[float, dict[str, torch.Tensor]]:
    policy = tiny_policy(Path(policy_dir), micro_batch_tokens=budget)
    ref = tiny_policy(Path(ref_dir)).snapshot()
    pairs: Sequence[Pair] = [policy.model.codec.pair(row) for row in comparisons()]
    gradients: dict[str, torch.Tensor] = {}

    def keep() -> float:
        gradients.update({n: p.grad.clone() for n, p in policy.model.trained() if p.grad is not None})
        return 0.0

    policy.optimizer.step = keep  # type: ignore[method-assign]
    objective = Pairwise(replace(PAIR_LOSSES[name], reduce=reduce), BETA, ref)  # type: ignore[arg-type]
    return policy.update(pairs, objective)["loss"], gradients


@pytest.mark.parametrize("budget", [10_000, 100])
@pytest.mark.parametrize(("trl_name", "name", "reduce"), LOSSES)
def test_same_loss_and_gradient_as_trl(
    trl_name: str, name: str, reduce: str, budget: int, tmp_path: Path
) -> None:
    policy_dir = tiny_model(tmp_path / "policy", chat=True, seed=1)
    ref_dir = tiny_model(tmp_path / "ref", chat=True, seed=2)
    theirs, their_gradients = trl_loss_and_gradients(policy_dir, ref_dir, trl_name, tmp_path / "trl")
    ours, our_gradients = our_loss_and_gradients(policy_dir, ref_dir, name, reduce, budget)

    assert ours == pytest.approx(theirs, abs=ROUNDING)
    assert our_gradients.keys() == their_gradients.keys()
    for parameter, gradient in their_gradients.items():
        size = float(gradient.norm())
        assert size > 0  # there is something to compare
        assert float((our_gradients[parameter] - gradient).norm()) <= ROUNDING * size, parameter
