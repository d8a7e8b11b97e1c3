"""Scores of contestants from battles between them, without an advantage for a position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

Results = Mapping[tuple[int, int], int]
"""The result of each battle (m, n), in which m is shown first: 1 if m wins, -1 if n wins, 0 for neither."""

RIDGE = 0.01
"""Strength of the penalty ½ RIDGE Σ score², without which an unbeaten contestant has an infinite score."""


def position_weights(battles: Sequence[Results]) -> tuple[float, float]:
    """Return the weights of a win in the first and in the second position.

    Wu et al. 2024 (Meta-Rewarding, arXiv:2407.19594): a win counts by the share of wins of the other
    position. Ours: if only one position ever wins, both weights are ½, since all would vanish otherwise.
    """
    results = [result for battle in battles for result in battle.values()]
    first, second = results.count(1), results.count(-1)
    if not first or not second:
        return 0.5, 0.5
    return second / (first + second), first / (first + second)


def battle_scores(results: Results, count: int, weights: tuple[float, float]) -> list[float]:
    """Return a score for each contestant, like Elo's: the difference of two is the log-odds of a win.

    The scores minimise -Σ B_mn log σ(s_m - s_n) + ½ RIDGE Σ s², where B_mn is the sum of the weights of the
    wins of m over n. Without any win, all scores are 0.

    Args:
        results: the battles; pairs that did not meet are left out.
        count: the number of contestants.
        weights: see `position_weights`.
    """
    wins = torch.zeros(count, count, dtype=torch.float64)
    for (m, n), result in results.items():
        if result == 1:
            wins[m, n] += weights[0]
        elif result == -1:
            wins[n, m] += weights[1]
    met = wins + wins.T
    scores = torch.zeros(count, dtype=torch.float64)
    for _ in range(100):  # Newton's method; the objective is strictly convex
        chance = torch.sigmoid(scores[:, None] - scores[None, :])
        gradient = (met * chance - wins).sum(1) + RIDGE * scores
        curvature = met * chance * (1 - chance)
        hessian = torch.diag(curvature.sum(1) + RIDGE) - curvature
        step = torch.linalg.solve(hessian, gradient)
        scores = scores - step * min(1.0, 2.0 / max(1e-9, float(step.abs().max())))
        if float(step.abs().max()) < 1e-12:
            break
    return [float(score) for score in scores]
