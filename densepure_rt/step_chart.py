"""A chart of step functions as SVG, made by hand: it opens from disk, in a page or alone, light or dark.

Lengths are in units of the view box, WIDTH x HEIGHT of them. Colours are classes, so that whoever shows the chart may
style it: `STYLE` is how this package does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from densepure_rt.elements import Html, element, joined
from densepure_rt.rounding import exact, floored_share

WIDTH, HEIGHT = 680.0, 380.0
LEFT, RIGHT, TOP, BOTTOM = 76.0, 18.0, 16.0, 58.0  # margins around the plot
INSET = 14.0  # between the frame and the first and last place, where whiskers have room
LEGEND_ROW = 24.0
DODGE = 5.0  # between whiskers of several lines at one place
TICKS = 6  # at most, along the x axis
TWO_FIVES = 200  # a logarithmic axis up to so many times its start has ticks at 2 and 5 too
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9")  # Okabe & Ito, told apart by most eyes
DARK_COLOURS = ("#5cb3e6", "#ff8f4d", "#2ed3a3", "#e8a3c8", "#f0c24b", "#8fd0f5")  # the same, on a dark ground
DASHES = ("", "7 3", "2 3", "10 3 2 3", "12 4", "4 2")  # the same in print, and where lines lie on each other
STYLE = (
    "".join(f".line{i}{{--c:var(--line{i})}}" for i in range(len(COLOURS)))
    + ":root{--ink:#1f2933;--soft:#5b6773;--rule:#dfe3e8;--ground:#fff;"
    + "".join(f"--line{i}:{colour};" for i, colour in enumerate(COLOURS))
    + "}@media screen and (prefers-color-scheme:dark)"
    + "{:root{--ink:#e6eaee;--soft:#9aa7b4;--rule:#333d47;--ground:#14191f;"
    + "".join(f"--line{i}:{colour};" for i, colour in enumerate(DARK_COLOURS))
    + "}}"
    + ".chart text{font:15px system-ui,sans-serif;fill:var(--soft)}.chart .axis{fill:var(--ink)}"
    + ".chart .rule{stroke:var(--rule)}.chart .base{stroke:var(--soft)}"
    + ".chart .band{fill:var(--c);fill-opacity:.13}.chart .dot{fill:var(--c)}"
    + ".chart .whisker{stroke:var(--c);stroke-opacity:.55;stroke-width:1.6;fill:none}"
    + ".chart .stroke{stroke:var(--c);stroke-width:2.4;fill:none;stroke-linejoin:round}"
    + ".chart .between{stroke-width:1.4;stroke-opacity:.65}"
)


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
class Axis:
    """The horizontal axis: from 0 on, or logarithmic from `start`."""

    name: str
    end: float
    start: float = 0.0
    log: bool = False

    def place(self, value: float) -> float:
        """0 at the start, 1 at the end."""
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
    """The smallest of 1, 2, 2.5 or 5 times a power of ten that makes no more than TICKS steps."""
    power = 10.0 ** math.floor(math.log10(span / TICKS))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if span / (factor * power) <= TICKS)


def falling(places: Sequence[float], values: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """The stairs of a function that is values[i] on (places[i - 1], places[i]]."""
    stairs = list(zip(places[:1], values[:1], strict=True))
    for before, place, value in zip(places, places[1:], values[1:], strict=False):
        stairs += [(before, value), (place, value)]
    return tuple(stairs)


def rising(values: Sequence[float], start: float) -> tuple[tuple[float, float], ...]:
    """The stairs of the share of `values` that are no more than x, from `start` on."""
    stairs, below = [(start, 0.0)], 0.0
    for count, value in enumerate(sorted(values), start=1):
        stairs += [(value, below), (value, count / len(values))]
        below = count / len(values)
    return tuple(stairs)


def step_chart(lines: Sequence[Line], axis: Axis, vertical: str, words: str, alone: bool = False) -> Html:
    """Shares (0 to 1) over `axis`. vertical: names them; words: the chart for those who cannot see it.

    alone: as a file of its own, with its style and a legend.
    """
    height = HEIGHT + (LEGEND_ROW * len(lines) + 8 if alone else 0)
    return element(
        "svg",
        element("title", words),
        element("style", Html(STYLE)) if alone else None,
        element("rect", width=WIDTH, height=height, style="fill:var(--ground)") if alone else None,
        *frame(axis, vertical),
        *(drawn_band(line, i, axis) for i, line in enumerate(lines)),
        *(drawn_stairs(line, i, axis) for i, line in enumerate(lines)),
        *(drawn for i, line in enumerate(lines) for drawn in drawn_dots(line, i, axis, dodge_of(lines, line))),
        *(legend(lines) if alone else ()),
        xmlns="http://www.w3.org/2000/svg",
        class_="chart",
        viewBox=f"0 0 {WIDTH:g} {height:g}",
        role="img",
    )


def x_of(axis: Axis) -> Callable[[float], float]:
    return lambda value: LEFT + INSET + (WIDTH - LEFT - RIGHT - 2 * INSET) * axis.place(value)


def y_of(share: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(1.0, max(0.0, share)))


def frame(axis: Axis, vertical: str) -> Iterator[Html]:
    """Rules, ticks and the names of both axes."""
    x = x_of(axis)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = y_of(share)
        yield element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="rule" if share else "base")
        yield element("text", f"{100 * share:.0f} %", x=LEFT - 8, y=y + 5, text_anchor="end")
    for tick in axis.ticks():
        bottom = y_of(0.0)
        yield element("line", x1=x(tick), x2=x(tick), y1=bottom, y2=bottom + 5, class_="base")
        yield element("text", f"{tick:,.6g}", x=x(tick), y=bottom + 22, text_anchor="middle")
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield element("text", axis.name, x=middle, y=HEIGHT - 10, text_anchor="middle", class_="axis")
    turned = f"translate(15 {(TOP + HEIGHT - BOTTOM) / 2:g}) rotate(-90)"
    yield element("text", vertical, transform=turned, text_anchor="middle", class_="axis side")


def look_of(i: int) -> tuple[str, str | None]:
    """The colour's class and the dashes of the line at place `i`."""
    return f"line{i % len(COLOURS)}", DASHES[i % len(DASHES)] or None


