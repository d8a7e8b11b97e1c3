"""`palate evaluate`: measure models, verdicts and judges, and export outputs to other evaluators."""

from __future__ import annotations

from collections.abc import Mapping

from palate.cli.command import Command, Group


def members() -> Mapping[str, Command]:
    """Return the evaluations by name."""
    from palate.cli.evaluations import MEMBERS

    return MEMBERS


COMMAND = Group(
    name="evaluate",
    help="Measure models against each other. `palate evaluate models --help` lists its options.",
    members=members,
    noun="evaluation",
    title="Evaluations",
    listed_by="palate evaluate --help",
    usage="Usage: palate evaluate [EVALUATION] [OPTIONS]",
    default="models",
    order=3,
)
