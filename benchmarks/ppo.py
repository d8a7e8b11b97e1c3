"""Time one step of PPO beside one step of online DPO on the same samples, and beside TRL's PPOTrainer.

SmolLM2-135M-Instruct, 8 prompts of about 40 tokens (template included), 2 completions each, forced to 32 new
tokens. A step samples, scores, and learns. `oaif` takes one DPO step on the pairs. `ppo` computes the
log-probabilities and values of the samples, and takes 1 or 4 passes over them, each with an optimizer step of
the value function and one of the policy. `rloo` takes one pass without a value function. With `lora`, policy,
value function and reward model are adapters on one base, which is in memory once; with `full`, all weights
are trained. Every side scores with a reward model of the policy's size, except oaif, whose reward is the
text's length; `rloo` too has that reward, so that it can be compared with oaif.

TRL 1.12.0 is the last version with a PPOTrainer (trl.experimental.ppo). It has one completion per prompt, so
it gets every prompt twice; weights, gradients, AdamW state, reference and reward model are in the compute
dtype, as on Palate's `full` sides, and it computes a pass in one batch.

    python benchmarks/ppo.py --sides "oaif lora" "ppo 1 lora" --output benchmarks/results/ppo.json
"""

from __future__ import annotations

import json
from typing import Any

from common import (
    PeakMemory,
    Side,
    arguments,
    clock,
    compute_dtype,
    finish,
    in_turns,
    median,
    peer,
    prompts,
    serve,
)
from online_dpo import reward

SHAPE = {"count": 8, "tokens": 40, "completions": 2, "new": 32}
PEER = "trl==1.12.0"
SIDES = (
    "oaif lora", "rloo lora", "ppo 1 lora", "ppo 4 lora", "oaif full", "rloo full", "ppo 1 full",
    "ppo 4 full", "trl 1 full", "trl 4 full",
)  # fmt: skip


class Step:
    """One step of `oaif` or `rlhf`, divided into its stages.

    Args:
        kind: `oaif`, `rloo` or `ppo`.
        passes: passes over the samples.
        lora: adapters instead of all weights.
        dtype: the compute dtype.
    """

    def __init__(self, kind: str, passes: int, lora: bool, dtype: str) -> None:
        import tempfile
        from pathlib import Path

        import palate
        from palate import loops
        from palate.config import LearnerConfig
        from palate.learn import Learner, Pairwise
        from palate.losses import PAIR_LOSSES
        from palate.methods.rlhf import RLHFConfig, load_critic
        from palate.model import share_frozen, weight_bytes
        from palate.quiet import quiet_libraries

        quiet_libraries()
        self.kind, self.loops = kind, loops
        self.cfg = RLHFConfig.model_validate(
            {
                "data": "-", "lora": lora, "dtype": dtype, "masters": "live", "lr": 5e-7,
                "ppo_epochs": passes,
                "estimator": "gae" if kind == "ppo" else "rloo", "n": SHAPE["completions"],
                "output": Path(tempfile.mkdtemp()) / "run",
            }
        )  # fmt: skip
        self.asked = [palate.Prompt(text) for text in prompts(SHAPE["count"], SHAPE["tokens"])]
        self.policy = palate.Policy.load(self.cfg, total_steps=1000)
        self.ref = self.policy.snapshot()
        self.critic = next(iter(load_critic(self.policy, self.cfg, seed=0)), None)
        self.objective = Pairwise(PAIR_LOSSES["dpo"], 0.1, self.ref)
        self.reward: Learner | None = None
        if kind == "ppo":
            own = self.cfg.part(LearnerConfig)
            self.reward = Learner.load(own, total_steps=1, head="scalar", name="reward")
            self.reward.model.codec = self.policy.model.codec
            share_frozen(self.reward.model, self.policy.model)
        learners = [learner for learner in (self.policy, self.critic, self.reward) if learner is not None]
        self.weights = weight_bytes(*(learner.model for learner in learners))
        self.by_length = palate.scored(palate.FunctionScorer(reward))
        self.run = palate.Run(self.cfg, method="rlhf")
        self.count = 0

    def sample(self, seed: int) -> Any:
        """Sample two completions per prompt."""
        options = self.cfg.sampling.model_copy(
            update={"max_new_tokens": SHAPE["new"], "min_new_tokens": SHAPE["new"]}
        )
        return self.policy.snapshot().sample(self.asked, SHAPE["completions"], options, seed=seed)

    def score(self, groups: Any) -> Any:
        """Return the groups with rewards."""
        import torch

        if self.reward is None:
            return self.by_length(groups)
        scores = torch.split(self.reward.scores(groups), [len(g.completions) for g in groups])
        return [g.annotated(tuple(own.tolist())) for g, own in zip(groups, scores, strict=True)]

    def learn(self, groups: Any) -> None:
        """Take the step's optimizer steps."""
        import palate

        if self.kind == "oaif":
            pairs, _ = palate.select_pairs(groups, palate.best_vs_worst)
            self.policy.update(pairs, self.objective)
            return
        rollouts, _ = self.loops.roll_out(
            self.policy,
            self.critic,
            self.ref,
            groups,
            self.cfg,
            self.run,
            step=self.count,
            beta=0.05,
            centre=0.0,
        )
        self.loops.learn_phase(self.policy, self.critic, rollouts, None, self.cfg, self.run, step=self.count)
        self.count += 1


