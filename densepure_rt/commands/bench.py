"""`densepure-rt bench`: time an engine against PyTorch, a step or the whole procedure; or the host alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from densepure_rt.commands.bench_tables import print_benchmark, print_host_costs, print_layers, print_procedures
from densepure_rt.commands.console import finite, make_folder, needs_pytorch, say, show_report, watched, write_report
from densepure_rt.commands.groups import with_options
from densepure_rt.commands.options import EngineFile, Json, ProviderName
from densepure_rt.commands.parity import ComparisonImages
from densepure_rt.commands.procedure_chart import draw_procedures
from densepure_rt.commands.values import none_as
from densepure_rt.errors import UsageError
from densepure_rt.export.models.model_options import ModelOptions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
CERTIFIED = 10  # images, by `bench --procedure`, unless told
PROFILED = 20  # calls, by `bench --profile`, unless told
of_step = partial(typer.Option, rich_help_panel="A reverse step")
of_procedure = partial(typer.Option, rich_help_panel="Whole certifications")


@with_options
def bench(
    models: ModelOptions,
    engine: EngineFile = None,
    images: ComparisonImages = None,
    sigma: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of the noise, in [0, 1] pixel units. Default: 0.5; with --procedure 0.25, "
            "which is also the radius."
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images per call of the engine. Default: as certify runs it.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Cores for each of the compared programs. Default: all.")] = None,
    provider: ProviderName = "cpu",
    rounds: Annotated[int | None, of_step(help="Timed calls of each program, in turns. Default: 20.")] = None,
    compiled: Annotated[
        bool | None,
        of_step("--compile/--no-compile", help="Also time torch.compile, which takes a minute to start. Default: yes."),
    ] = None,
    profile: Annotated[
        bool, of_step("--profile", help="Time each layer of a TensorRT plan on its GPU. Needs no PyTorch.")
    ] = False,
    procedure: Annotated[
        bool,
        of_procedure(
            "--procedure",
            help="Compare whole certifications: ours, and the published procedure in PyTorch, which is run with "
            "few samples and extrapolated to n = 100,000. Can take minutes per image.",
        ),
    ] = False,
    limit: Annotated[
        int | None, of_procedure("--max", help="Number of images. Default: 10, or all if there are fewer.")
    ] = None,
    steps: Annotated[int | None, of_procedure(help="Reverse steps (b) of both procedures. Default: 10.")] = None,
    votes: Annotated[
        int | None, of_procedure(help="Votes per noise sample (K) of both procedures. Default: 40.")
    ] = None,
    n: Annotated[
        int | None, of_procedure(help="Maximum number of samples per image of our procedure. Default: 10000.")
    ] = None,
    seed: Annotated[int | None, of_procedure(help="Public seed of both procedures. Default: 0.")] = None,
    out: Annotated[Path | None, of_procedure(help="Folder for procedure.json and procedure.png.")] = None,
    host: Annotated[
        bool,
        typer.Option(
            "--host",
            help="Time the host's work for a batch on a GPU, with a device that takes no time. Takes only --batch "
            "and --rounds.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Time an engine against PyTorch in one run: a reverse step by stages, or with --procedure whole certifications.

    Speed is a ratio in one run on one machine; with other work on the cores, --threads 1 is the steadier. The picture
    needs densepure-rt\\[report].
    """
    from densepure_rt.runtime.open_device import provider_of

    device = provider_of(provider)
    step_options = {"rounds": rounds, "compile": compiled}
    procedure_options = {"max": limit, "steps": steps, "votes": votes, "n": n, "seed": seed, "out": out}
    if host or profile:
        others = {"images": images, "sigma": sigma, "threads": threads, "compile": compiled}
        others |= {"profile": (host and profile) or None, "procedure": procedure or None, **procedure_options}
    if host:
        refuse_given({"engine": engine, **others}, "an engine, and --host runs none: leave them out")
        bench_host(batch, rounds, as_json)
        return
    if profile:
        refuse_given(others, "other measurements than --profile: leave them out")
        bench_layers(engine, batch, none_as(PROFILED, rounds), as_json)
        return
    if procedure:
        refuse_given(step_options, "a single step, which --procedure does not time: leave them out")
    else:
        refuse_given(procedure_options, "--procedure: add it, or leave them out")
    with needs_pytorch("bench"):
        from densepure_rt.export.compare import bench as step
        from densepure_rt.export.compare import procedure as whole
        from densepure_rt.export.compare.engine_run import EngineRun, flat
        from densepure_rt.export.models.check_images import LABEL_IMAGES, comparison_images
        from densepure_rt.export.models.sources import open_models
    import numpy as np

    from densepure_rt.runtime.bundle import open_bundle, shipped_engine

    if out is not None:
        make_folder(out)  # first: what follows may take long
    opened = open_models(models)
    chosen = comparison_images(opened, images, limit, say, CERTIFIED if procedure else LABEL_IMAGES)
    run = EngineRun(open_bundle(engine or shipped_engine(device != "cpu")), batch, threads, device)
    if not procedure:
        pixels = np.stack([image.pixels for image in chosen])
        work = told(step.DEFAULT, sigma=sigma, rounds=rounds, compile=compiled)
        timed = step.bench(opened, run, pixels, work, say)
        show_report(flat(timed), as_json, lambda: print_benchmark(timed))
        return
    settings, seed = told(whole.OURS, sigma=sigma, steps=steps, votes=votes, n=n), none_as(whole.SEED, seed)
    found = whole.compare(opened, run, chosen, settings, seed=seed, say=say, watch=watched)
    report = finite(flat(found))
    show_report(report, as_json, lambda: print_procedures(found))
    if out is not None:
        write_report(out, "procedure", report, lambda path: draw_procedures(found, path))


def told(defaults: T, **options: float | None) -> T:
    """`defaults` with the options that were typed in their place."""
    return dataclasses.replace(defaults, **{name: value for name, value in options.items() if value is not None})


def bench_layers(engine: Path | None, batch: int | None, rounds: int, as_json: bool) -> None:
    """Time the layers of both plans of a bundle."""
    from densepure_rt.runtime.bundle import open_bundle, shipped_engine
    from densepure_rt.runtime.open_device import open_device

    bundle = open_bundle(engine or shipped_engine())
    if bundle.unet.plan is None:
        raise UsageError(
            f"--profile times the layers of a plan, and {bundle.unet_path} is none: give one with `engine`, made by "
            f'"densepure-rt export --target tensorrt"'
        )
    if rounds < 1:
        raise UsageError(f"`rounds` {rounds}: give 1 or more")
    from densepure_rt.runtime.tensorrt_device import TensorRTDevice

    device = open_device(bundle, batch, 1)
    assert isinstance(device, TensorRTDevice)
    with closing(device):
        times = device.layer_times(rounds)
    report = {"batch": device.batch, "rounds": rounds, "ms": times}
    show_report(report, as_json, lambda: print_layers(device.batch, times))


def bench_host(batch: int | None, rounds: int | None, as_json: bool) -> None:
    """Time the host, at one batch size or at those that plans are built for."""
    from densepure_rt.export.compare.host_cost import BATCHES, ROUNDS, host_costs

    found = host_costs(BATCHES if batch is None else (batch,), none_as(ROUNDS, rounds))
    show_report(dataclasses.asdict(found), as_json, lambda: print_host_costs(found))


def refuse_given(options: Mapping[str, float | Path | None], owner: str) -> None:
    """Raise UsageError for options that were typed where they mean nothing."""
    if typed := [("--no-" if value is False else "--") + name for name, value in options.items() if value is not None]:
        raise UsageError(f"{', '.join(typed)}: only for {owner}")
