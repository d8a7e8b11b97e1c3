"""`palate compare`: train several methods at an equal budget, and measure which one is best."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, get_origin

from pydantic import BeforeValidator, Field, create_model

from palate.cli.command import Command
from palate.comparison.config import SET_BY_BUDGET, CompareConfig
from palate.config import Config
from palate.settings import load_config, offered, plain


class PrintConfig(Config):
    """Output"""

    flags: ClassVar[Mapping[str, str]] = {"json_only": "--json"}
    """Flags that are not named like their field."""
    json_only: bool = False
    """Print JSON and nothing else on stdout."""


@cache
def options() -> type[CompareConfig]:
    """Return the comparison's options together with those of all methods, which are passed on as text."""
    from palate.cli.descriptions import description
    from palate.methods import METHODS

    fields: dict[str, Any] = {}
    for method in METHODS.values():
        if method.share is None:
            continue
        for name in offered(method.options):
            known = name in CompareConfig.model_fields or name in SET_BY_BUDGET
            if known or name in fields or name in PrintConfig.model_fields:
                continue
            text = description(method.options, name)
            fields[name] = (
                _passed(method.options.model_fields[name].annotation),
                Field(None, description=text),
            )
    passed = create_model("PassedConfig", __base__=Config, **fields)
    passed.__doc__ = "Options for every method that has them"
    both: Any = create_model("CompareOptions", __base__=(PrintConfig, CompareConfig, passed))
    return both  # type: ignore[no-any-return]


def _passed(annotation: Any) -> Any:
    """Return the type of a passed option: text, which each method converts itself, except for flags."""
    hint = plain(annotation)
    if hint is bool:
        return bool | None
    origin = get_origin(hint)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return Mapping[str, str] | None
    kind: Any = tuple[str, ...] | None if origin in (tuple, list) else str | None
    return Annotated[kind, BeforeValidator(_texts)]


def _texts(given: Any) -> Any:
    """Return the numbers of a configuration file as text."""
    if isinstance(given, list | tuple):
        return [_texts(one) for one in given]
    return str(given) if isinstance(given, int | float) and not isinstance(given, bool) else given


def compare(config: Any) -> int:
    """Compare, then print the summary and the path of the report."""
    from rich.console import Console

    from palate.comparison import compare_methods
    from palate.quiet import quiet_libraries
    from palate.run import Display, plain

    quiet_libraries()
    done = compare_methods(configured(config), display=Display(quiet=config.json_only))
    from palate.report.compared import SHORT, table, write_comparison

    page = write_comparison(done.result, done.samples, done.directory / "report.html")
    if config.json_only:
        print(jsonlib.dumps(done.result))
        return 0
    from rich.table import Table
    from rich.text import Text

    console = Console()
    head, rows = table(done.result, SHORT)
    shown = Table(box=None, pad_edge=False)
    for i, name in enumerate(head):
        shown.add_column(Text(plain(name)), justify="right" if i else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(plain(cell)) for cell in row))
    console.print()
    console.print(shown)
    for sentence in (*done.result["sentences"], *done.result.get("gold_sentences", ())):
        console.print(Text(plain(sentence)), soft_wrap=True)
    console.print(Text(plain(f"\nresults  {done.directory / 'summary.json'}")), soft_wrap=True)
    console.print(Text(plain(f"report   {page}")), soft_wrap=True)
    return 0


def configured(config: Any) -> CompareConfig:
    """Return the comparison's own options, with the others under `passed`."""
    own = {name: getattr(config, name) for name in CompareConfig.model_fields if name != "passed"}
    given = {
        name: getattr(config, name)
        for name in type(config).model_fields
        if name not in CompareConfig.model_fields and name not in PrintConfig.model_fields
    }
    passed = {name: value for name, value in given.items() if value is not None}
    return load_config(CompareConfig, file=None, flags={**own, "passed": passed}, python=True)


COMMAND = Command(
    name="compare",
    help="Train several methods at an equal budget and measure which is best.",
    call=compare,
    config=options,
    usage="Usage: palate compare --methods A,B --budget-tokens N --data DATA --output DIR [OPTIONS]",
    order=3,
)
