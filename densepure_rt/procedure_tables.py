"""What `densepure-rt bench --procedure` prints for a person, and draws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from densepure_rt.benchmark_tables import CLOCKS, warn_of_others
from densepure_rt.console import duration, plural, rows, stdout
from densepure_rt.optional import optional
from densepure_rt.rounding import exact, floored_share

if TYPE_CHECKING:
    from densepure_rt.export.procedure import Procedure, ProcedureBenchmark

WIDTH = 40  # columns of the printed axis
NAMES = {  # of the factors
    "statistics": "stop when it is clear",
    "shared_step": "share the first step",
    "ballots": "stop decided ballots",
    "engine": "engine, full batches",
}
COLOURS = {"published": "#6b7280", "saved": "#60a5fa", "lost": "#dc2626", "ours": "#059669"}
TICKED = {"ms": (0.1, 1, 10, 100), "s": (1, 10), "min": (1, 10), "h": (1,), "d": (1, 10, 100, 1000)}
UNITS = {"ms": 0.001, "s": 1, "min": 60, "h": 3600, "d": 86_400}  # seconds
TICKS = {UNITS[unit] * count: f"{count:g} {unit}" for unit, counts in TICKED.items() for count in counts}


class Bar(NamedTuple):
    """A bar of the chart, from `low` to `high` seconds an image; `text` stands beside it."""

    name: str
    low: float
    high: float
    text: str
    kind: Literal["published", "saved", "lost", "ours"]


def bars(found: ProcedureBenchmark) -> list[Bar]:
    """From the published procedure down to ours, factor by factor: on a log scale they lie end to end."""
    seconds, steps = found.published.seconds, []
    for field, name in NAMES.items():
        factor = getattr(found.factors, field)
        low, high = sorted((seconds, seconds / factor))
        steps.append(Bar(name, low, high, f"/ {shortened(factor)}", "saved" if factor >= 1 else "lost"))
        seconds /= factor
    highest, lowest = max(step.high for step in steps), min(step.low for step in steps)
    start = lowest / max(2.0, highest / lowest) ** (1 / 6)  # so that the shortest bar can be seen
    published, ours = found.published.seconds, found.ours.seconds
    return [
        Bar("published procedure", start, published, f"{elapsed(published)}, priced", "published"),
        *steps,
        Bar("ours", start, ours, elapsed(ours), "ours"),
    ]


def print_procedures(found: ProcedureBenchmark, console: Console = stdout) -> None:
    """The result for a person: what was run on what, what it took, and what makes the difference."""
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    small, published, ours = found.small.settings, found.published.settings, found.ours.settings
    calls, fill = found.call_seconds, ", ".join(f"{kind} {100 * full:.0f} %" for kind, full in found.fill.items())
    loads = (" to ".join("unknown" if load is None else f"{load:.1f}" for load in each.average) for each in found.load)
    facts = {
        "engine": f"{found.engine}, {found.precision}, sha256 {found.engine_sha256[:16]}",
        "device": ", ".join(f"{name} {value}" for name, value in found.device.items()),
        "machine": f"{found.gpu or found.processor}, {found.cores} cores; {versions}",
        "load": "{} beside the published procedure, {} beside ours".format(*loads),
        "images": f"{found.images} of {list(found.image)}, seed {found.seed}; certified: at the radius "
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
        f"less time: an image, on a log scale"
    )
    for line in chart(bars(found), "█" if console.encoding.lower().startswith("utf") else "#"):
        console.print(line)
    warn_of_others(max(found.load, key=lambda load: load.others or 0.0), found.cores, found.clock)


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


def chart(shown: list[Bar], block: str) -> list[str]:
    """The bars as lines of text, each a block long at least."""
    start, end = min(bar.low for bar in shown), max(bar.high for bar in shown)
    width = max(len(bar.name) for bar in shown)

    def column(seconds: float) -> int:
        return round(WIDTH * math.log(seconds / start) / math.log(end / start))

    lines = []
    for bar in shown:
        first = min(column(bar.low), WIDTH - 1)
        drawn = " " * first + block * max(1, column(bar.high) - first)
        lines.append(f" {bar.name:<{width}}  {drawn:<{WIDTH}}  {bar.text}")
    return lines


def draw_procedures(found: ProcedureBenchmark, path: Path) -> None:
    """The same chart as a picture. Needs matplotlib."""
    with optional("the picture", "matplotlib", "run \"pip install 'densepure-rt[report]'\""):
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, NullLocator
    shown = bars(found)
    start, end = min(bar.low for bar in shown), max(bar.high for bar in shown)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(shown))
    drawn = axes.barh(
        places,
        [bar.high - bar.low for bar in shown],
        left=[bar.low for bar in shown],
        color=[COLOURS[bar.kind] for bar in shown],
        height=0.62,
    )
    axes.bar_label(drawn, [bar.text for bar in shown], padding=5, fontweight="bold")
    axes.set_xscale("log")
    axes.set_xlim(start, end * (end / start) ** 0.26)  # room for the words beside the longest bar
    ticks = [seconds for seconds in TICKS if start <= seconds <= end]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [TICKS[seconds] for seconds in ticks])
    axes.set_yticks(places, [bar.name for bar in shown])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    settings = found.ours.settings
    axes.set_xlabel(
        f"{CLOCKS[found.clock]} of an image (log scale), {plural(found.threads, 'thread')}, "
        f"{found.gpu or found.processor}; {found.precision} engine, {plural(found.images, 'image')}",
        color="#374151",
    )
    figure.suptitle(
        f"An image at the radius {exact(found.sigma)}, K = {settings.votes}, b = {settings.steps}: "
        f"{shortened(found.time_ratio)} times less time\nand {shortened(found.unet_call_ratio)} times fewer UNet calls "
        f"than the published procedure",
        x=0.02,
        ha="left",
        fontsize=12,
    )
    figure.savefig(path, dpi=150)


def elapsed(seconds: float) -> str:
    return duration(seconds) if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def shortened(factor: float) -> str:
    """Three figures, all of those before the point."""
    return f"{factor:,.0f}" if factor >= 100 else f"{factor:.3g}"
