"""One optimizer step of online DPO against TRL's OnlineDPOTrainer, on the same work, in seconds.

All weights of SmolLM2-135M-Instruct in bfloat16, two completions per prompt forced to full length, reward =
length of the text. short: 16 prompts of about 40 tokens, 64 new; long: 8 prompts of about 400 tokens, 53 new.

TRL runs `best` (KV cache on, no checkpointing) and, on the short shape, `default` (checkpointing on, which
turns its KV cache off). Its weights, gradients and AdamW state are bfloat16. Palate runs `live` (the same
state) and `masters` (float32 copies of the weights, gradients and state, its default). Both hold a full copy
of the model as the reference.

The last line: TRL's seconds over Palate's (with masters), Palate's memory over TRL's at the same state, and
the share of the GEMM peak that Palate's learner and sampler reach.
"""

from __future__ import annotations

import time
from typing import Any

from common import PeakMemory, Side, arguments, finish, gemm_peak, in_turns, median, prompts, say, serve

SHAPES = {
    "short": {"count": 16, "tokens": 40, "new": 64},
    "long": {"count": 8, "tokens": 400, "new": 53},
}


def reward(completions: list[str], **_: Any) -> list[float]:
    """Longer is better: cheap, and hardly ever a tie."""
    return [float(len(text)) for text in completions]


def palate_worker(masters: str, shape: str) -> Any:
    """One step as `oaif` takes it, sampling and learning timed apart."""
    from functools import partial

    import palate
    from palate.cli.actions import quiet_libraries
    from palate.config import LearnerConfig, Sampling
    from palate.learn import Pairwise, Policy
    from palate.losses import PAIR_LOSSES
    from palate.select import best_vs_worst, select_pairs
    from palate.types import Prompt

    quiet_libraries()
    s = SHAPES[shape]
    asked = [Prompt(text) for text in prompts(s["count"], s["tokens"])]
    cfg = LearnerConfig(lora=False, dtype="bfloat16", lr=5e-7, masters=masters)
    policy = Policy.load(cfg, total_steps=1000)
    objective = Pairwise(PAIR_LOSSES["dpo"], 0.1, policy.snapshot())
    annotate = palate.scored(palate.FunctionScorer(reward))
    options = Sampling(temperature=0.9, max_new_tokens=s["new"], min_new_tokens=s["new"])
    network = policy.model.network
    head_size = network.get_output_embeddings().weight.numel()
    body_size = sum(p.numel() for p in network.parameters()) - network.get_input_embeddings().weight.numel()

    def work(seed: int = 0) -> dict[str, float]:
        with PeakMemory() as memory:
            began = time.perf_counter()
            groups = policy.snapshot().sample(asked, 2, options, seed=seed)
            sampled = time.perf_counter()
            pairs, _ = select_pairs(annotate(groups), partial(best_vs_worst, tie=-0.0))
            policy.update(pairs, objective)
            ended = time.perf_counter()
        prompt_tokens = sum(len(policy.model.codec.prompt_ids(p)) for p in asked)
        new_tokens = sum(len(c.token_ids) for g in groups for c in g.completions)
        # Products of the reference's pass and of forward and backward, with each prompt counted once.
        learned = 2 * (1 + 3) * ((prompt_tokens + new_tokens) * body_size + new_tokens * head_size)
        drawn = 2 * ((prompt_tokens + new_tokens) * body_size + new_tokens * head_size)
        return {
            "seconds": round(ended - began, 3),
            "sampling_seconds": round(sampled - began, 3),
            "learning_seconds": round(ended - sampled, 3),
            "memory_gb": round(memory.bytes / 1e9, 3),
            "learner_gflops": round(learned / (ended - sampled) / 1e9, 1),
            "sampler_gflops": round(drawn / (sampled - began) / 1e9, 1),
        }

    return work


def trl_worker(kind: str, shape: str) -> Any:
    """TRL's own training_step, with its optimizer stepped as its loop does."""
    import tempfile

    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    from palate.cli.actions import quiet_libraries
    from palate.model import embedded_model

    quiet_libraries()
    s = SHAPES[shape]
    texts = prompts(s["count"], s["tokens"])
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    best = kind == "best"

    def trl_reward(completions: list[Any], **_: Any) -> list[float]:
        return reward([turns[0]["content"] for turns in completions])

    args = OnlineDPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=s["count"],
        max_new_tokens=s["new"],
        max_length=1024,
        temperature=0.9,
        generation_kwargs={"min_new_tokens": s["new"], **({"use_cache": True} if best else {})},
        **({"gradient_checkpointing": False} if best else {}),
        bf16=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        max_steps=1000,
    )
    trainer = OnlineDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.bfloat16),
        ref_model=AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.bfloat16),
        reward_funcs=trl_reward,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(embedded_model()),
    )
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    batch = next(iter(trainer.get_train_dataloader()))

    def work(seed: int = 0) -> dict[str, float]:
        torch.manual_seed(seed)
        with PeakMemory() as memory:
            began = time.perf_counter()
            trainer.training_step(trainer.model, {k: list(v) for k, v in batch.items()})
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            ended = time.perf_counter()
        return {"seconds": round(ended - began, 3), "memory_gb": round(memory.bytes / 1e9, 3)}

    return work


def main() -> None:
    given = arguments(
        __doc__ or "",
        shapes={"nargs": "*", "default": list(SHAPES), "choices": list(SHAPES)},
        no_default={"action": "store_true", "help": "leave out TRL at its defaults, which is slow"},
    )
    if given.worker:
        side, *rest = given.worker
        serve({"palate": palate_worker, "trl": trl_worker}[side](*rest))
        return
    detail: dict[str, Any] = {"shapes": SHAPES, "measured": {}}
    last: dict[str, float] = {}
    for shape in given.shapes:
        say(shape)
        kinds = [("palate", "masters"), ("palate", "live"), ("trl", "best")]
        if shape == "short" and not given.no_default:
            kinds.append(("trl", "default"))
        names = {"masters": "float32", "live": "live"}
        sides = [
            Side(f"{side} {kind}", "online_dpo.py", side, names.get(kind, kind), shape)
            for side, kind in kinds
        ]
        found = in_turns(sides, given.runs)
        for side in sides:
            side.close()
        medians = {name: {key: median(rows, key) for key in rows[0]} for name, rows in found.items()}
        detail["measured"][shape] = medians
        ours = medians["palate masters"]
        last[f"{shape}_best"] = round(medians["trl best"]["seconds"] / ours["seconds"], 2)
        if "trl default" in medians:
            last["short_default"] = round(medians["trl default"]["seconds"] / ours["seconds"], 2)
        last[f"memory_{shape}"] = round(
            medians["palate live"]["memory_gb"] / medians["trl best"]["memory_gb"], 2
        )
    peak = gemm_peak("bfloat16")
    detail["gemm_peak_gflops"] = round(peak / 1e9)
    for name in ("learner", "sampler"):
        rates = [m["palate masters"][f"{name}_gflops"] for m in detail["measured"].values()]
        last[f"gemm_share_{name}"] = round(max(rates) * 1e9 / peak, 2)
    finish(given, detail, last)


if __name__ == "__main__":
    main()
