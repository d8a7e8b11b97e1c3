"""The wheel: what is in it, and that it runs by itself."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

from palate.methods import METHODS

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("hatchling") is None,
        reason="hatchling builds the wheel: pip install '.[dev]'",
    ),
    pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the repository"),
]


def run(*command: str, at: Path, path: Path | None = None) -> str:
    """Run Python on a command line in the folder `at`, with imports from `path`, and return its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *command], cwd=at, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this source."""
    directory = tmp_path_factory.mktemp("dist")
    run("-m", "hatchling", "build", "-t", "wheel", "-d", str(directory), at=ROOT)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel alone. A pure wheel is installed by unpacking it."""
    directory = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    source = ROOT / "src"
    files = {path.relative_to(source).as_posix() for path in (source / "palate").rglob("*") if path.is_file()}
    expected = {name for name in files if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    assert {name for name in packed if ".dist-info/" not in name} == expected
    assert "palate/py.typed" in packed
    # Data and templates: without these the list above could lack a kind of file and agree.
    assert {Path(name).suffix for name in expected} >= {".py", ".jsonl", ".j2", ".css", ".js", ".typed"}


def test_the_metadata_say_what_the_package_needs(wheel: Path) -> None:
    found = metadata(wheel)
    assert (found["Name"], found["License-Expression"]) == ("palate", "Apache-2.0")
    assert found["Requires-Python"] == ">=3.11"
    assert "Programming Language :: Python :: 3.11" in found.get_all("Classifier", [])
    assert "Typing :: Typed" in found.get_all("Classifier", [])
    needed = [line for line in found.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert any(line.startswith("torch") for line in needed)
    assert not [line for line in needed if line.startswith(("pytest", "ruff", "mypy", "hatchling", "trl"))]


def test_the_wheel_runs_without_the_source(wheel: Path, installed: Path, tmp_path: Path) -> None:
    where = run("-c", "import palate; print(palate.__file__)", at=tmp_path, path=installed)
    assert Path(where.strip()).is_relative_to(installed)
    version = run("-m", "palate", "--version", at=tmp_path, path=installed)
    assert version == f"palate {metadata(wheel)['Version']}\n"
    listed = run("-m", "palate", "methods", at=tmp_path, path=installed)
    assert [name for name in METHODS if name not in listed] == []


def test_a_run_finds_its_data_and_templates_in_the_wheel(installed: Path, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        f"model: {tiny}\ndata: everyday\nreward: length:4\nlimit: 4\neval_limit: 2\n"
        "steps: 1\nbatch_size: 2\nmax_new_tokens: 4\ndevice: cpu\noutput: mine\n"
    )
    run("-m", "palate", "run", "oaif", "--config", "mine.yaml", at=tmp_path, path=installed)
    page = (tmp_path / "mine" / "report.html").read_text(encoding="utf-8")
    assert "<style>" in page
    assert "<script" in page


def test_the_version_is_the_changelogs(wheel: Path) -> None:
    heading = next(
        line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")
    )
    assert heading.split()[1] == metadata(wheel)["Version"]
