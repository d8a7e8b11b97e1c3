"""Write the parts of the project that follow from the files in src/palate/methods/.

    python docs/methods/generate.py --write    writes them
    python docs/methods/generate.py --check    says which are out of date, and exits with 1

They are the exports of the configurations in src/palate/__init__.pyi and the table in docs/methods/README.md.
A method without a page or without its paper's settings gets a draft of each, for a person to finish.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import yaml

from palate.article import SOURCE
from palate.config import Config
from palate.method import METHOD_GROUPS, VARIANT
from palate.methods import METHODS, Method

ROOT = Path(__file__).parents[2]
EXPORTS = ROOT / "src" / "palate" / "__init__.pyi"
TABLE = ROOT / "docs" / "methods" / "README.md"


def exports(text: str) -> str:
    """The list of public names, with the configurations of all methods after `Method`."""
    kept = [line for line in text.splitlines() if not line.startswith("from .methods.")]
    names = [
        f"from .methods.{name.replace('-', '_')} import {config} as {config}"
        for name, method in METHODS.items()
        for config in sorted(way.config.__name__ for way in method.ways)
    ]
    place = kept.index("from .methods import Method as Method") + 1
    return "\n".join([*kept[:place], *names, *kept[place:], ""])


def table(text: str) -> str:
    """The page of the methods, with its first table made again; cells unlike the article's are bold."""
    start = text.index("| method | learns from |")
    head = "\n".join(text[start:].splitlines()[:2])
    end = text.index("\n\n", start)
    return text[:start] + "\n".join([head, *_rows()]) + text[end:]


def _rows() -> Iterator[str]:
    for method in sorted(METHODS.values(), key=lambda m: (METHOD_GROUPS.index(m.group), m.name)):
        name = method.name
        title = f"[`{name}`]({name}.md)"
        ours = astuple(method.recipe.cells)
        article = astuple(SOURCE[name]) if name in SOURCE else ours
        cells = (cell if cell == other else f"**{cell}**" for cell, other in zip(ours, article, strict=True))
        data = " or ".join(dict.fromkeys(way.learns_from for way in method.ways))
        yield f"| {' | '.join([title, data, method.group, *cells])} |"


PAGE = """\
# {name}: {summary}

{paper}.

## The algorithm, in our words

{algorithm}

## Deviations

{deviations}

## Command

    palate run {name} --data {data} --output runs/{name}
"""


def page(method: Method) -> str:
    """A draft of a method's page, from the text at the top of its file."""
    text = sys.modules[method.train.__module__].__doc__ or ""
    algorithm, _, deviations = text.partition("\n\n")[2].partition("\n\nOurs: ")
    return PAGE.format(
        name=method.name,
        summary=method.summary,
        paper=method.paper,
        algorithm=algorithm.strip(),
        deviations=deviations.strip() or "None.",
        data=f"{method.learns_from}.jsonl" + " --reward REWARD" * (method.learns_from == "prompts"),
    )


def settings(method: Method) -> str:
    """A draft of the paper's settings: the numbers that the method declares itself."""
    module = method.train.__module__
    own = [cls for cls in method.config.__mro__ if issubclass(cls, Config) and cls.__module__ == module]
    names = [name for cls in reversed(own) for name in vars(cls).get("__annotations__", {})]
    values: dict[str, Any] = method.config.model_validate({"data": "-"}).model_dump(mode="json")
    numbers = {name: values[name] for name in dict.fromkeys(names) if name in values and name != VARIANT}
    opening = f"# Numbers of {method.paper}.\n# Give model and data yourself.\n"
    return opening + (yaml.safe_dump(numbers, sort_keys=False) if numbers else "")


def generated() -> dict[Path, str]:
    """Every file that this script writes, with its text."""
    files = {EXPORTS: exports(EXPORTS.read_text("utf-8")), TABLE: table(TABLE.read_text("utf-8"))}
    for name, method in METHODS.items():
        drafts = {TABLE.with_name(f"{name}.md"): page, ROOT / "configs" / "paper" / f"{name}.yaml": settings}
        files |= {path: draft(method) for path, draft in drafts.items() if not path.exists()}
    return files


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=re.split(r"\n\n", __doc__ or "")[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true")
    mode.add_argument("--check", action="store_true")
    write = parser.parse_args().write
    stale = {
        path: text
        for path, text in generated().items()
        if not path.exists() or path.read_text("utf-8") != text
    }
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)} {'is written' if write else 'is out of date'}", file=sys.stderr)
        if write:
            path.write_text(text, encoding="utf-8")
    if stale and not write:
        print("run `make generate`", file=sys.stderr)
    return 1 if stale and not write else 0


if __name__ == "__main__":
    sys.exit(main())
