"""`densepure-rt merge`: make one run of the shards of one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from densepure_rt.commands.console import print_attacks, stdout
from densepure_rt.commands.options import Json
from densepure_rt.commands.values import folder_of
from densepure_rt.text import plural


def merge(
    shards: Annotated[
        list[Path], typer.Argument(metavar="SHARD", help="Folders of certify --shard: all shards of one run.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            parser=folder_of,
            metavar="PATH",
            help="Folder for the whole run. An interrupted merge is repeated.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Make one run of its shards: the folder that a single process would have left.

    Exit code 2 when images are missing or in two shards, 1 when a shard is not complete or not what was sealed, or an
    attack has broken a certificate.
    """
    from densepure_rt.runs.merge import merge as merged
    from densepure_rt.runs.reader import read_attacks, read_run
    from densepure_rt.runs.summary import accuracy_so_far

    summary, attacks = merged(shards, out), read_attacks(out)
    if as_json:
        print(json.dumps(dataclasses.asdict(summary) | {"out": str(out)}))
    else:
        stdout.print(
            f"{plural(len(shards), 'shard')} merged: {plural(summary.done, 'image')}, {summary.abstained} abstained"
        )
        if any(share is not None for share in summary.accuracy):
            stdout.print(accuracy_so_far(summary))
        stdout.print(f"results in {out}")
    if attacks is not None:
        print_attacks(attacks, read_run(out).names)
