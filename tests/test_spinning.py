"""The bound on spinning: set before torch is loaded, and never against the user."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from palate.spinning import CHOSEN, MILLISECONDS, SPINS

SHOW = "import os; print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('KMP_BLOCKTIME'))"


def shown(code: str, **given: str) -> str:
    """What a new process prints, without variables of this one about waiting."""
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {SHOW}"],
        env={**environment, **given},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("entry", ["import palate", "import palate.cli", "from palate.learn import Policy"])
def test_every_entry_bounds_the_spinning(entry: str) -> None:
    assert shown(entry) == f"{SPINS} {MILLISECONDS}"


@pytest.mark.parametrize("name", CHOSEN)
def test_the_user_decides(name: str) -> None:
    chosen = {"GOMP_SPINCOUNT": "7 None", "KMP_BLOCKTIME": "None 7"}
    assert shown("import palate", **{name: "7"}) == chosen.get(name, "None None")


def test_nothing_is_set_that_would_come_too_late() -> None:
    assert shown("import sys, types; sys.modules['torch'] = types.ModuleType('torch'); import palate") == (
        "None None"
    )
