"""`densepure-rt parity`: compare an engine with the PyTorch models that it was made of."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from densepure_rt.commands.console import (
    finite,
    make_folder,
    needs_pytorch,
    say,
    show_report,
    stderr,
    stdout,
    track,
    write_report,
)
from densepure_rt.commands.groups import with_options
from densepure_rt.commands.options import EngineFile, Json, ProviderName
from densepure_rt.errors import CheckFailed
from densepure_rt.export.models.model_options import ModelOptions
from densepure_rt.rounding import floored, raised

if TYPE_CHECKING:
    from densepure_rt.export.compare.agreement import Agreement

ComparisonImages = Annotated[
    Path | None,
    typer.Option(help="Images of the engine's size. Default: the shipped ones if they fit, else made-up ones."),
]
COMPARED = 5  # images, by `parity`, unless told
PARITY_SAMPLES = 20
SMALLEST = 1e-12  # error that a ratio is taken to


@with_options
def parity(
    models: ModelOptions,
    engine: EngineFile = None,
    images: ComparisonImages = None,
    limit: Annotated[
        int | None, typer.Option("--max", help="Number of images. Default: 5, or all if there are fewer.")
    ] = None,
    sigma: Annotated[float, typer.Option(help="Standard deviation of the smoothing noise, in [0, 1] units.")] = 0.5,
    steps: Annotated[int, typer.Option(help="Reverse steps (b).")] = 2,
    votes: Annotated[int, typer.Option(help="Votes per noise sample (K).")] = 5,
    n: Annotated[int, typer.Option(help="Samples per image.")] = 50,
    alpha: Annotated[float, typer.Option(help="Maximum probability that an image gets a wrong certificate.")] = 0.001,
    batch: Annotated[int | None, typer.Option(help="Images per call of the engine.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads that call the engine. Default: one per core, two on a GPU.")
    ] = None,
    provider: ProviderName = "cpu",
    trust: Annotated[bool, typer.Option("--trust", help="Accept a plan without a sidecar.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for parity.json and parity.png.")] = None,
    as_json: Json = False,
) -> None:
    """Compare an engine with PyTorch on the same noise: steps, chains, labels, votes and certificates.

    Exit code 1 when they differ by more than the engine's precision may lose. The noise is public, so the radii are
    valid only for images chosen without regard to it. The picture needs densepure-rt\\[report].
    """
    with needs_pytorch("parity"):
        from densepure_rt.export.compare.agreement import agree, draw, failures
        from densepure_rt.export.models.check_images import comparison_images
        from densepure_rt.export.models.sources import open_models, refuse_other_models
    from densepure_rt.runtime.bundle import open_bundle, shipped_engine
    from densepure_rt.smoothing.classifier import load
    from densepure_rt.smoothing.settings import Settings

    settings = Settings(sigma, steps, votes, n=n, alpha=alpha)
    if out is not None:
        make_folder(out)  # first: what follows may take long
    opened = open_models(models)
    refuse_other_models(*opened, open_bundle(engine or shipped_engine(), trust=trust))  # before their images are read
    chosen = comparison_images(opened, images, limit, say, COMPARED)
    with load(engine, batch=batch, threads=threads, provider=provider, trust=trust) as smoothed:
        found = agree(smoothed, opened, track(chosen, len(chosen)), settings)
    failed = failures(found)
    report = finite({name: value for name, value in dataclasses.asdict(found).items() if name != "shown"})
    report["failures"] = failed
    show_report(report, as_json, lambda: print_agreement(found))
    if out is not None:
        write_report(out, "parity", report, lambda path: draw(found, path))
    for line in failed:
        stderr.print(f"error: {line}")
    if failed:
        raise typer.Exit(CheckFailed.exit_code)


def print_agreement(found: Agreement) -> None:
    table = Table(title=f"{found.engine} ({found.precision}) against PyTorch", title_justify="left", box=None)
    for column in ("level", "relative L2", "largest", "differ", "of", "fewer than"):
        table.add_column(column, justify="left" if column == "level" else "right")
    for gap in found.steps:
        at = f"timestep {gap.timestep}" if gap.timestep is not None else f"noise {gap.noise:.3g}"
        table.add_row(f"step {gap.step + 1}, {at}", raised(gap.relative_l2, figures=2), raised(gap.max_abs, figures=2))
    table.add_row("whole chain", raised(found.chain_relative_l2, figures=2), raised(found.chain_max_abs, figures=2))
    for name, share in (("labels", found.labels), ("votes", found.votes)):
        table.add_row(name, "", "", f"{share.differ:,}", f"{share.total:,}", raised(share.upper, 2, percent=True))
    stdout.print(table)
    table = Table(title="radii on the same samples", title_justify="left", box=None)
    for column in ("idx", "class", "PyTorch", "engine", "transferred", "eta"):
        table.add_column(column, justify="right")
    for row in found.certificates:
        radii = ("abstains" if r is None else floored(r) for r in (row.torch, row.engine, row.transferred))
        table.add_row(str(row.idx), str(row.predict), *radii, raised(row.eta, figures=2))
    stdout.print(table)
    stdout.print("the noise is public: a transferred radius is valid only for images chosen without regard to it")
