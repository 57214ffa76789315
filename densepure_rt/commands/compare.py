"""`densepure-rt compare`: what changed between runs on the same images."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from densepure_rt.commands.console import rows, stdout
from densepure_rt.commands.options import Json
from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.rounding import exact, floored, floored_share, raised
from densepure_rt.text import plural, printable

if TYPE_CHECKING:
    from densepure_rt.report.compare import Change, Comparison

ALSO = ("png", "svg", "md")
MOST_CHANGES = 10  # images of each kind that `compare` prints


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of a run.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Folder of another run on the same images.")],
    radius: Annotated[
        float | None, typer.Option(help="Compare at this l2 radius. Default: at every radius that both runs decided.")
    ] = None,
    level: Annotated[
        float,
        typer.Option(
            help="Level of the exact McNemar test that says whether B is worse at a radius. Over k radii, a false "
            "alarm has probability at most k * level / 2."
        ),
    ] = 0.05,
    max_lost: Annotated[
        int | None,
        typer.Option(
            min=0, help="Fail if more images than this lost radius, however little (with --radius: lost that radius)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two runs image by image, paired by their pixels. Exit code 1 when B is significantly worse than A."""
    from densepure_rt.report.compare import compare as compared
    from densepure_rt.runs.reader import read_run

    if not 0 < level < 1:
        raise UsageError(f"--level is a probability between 0 and 1, got {exact(level)}")
    found = compared(read_run(a), read_run(b), radius)
    worse = found.worse_at(level)
    too_many = max_lost is not None and len(found.lost) > max_lost
    if as_json:
        print(json.dumps(dataclasses.asdict(found) | {"worse_at": [each.radius for each in worse]}))
    else:
        print_comparison(found)
    if worse:
        where = ", ".join(f"{exact(each.radius)} (p = {raised(each.p_value, figures=2)})" for each in worse)
        alarm = raised(found.false_alarm(level), figures=2)
        raise CheckFailed(
            f"{b} certifies significantly fewer images than {a} at radius {where}, level {exact(level)}; over "
            f"{plural(len(found.radii), 'comparison')} a false alarm has probability {alarm} at most"
        )
    if too_many:
        raise CheckFailed(f"{plural(len(found.lost), 'image')} lost radius from {a} to {b}, more than {max_lost}")


def print_comparison(found: Comparison) -> None:
    """The result for a person: what was paired, both accuracies, the images that changed, and what differs."""
    from densepure_rt.text import brief

    unpaired = f"{found.unpaired_a:,} in A alone, {found.unpaired_b:,} in B alone"
    facts = {"paired": f"{plural(found.pairs, 'image')} by SHA-256; {unpaired}"}
    facts["radius"] = f"{len(found.gained):,} gained, {len(found.lost):,} lost, {found.same:,} the same"
    if found.other_class:
        facts["class"] = f"{plural(found.other_class, 'image')} certified by both, for different classes"
    rows(stdout, facts.items())
    stdout.print(accuracy_table(found))
    for name, changes in (("lost", found.lost), ("gained", found.gained)):
        if changes:
            stdout.print(change_table(name, changes))
    if found.differs:
        stdout.print("what differs between the runs, and may be why")
        rows(stdout, ((f" {name}", f"{brief(one)} in A, {brief(other)} in B") for name, one, other in found.differs))
    else:
        stdout.print("the two runs have one identity: nothing that results depend on differs")


def accuracy_table(found: Comparison) -> Table:
    title = "certified accuracy" if found.labelled else "share certified"
    table = Table(title=f"{title} of the paired images", title_justify="left", box=None)
    for name in ("radius", "A", "B", "A alone", "B alone", "McNemar p"):
        table.add_column(name, justify="right")
    for each in found.radii:
        shares = (floored_share(share) for share in (each.a, each.b))
        table.add_row(
            exact(each.radius), *shares, f"{each.only_a:,}", f"{each.only_b:,}", raised(each.p_value, figures=2)
        )
    return table


def change_table(name: str, changes: Sequence[Change]) -> Table:
    most = f", the largest {MOST_CHANGES} of {len(changes):,}" if len(changes) > MOST_CHANGES else ""
    table = Table(title=f"images that {name} radius{most}", title_justify="left", box=None)
    for column in ("image", "label", "A", "B"):
        table.add_column(column, justify="right")
    if named := any(change.name_a or change.name_b for change in changes):
        table.add_column("file", overflow="fold")
    for change in changes[:MOST_CHANGES]:
        idx = str(change.idx_a) if change.idx_a == change.idx_b else f"{change.idx_a} / {change.idx_b}"
        radii = ("-" if radius is None else floored(radius) for radius in (change.a, change.b))
        names = dict.fromkeys(name for name in (change.name_a, change.name_b) if name)
        files = [" / ".join(map(printable, names))] if named else []
        table.add_row(idx, "no label" if change.label is None else str(change.label), *radii, *files)
    return table
