"""Places for the labels of points in a chart, so that no label covers a point or another label."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

DISTANCES = (7.0, 11.0, 16.0, 22.0, 30.0, 40.0)
"""Distances between a point and the edge of its label that are tried, in the unit of the boxes."""
DIRECTIONS = (0, 180, 90, 270, 30, 330, 150, 210, 60, 300, 120, 240, 15, 345, 165, 195)
"""Directions in degrees from a point to its label, those that read best first."""
OUTSIDE, ON_MARK, ON_FAINT = 4.0, 1.0, 1.5
"""Cost of a unit of area outside the frame, on a label or a point, and on a faint point."""
FAR, TURNED = 2.0, 0.4
"""Cost of a unit of distance from the point, and of each direction that reads less well."""
CENTRED = 0.35
"""A label whose direction has a smaller cosine is centred above or below its point."""


class Box(NamedTuple):
    """A rectangle."""

    left: float
    low: float
    right: float
    high: float

    def shared(self, other: Box) -> float:
        """Return the area that two rectangles share."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.high, other.high) - max(self.low, other.low)
        return width * height if width > 0 and height > 0 else 0.0

    @property
    def area(self) -> float:
        """The area."""
        return (self.right - self.left) * (self.high - self.low)


class Spot(NamedTuple):
    """A point with the size of its label."""

    x: float
    y: float
    width: float
    height: float
    gap: float = 0.0
    """Distance that the label keeps besides the usual one."""


def place(
    spots: Sequence[Spot],
    frame: Box,
    *,
    taken: Sequence[Box] = (),
    faint: Sequence[Box] = (),
    mark: float = 4.0,
) -> list[Box]:
    """Return a box for the label of each point.

    Points with many neighbours choose first, and every label takes the cheapest of several places around its
    point.

    Args:
        spots: the points.
        frame: labels stay inside, if there is room.
        taken: what no label may cover, besides the points.
        faint: what labels should leave free, if there is room.
        mark: half the side of a point's marker.
    """
    around = [Box(s.x - mark, s.y - mark, s.x + mark, s.y + mark) for s in spots]
    blocked, boxes = [*taken, *around], dict[int, Box]()
    for i in sorted(range(len(spots)), key=lambda i: -_crowd(spots, i)):
        costs = [(_cost(box, frame, blocked, faint) + extra, box) for extra, box in _tried(spots[i])]
        boxes[i] = min(costs, key=lambda pair: pair[0])[1]
        blocked.append(boxes[i])
    return [boxes[i] for i in range(len(spots))]


def _crowd(spots: Sequence[Spot], i: int) -> float:
    """Return how near the other points are, in widths of the label."""
    own = spots[i]
    near = (math.hypot(own.x - s.x, 2 * (own.y - s.y)) / own.width for j, s in enumerate(spots) if j != i)
    return sum(1 / (0.1 + distance) for distance in near)


def _tried(spot: Spot) -> Iterator[tuple[float, Box]]:
    """Yield places around a point, each with the cost of its distance and direction."""
    for distance in (spot.gap + usual for usual in DISTANCES):
        for rank, degrees in enumerate(DIRECTIONS):
            across, up = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            side = 0.0 if abs(across) < CENTRED else math.copysign(1.0, across)
            left = spot.x + distance * across + (side - 1) / 2 * spot.width
            low = spot.y + distance * up + (up - 1) / 2 * spot.height
            yield FAR * distance + TURNED * rank, Box(left, low, left + spot.width, low + spot.height)


def _cost(box: Box, frame: Box, blocked: Sequence[Box], faint: Sequence[Box]) -> float:
    """Return the cost of what a place covers."""
    outside = box.area - box.shared(frame)
    covered = sum(box.shared(other) for other in blocked)
    touched = 1000.0 if covered else 0.0
    return (
        OUTSIDE * outside + ON_MARK * covered + touched + ON_FAINT * sum(box.shared(other) for other in faint)
    )


__all__ = ["Box", "Spot", "place"]
