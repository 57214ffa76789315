"""`densepure-rt import`: results of older tools, read on their sound reading, shown and kept beside own runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from densepure_rt.commands.console import rows, stdout, track
from densepure_rt.commands.options import Json
from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.rounding import exact, floored_share, raised
from densepure_rt.text import plural, printable

if TYPE_CHECKING:
    from densepure_rt.legacy.claims import Flag, Imported

RADII = "0,0.25,0.5,0.75,1"
SHOWN = 5  # images of a flag, in print


@dataclass(frozen=True)
class FolderOptions:
    """Hold what only a folder of label arrays has a use for."""

    merged: Path | None
    labels: Path | None
    votes: int | None
    classes: int | None

    def refuse(self, source: Path) -> None:
        """Raise UsageError for options that were given."""
        if given := [f"--{name}" for name, value in vars(self).items() if value is not None]:
            raise UsageError(f"{', '.join(given)}: for folders of label arrays, and {source} is none")


def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="A certify log of locuslab/smoothing, DDS or DensePure (idx, label, predict, radius, correct, with "
            "tabs between), or DensePure's folder of {sigma}-{idx}-{seed}-n0_predictions.npy and "
            "{sigma}-{idx}-{seed}-n_predictions.npy: n0 and n integers, equally many of every image and seed."
        ),
    ],
    sigma: Annotated[
        float | None,
        typer.Option(help="Sigma of the log, in [0, 1] pixel units. For a folder with several: which one to read."),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            help="Samples per image that the log was made with. With --sigma, the reach of its radii is checked."
        ),
    ] = None,
    alpha: Annotated[
        float,
        typer.Option(
            help="Maximum probability that an image gets a wrong certificate. 0.001 is the default of the older tools."
        ),
    ] = 0.001,
    merged: Annotated[
        Path | None,
        typer.Option(help="Folders: the file that DensePure's merge_results.py made from it, to compare with."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="Folders: a log whose idx and label columns name the images' labels; default: --merged."),
    ] = None,
    votes: Annotated[int | None, typer.Option(help="Folders: read only the first VOTES seeds. Default: all.")] = None,
    classes: Annotated[int | None, typer.Option(help="Folders: number of classes; larger labels are refused.")] = None,
    radii: Annotated[str, typer.Option(help="Radii of the table, separated by commas, in [0, 1] pixel units.")] = RADII,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results.tsv, results.jsonl and imported.json. It must not contain any of them yet."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Read results of older tools, recompute what can be, round radii down and flag what does not hold.

    Exit code 1 when the files claim what they do not bear out.
    """
    from densepure_rt.legacy.folder import FILES, report, write

    grid, of_folders = radii_of(radii), FolderOptions(merged, labels, votes, classes)
    if out is not None and (there := [name for name in FILES if (out / name).exists()]):
        raise UsageError(f"{out} already holds {', '.join(there)}: choose another folder with --out")
    if source.is_dir():
        found = folder_imported(source, sigma, n, alpha, of_folders, grid)
    else:
        of_folders.refuse(source)
        found = log_imported(source, sigma, n, alpha, grid)
    if out is not None:
        write(found, grid, out)
    if as_json:
        print(json.dumps(report(found, grid) | {"out": None if out is None else str(out)}))
    else:
        show(found, grid)
    if found.unsound:
        unsound = ", ".join(flag.name for flag in found.flags if flag.unsound)
        raise CheckFailed(f"{source} claims what it does not bear out: {unsound}")


def log_imported(source: Path, sigma: float | None, n: int | None, alpha: float, grid: Sequence[float]) -> Imported:
    from densepure_rt.legacy.claims import import_log
    from densepure_rt.legacy.logs import read_log

    if (sigma is None) != (n is None):
        raise UsageError("what a log can reach takes both --sigma and --n: give the other one too")
    check_options(sigma, n, alpha)
    return import_log(read_log(source), sigma, n, alpha, grid)


def folder_imported(
    source: Path, sigma: float | None, n: int | None, alpha: float, options: FolderOptions, grid: Sequence[float]
) -> Imported:
    from densepure_rt.legacy.claims import import_folder
    from densepure_rt.legacy.label_arrays import open_folder
    from densepure_rt.legacy.logs import read_log

    if n is not None:
        raise UsageError(f"--n is for logs: the arrays in {source} say themselves how many samples there are")
    if options.classes is not None and options.classes < 1:
        raise UsageError(f"--classes is a count, at least 1, got {options.classes}")
    check_options(sigma, n, alpha)
    naming, official = (None if path is None else read_log(path) for path in (options.labels, options.merged))
    folder = open_folder(source, sigma, options.votes)
    return import_folder(folder, alpha, options.classes, naming, official, grid, track)


def check_options(sigma: float | None, n: int | None, alpha: float) -> None:
    from densepure_rt.smoothing.bounds import check_sampling

    check_sampling(1, 1 if n is None else n, alpha)
    if sigma is not None and not 0 < sigma < math.inf:
        raise UsageError(f"sigma is a number above 0, got {sigma:g}")


def radii_of(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(word) for word in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 <= number < math.inf for number in numbers):
        raise UsageError(f"--radii are numbers from 0 on with commas between, such as {RADII}; got {text!r}")
    return numbers


def show(found: Imported, grid: Sequence[float]) -> None:
    abstained = sum(claim.predict is None for claim in found.claims)
    lines = {name.replace("_", " "): said(value) for name, value in found.settings.told().items() if value is not None}
    lines["images"] = f"{len(found.claims)}, {abstained} abstained"
    if found.reach is None:
        lines["reach"] = "not checked: give --sigma and --n"
    else:
        lines["reach"] = f"no radius beyond {raised(found.reach, 4)} can be certified"
    rows(stdout, lines.items())
    table = Table(title=f"certified accuracy of {plural(len(found.claims), 'image')}", title_justify="left", box=None)
    table.add_column("radius")
    for radius in grid:
        table.add_column(exact(radius), justify="right")
    for name, shares in (("as printed", found.accuracy_as_printed(grid)), ("sound", found.accuracy(grid))):
        table.add_row(name, *("-" if share is None else floored_share(share) for share in shares))
    stdout.print(table)
    for flag in sorted(found.flags, key=lambda flag: not flag.unsound):
        stdout.print(
            Text("unsound " if flag.unsound else "note    ", "red" if flag.unsound else "yellow")
            + printable(line_of(flag))
        )


def said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def line_of(flag: Flag) -> str:
    some = ", ".join(map(str, flag.images[:SHOWN])) + (", ..." if len(flag.images) > SHOWN else "")
    return f"{flag.name}: " + (f"{plural(len(flag.images), 'image')} ({some}): " if flag.images else "") + flag.says
