"""`palate make`: make data for training, such as new prompts, and examples that teach a model to grade."""

from __future__ import annotations

from collections.abc import Mapping

from palate.cli.command import Command, Group


def members() -> Mapping[str, Command]:
    """Return the makers."""
    from palate.cli.makes import MEMBERS

    return MEMBERS


COMMAND = Group(
    name="make",
    help="Make data: new prompts, or examples that teach a model to grade answers.",
    members=members,
    noun="kind of data",
    title="Data",
    listed_by="palate make --help",
    usage="Usage: palate make DATA [OPTIONS]",
    order=5,
)
