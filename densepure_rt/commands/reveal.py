"""`densepure-rt reveal`: make the secret of a run public, so that anybody can audit it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from densepure_rt.commands.console import stderr
from densepure_rt.commands.options import RunPath


def reveal(
    run: RunPath,
    key: Annotated[
        Path | None,
        typer.Option(help="The run's key file. It is renamed to FILE.revealed and refused from then on."),
    ] = None,
) -> None:
    """Make the secret of a run public: anybody can then draw its noise again, and no more may be drawn with it.

    The run itself goes on no more. A key file does until --key retires it, as do other runs and servers that have it.
    """
    from densepure_rt.keys import retired
    from densepure_rt.runs.secret import reveal as make_public

    print(make_public(run, key))
    if key is not None:
        stderr.print(f"{key} is {retired(key)} now")
    stderr.print(
        "remove every other key file that holds this secret, such as that of --key, reveal the other runs that were "
        "keyed with it, and stop the servers that have it: no more noise may be drawn with it"
    )
