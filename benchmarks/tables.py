"""Write the tables of the pages in docs/ from the results in benchmarks/results.

python benchmarks/tables.py          # print them
python benchmarks/tables.py --write  # put them into the pages, each between its two marks
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from common import ROOT, runs_of

sys.path.insert(0, str(ROOT / "experiments"))
from marks import marked, missing, write

RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"


def main() -> None:
    """Print or write each table that has results; with `--check`, name the tables that are out of date."""
    made = documents()
    if sys.argv[1:] == ["--write"]:
        for page, parts in made.items():
            write(page, parts)
    elif sys.argv[1:] == ["--check"]:
        old = [name for page, parts in made.items() for name in missing(page, parts)]
        sys.exit(f"not what benchmarks/tables.py writes: {', '.join(old)}" if old else 0)
    else:
        parts = {name: lines for tables in made.values() for name, lines in tables.items()}
        print("\n\n".join(marked(name, lines) for name, lines in parts.items()))


def documents() -> dict[Path, dict[str, list[str]]]:
    """Return the lines of each table by name, by page."""
    alone = {
        "data.md": {"preparing": preparing}, "judges.md": {"overlap": overlap},
        "scale.md": {"processes": processes},
    }  # fmt: skip
    files = {"preparing": "data"}
    made = {
        DOCS / page: {
            name: table(read(files.get(name, name)))
            for name, table in parts.items()
            if (RESULTS / f"{files.get(name, name)}.json").exists()
        }
        for page, parts in alone.items()
    }
    return {DOCS / "performance.md": tables(), **made}


def tables() -> dict[str, list[str]]:
    """Return the lines of each table by name. Results of other machines (`NAME_MACHINE.json`) come last."""
    made = {
        "sampling": sampling, "online_dpo": online_dpo, "ppo": ppo, "scaling": scaling,
        "operations": operations, "compiled": compiled, "neighbour": neighbour,
        "attention": attention, "pages": pages, "products": products,
    }  # fmt: skip
    found: dict[str, list[str]] = {}
    for name, table in made.items():
        for file in sorted(RESULTS.glob(f"{name}*.json"), key=lambda file: len(file.stem)):
            found[name] = [*([*found[name], ""] if name in found else []), *table(read(file.stem))]
    profiles: dict[str, list[dict[str, Any]]] = {}  # by kind of processor, one table each
    for file in sorted(RESULTS.glob("shares_*.json"), reverse=True):
        profiles.setdefault(kind_of(read(file.stem)["machine"]), []).append(read(file.stem))
    lines: list[str] = []
    for one in profiles.values():
        lines += [*([""] if lines else []), *shares(one)]
    return {**found, **({"shares": lines} if lines else {})}


def read(name: str) -> dict[str, Any]:
    """Return the result of one benchmark."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def kind_of(machine: dict[str, Any]) -> str:
    """Return the units that the machine computed with."""
    if "units" in machine:
        return str(machine["units"])
    return "GPU" if machine["accelerator"] else "AMX" if machine["amx"] else machine["instruction_set"]


def where(result: dict[str, Any]) -> str:
    """Return one line with the machine, the date and the way of measuring."""
    machine = result["machine"]
    hardware = machine["accelerator"] or f"{machine['processor']}, {machine['cores']} cores"
    kind = kind_of(machine)
    peak = result.get("gemm_peak_gflops")
    return ", ".join(
        (
            f"{hardware} ({kind})",
            f"torch {machine['torch']}",
            result["dtype"],
            *([f"medians of {result['runs']} runs"] if result.get("runs", 1) > 1 else []),
            *([f"GEMM peak {peak} GFLOP/s"] if peak else []),
            machine["date"],
        )
    )


def sampling(result: dict[str, Any]) -> list[str]:
    """Return the table of tokens per second by side."""
    sides = list(next(iter(result.get("forced", result.get("natural")).values())))
    lines = [where(result) + ". Tokens per second:", ""]
    ours = [side for side in sides if side.startswith("palate")]
    ratios = (f"{side.replace('palate', 'Palate')} over `generate`" for side in ours)
    lines += row("shape", "completions", *(f"`{s}`" for s in sides), *ratios)
    lines += ["|---" * (len(sides) + len(ours) + 2) + "|"]
    for ending, name in (("forced", "forced to 64 tokens"), ("natural", "ended by themselves")):
        for shape, speed in result.get(ending, {}).items():
            rows = result.get("rows", {}).get(ending, {}).get(shape, {})
            cells = (f"{speed[s]:.0f}{span(rows.get(s, []), 'tokens_per_second')}" for s in sides)
            runs = runs_of(ending, result["runs"])
            told = name if runs == result["runs"] else f"{name} ({runs} {'runs' if runs > 1 else 'run'})"
            over = (f"**{speed[side] / speed['generate']:.2f}**" for side in ours)
            lines += row(f"`{shape}`", told, *cells, *over)
    return lines


