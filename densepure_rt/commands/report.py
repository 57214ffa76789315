"""The commands that read finished runs: `report`, `compare` and `merge`. Options in, one call, one printed result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from densepure_rt.commands.compare import ALSO
from densepure_rt.commands.console import stdout
from densepure_rt.commands.from_run import file_of, images_of
from densepure_rt.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from densepure_rt.report.gallery import Shown


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Folders of runs, finished or not, or of import --out."),
    ],
    out: Annotated[Path, typer.Option(help="The report: one HTML file that needs no network.")] = Path("report.html"),
    also: Annotated[
        str,
        typer.Option(
            help="More files beside it, separated by commas: png or svg (the curve), md (the table of the papers)."
        ),
    ] = "",
    gallery: Annotated[
        int | None,
        typer.Option(help="Number of images of the first run to show, noisy and purified. Runs its engine again."),
    ] = None,
    engine: Annotated[
        Path | None, typer.Option(help="For --gallery: the engine that was run. Default: the one that the run names.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="For --gallery: the images that were certified. Default: those that the run names."),
    ] = None,
) -> None:
    """Make a page of one or several runs: certified accuracy with its band, abstentions, cost and what was run.

    Results of older tools that import kept stand beside them on their sound reading.
    """
    from densepure_rt.report.charts import accuracy_chart, accuracy_png
    from densepure_rt.report.gallery import gallery as shown_again
    from densepure_rt.report.page import page
    from densepure_rt.report.sources import read_results
    from densepure_rt.report.summary import markdown, names_of, report_of
    from densepure_rt.runs.reader import Run
    from densepure_rt.runs.secret import secret_of

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
        engine, certified = file_of(first.path, "engine", engine), images_of(first.path, images)
        pictures = shown_again(first, gallery, secret_of(first.path, first.manifest), engine, certified)
    makers: Mapping[str, Callable[[], str | bytes]] = {
        "png": lambda: accuracy_png(reports),
        "svg": lambda: accuracy_chart(reports, alone=True),
        "md": lambda: markdown(reports),
    }
    files = {out: page(reports, pictures)} | {out.with_suffix(f".{kind}"): makers[kind]() for kind in kinds}
    for path, content in files.items():
        write(path, content)
        stdout.print(str(path))


def write(path: Path, content: str | bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise EnvironmentFault(f"cannot write {path} ({error.strerror}): choose another file with --out") from error
