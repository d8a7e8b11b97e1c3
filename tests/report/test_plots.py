from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.report import plots
from palate.report.curves import Line, Panel
from palate.report.panels import panels
from palate.report.plots import Interval
from palate.rundir import RunRecord

Record = Callable[..., RunRecord]


def panel(*lines: Line, **options: object) -> Panel:
    return Panel("key", "Title", "nats", "", (), lines=lines, **options)  # type: ignore[arg-type]


def line(values: Sequence[float], label: str = "", **options: object) -> Line:
    steps = tuple(float(i + 1) for i in range(len(values)))
    return Line((steps, tuple(values)), label, **options)  # type: ignore[arg-type]


def drawn(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in drawn(svg).iter("text")]


def curves(*lines: Line, **options: object) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return plots.curves(panel(*lines, **options))


def test_texts_are_texts() -> None:
    found = texts(curves(line([0.5, 0.25, 0.75], "chosen")))
    assert {"chosen", "nats", "step"} < set(found)
    assert {"1", "2", "3"} < set(found)


def test_what_is_read_aloud() -> None:
    svg = curves(line([0.5, 0.25, 0.75], "chosen"), line([1.0], "rejected"))
    title = drawn(svg).find("title")
    assert title is not None
    assert title.text == (
        "Title. chosen: from 0.500 at step 1 to 0.750 at step 3, lowest 0.250, highest 0.750; "
        "rejected: 1.00 at step 1."
    )
    assert drawn(svg).get("aria-labelledby") == title.get("id")
    assert drawn(svg).get("role") == "img"


@pytest.mark.parametrize(
    "values",
    [[0.5], [0.0], [0.5, 0.5, 0.5], [-1e29, 1e29], [1e-9, 2e-9], [0.0] * 100, [1e15, 1e15 + 1]],
    ids=["one", "zero", "constant", "huge", "tiny", "many", "close"],
)
def test_odd_curves_are_drawn(values: list[float]) -> None:
    svg = curves(line(values, "a"), guide=0.0)
    assert "a" in texts(svg)
    assert "nan" not in svg


def test_rates_are_per_cent() -> None:
    found = texts(curves(line([0.0, 0.5, 1.0]), rate=True))
    assert {"0 %", "50 %", "100 %"} <= set(found)


def test_a_single_step_has_one_tick() -> None:
    assert texts(curves(Line(((7.0,), (0.5,))))).count("7") == 1


def test_a_guide_lies_within_the_plot() -> None:
    # Values around 0.9 alone would leave one half out of sight.
    dashed = [
        e for e in drawn(curves(line([0.9, 0.91]), guide=0.5)).iter("path") if e.get("stroke-dasharray")
    ]
    (guide,) = dashed
    height = float(guide.get("d", "").split()[2])
    assert 0 < height < plots.HEIGHT - 30


def test_a_label_stands_where_its_line_ends() -> None:
    # The second run has stopped after a third of the steps.
    svg = drawn(curves(line([1.0] * 10, "A"), line([2.0] * 4, "B")))
    (a,), (b,) = ([e for e in svg.iter("text") if e.text == name] for name in "AB")
    ends = [float(e.get("d", "").split()[-2]) for e in svg.iter("path") if e.get("stroke-width") == "1.7"]
    assert [float(e.get("x", "")) > end for e, end in zip((a, b), ends, strict=True)] == [True, True]
    assert float(b.get("x", "")) < ends[0]


def test_lines_differ_by_more_than_colour() -> None:
    svg = drawn(curves(line([1.0, 2.0], "A", style=0), line([2.0, 3.0], "B", style=1)))
    lines = [e for e in svg.iter("path") if e.get("stroke-width") == "1.7"]
    assert [e.get("stroke") for e in lines] == ["var(--s0)", "var(--s1)"]
    assert lines[0].get("stroke-dasharray") != lines[1].get("stroke-dasharray")
    assert len({e.get("href") for e in svg.iter("use")}) == 2  # two markers