def span(rows: list[dict[str, float]], key: str, form: str = ".0f") -> str:
    """Return the range of the measured values, if they were saved."""
    values = [row[key] for row in rows]
    return f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""


def online_dpo(result: dict[str, Any]) -> list[str]:
    """Return the table of seconds and memory per step by side."""
    lines = [where(result) + ".", ""]
    lines += row(
        "shape", "side", "seconds", "of it sampling", "learning", "memory (GB)", "seconds over Palate's",
        "learner's share of the GEMM peak", "sampler's",
    )  # fmt: skip
    lines += ["|---" * 9 + "|"]
    peak = result["gemm_peak_gflops"]
    for shape, sides in result["measured"].items():
        ours = sides.get("palate masters", sides["palate live"])
        for name, side in sides.items():
            stages = ("sampling_seconds", "learning_seconds")
            rates = ("learner_gflops", "sampler_gflops")
            lines += row(
                f"`{shape}`",
                name,
                f"{side['seconds']:.1f}",
                *(f"{side[s]:.1f}" if s in side else "" for s in stages),
                f"{side['memory_gb']:.2f}",
                f"**{side['seconds'] / ours['seconds']:.2f}**" if name.startswith("trl") else "",
                *(f"{side[r] / peak:.2f}" if r in side else "" for r in rates),
            )
    return lines


def ppo(result: dict[str, Any]) -> list[str]:
    """Return the table of seconds and memory of a step of PPO beside one of online DPO."""
    lines = [where(result) + ".", ""]
    lines += row(
        "side", "seconds", "of it sampling", "scoring", "learning", "over `oaif`'s", "memory (GB)",
        "weights (GB)",
    )  # fmt: skip
    lines += ["|---" * 8 + "|"]
    sides = result["measured"]
    for name, side in sides.items():
        same = sides.get("oaif lora" if name.endswith("lora") else "oaif full")
        stages = ("sampling_seconds", "scoring_seconds", "learning_seconds")
        lines += row(
            name,
            f"{side['seconds']:.1f}",
            *(f"{side[s]:.1f}" if s in side else "" for s in stages),
            f"{side['seconds'] / same['seconds']:.2f}" if same else "",
            f"{side['memory_gb']:.2f}",
            f"{side['weights_gb']:.2f}" if "weights_gb" in side else "",
        )
    return lines


def scaling(result: dict[str, Any]) -> list[str]:
    """Return the table of seconds by prompt length, then by completions per prompt."""
    lines = [where(result) + ". Seconds, sampling + learning:", ""]
    lines += row("prompt tokens", "completions a prompt", "padded", "fast", "padded over fast")
    lines += ["|---" * 5 + "|"]
    for one in (*result["by_length"], *result["by_completions"]):
        lines += row(
            one["prompt_tokens"],
            one["completions"],
            *(
                f"{one[side]['sampling_seconds']:.1f} + {one[side]['learning_seconds']:.1f}"
                for side in ("padded", "fast")
            ),
            f"**{one['padded_over_fast']:.2f}**",
        )
    return lines


def operations(result: dict[str, Any]) -> list[str]:
    """Return the table of operations of both sides, counted from the shapes."""
    lines = row("work", "prompt tokens, mean and most", "Palate (TFLOP)", "peer (TFLOP)", "peer over Palate")
    lines += ["|---" * 5 + "|"]
    for name, one in result["counted"].items():
        prompt = f"{one['mean_prompt']:.0f}, {one['longest_prompt']}"
        work = (f"{one[side + '_tflop']:.2f}" for side in ("palate", "peer"))
        lines += row(name.replace(" ", " `") + "`", prompt, *work, f"**{one['ratio']:.2f}**")
    return lines


