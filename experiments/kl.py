"""Compare `palate.kl_from` with the exact KL of two tiny models over one token, at several temperatures.

Beside it stands the mean log-ratio of the tempered samples themselves, which is no KL.

python experiments/kl.py            # measure and print
python experiments/kl.py --write    # put the table into docs/statistics.md
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path

import torch

import palate
from marks import write
from palate.config import Sampling
from palate.model import Snapshot
from palate.testing import tiny_model, tiny_policy
from palate.types import Completion, Group, Prompt

PAGE = Path(__file__).resolve().parent.parent / "docs" / "statistics.md"
TEMPERATURES = (0.5, 0.7, 1.0, 1.2)
DRAWS = 20_000
VOCABULARY = 259


def snapshot(directory: str, seed: int) -> Snapshot:
    """A tiny random policy with logits that lie some nats apart."""
    tiny_model(Path(directory), chat=True, seed=seed, initializer_range=0.3)
    return tiny_policy(Path(directory)).snapshot()


def rows() -> list[tuple[float, float, float, float, float]]:
    """Temperature, exact KL, its estimate, the mean log-ratio of tempered samples, and its exact value."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        ref, policy = snapshot(one, 1), snapshot(two, 2)
        every = [Group(Prompt("which?"), tuple(Completion("", (token,)) for token in range(VOCABULARY)))]
        new, old = (side.logps(every).sum().double() for side in (policy, ref))
        exact = float((new.exp() * (new - old)).sum())
        asked = [Prompt("which?", where=str(i)) for i in range(DRAWS)]
        found = []
        for temperature in TEMPERATURES:
            sampling = Sampling(max_new_tokens=1, temperature=temperature)
            estimate = palate.kl_from(ref, policy, asked, sampling, seed=3)
            drawn = policy.sample(asked, 1, sampling, seed=4)
            ratio = float((policy.logps(drawn).sum() - ref.logps(drawn).sum()).mean())
            tempered = torch.softmax(new / temperature, -1)
            found.append((temperature, exact, estimate, ratio, float((tempered * (new - old)).sum())))
        spread = math.sqrt(float((new.exp() * (new - old - exact).square()).sum()) / DRAWS)
        print(f"standard error of the estimate: {spread:.3f}", file=sys.stderr)
    return found


def main() -> None:
    """Print the table, or put it into the page."""
    heads = ("temperature", "KL, exact", "`kl_from`", "mean log-ratio of its samples", "the same, exact")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {row[0]:g} | " + " | ".join(f"{value:.3f}" for value in row[1:]) + " |" for row in rows()]
    lines += ["", f"Means of {DRAWS:,} draws."]
    if sys.argv[1:] == ["--write"]:
        write(PAGE, {"kl": lines})
    print("\n".join(lines))


if __name__ == "__main__":
    main()
