"""Draw the cost of the published procedure and of this one as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from densepure_rt.optional import optional
from densepure_rt.rounding import exact
from densepure_rt.text import duration, plural

if TYPE_CHECKING:
    from densepure_rt.export.compare.machine import Clock
    from densepure_rt.export.compare.procedure import ProcedureBenchmark

CLOCKS: Mapping[Clock, str] = {
    "wall": "wall clock",
    "core": "CPU time",
    "events": "CUDA events, the engine by the wall",
}
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
    settings, machine = found.ours.settings, found.machine
    axes.set_xlabel(
        f"{CLOCKS[found.clock]} of an image (log scale), {plural(found.threads, 'thread')}, "
        f"{machine.gpu or machine.processor}; {found.subject.precision} engine, {plural(found.images, 'image')}",
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
