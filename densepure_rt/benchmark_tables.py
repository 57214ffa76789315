"""What `densepure-rt bench` prints for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from densepure_rt.console import rows, stderr, stdout
from densepure_rt.rounding import raised

if TYPE_CHECKING:
    from densepure_rt.export.bench import Benchmark
    from densepure_rt.export.machine import Clock, Load

OTHER_LOAD = 0.5  # cores that other programs may use before the timings are doubted
CLOCKS: Mapping[Clock, str] = {
    "wall": "wall clock",
    "core": "CPU time",
    "events": "CUDA events, the engine by the wall",
}
# PyTorch's threads wait for one another at the end of every operation, so a core that is taken away stops them all.
DOUBT: Mapping[Clock, str] = {
    "wall": "not even the ratios hold; measure on an idle machine, or with --threads 1, in CPU time",
    "core": "read the ratios, not the seconds, and measure again on an idle machine",
    "events": "measure again on an idle machine",
}


def print_benchmark(found: Benchmark, console: Console = stdout) -> None:
    """The result for a person: what was run on what, the routes, the stages; a warning where timings are doubtful."""
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    before, after = ("unknown" if load is None else f"{load:.1f}" for load in found.load.average)
    gflop = ", ".join(f"{name} {'unknown' if work is None else f'{work:.3g}'}" for name, work in found.gflop.items())
    facts = {
        "engine": f"{found.engine}, {found.precision}, sha256 {found.engine_sha256[:16]}",
        "device": ", ".join(f"{name} {value}" for name, value in found.device.items()),
        "machine": f"{found.gpu or found.processor}, {found.cores} cores; {versions}",
        "load": f"{before} before, {after} after",
        "work": f"{found.calls} x {found.batch} images {list(found.image)} a call, sigma {found.sigma:g}",
        "GFLOP": f"{gflop} an image, two a multiply-add",
        "peak": ", ".join(f"{gflops:.0f} GFLOP/s {name}" for name, gflops in found.peak.items()) + ", float32",
        "agreement": f"{raised(found.relative_l2, figures=2)} relative L2 between the engine's states and PyTorch's",
    }
    rows(console, facts.items())
    console.print(route_table(found))
    for route in found.routes:
        if route.absent is not None:
            console.print(f"{route.name}: {route.absent}")
    console.print(stage_table(found))
    for when, state in zip(("before", "after"), found.load.gpu, strict=True):
        if state:
            console.print(f"GPU {when}: " + ", ".join(f"{name} {value or 'unknown'}" for name, value in state.items()))
    warn_of_others(found.load, found.cores, found.clock)


def warn_of_others(load: Load, cores: int, clock: Clock) -> None:
    """Say so where other programs used so much of the machine that timings are doubtful."""
    others = load.average[0] if load.others is None else load.others
    if others is not None and others > OTHER_LOAD:
        stderr.print(f"warning: other programs used {others:.1f} cores meanwhile, of {cores} here: {DOUBT[clock]}")


def route_table(found: Benchmark) -> Table:
    table = Table(
        title=f"one reverse step, ms an image, {found.rounds} interleaved rounds, {CLOCKS[found.clock]}",
        title_justify="left",
        box=None,
    )
    table.add_column("route", no_wrap=True)
    for name in ("median", "quartiles", "engine is", "quartiles", "GFLOP/s", "of peak"):
        table.add_column(name, justify="right", overflow="fold")
    for route in found.routes:
        if route.seconds is None:
            continue
        ratio = route.engine_speedup
        table.add_row(
            route.name,
            f"{1000 * route.seconds.median:.3g}",
            f"{1000 * route.seconds.lower:.3g}-{1000 * route.seconds.upper:.3g}",
            "" if ratio is None else f"{ratio.median:.2f} x",
            "" if ratio is None else f"{ratio.lower:.2f}-{ratio.upper:.2f}",
            "-" if route.gflops is None else f"{route.gflops:.0f}",
            "-" if route.of_peak is None else f"{100 * route.of_peak:.0f} %",
        )
    return table


def stage_table(found: Benchmark) -> Table:
    table = Table(title="one vote of one step on the engine, us an image, one core", title_justify="left", box=None)
    table.add_column("stage")
    for name in ("median", "quartiles", "share"):
        table.add_column(name, justify="right", overflow="fold")
    for stage in found.stages:
        seconds = stage.seconds
        table.add_row(
            stage.name,
            f"{1e6 * seconds.median:.1f}",
            f"{1e6 * seconds.lower:.1f}-{1e6 * seconds.upper:.1f}",
            f"{100 * stage.share:.1f} %",
        )
    return table
