from __future__ import annotations

import math

import pytest


@pytest.fixture
def online_rows() -> list[dict[str, float]]:
    """Eight steps of an online method, one of them without a finite gradient norm."""
    return [
        {
            "step": i,
            "loss": 0.7 - 0.02 * i,
            "grad_norm": math.nan if i == 3 else 1.0 + 0.1 * i,
            "objective/scores": 0.1 * i,
            "objective/scores_std": 0.2,
            "objective/kl": 0.1 * i,
            "rewards/accuracies": 0.5 + 0.02 * i,
            "completions/clipped_ratio": 0.1,
            "pairs/kept": 15,
            "pairs/dropped": 1,
            "pairs/dropped_tie": 1,
            "pairs/dropped_identical": 0,
            "pairs/dropped_unusable": 0,
            "time/sample": 2.0,
            "time/learn": 1.0,
            "step_time": 3.5,
        }
        for i in range(1, 9)
    ]
