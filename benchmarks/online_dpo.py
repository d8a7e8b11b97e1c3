"""Time one optimizer step of online DPO in Palate and in TRL's OnlineDPOTrainer, on the same work.

All weights of SmolLM2-135M-Instruct, two completions per prompt forced to full length. short: 16 prompts
of about 40 tokens (template included), 64 new; long: 8 prompts of about 400 tokens, 53 new. The reward is
the text's length, with a fraction that keeps two different texts from being a tie.

TRL runs `best` (KV cache on, no checkpointing) and, on the short shape, `default` (checkpointing on, which
turns its KV cache off). Its weights, gradients and AdamW state are in the compute dtype throughout. Palate
runs `live` (the same state) and, where the compute dtype is bfloat16, `masters` (float32 copies of the
weights, gradients and state, its default). All hold a full copy of the model as the reference. Palate
uses compiled functions (`--compile on`) where a compiler is found; `plain`, on the short shape, is Palate's
default without them. All sides of a shape are in memory together.

The last line has three figures: TRL's seconds over Palate's (with masters if measured); Palate's memory over
TRL's with the same state; and the share of the machine's GEMM peak, measured in the same run, that Palate's
learner and sampler reach on the better shape. The share divides the operations of the matrix products of
layers and head, with each prompt counted once, by the seconds of the whole stage. TRL computes all rows of a
step in one batch, as its trainer does without accumulation; Palate splits them by its default token budget.

    python benchmarks/online_dpo.py
    python benchmarks/online_dpo.py --dtype float32 --shapes short --trl best  # not TRL's defaults
    python benchmarks/online_dpo.py --dtype bfloat16 --trl                     # Palate alone

Other shapes in the output file, measured with the same settings, are kept.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

from common import (
    COMPILE,
    PeakMemory,
    Side,
    arguments,
    clock,
    compiling,
    compute_dtype,
    finish,
    gemm_peak,
    in_turns,
    median,
    on_gpu,
    peer,
    prompts,
    say,
    serve,
)

SHAPES = {
    "short": {"count": 16, "tokens": 40, "new": 64},
    "long": {"count": 8, "tokens": 400, "new": 53},
}
PEER = "trl==1.16.0"


def reward(completions: list[str], **_: Any) -> list[float]:
    """Score texts by length: cheap to compute, and only equal texts tie."""
    return [len(text) + zlib.crc32(text.encode()) / 2**32 for text in completions]


class PalateStep:
    """One step of `oaif`, divided into its stages.

    Args:
        masters: `live` or `float32`; see the module's docstring.
        shape: one of `SHAPES`.
        dtype: the compute dtype.
        compiled: `on` or `off`, the choice of compiled functions.
    """

    def __init__(self, masters: str, shape: str, dtype: str, compiled: str = "off") -> None:
        import palate
        from palate.config import LearnerConfig, Sampling
        from palate.learn import Pairwise, Policy
        from palate.losses import PAIR_LOSSES
        from palate.quiet import quiet_libraries
        from palate.types import Prompt

        quiet_libraries()
        s = SHAPES[shape]
        self.asked = [Prompt(text) for text in prompts(s["count"], s["tokens"])]
        options = {"lora": False, "dtype": dtype, "lr": 5e-7, "masters": masters, "compile": compiled}
        cfg = LearnerConfig.model_validate(options)
        self.policy = Policy.load(cfg, total_steps=1000)
        self.objective = Pairwise(PAIR_LOSSES["dpo"], 0.1, self.policy.snapshot())
        self.annotate = palate.scored(palate.FunctionScorer(reward))
        self.options = Sampling(
            temperature=0.9, max_new_tokens=s["new"], min_new_tokens=s["new"], sampling_rows=2 * s["count"]
        )

    def sample(self, seed: int) -> Any:
        """Sample two completions per prompt."""
        return self.policy.snapshot().sample(self.asked, 2, self.options, seed=seed)

    def learn(self, groups: Any) -> int:
        """Annotate, select pairs and update; return the number of pairs."""
        import palate

        pairs, _ = palate.select_pairs(self.annotate(groups), palate.best_vs_worst)
        self.policy.update(pairs, self.objective)
        return len(pairs)

    def forward_operations(self, groups: Any, *, sampling: bool = False) -> int:
        """Return the floating-point operations of one forward pass in matrix products, each prompt once.

        In sampling, a completion's last token is not computed by the layers.
        """
        network, codec = self.policy.model.network, self.policy.model.codec
        head = network.get_output_embeddings().weight.numel()
        embedding = network.get_input_embeddings().weight.numel()
        body = sum(p.numel() for p in network.parameters()) - embedding
        prompt_tokens = sum(len(codec.prompt_ids(prompt)) for prompt in self.asked)
        new_tokens = sum(len(c.token_ids) for g in groups for c in g.completions)
        last = sum(len(g.completions) for g in groups) if sampling else 0
        return 2 * ((prompt_tokens + new_tokens - last) * body + new_tokens * head)


def palate_worker(masters: str, shape: str, dtype: str, compiled: str) -> Any:
    """Time one step of Palate, with separate times for sampling and learning."""
    step = PalateStep(masters, shape, dtype, compiled)

    def work(seed: int = 0) -> dict[str, float]:
        with PeakMemory() as memory:
            began = clock()
            groups = step.sample(seed)
            sampled = clock()
            pairs = step.learn(groups)
            ended = clock()
        forward = step.forward_operations(groups)
        return {
            "seconds": round(ended - began, 3),
            "sampling_seconds": round(sampled - began, 3),
            "learning_seconds": round(ended - sampled, 3),
            "memory_gb": round(memory.bytes / 1e9, 3),
            # The reference's pass, and forward and backward of all weights.
            "learner_gflops": round(forward * (1 + 3) / (ended - sampled) / 1e9, 1),
            "sampler_gflops": round(
                step.forward_operations(groups, sampling=True) / (sampled - began) / 1e9, 1
            ),
            "pairs": pairs,
        }

    return work


def trl_worker(kind: str, shape: str, dtype: str) -> Any:
    """Time TRL's own training_step, followed by an optimizer step as in its training loop."""
    import tempfile

    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    from palate.model import embedded_model
    from palate.quiet import quiet_libraries

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
        # The weights are in the compute dtype already: mixed precision would widen the reference to float32.
        bf16=False,
        use_cpu=not on_gpu(),
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        max_steps=1000,
    )

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=getattr(torch, dtype))

    trainer = OnlineDPOTrainer(
        model=model(),
        ref_model=model(),
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
            began = clock()
            trainer.training_step(trainer.model, {k: list(v) for k, v in batch.items()})
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            ended = clock()
        return {"seconds": round(ended - began, 3), "memory_gb": round(memory.bytes / 1e9, 3)}

    return work


def measured(
    shape: str, dtype: str, runs: int, *, trl: list[str], compiled: str
) -> dict[str, list[dict[str, float]]]:
    """Return the measurements of Palate and the given variants of TRL on a shape, run by run."""
    kinds = [("palate", "live"), *(("trl", kind) for kind in trl if kind == "best")]
    if dtype == "bfloat16":
        kinds.append(("palate", "masters"))
    if compiled == "on" and shape == "short":
        kinds.append(("palate", "plain"))
    if "default" in trl and shape == "short":
        kinds.append(("trl", "default"))
    state = {"masters": "float32", "plain": "float32" if dtype == "bfloat16" else "live"}
    peers = peer(PEER)
    sides = []
    for who, kind in kinds:
        own = ("off" if kind == "plain" else compiled,) if who == "palate" else ()
        words = who, state.get(kind, kind), shape, dtype, *own
        sides.append(Side(f"{who} {kind}", "online_dpo.py", *words, path=peers))
    found = in_turns(sides, runs)
    for side in sides:
        side.close()
    return found


def main() -> None:
    given = arguments(
        __doc__ or "",
        dtype={"default": "auto", "choices": ["auto", "bfloat16", "float32"]},
        shapes={"nargs": "*", "default": list(SHAPES), "choices": list(SHAPES)},
        trl={
            "nargs": "*",
            "default": ["best", "default"],
            "choices": ["best", "default"],
            "help": "kinds of TRL, if any, beside Palate",
        },
        compile=COMPILE,
    )
    if given.worker:
        side, *rest = given.worker
        serve({"palate": palate_worker, "trl": trl_worker}[side](*rest))
        return
    dtype = compute_dtype(given.dtype)
    compiled = compiling(given.compile)
    settings = {"dtype": dtype, "peer": PEER, "shapes": SHAPES, "runs": given.runs, "compile": compiled}
    rows: dict[str, Any] = {}
    if given.output is not None and given.output.exists():
        earlier = json.loads(given.output.read_text())
        if all(earlier.get(name) == value for name, value in settings.items()):
            rows = earlier["rows"]  # of other shapes
    ours = "palate masters" if dtype == "bfloat16" else "palate live"  # its default in that format
    before = gemm_peak(dtype)
    for shape in given.shapes:
        say(shape)
        rows[shape] = measured(shape, dtype, given.runs, trl=given.trl, compiled=compiled)
    detail: dict[str, Any] = {**settings, "measured": {}, "rows": rows}
    last: dict[str, float] = {}
    for shape, own in rows.items():
        medians = {name: {key: median(runs, key) for key in runs[0]} for name, runs in own.items()}
        detail["measured"][shape] = medians
        for kind in ("best", "default"):
            if (theirs := medians.get(f"trl {kind}")) is not None:
                last[f"{shape}_{kind}"] = round(theirs["seconds"] / medians[ours]["seconds"], 2)
        if (best := medians.get("trl best")) is not None:
            last[f"memory_{shape}"] = round(medians["palate live"]["memory_gb"] / best["memory_gb"], 2)
    peak = max(before, gemm_peak(dtype))
    detail["gemm_peak_gflops"] = round(peak / 1e9)
    for name in ("learner", "sampler"):
        rates = [m[ours][f"{name}_gflops"] for m in detail["measured"].values()]
        last[f"gemm_share_{name}"] = round(max(rates) * 1e9 / peak, 2)
    finish(given, detail, last)


if __name__ == "__main__":
    main()