def test_noisy_curves_have_a_mean_upon_them() -> None:
    values = [float(i % 2) for i in range(plots.SMOOTH_FROM)]
    svg = drawn(curves(line(values)))
    assert {e.get("stroke-width") for e in svg.iter("path")} >= {"0.7", "1.7"}
    calm = drawn(curves(line(values[:-1])))
    assert "0.7" not in {e.get("stroke-width") for e in calm.iter("path")}


def test_means_over_a_window() -> None:
    # In the middle the mean of 11 steps of a line is the line; at its ends, of the 6 that there are.
    values = tuple(map(float, range(100)))
    bold = plots._bold(line(values))
    assert bold[50] == 50.0
    assert bold[0] == 2.5
    assert bold[-1] == 96.5


def test_long_curves_are_thinned_to_means() -> None:
    count = 4 * plots.MOST_POINTS
    long = line([float(i % 4) for i in range(count)], band=((1.0,) * count, (2.0,) * count))
    thin = plots._thinned(long)
    assert thin.points[0][:2] == (2.5, 6.5)  # means of steps 1 to 4, 5 to 8
    assert set(thin.points[1]) == {1.5}
    assert thin.band == ((1.0,) * plots.MOST_POINTS, (2.0,) * plots.MOST_POINTS)
    short = line([0.0] * plots.MOST_POINTS)
    assert plots._thinned(short) is short


@given(
    heights=st.lists(st.floats(-50, 250), max_size=12).map(sorted),
    apart=st.floats(1, 20),
)
def test_labels_keep_apart(heights: list[float], apart: float) -> None:
    placed = plots.spread(heights, apart, 0, 200)
    assert len(placed) == len(heights)
    assert all(b - a >= apart - 1e-6 for a, b in itertools.pairwise(placed))
    if placed:
        assert placed[0] >= -1e-6
        assert placed[-1] <= max(200, apart * (len(placed) - 1)) + 1e-6


def test_labels_move_no_more_than_they_must() -> None:
    assert plots.spread([10, 50], 10, 0, 100) == pytest.approx([10, 50])
    assert plots.spread([50, 50], 10, 0, 100) == pytest.approx([45, 55])
    assert plots.spread([0, 2], 10, 0, 100) == pytest.approx([0, 10])


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>", "$x_1$ $\\frac", "_hidden", "\x1b[31mred", "\u202eevil",
        "emoji 🎉", "\ud83d",
        "@0@", "",
    ],
)  # fmt: skip
def test_hostile_names_of_metrics(record: Record, name: str) -> None:
    runs = [record({f"objective/scores/{name}": [0.1, 0.2], "objective/scores/b": [0.2, 0.1]})]
    (found,) = panels(runs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = plots.curves(found)
    svg.encode()
    assert "<script" not in svg
    assert not {"\x1b", "\u202e", "\ud83d"} & set(svg)
    assert drawn(svg).find(".//script") is None


def test_intervals_say_their_rates() -> None:
    rows = [Interval("A", 0.75, 0.5, 0.875, 0), Interval("B", 0.0, 0.0, 1.0, 1)]
    svg = plots.intervals(rows, "k", "Win rate")
    found = [text.replace("\N{NO-BREAK SPACE}", " ") for text in texts(svg)]
    assert {"A", "B", "75.0 %", "0.0 %"} < set(found)
    title = drawn(svg).findtext("title", "").replace("\N{NO-BREAK SPACE}", " ")
    assert (
        title
        == "Win rate. A: 75.0 %, interval from 50.0 % to 87.5 %; B: 0.0 %, interval from 0.0 % to 100.0 %."
    )


def test_bars_are_parts_of_a_whole() -> None:
    svg = plots.bars({"A": {"sampling": 3.0, "learning": 1.0}}, ["sampling", "learning"], "k", "Time")
    title = drawn(svg).findtext("title", "").replace("\N{NO-BREAK SPACE}", " ")
    assert title == "Time. A: sampling 75.0 %, learning 25.0 %."


def test_legends_are_hidden_from_those_who_do_not_see() -> None:
    for svg in (plots.swatch(1, "k"), plots.patch(1, "k")):
        assert drawn(svg).get("aria-hidden") == "true"
        assert "var(--s1)" in svg