def shares(results: list[dict[str, Any]]) -> list[str]:
    """Return the table of time shares, with a column per stage and shape."""
    columns = [(r["shape"], stage, r[stage]) for r in results for stage in ("sampler", "learner")]
    lines = [where(results[0]) + ".", ""]
    lines += row("share of the time", *(f"{stage}, `{shape}`" for shape, stage, _ in columns))
    lines += ["|---" * (len(columns) + 1) + "|"]
    for kind in (name for name in columns[0][2] if name not in ("seconds", "gflops")):
        lines += row(kind, *(f"{100 * found[kind]:.0f} %" for _, _, found in columns))
    return lines


def compiled(result: dict[str, Any]) -> list[str]:
    """Return the table of a sampling step, plain and compiled, and the time to compile it."""
    threads = f"{result['threads']} {'thread' if result['threads'] == 1 else 'threads'}"
    lines = [f"{where(result)}, {threads}. Milliseconds of a step:", ""]
    lines += row(
        "format", "rows", "plain", "compiled", "plain over compiled", "of plain: products, attention, rest",
        "of compiled", "operations of torch in a step", "compiling (s), and from the cache",
    )  # fmt: skip
    lines += ["|---" * 9 + "|"]
    for dtype, steps in result["steps"].items():
        seconds = result["compiling"][dtype]
        for rows, one in steps.items():
            parts = [one["parts"][side] for side in ("plain", "compiled")]
            lines += row(
                dtype, rows, f"{one['plain']:.0f}", f"{one['compiled']:.0f}", f"**{one['ratio']:.2f}**",
                *(", ".join(f"{p[k]:.0f}" for k in ("products", "attention", "rest")) for p in parts),
                " and ".join(f"{p['operations']:,}" for p in parts),
                f"{seconds['cold']:.0f}, {seconds['warm']:.0f}",
            )  # fmt: skip
    return lines


def attention(result: dict[str, Any]) -> list[str]:
    """Return the table of the attention of packed rows."""
    lines = [
        f"{where(result)}, {result['threads']} threads. Milliseconds of one layer, forward and backward:",
        "",
    ]
    names = {"kernel": "torch's kernel", "batches": "Palate", "compiled": "Palate compiled"}
    sides = [side for side in names if side in next(iter(result["measured"].values()))]
    ours = sides[1:]
    lines += row(
        "row",
        *(names[side] for side in sides),
        *(f"kernel over {names[side]}" for side in ours),
        *(f"error of the keys' gradient: {names[side]}" for side in sides),
    )
    lines += ["|---" * (1 + 2 * len(sides) + len(ours)) + "|"]
    for name, one in result["measured"].items():
        ratios = (f"**{one['kernel'] / one[side]:.2f}**" for side in ours)
        errors = (f"{one[side + '_error']:.4f}" for side in sides)
        lines += row(name, *(f"{one[side]:.1f}" for side in sides), *ratios, *errors)
    return lines


def neighbour(result: dict[str, Any]) -> list[str]:
    """Return the table of a sampling step on an idle machine and beside a busy program."""
    names = {
        "bounded": "a bounded wait (default)", "unbounded": "the wait of GNU's OpenMP",
        "one thread": "`--threads 1`",
    }  # fmt: skip
    functions = "with" if result.get("compile") == "on" else "without"
    lines = [f"{where(result)}. Milliseconds of a step of 32 rows, {functions} compiled functions:", ""]
    lines += row("threads", "idle machine", "one busy program", "busy over idle")
    lines += ["|---" * 4 + "|"]
    for name, one in result["measured"].items():
        ratio = f"**{one['busy'] / one['idle']:.2f}**"
        lines += row(names[name], f"{one['idle']:.0f}", f"{one['busy']:.0f}", ratio)
    return lines


def products(result: dict[str, Any]) -> list[str]:
    """Return the table of the rates of a layer's products."""
    ways = list(next(iter(next(iter(result["rates"].values())).values())))
    lines = [f"{where(result)}. GFLOP/s:", ""]
    lines += row("tokens", "weights", *(f"gradients {way}" if way.startswith("of") else way for way in ways))
    lines += ["|---" * (len(ways) + 2) + "|"]
    for tokens, sizes in result["rates"].items():
        for name, rates in sizes.items():
            lines += row(f"{int(tokens):,}", name, *(f"{rates[way]:,.0f}" for way in ways))
    return lines


