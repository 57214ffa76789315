"""`densepure-rt bench`: time an engine against PyTorch, a step or the whole procedure."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from densepure_rt.commands.bench_tables import print_benchmark, print_procedures
from densepure_rt.commands.console import finite, make_folder, needs_pytorch, say, watched, write_report
from densepure_rt.commands.options import EngineFile, Json, ProviderName, with_models
from densepure_rt.commands.procedure_chart import draw_procedures
from densepure_rt.errors import UsageError
from densepure_rt.export.models.model_options import ModelOptions

if TYPE_CHECKING:
    pass

CERTIFIED = 10  # images, by `bench --procedure`, unless told
STEP, PROCEDURE = "A reverse step", "Whole certifications"


@with_models
def bench(
    models: ModelOptions,
    engine: EngineFile = None,
    images: Annotated[
        Path | None, typer.Option(help="Images of the engine's size; default: the shipped ones, or made up.")
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of the noise, in [0, 1] units; default: 0.5, with --procedure 0.25, which is the "
            "radius too."
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Items a call; default: as certify runs the engine.")] = None,
    threads: Annotated[int | None, typer.Option(help="Cores for each route; default: all.")] = None,
    provider: ProviderName = "cpu",
    rounds: Annotated[
        int | None, typer.Option(help="Calls of each route, in turns; default: 20.", rich_help_panel=STEP)
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Time torch.compile too, which takes a minute to start; default: yes.",
            rich_help_panel=STEP,
        ),
    ] = None,
    procedure: Annotated[
        bool,
        typer.Option(
            "--procedure",
            help="Compare whole certifications: the published procedure in PyTorch, run small and priced at n = "
            "100,000, with ours, run for real, which can take minutes an image.",
            rich_help_panel=PROCEDURE,
        ),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option("--max", help="How many images; default: 10, or what there is.", rich_help_panel=PROCEDURE),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Reverse steps (b) of both; default: 10.", rich_help_panel=PROCEDURE)
    ] = None,
    votes: Annotated[
        int | None, typer.Option(help="Votes a noise sample (K) of both; default: 40.", rich_help_panel=PROCEDURE)
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(help="Samples of an image that ours takes at most; default: 10000.", rich_help_panel=PROCEDURE),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Public seed of both; default: 0.", rich_help_panel=PROCEDURE)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for procedure.json and procedure.png.", rich_help_panel=PROCEDURE)
    ] = None,
    as_json: Json = False,
) -> None:
    """Time an engine against PyTorch in one run: a reverse step by stages, or with --procedure whole certifications.

    Speed is a ratio in one run on one machine; with other work on the cores, --threads 1 is the steadier. The picture
    needs densepure-rt\\[report].
    """
    from densepure_rt.runtime.open_device import provider_of

    shared = {"sigma": sigma, "batch": batch, "threads": threads, "provider": provider_of(provider)}
    of_step = {"rounds": rounds, "compile": compiled}
    of_procedure = {"steps": steps, "votes": votes, "n": n, "seed": seed}
    if procedure:
        refuse_given(of_step, "a single step, which --procedure does not time: leave them out")
        bench_procedure(models, engine, images, limit, given(shared | of_procedure), out, as_json)
    else:
        refuse_given({"max": limit, **of_procedure, "out": out}, "--procedure: add it, or leave them out")
        bench_step(models, engine, images, given(shared | of_step), as_json)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were typed; what is not is left to the defaults of what they are for."""
    return {name: value for name, value in options.items() if value is not None}


def refuse_given(options: dict[str, Any], owner: str) -> None:
    """Raise UsageError for options that were typed where they mean nothing."""
    if typed := [("--no-" if value is False else "--") + name for name, value in given(options).items()]:
        raise UsageError(f"{', '.join(typed)}: only for {owner}")


def bench_step(
    models: ModelOptions, engine: Path | None, images: Path | None, options: dict[str, Any], as_json: bool
) -> None:
    """Time a reverse step. options: of `densepure_rt.export.compare.bench.bench`."""
    with needs_pytorch("bench"):
        from densepure_rt.export.compare.bench import bench as measure
        from densepure_rt.export.models.check_images import comparison_images
        from densepure_rt.export.models.sources import open_models
    import numpy as np

    from densepure_rt.runtime.bundle import open_bundle, shipped_engine

    unet, classifier = open_models(models)
    pixels = np.stack([image.pixels for image in comparison_images(unet, classifier, images, None, say)])
    found = measure(
        unet,
        classifier,
        open_bundle(engine or shipped_engine(options["provider"] != "cpu")),
        pixels,
        say=say,
        **options,
    )
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
    else:
        print_benchmark(found)


def bench_procedure(
    models: ModelOptions,
    engine: Path | None,
    images: Path | None,
    limit: int | None,
    options: dict[str, Any],
    out: Path | None,
    as_json: bool,
) -> None:
    """Compare whole certifications. options: of `densepure_rt.export.compare.procedure.compare`."""
    with needs_pytorch("bench"):
        from densepure_rt.export.compare.procedure import compare
        from densepure_rt.export.models.check_images import comparison_images
        from densepure_rt.export.models.sources import open_models
    from densepure_rt.runtime.bundle import open_bundle, shipped_engine

    if out is not None:
        make_folder(out)  # first: what follows may take long
    unet, classifier = open_models(models)
    chosen = comparison_images(unet, classifier, images, limit, say, CERTIFIED)
    found = compare(
        unet,
        classifier,
        open_bundle(engine or shipped_engine(options["provider"] != "cpu")),
        chosen,
        say=say,
        watch=watched,
        **options,
    )
    report = finite(dataclasses.asdict(found))
    if as_json:
        print(json.dumps(report))
    else:
        print_procedures(found)
    if out is not None:
        write_report(out, "procedure", report, lambda path: draw_procedures(found, path))
