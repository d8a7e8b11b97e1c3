from __future__ import annotations

import io
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from palate.run import Display, notebook
from palate.types import Completion, Group, Prompt

Bundle = dict[str, str]


class Handle:
    """An output under a cell, as IPython's `display` returns it."""

    def __init__(self, shown: list[Bundle]) -> None:
        self.shown = shown

    def update(self, bundle: Bundle, *, raw: bool) -> None:
        assert raw
        self.shown.append(bundle)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Bundle]:
    """All that is shown in a stand-in for a notebook."""
    bundles: list[Bundle] = []

    def display(bundle: Bundle, *, raw: bool, display_id: bool) -> Handle:
        assert raw
        assert display_id
        bundles.append(bundle)
        return Handle(bundles)

    module: Any = ModuleType("IPython.display")
    module.display = display
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return bundles


def a_run(console: Console) -> None:
    display = Display(console)
    display.start("oaif", Path("runs/x"))
    display.expect(2)
    for step in (1, 2):
        display.working("sample", 10.0)
        group = Group(Prompt("Why?"), (Completion(f"<b>so {step}</b>", (1,)),), (0.5,))
        display.metrics({"step": step, "step_time": 1.0, "loss": 0.5}, [group])
    display.stop()


def test_one_view_is_replaced(shown: list[Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "PAUSE", 0.0)
    a_run(Console(force_jupyter=True))
    assert len(shown) > 3
    assert "step 0/0" in shown[0]["text/plain"]
    last = shown[-1]
    assert "step 2/2  ended" in last["text/plain"]
    assert "\x1b" not in last["text/plain"]
    assert "&lt;b&gt;so 2&lt;/b&gt;" in last["text/html"]  # a model's text is no markup


def test_a_view_that_is_new_is_left(shown: list[Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "PAUSE", 1e9)
    a_run(Console(force_jupyter=True))
    assert len(shown) == 2  # the first and, at the end, the last


def test_none_without_a_notebook(shown: list[Bundle]) -> None:
    out = io.StringIO()
    a_run(Console(file=out, force_jupyter=False))
    assert shown == []
    assert len(out.getvalue().splitlines()) == 2