def pages(result: dict[str, Any]) -> list[str]:
    """Return the table of a step with small and with large pages of memory."""
    lines = [where(result) + f". One step of `palate live` at `{result['shape']}`:", ""]
    lines += row("memory", "sampling (s)", "learning (s)", "memory (GB)")
    lines += ["|---" * 4 + "|"]
    for name, one in result["measured"].items():
        spans = (span(result["rows"][name], f"{key}_seconds", ".1f") for key in ("sampling", "learning"))
        cells = zip((one["sampling_seconds"], one["learning_seconds"]), spans, strict=True)
        lines += row(
            name, *(f"{seconds:.1f}{around}" for seconds, around in cells), f"{one['memory_gb']:.2f}"
        )
    return lines


def preparing(result: dict[str, Any]) -> list[str]:
    """Return the table of the preparation of pairs."""
    machine = result["machine"]
    lines = [f"{machine['processor']}, {machine['cores']} cores, {machine['date']}:", ""]
    lines += row(
        "pairs", "tokens of a pair's longer row", "reading (s)", "tokenising (s)",
        "processor time of both (s)", "on resume (s)",
        "tokenizer alone, for 60,000 pairs (s)", "memory (GB)", "disk (GB)",
    )  # fmt: skip
    lines += ["|---" * 9 + "|"]
    names = {
        "synthetic": "synthetic",
        "real": "real answers, beside other work",
        "million": "synthetic",
    }
    for name, text in names.items():
        if name in result:
            one = result[name]
            lines += row(
                f"{one['pairs']:,} ({text})",
                f"{one['tokens']:.0f}",
                *(f"{one[key]:.1f}" for key in ("reading_seconds", "tokenising_seconds")),
                f"{one['cpu_seconds']:.1f}" if "cpu_seconds" in one else "",
                f"{one['resumed_seconds']:.1f}",
                f"{one['tokenizer_seconds_per_60k']:.1f}",
                *(f"{one[key]:.2f}" for key in ("memory_gb", "disk_gb")),
            )
    if "journal" in result:
        one = result["journal"]
        lines += [
            "",
            f"A journal of {one['completions']:,} completions ({one['gb']:.1f} GB) opens "
            f"in {one['opening_seconds']:.1f} s and returns 16 of them by key in {one['median_ms']:.2f} ms.",
        ]
    return lines


def overlap(result: dict[str, Any]) -> list[str]:
    """Return the table of seconds per step with a slow judge."""
    machine = result["machine"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {result['dtype']}, {machine['date']}; "
        f"{result['batch_size']} prompts a step with two completions of at most {result['max_new_tokens']} "
        f"tokens, {result['sampling_rows']} sampled at once, {result['concurrency']} requests at once; "
        "medians of the steps after the first:",
        "",
    ]
    lines += row("judge", "seconds of a step", "sampling", "waiting for the judge", "learning")
    lines += ["|---" * 5 + "|"]
    for one in result["rows"]:
        parts = (one[name] for name in ("seconds", "time/sample", "time/annotate", "time/learn"))
        lines += row(one["judge"], *(f"{seconds:.2f}" for seconds in parts))
    return lines


def processes(result: dict[str, Any]) -> list[str]:
    """Return the table of two processes beside one, and of their messages."""
    machine = result["machine"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores ({kind_of(machine)}), torch {machine['torch']}, "
        f"{machine['date']}; the embedded model with a LoRA adapter, 8 prompts or pairs a step, medians of "
        "the steps after the first:",
        "",
    ]
    lines += row(
        "method", "one process (s a step)", "two processes", "lost", "one with half the threads",
        "messages of process 0 (MB a step)", "of these gradients", "waiting and sending (s a step)",
    )  # fmt: skip
    lines += ["|---" * 8 + "|"]
    for method in result["arms"]:
        kinds = result[method]
        one, two, half = (kinds[name]["step_time"] for name in ("one", "two", "one_with_half_the_threads"))
        sent = kinds["two"]["messages"]
        gradients = sum(m["bytes"] for name, m in sent.items() if "gradient" in name)
        lines += row(
            f"`{method}`", f"{one:.2f}", f"{two:.2f}", f"{two / one - 1:+.0%}", f"{half:.2f}",
            f"{sum(m['bytes'] for m in sent.values()) / 1e6:.2f}", f"{gradients / 1e6:.2f}",
            f"{sum(m['seconds'] for m in sent.values()):.2f}",
        )  # fmt: skip
    return lines


def row(*cells: object) -> list[str]:
    """Return a line of a table."""
    return [f"| {' | '.join(map(str, cells))} |"]


if __name__ == "__main__":
    main()
