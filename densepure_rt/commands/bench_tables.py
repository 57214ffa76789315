"""What `densepure-rt bench` prints for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from densepure_rt.commands.console import rows, stderr, stdout
from densepure_rt.commands.procedure_chart import CLOCKS, bars, elapsed, shortened
from densepure_rt.rounding import exact, floored_share, raised
from densepure_rt.text import plural, printable

if TYPE_CHECKING:
    from densepure_rt.export.compare.bench import Benchmark
    from densepure_rt.export.compare.engine_run import Subject
    from densepure_rt.export.compare.host_cost import HostCosts
    from densepure_rt.export.compare.machine import Clock, Load, Machine
    from densepure_rt.export.compare.procedure import Procedure, ProcedureBenchmark

OTHER_LOAD = 0.5  # cores that other programs may use before the timings are doubted
# PyTorch's threads wait for one another at the end of every operation, so a core that is taken away stops them all.
DOUBT: Mapping[Clock, str] = {
    "wall": "not even the ratios hold; measure on an idle machine, or with --threads 1, in CPU time",
    "core": "read the ratios, not the seconds, and measure again on an idle machine",
    "events": "measure again on an idle machine",
}


def print_benchmark(found: Benchmark, console: Console = stdout) -> None:
    """The result for a person: what was run on what, the routes, the stages; a warning where timings are doubtful."""
    before, after = ("unknown" if load is None else f"{load:.1f}" for load in found.load.average)
    gflop = ", ".join(f"{name} {'unknown' if work is None else f'{work:.3g}'}" for name, work in found.gflop.items())
    facts = {
        **ran_on(found.subject, found.machine),
        "load": f"{before} before, {after} after",
        "work": f"{found.calls} x {found.batch} images {list(found.subject.image)} a call, sigma {found.sigma:g}",
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
    warn_of_others(found.load, found.machine.cores, found.clock)


def ran_on(subject: Subject, machine: Machine) -> dict[str, str]:
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return {
        "engine": f"{subject.engine}, {subject.precision}, sha256 {subject.engine_sha256[:16]}",
        "device": ", ".join(f"{name} {value}" for name, value in subject.device.items()),
        "machine": f"{machine.gpu or machine.processor}, {machine.cores} cores; {versions}",
    }


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


def print_host_costs(found: HostCosts, console: Console = stdout) -> None:
    """Print the host's time for a batch, and the UNet calls that it can keep a GPU supplied with."""
    table = Table(
        title=f"the host's part of a batch, us, {found.rounds} rounds, CPU time of one core of {found.processor}",
        title_justify="left",
        box=None,
    )
    for name in ("batch", "steps", "votes", "median", "quartiles", "UNet calls/s at most", "slots"):
        table.add_column(name, justify="right", overflow="fold")
    for cost in found.costs:
        table.add_row(
            *map(str, (cost.batch, cost.steps, cost.votes)),
            f"{cost.median:.0f}",
            f"{cost.lower:.0f}-{cost.upper:.0f}",
            f"{cost.unet_calls:,.0f}",
            f"{cost.slots:,}",
        )
    console.print(table)
    console.print("the reverse loop, its ballots, the buffers it fills; not: the driver's calls, the rule of an image")


def print_procedures(found: ProcedureBenchmark, console: Console = stdout) -> None:
    """The result for a person: what was run on what, what it took, and what makes the difference."""
    small, published, ours = found.small.settings, found.published.settings, found.ours.settings
    calls, fill = found.call_seconds, ", ".join(f"{kind} {100 * full:.0f} %" for kind, full in found.fill.items())
    loads = (" to ".join("unknown" if load is None else f"{load:.1f}" for load in each.average) for each in found.load)
    facts = {
        **ran_on(found.subject, found.machine),
        "load": "{} beside the published procedure, {} beside ours".format(*loads),
        "images": f"{found.images} of {list(found.subject.image)}, seed {found.seed}; certified: at the radius "
        f"{exact(found.sigma)}",
        "published": f"n0 {published.n0:,}, n {published.n:,}, K {published.votes}, b {published.steps}; "
        f"run small: n0 {small.n0:,}, n {small.n:,}, K {small.votes}, b {small.steps}",
        "ours": f"{ours.method}, n {ours.n:,} at most, K {ours.votes}, b {ours.steps}; "
        f"{found.samples_judged:,.1f} samples judged of {found.ours.samples:,.1f} drawn",
        "priced by": f"UNet {elapsed(calls.unet)}, classifier {elapsed(calls.classifier)} a call; that gives "
        f"{elapsed(found.predicted_seconds)} for the small run, which took {elapsed(found.small.seconds)}, an image",
        "batches": f"{fill} full",
        "main thread": f"{100 * found.main_thread:.1f} % of the CPU time of ours",
    }
    rows(console, facts.items())
    console.print(cost_table(found))
    console.print(
        f"ours takes {shortened(found.unet_call_ratio)} times fewer UNet calls and {shortened(found.time_ratio)} times "
        f"less time an image:"
    )
    rows(console, ((f" {bar.name}", bar.text) for bar in bars(found)))
    warn_of_others(max(found.load, key=lambda load: load.others or 0.0), found.machine.cores, found.clock)


def cost_table(found: ProcedureBenchmark) -> Table:
    table = Table(title=f"of one image, {CLOCKS[found.clock]}", title_justify="left", box=None)
    table.add_column("procedure", no_wrap=True)
    for name in ("samples", "UNet calls", "classifier", "time", "certified"):
        table.add_column(name, justify="right", overflow="fold")

    def add(name: str, procedure: Procedure) -> None:
        numbers = (procedure.samples, procedure.unet_calls, procedure.classifier_calls)
        share = "-" if procedure.certified is None else floored_share(procedure.certified, 0)
        table.add_row(name, *(f"{number:,.0f}" for number in numbers), elapsed(procedure.seconds), share)

    add("published, run small", found.small)
    add("published, priced", found.published)
    add("ours", found.ours)
    return table


def print_layers(batch: int, times: Mapping[str, Mapping[str, float]]) -> None:
    """Print the layers of each engine, the slowest first. times: milliseconds a call, by engine and layer."""
    for engine, layers in times.items():
        total = sum(layers.values())
        stdout.print(f"{engine}: {total:.3f} ms a call of {batch} images, {plural(len(layers), 'layer')}")
        for layer, ms in sorted(layers.items(), key=lambda item: -item[1]):
            stdout.print(f"  {ms:9.4f} ms  {ms / total:6.1%}  {printable(layer)}")