def drawn_band(line: Line, i: int, axis: Axis) -> Html | None:
    if line.half_width is None or line.dots is not None or not line.corners:
        return None
    upper = [(place, share + line.half_width) for place, share in line.corners]
    lower = [(place, share - line.half_width) for place, share in reversed(line.corners)]
    return element("path", d=path([*upper, *lower], x_of(axis)) + "Z", class_=f"band {look_of(i)[0]}")


def drawn_stairs(line: Line, i: int, axis: Axis) -> Html:
    look, dash = look_of(i)
    kind = "stroke" if line.dots is None else "stroke between"
    return element("path", d=path(line.corners, x_of(axis)), class_=f"{kind} {look}", stroke_dasharray=dash)


def dodge_of(lines: Sequence[Line], line: Line) -> float:
    """How far aside the dots of a line stand, so that those of several lines stand side by side."""
    dotted = [other for other in lines if other.dots is not None]
    return DODGE * (dotted.index(line) - (len(dotted) - 1) / 2) if line in dotted else 0.0


def drawn_dots(line: Line, i: int, axis: Axis, aside: float) -> Iterator[Html]:
    """Points with whiskers, `aside` units from their places."""
    x, (look, _) = x_of(axis), look_of(i)
    for place, share in line.dots or ():
        at = x(place) + aside
        if line.half_width is not None:
            top, bottom = y_of(share + line.half_width), y_of(share - line.half_width)
            caps = f"M{at - 4:.2f} {top:.2f}h8m-4 0V{bottom:.2f}m-4 0h8"
            yield element("path", d=caps, class_=f"whisker {look}")
        said = element("title", f"{line.name}: {floored_share(share)} at {exact(place)}")
        yield element("circle", said, cx=at, cy=y_of(share), r=4.5, class_=f"dot {look}")


def path(corners: Sequence[tuple[float, float]], x: Callable[[float], float]) -> str:
    return "".join(
        f"{'L' if count else 'M'}{x(place):.2f} {y_of(share):.2f}" for count, (place, share) in enumerate(corners)
    )


def swatch(line: Line, i: int) -> Html:
    """A line's look, 34 x 16 units."""
    look, dash = look_of(i)
    stroke = element("path", d="M1 8H33", class_=f"stroke {look}", stroke_dasharray=dash)
    return joined(stroke, None if line.dots is None else element("circle", cx=17, cy=8, r=4.5, class_=f"dot {look}"))


def legend(lines: Sequence[Line]) -> Iterator[Html]:
    """Beneath the chart, a row for each line."""
    for i, line in enumerate(lines):
        y = HEIGHT + LEGEND_ROW * i
        yield element("g", swatch(line, i), transform=f"translate({LEFT:g} {y:g})")
        yield element("text", line.name, x=LEFT + 42, y=y + 13)
