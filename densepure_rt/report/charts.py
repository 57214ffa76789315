"""The charts of a report: certified accuracy over the radius, samples over images."""

from __future__ import annotations

import io
from collections.abc import Sequence

from markupsafe import Markup

from densepure_rt.optional import optional
from densepure_rt.report.accuracy import band_half_width
from densepure_rt.report.step_chart import COLOURS, Axis, Line, falling, rising, step_chart
from densepure_rt.report.summary import RunReport, own


def accuracy_lines(reports: Sequence[RunReport]) -> list[Line]:
    """The certified-accuracy curves with their bands; points where a run knows its grid's radii alone."""
    lines = []
    for report in reports:
        curve = report.curve
        known = tuple(zip(curve.radii, curve.accuracy, strict=True))
        band = band_half_width(curve.images) if curve.images else None
        lines.append(Line(report.name, falling(curve.radii, curve.accuracy), band, known if curve.grid else None))
    return lines


def accuracy_axis(reports: Sequence[RunReport]) -> Axis:
    ends = [report.curve.radii[-1] for report in reports if report.curve.radii]
    return Axis("l2 radius, in [0, 1] pixel units", end=1.04 * max(ends, default=0.0) or 1.0)


def accuracy_name(reports: Sequence[RunReport]) -> str:
    return "certified accuracy" if all(report.curve.labelled for report in reports) else "share certified"


def accuracy_chart(reports: Sequence[RunReport], alone: bool = False) -> Markup:
    words = f"{accuracy_name(reports)} over the l2 radius of {', '.join(report.name for report in reports)}"
    return step_chart(accuracy_lines(reports), accuracy_axis(reports), accuracy_name(reports), words, alone)


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
        from matplotlib.ticker import PercentFormatter
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for i, line in enumerate(accuracy_lines(reports)):
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
    axes.set(xlim=(0, accuracy_axis(reports).end), ylim=(0, 1.02))
    axes.set(xlabel=accuracy_axis(reports).name, ylabel=accuracy_name(reports))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", color="#dfe3e8")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format="png")
    return file.getvalue()
