"""A chart of step functions as SVG, laid out by `data/step_chart.svg`: it opens from disk, in a page or alone.

Lengths are in units of the view box, WIDTH x HEIGHT of them. Colours are classes, so that whoever shows the chart may
style it: `data/theme.css` is how this package does, light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from densepure_rt.report.templates import render
from densepure_rt.rounding import exact, floored_share

WIDTH, HEIGHT = 680.0, 380.0
LEFT, RIGHT, TOP, BOTTOM = 76.0, 18.0, 16.0, 58.0  # margins around the plot
INSET = 14.0  # between the frame and the first and last place, where whiskers have room
LEGEND_ROW = 24.0
DODGE = 5.0  # between whiskers of several lines at one place
TICKS = 6  # at most, along the x axis
TWO_FIVES = 200  # a logarithmic axis up to so many times its start has ticks at 2 and 5 too
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9")  # of the theme, for who reads no CSS
DASHES = ("", "7 3", "2 3", "10 3 2 3", "12 4", "4 2")  # the same in print, and where lines lie on each other


@dataclass(frozen=True)
class Line:
    """A step function, as the corners of its stairs. half_width: of its band, None for none.

    dots: where it is known, when it is not known in between; the band is then drawn as whiskers.
    """

    name: str
    corners: tuple[tuple[float, float], ...]
    half_width: float | None = None
    dots: tuple[tuple[float, float], ...] | None = None


@dataclass(frozen=True)
class Look:
    """The looks that tell a line apart. colour: a class of the theme."""

    colour: str
    dashes: str
    dotted: bool


@dataclass(frozen=True)
class Dot:
    """A place where a line is known, with what is said there. whisker: a path, where there is a band."""

    x: float
    y: float
    whisker: str | None
    words: str


@dataclass(frozen=True)
class Drawn:
    """A line as paths. band: around its stairs, if it has one."""

    name: str
    look: Look
    stairs: str
    band: str | None
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Axis:
    """The horizontal axis: from 0 on, or logarithmic from `start`."""

    name: str
    end: float
    start: float = 0.0
    log: bool = False

    def place(self, value: float) -> float:
        """Place `value` between 0 at the start and 1 at the end."""
        if self.log:
            return math.log(max(value, self.start) / self.start) / math.log(self.end / self.start)
        return (value - self.start) / (self.end - self.start)

    def ticks(self) -> tuple[float, ...]:
        if not self.log:
            step = nice_step(self.end - self.start)
            return tuple(step * i for i in range(math.ceil(self.end / step) + 1) if step * i <= self.end * (1 + 1e-9))
        decades = range(math.floor(math.log10(self.start)), math.ceil(math.log10(self.end)) + 1)
        factors = (1, 2, 5) if self.end / self.start <= TWO_FIVES else (1,)
        values = (factor * 10.0**decade for decade in decades for factor in factors)
        return tuple(value for value in values if self.start <= value <= self.end)


def nice_step(span: float) -> float:
    """Return the smallest of 1, 2, 2.5 or 5 times a power of ten that makes no more than TICKS steps."""
    power = 10.0 ** math.floor(math.log10(span / TICKS))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if span / (factor * power) <= TICKS)


def falling(places: Sequence[float], values: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Return the stairs of a function that is values[i] on (places[i - 1], places[i]]."""
    stairs = list(zip(places[:1], values[:1], strict=True))
    for before, place, value in zip(places, places[1:], values[1:], strict=False):
        stairs += [(before, value), (place, value)]
    return tuple(stairs)


def rising(values: Sequence[float], start: float) -> tuple[tuple[float, float], ...]:
    """Return the stairs of the share of `values` that are no more than x, from `start` on."""
    stairs, below = [(start, 0.0)], 0.0
    for count, value in enumerate(sorted(values), start=1):
        stairs += [(value, below), (value, count / len(values))]
        below = count / len(values)
    return tuple(stairs)


def step_chart(lines: Sequence[Line], axis: Axis, vertical: str, words: str, alone: bool = False) -> Markup:
    """Draw shares (0 to 1) over `axis`. vertical: names them; words: the chart for those who cannot see it.

    alone: as a file of its own, with its style and a legend.
    """
    x = x_of(axis)
    chart = render(
        "step_chart.svg",
        width=WIDTH,
        height=HEIGHT + (LEGEND_ROW * len(lines) + 8 if alone else 0),
        foot=HEIGHT,
        row=LEGEND_ROW,
        left=LEFT,
        right=WIDTH - RIGHT,
        top=TOP,
        bottom=HEIGHT - BOTTOM,
        rules=[(y_of(share), f"{100 * share:.0f} %") for share in (0.0, 0.25, 0.5, 0.75, 1.0)],
        ticks=[(x(tick), f"{tick:,.6g}") for tick in axis.ticks()],
        horizontal=axis.name,
        vertical=vertical,
        words=words,
        lines=[drawn(line, look_of(line, i), x, dodge_of(lines, line)) for i, line in enumerate(lines)],
        alone=alone,
    )
    return Markup(chart)


def x_of(axis: Axis) -> Callable[[float], float]:
    return lambda value: LEFT + INSET + (WIDTH - LEFT - RIGHT - 2 * INSET) * axis.place(value)


def y_of(share: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(1.0, max(0.0, share)))


def look_of(line: Line, i: int) -> Look:
    """Return how the line at place `i` looks."""
    return Look(f"line{i % len(COLOURS)}", DASHES[i % len(DASHES)], line.dots is not None)


def drawn(line: Line, look: Look, x: Callable[[float], float], aside: float) -> Drawn:
    """Lay a line out, its dots `aside` units from their places."""
    band = None
    if line.half_width is not None and line.dots is None and line.corners:
        upper = [(place, share + line.half_width) for place, share in line.corners]
        lower = [(place, share - line.half_width) for place, share in reversed(line.corners)]
        band = path([*upper, *lower], x) + "Z"
    return Drawn(line.name, look, path(line.corners, x), band, tuple(dots_of(line, x, aside)))


def dodge_of(lines: Sequence[Line], line: Line) -> float:
    """Return how far aside the dots of a line stand, so that those of several lines stand side by side."""
    dotted = [other for other in lines if other.dots is not None]
    return DODGE * (dotted.index(line) - (len(dotted) - 1) / 2) if line in dotted else 0.0


def dots_of(line: Line, x: Callable[[float], float], aside: float) -> Iterator[Dot]:
    for place, share in line.dots or ():
        at, whisker = x(place) + aside, None
        if line.half_width is not None:
            top, bottom = y_of(share + line.half_width), y_of(share - line.half_width)
            whisker = f"M{at - 4:.2f} {top:.2f}h8m-4 0V{bottom:.2f}m-4 0h8"
        yield Dot(at, y_of(share), whisker, f"{line.name}: {floored_share(share)} at {exact(place)}")


def path(corners: Sequence[tuple[float, float]], x: Callable[[float], float]) -> str:
    return "".join(
        f"{'L' if count else 'M'}{x(place):.2f} {y_of(share):.2f}" for count, (place, share) in enumerate(corners)
    )
