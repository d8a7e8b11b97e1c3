"""Figures in the documents are those that the scripts made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results" / "all_methods.jsonl"


@pytest.mark.skipif(not RESULTS.exists(), reason="the comparison of all methods has not been run")
def test_the_readme_has_the_table_of_all_methods() -> None:
    script = ROOT / "experiments" / "all_methods.py"
    made = subprocess.run(
        [sys.executable, str(script), "--output", str(RESULTS), "--table"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert made.stdout.strip() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_page_on_performance_has_the_tables_of_the_benchmarks() -> None:
    made = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "tables.py")], check=True, capture_output=True, text=True
    )
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    tables = made.stdout.strip().split("\n\n<!-- ")
    assert tables, "benchmarks/results is empty"
    for table in tables:
        assert table in page, f"not what benchmarks/tables.py makes: {table.splitlines()[0]}"
