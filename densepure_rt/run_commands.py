"""The commands that read finished runs: `report`, `compare` and `merge`. Options in, one call, one printed result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from densepure_rt.audit_commands import secret_of
from densepure_rt.console import Json, plural, rows, stderr, stdout
from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.options import folder_of
from densepure_rt.rounding import exact, floored, floored_share, raised

if TYPE_CHECKING:
    from densepure_rt.compare import Change, Comparison
    from densepure_rt.falsifier import Falsification
    from densepure_rt.gallery import Shown

ALSO = ("png", "svg", "md")
MOST_CHANGES = 10  # images of each kind that `compare` prints


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Folders of runs, finished or not, and of what import --out kept."),
    ],
    out: Annotated[Path, typer.Option(help="The page: one HTML file that needs no network.")] = Path("report.html"),
    also: Annotated[
        str, typer.Option(help="Beside it, with commas: png, svg (the curve), md (the papers' table).")
    ] = "",
    gallery: Annotated[
        int | None,
        typer.Option(help="Show so many images of the first run with noise and purified: runs its engine again."),
    ] = None,
    engine: Annotated[
        Path | None, typer.Option(help="For --gallery: the engine that was run; default: the one that ships.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="For --gallery: what was certified; default: the shipped images.")
    ] = None,
) -> None:
    """Make a page of one or several runs: certified accuracy with its band, abstentions, cost and what was run.

    Results of older tools that import kept stand beside them on their sound reading.
    """
    from densepure_rt.gallery import gallery as shown_again
    from densepure_rt.import_reader import read_results
    from densepure_rt.report import accuracy_chart, accuracy_png, markdown, names_of, report_of
    from densepure_rt.report_page import page
    from densepure_rt.run_reader import Run

    kinds = tuple(word.strip() for word in also.split(",") if word.strip())
    if unknown := [kind for kind in kinds if kind not in ALSO]:
        raise UsageError(f"--also {unknown[0]} is not known: {', '.join(ALSO)}, or several with commas")
    if out.suffix.lstrip(".") in ALSO:
        raise UsageError(f"--out {out} is the HTML page: name it .html, and ask for others beside it with --also")
    reports = [report_of(read_results(path), name) for path, name in zip(runs, names_of(runs), strict=True)]
    pictures: Sequence[Shown] = ()
    if gallery is not None:
        first = reports[0].source
        if not isinstance(first, Run):
            raise UsageError(f"--gallery draws samples again, and {first.path} was imported: name an own run first")
        pictures = shown_again(first, gallery, secret_of(first.path, first.manifest), engine, images)
    makers: Mapping[str, Callable[[], str | bytes]] = {
        "png": lambda: accuracy_png(reports),
        "svg": lambda: accuracy_chart(reports, alone=True),
        "md": lambda: markdown(reports),
    }
    files = {out: page(reports, pictures)} | {out.with_suffix(f".{kind}"): makers[kind]() for kind in kinds}
    for path, content in files.items():
        write(path, content)
        stdout.print(str(path))


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="The folder of a run.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="That of another one over the same images.")],
    radius: Annotated[
        float | None, typer.Option(help="Compare at this l2 radius; default: at all that both were asked.")
    ] = None,
    level: Annotated[
        float,
        typer.Option(
            help="B is worse at a radius where the exact McNemar test says so at this level. Over k radii a false "
            "alarm has probability k * level / 2 at most."
        ),
    ] = 0.05,
    max_lost: Annotated[
        int | None,
        typer.Option(min=0, help="Fail when more images than this lost radius, by however little, or --radius."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two runs image by image, paired by their pixels. Exit code 1 when B is significantly worse than A."""
    from densepure_rt.compare import compare as compared
    from densepure_rt.run_reader import read_run

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


def merge(
    shards: Annotated[
        list[Path], typer.Argument(metavar="SHARD", help="The folders of certify --shard, all of one run.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            parser=folder_of,
            metavar="PATH",
            help="Folder for the whole run; a merge that was cut short is made again.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Make one run of its shards: the folder that a single process would have left.

    Exit code 2 when images are missing or in two shards, 1 when a shard is not complete or not what was sealed, or an
    attack has broken a certificate.
    """
    from densepure_rt.certify_run import accuracy_so_far
    from densepure_rt.merge import merge as merged
    from densepure_rt.run_reader import read_attacks

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
        print_attacks(attacks)


def print_attacks(attacks: Sequence[Falsification]) -> None:
    """Exit code 1 when a certificate is broken."""
    broken = [attack for attack in attacks if attack.broken]
    for attack in broken:
        stderr.print(
            f"error: image {attack.idx}: {attack.votes} of {attack.n} samples are for class {attack.label} at a "
            f"distance of {attack.distance}, inside the certified radius {exact(attack.radius)}"
        )
    samples = sum(attack.samples for attack in attacks)
    if not attacks:
        stderr.print("no certificate was attacked: the share of the samples does not pay for an attack, ask for more")
    else:
        stderr.print(f"{plural(len(attacks), 'certificate')} attacked with {samples:,} samples, {len(broken)} broken")
    if broken:
        raise typer.Exit(CheckFailed.exit_code)


def print_comparison(found: Comparison) -> None:
    """The result for a person: what was paired, both accuracies, the images that changed, and what differs."""
    from densepure_rt.run_folder import brief

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
    for change in changes[:MOST_CHANGES]:
        idx = str(change.idx_a) if change.idx_a == change.idx_b else f"{change.idx_a} / {change.idx_b}"
        radii = ("-" if radius is None else floored(radius) for radius in (change.a, change.b))
        table.add_row(idx, "-" if change.label is None else str(change.label), *radii)
    return table


def write(path: Path, content: str | bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise EnvironmentFault(f"cannot write {path} ({error.strerror}): choose another file with --out") from error