def palate_worker(kind: str, passes: str, how: str, dtype: str) -> Any:
    """Time one step of Palate, with separate times for its stages."""
    step = Step(kind, int(passes), how == "lora", dtype)

    def work(seed: int = 0) -> dict[str, float]:
        with PeakMemory() as memory:
            began = clock()
            groups = step.sample(seed)
            sampled = clock()
            groups = step.score(groups)
            scored = clock()
            step.learn(groups)
            ended = clock()
        return {
            "seconds": round(ended - began, 3),
            "sampling_seconds": round(sampled - began, 3),
            "scoring_seconds": round(scored - sampled, 3),
            "learning_seconds": round(ended - scored, 3),
            "memory_gb": round(memory.bytes / 1e9, 3),
            "weights_gb": round(step.weights / 1e9, 3),
        }

    return work


def trl_worker(kind: str, passes: str, how: str, dtype: str) -> Any:
    """Time one update of TRL's own training loop."""
    import tempfile

    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from palate.model import embedded_model
    from palate.quiet import quiet_libraries

    quiet_libraries()
    where = embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(where, padding_side="left")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:  # its masks would take the end for padding
        tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
    texts = [text for text in prompts(SHAPE["count"], SHAPE["tokens"]) for _ in range(SHAPE["completions"])]
    rows = [
        {
            "input_ids": tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
        }
        for text in texts
    ]
    args = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=len(rows),
        gradient_accumulation_steps=1,
        num_ppo_epochs=int(passes),
        num_mini_batches=1,
        total_episodes=len(rows),
        local_rollout_forward_batch_size=len(rows),
        response_length=SHAPE["new"],
        temperature=1.0,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        learning_rate=5e-7,
    )

    def network(cls: Any, **more: Any) -> Any:
        return cls.from_pretrained(where, dtype=getattr(torch, dtype), **more)

    scorers = [network(AutoModelForSequenceClassification, num_labels=1) for _ in range(2)]
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=network(AutoModelForCausalLM),
        ref_model=network(AutoModelForCausalLM),
        reward_model=scorers[0],
        value_model=scorers[1],
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows),
    )

    def work(seed: int = 0) -> dict[str, float]:
        torch.manual_seed(seed)
        with PeakMemory() as memory:
            began = clock()
            trainer.train()
            ended = clock()
        return {"seconds": round(ended - began, 3), "memory_gb": round(memory.bytes / 1e9, 3)}

    return work


def main() -> None:
    """Measure the sides that are asked for; other sides in the output file are kept."""
    given = arguments(
        __doc__ or "",
        dtype={"default": "float32", "choices": ["auto", "bfloat16", "float32"]},
        sides={"nargs": "*", "default": list(SIDES), "choices": list(SIDES)},
    )
    if given.worker:
        kind, *rest = given.worker
        serve((trl_worker if kind == "trl" else palate_worker)(kind, *rest))
        return
    dtype = compute_dtype(given.dtype)
    rows: dict[str, list[dict[str, float]]] = {}
    if given.output is not None and given.output.exists():
        earlier = json.loads(given.output.read_text())
        if (earlier["dtype"], earlier["shape"], earlier["runs"]) == (dtype, SHAPE, given.runs):
            rows = earlier["rows"]
    path = peer(PEER) if any(side.startswith("trl") for side in given.sides) else None
    for name in given.sides:  # one after the other, so that a side's memory is its own
        words = name.split()
        kind, passes, how = words if len(words) == 3 else (words[0], "1", words[1])
        side = Side(name, "ppo.py", kind, passes, how, dtype, path=path if kind == "trl" else None)
        rows |= in_turns([side], given.runs)
        side.close()
    rows = {name: rows[name] for name in SIDES if name in rows}
    measured = {name: {key: median(own, key) for key in own[0]} for name, own in rows.items()}
    last = {
        f"ppo_over_oaif_{how}": round(
            measured[f"ppo 4 {how}"]["seconds"] / measured[f"oaif {how}"]["seconds"], 2
        )
        for how in ("lora", "full")
        if {f"ppo 4 {how}", f"oaif {how}"} <= measured.keys()
    }
    detail = {
        "dtype": dtype, "peer": PEER, "shape": SHAPE, "runs": given.runs, "measured": measured, "rows": rows
    }  # fmt: skip
    finish(given, detail, last)


if __name__ == "__main__":
    main()
