"""The parts of self-rewarding around its rounds: the lessons for M1, new prompts, positives, contests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

from palate import select
from palate.annotate.judges.local import weights_digest
from palate.config import DataConfig, ModelConfig, Sampling, Source
from palate.data.formats import read_prompts
from palate.errors import RunError
from palate.learn import Likelihood, Policy
from palate.loops.config import Batches, RoundsConfig
from palate.loops.offline import fit
from palate.loops.records import read_examples
from palate.loops.report import group_numbers
from palate.loops.rounds import prompts_of_round
from palate.making.filters import PromptFilter, subjects
from palate.making.prompts import most_replies, write_prompts
from palate.model import Snapshot, load_model
from palate.run import Run
from palate.types import Example, Group, Prompt

__all__ = [
    "contest", "fine_tune", "held_out_prompts", "likelihood", "most_replies", "positives", "prompt_source",
    "read_lessons",
]  # fmt: skip

WRITING = {"temperature": 0.6, "top_p": 0.9}
"""How new prompts are sampled in Yuan et al. 2024."""

Prompts = Callable[[int], list[Prompt]]
"""Returns the prompts of a round, from 0."""


def likelihood(batch: Sequence[Example], _: int) -> Likelihood:
    """Return the loss of supervised fine-tuning."""
    return Likelihood.per_token(batch)


def read_lessons(
    policy: Policy, sources: Sequence[Source | None], cfg: DataConfig, run: Run
) -> list[Example]:
    """Return the demonstrations of several data sets; those that are None are left out."""
    return [
        example
        for source in sources
        if source is not None
        for example in read_examples(policy, source, cfg, run, name=f"the lessons of {source}", limit=None)
    ]


def fine_tune(
    policy: Policy, lessons: Sequence[Example], epochs: float, lr: float | None, cfg: Batches, run: Run
) -> None:
    """Imitate the lessons, with a schedule of its own, as the round 0 of the run."""
    batches = Batches.model_validate({"batch_size": cfg.batch_size, "epochs": epochs})
    policy.optimizer.restart(total_steps=batches.total_steps(len(lessons)), lr=lr)
    fit(policy, lessons, likelihood, batches, run, name="lessons", numbers={"round": 0})


def prompt_source(
    policy: Policy,
    prompts: Sequence[Prompt],
    lessons: Sequence[Example],
    others: Sequence[Prompt],
    cfg: RoundsConfig,
    run: Run,
    *,
    writer: str | None,
    tokens: int,
) -> Prompts:
    """Return the prompts of each round: those of the data, or new ones by a model that stays the same.

    New prompts resemble neither the prompts of the data, the lessons and the held-out data, nor those of
    earlier rounds.

    Args:
        policy: writes them as it is now, if `writer` is `sft`.
        prompts: the prompts of the data.
        lessons: the demonstrations of M1.
        others: held-out prompts.
        cfg, run: of the method.
        writer: `sft`, a hub id or a directory; None to use the data.
        tokens: the most tokens of a reply.
    """
    if writer is None:
        return lambda t: prompts_of_round(prompts, t, cfg, run)
    by = policy.snapshot() if writer == "sft" else _loaded(writer, cfg, run)
    seeds = list(dict.fromkeys(prompt.text for prompt in prompts))
    learnt = [text for example in lessons for text in subjects(example.prompt)]
    sieve = PromptFilter([*seeds, *learnt, *(prompt.text for prompt in others)])
    sampling = Sampling.model_validate(
        {**WRITING, "max_new_tokens": tokens, "sampling_rows": cfg.sampling_rows}
    )

    def written(t: int) -> list[Prompt]:
        sieve.left_out.clear()
        count = cfg.prompts_per_round or len(prompts)
        made = write_prompts(by, seeds, count, sieve, sampling, seed=run.seed("new prompts", t))
        reasons = ", ".join(f"{number} {reason}" for reason, number in sieve.left_out.most_common())
        run.display.say(
            f"round {t + 1}: {count} new prompts from {made.replies} replies; left out: {reasons or 'none'}"
        )
        return list(made.prompts)

    return written


def _loaded(name: str, cfg: RoundsConfig, run: Run) -> Snapshot:
    """Return a model that writes prompts; its replies are kept in the run's journal."""
    given = {"model": name, "lora": False, "device": cfg.device, "fast": cfg.fast}
    options = ModelConfig.model_validate({**given, "trust_remote_code": cfg.trust_remote_code})
    model = load_model(options, trainable=False)
    run.require_same("the writer of prompts", weights_digest(model), f"the model {name!r}")
    return Snapshot(
        0,
        lambda: nullcontext(model),
        micro_batch_tokens=8192,
        memory=lambda: run.memory,
        name=f"writer:{name}",
    )


def held_out_prompts(cfg: DataConfig) -> list[Prompt]:
    """Return the held-out prompts of the data, which new prompts must not resemble."""
    if cfg.eval_data is None:
        return []
    return read_prompts(cfg.eval_data, split=cfg.eval_split, columns=cfg.map, limit=cfg.eval_limit)


def positives(
    groups: Sequence[Group], lowest: float | None, index: int
) -> tuple[list[Example], dict[str, float]]:
    """Return each group's best completion if its reward is high enough, and the metrics of the samples.

    Raises:
        RunError: no completion is left.
    """
    best = select.select_completions(groups, partial(select.top_k, k=1)).groups
    kept = [
        Example(group.prompt, group.completions[0])
        for group in best
        for reward in group.rewards or ()
        if lowest is None or (reward is not None and reward >= lowest)
    ]
    if not kept:
        raise RunError(
            f"round {index + 1}: no completion of {len(groups)} prompts has a score of at least {lowest}; "
            "lower positive_score or leave it out"
        )
    return kept, {"round": index + 1, **group_numbers(groups, {}, kept=len(kept))}


def contest(before: Snapshot, policy: Policy, run: Run) -> None:
    """Measure the policy against the one before the round, on the held-out prompts if there are any."""
    if run.contest is not None:
        compared = run.contest
        run.measure("contest", lambda: compared(before, policy.snapshot()))
