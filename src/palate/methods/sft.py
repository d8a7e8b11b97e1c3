"""Supervised fine-tuning on demonstrations, the first step of Ouyang et al. 2022 (arXiv:2203.02155).

Given prompts with one answer each, raise the likelihood of the answers. SFT is the usual start of the other
methods and the baseline for them.

Ours: the loss is the mean over all answer tokens of an update, including the end token; prompt tokens have
no loss. The paper uses 16 epochs, a cosine schedule and dropout; the defaults here are one epoch and a
constant rate, and dropout is off as in every method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from palate import learn, loops
from palate.method import Method, Recipe, Share
from palate.types import Example

if TYPE_CHECKING:
    from palate.learn import Policy
    from palate.run import Run


class SFTConfig(loops.OfflineConfig, loops.PairBatches):
    """Options of supervised fine-tuning."""

    vetted_lr: ClassVar = {"lora": 2e-4, "full": 2e-5}


def sft(
    policy: Policy, examples: Sequence[Example], cfg: SFTConfig, run: Run, *, held_out: Sequence[Example] = ()
) -> None:
    """Train `policy` in place on demonstrations."""

    def objective(batch: Sequence[Example], _: int) -> learn.Likelihood:
        return learn.Likelihood.per_token(batch)

    loops.fit(policy, examples, objective, cfg, run, held_out, name="examples")


METHOD = Method(
    train=sft,
    config=SFTConfig,
    summary="supervised fine-tuning: imitates demonstrations; the usual start of other methods",
    paper="Ouyang et al. 2022, arXiv:2203.02155",
    group="supervised",
    learns_from="demonstrations",
    batches_of="demonstration",
    spends=loops.spends_on_demonstrations,
    recipe=Recipe("none", "data", "once", ("policy",)),
    share=Share("demonstrations", n=16),
)
