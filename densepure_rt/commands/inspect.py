"""`densepure-rt inspect`: what an engine file is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from densepure_rt.commands.console import rows, stderr, stdout
from densepure_rt.commands.options import Json


def inspect(
    file: Annotated[Path, typer.Argument(help="An engine file, its sidecar, or the folder of a bundle.")],
    layers: Annotated[
        bool, typer.Option("--layers", help="Show how TensorRT implements each layer of a plan. Needs the plan's GPU.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what an engine is, and check its hash. Exit code 1 when the file is not what its sidecar says."""
    from densepure_rt.commands.inspection import flattened, inspection, layer_rows

    report = inspection(file, layers)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        said = layer_rows(report.pop("layers", ()))
        rows(stdout, flattened(report))
        widths = [max(map(len, column)) for column in zip(*said, strict=True)]
        for row in said if len(said) > 1 else ():
            stdout.print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())
    if not report["check"]["matches"]:
        stderr.print("error: the file's SHA-256 is not the one in its sidecar: it is damaged or another engine")
        raise typer.Exit(1)
