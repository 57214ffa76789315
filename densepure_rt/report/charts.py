"""The charts of a report: certified accuracy over the radius, samples over images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from densepure_rt.optional import optional
from densepure_rt.report.accuracy import Curve, band_half_width
from densepure_rt.report.step_chart import COLOURS, Axis, Line, falling, rising, step_chart
from densepure_rt.report.summary import RunReport, own

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def accuracy_lines(reports: Sequence[RunReport]) -> list[Line]:
    """The certified-accuracy curves with their bands; points where a run knows its grid's radii alone."""
    return [line_of(report.name, report.curve) for report in reports]


def line_of(name: str, curve: Curve) -> Line:
    known = tuple(zip(curve.radii, curve.accuracy, strict=True))
    band = band_half_width(curve.images) if curve.images else None
    return Line(name, falling(curve.radii, curve.accuracy), band, known if curve.grid else None)


def accuracy_axis(curves: Sequence[Curve]) -> Axis:
    ends = [curve.radii[-1] for curve in curves if curve.radii]
    return Axis("l2 radius, in [0, 1] pixel units", end=1.04 * max(ends, default=0.0) or 1.0)


def accuracy_name(curves: Sequence[Curve]) -> str:
    return "certified accuracy" if all(curve.labelled for curve in curves) else "share certified"


def accuracy_chart(reports: Sequence[RunReport], alone: bool = False) -> Markup:
    curves = [report.curve for report in reports]
    words = f"{accuracy_name(curves)} over the l2 radius of {', '.join(report.name for report in reports)}"
    return step_chart(accuracy_lines(reports), accuracy_axis(curves), accuracy_name(curves), words, alone)


def samples_axis(reports: Sequence[RunReport]) -> Axis:
    counts = [max(1, timing.samples) for _, run in own(reports) for timing in run.timings] or [1]
    return Axis("samples of an image", start=min(counts) / 1.25, end=max(*counts, 2 * min(counts)) * 1.25, log=True)


def samples_lines(reports: Sequence[RunReport]) -> list[Line]:
    """The share of images that were decided with no more than so many samples; nothing where that is not known."""
    axis, lines = samples_axis(reports), []
    for report in reports:
        counts = [timing.samples for _, run in own([report]) for timing in run.timings]
        lines.append(Line(report.name, (*rising(counts, axis.start), (axis.end, 1.0)) if counts else ()))
    return lines


def samples_chart(reports: Sequence[RunReport]) -> Markup:
    words = f"share of images over the samples they took, of {', '.join(report.name for report, _ in own(reports))}"
    return step_chart(samples_lines(reports), samples_axis(reports), "share of images", words)


def accuracy_png(reports: Sequence[RunReport]) -> bytes:
    """The certified-accuracy curve as a PNG. Needs matplotlib."""
    with optional("a PNG", "matplotlib", "run \"pip install 'densepure-rt[report]'\", or ask for `also` svg"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    draw_accuracy(figure.subplots(), [(report.name, report.curve) for report in reports])
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format="png")
    return file.getvalue()


def draw_accuracy(axes: Axes, curves: Sequence[tuple[str, Curve]]) -> None:
    """Draw curves by their names on axes of matplotlib."""
    from matplotlib.ticker import PercentFormatter

    for i, line in enumerate(line_of(name, curve) for name, curve in curves):
        colour, name = COLOURS[i % len(COLOURS)], line.name.replace("$", r"\$")
        places, shares = [x for x, _ in line.corners], [y for _, y in line.corners]
        if line.dots is not None:
            axes.plot(places, shares, color=colour, linewidth=0.9, linestyle=":")
            known, values = [x for x, _ in line.dots], [y for _, y in line.dots]
            axes.errorbar(known, values, line.half_width, fmt="o", color=colour, capsize=3, elinewidth=0.9, label=name)
        else:
            axes.plot(places, shares, color=colour, label=name)
            half = line.half_width or 0.0
            low, high = [max(0.0, y - half) for y in shares], [min(1.0, y + half) for y in shares]
            axes.fill_between(places, low, high, color=colour, alpha=0.13, linewidth=0)
    alone = [curve for _, curve in curves]
    axes.set(xlim=(0, accuracy_axis(alone).end), ylim=(0, 1.02))
    axes.set(xlabel=accuracy_axis(alone).name, ylabel=accuracy_name(alone))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", color="#dfe3e8")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
