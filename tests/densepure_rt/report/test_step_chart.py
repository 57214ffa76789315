from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from densepure_rt.report.step_chart import HEIGHT, TICKS, WIDTH, Axis, Line, falling, nice_step, rising, step_chart


def height_at(stairs: tuple[tuple[float, float], ...], place: float) -> float:
    """Of the horizontal piece over a place that is no corner."""
    pieces = zip(stairs, stairs[1:], strict=False)
    (share,) = {y for (x, y), (following, _) in pieces if x < place < following}
    return share


@given(st.lists(st.integers(1, 50), min_size=1, unique=True))
def test_falling_stairs_are_the_curve_between_its_corners(places: list[int]) -> None:
    radii = [0.0, *map(float, sorted(places))]
    shares = [1 - i / len(radii) for i in range(len(radii))]
    stairs = falling(radii, shares)
    for place in np.arange(0.5, radii[-1], 1.0):
        assert height_at(stairs, place) == shares[int(np.searchsorted(radii, place))]
    assert (stairs[0], stairs[-1]) == ((0.0, shares[0]), (radii[-1], shares[-1]))


@given(st.lists(st.integers(2, 50), min_size=1))
def test_rising_stairs_are_the_share_of_values_up_to_there(values: list[int]) -> None:
    stairs = rising(values, 1.0)
    for place in np.arange(1.5, max(values), 1.0):
        assert height_at(stairs, place) == pytest.approx(np.mean(np.array(values) <= place))
    assert stairs[-1] == (max(values), 1.0)


@given(st.floats(1e-6, 1e6))
def test_ticks_are_few_and_within_the_axis(end: float) -> None:
    ticks = Axis("r", end).ticks()
    assert ticks[0] == 0.0
    assert 2 <= len(ticks) <= TICKS + 1
    assert ticks[-1] <= end * (1 + 1e-9) < ticks[-1] + nice_step(end) * (1 + 1e-6)


def test_a_logarithmic_axis_has_round_ticks() -> None:
    assert Axis("n", 1200, start=25, log=True).ticks() == pytest.approx((50, 100, 200, 500, 1000))
    assert Axis("n", 2e5, start=8, log=True).ticks() == pytest.approx((10, 100, 1000, 1e4, 1e5))


def test_a_chart_alone_is_well_formed_and_inside_its_box() -> None:
    lines = [Line("a < b", ((0.0, 1.0), (1.0, 0.5)), 0.2), Line("grid", ((0.0, 0.5),), 0.6, dots=((0.0, 0.5),))]
    chart = ElementTree.fromstring(step_chart(lines, Axis("r", 1.0), "share", "words", alone=True))
    assert "a < b" in "".join(chart.itertext())
    for path in chart.iterfind(".//{*}path[@class]"):
        if "band" in path.attrib["class"]:
            numbers = path.attrib["d"].replace("M", " ").replace("L", " ").replace("Z", "").split()
            assert all(0 <= float(x) <= WIDTH for x in numbers[::2])
            assert all(0 <= float(y) <= HEIGHT for y in numbers[1::2])


def test_a_share_stands_at_its_height() -> None:
    """Half way up between the rules of 0 % and 100 %."""
    line = Line("grid", ((0.0, 0.5),), None, dots=((0.0, 0.5),))
    chart = ElementTree.fromstring(step_chart([line], Axis("r", 1.0), "share", "words"))
    rules = [
        float(rule.attrib["y1"]) for rule in chart.iterfind(".//{*}line") if rule.attrib["y1"] == rule.attrib["y2"]
    ]
    (dot,) = chart.iterfind(".//{*}circle")
    assert float(dot.attrib["cy"]) == pytest.approx((min(rules) + max(rules)) / 2)
