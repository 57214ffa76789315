from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densepure_rt.rounding import exact, floored, floored_share, raised, raised_share, ratio, typed


@given(st.floats(0, 1e6))
def test_printed_radius_is_below_the_radius_by_less_than_a_digit(radius: float) -> None:
    printed = floored(radius)
    assert re.fullmatch(r"\d+\.\d{3}", printed)
    assert 0 <= Fraction(radius) - Fraction(Decimal(printed)) < Fraction(1, 1000)


@pytest.mark.parametrize(
    ("radius", "printed"),
    [(0.9999, "0.999"), (0.2509999, "0.250"), (0.25, "0.250"), (0.0, "0.000"), (1e-9, "0.000"), (12.3456, "12.345")],
)
def test_printed_radius_is_floored(radius: float, printed: str) -> None:
    assert floored(radius) == printed


@given(st.floats(1e-300, 1.0))
def test_a_printed_probability_is_never_below_the_real_one(probability: float) -> None:
    assert probability <= float(raised(probability, figures=2)) <= probability * 1.1


@given(st.floats(0, 1e6), st.integers(0, 6))
def test_a_raised_number_is_above_the_number_by_less_than_a_digit(value: float, decimals: int) -> None:
    assert 0 <= Fraction(raised(value, decimals)) - Fraction(value) < Fraction(1, 10**decimals)


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.integers(0, 3))
def test_shares_are_rounded_as_their_ratio_of_counts(images: int, certified: int, decimals: int) -> None:
    certified = min(certified, images)
    truth, unit = Fraction(100 * certified, images), Fraction(1, 10**decimals)
    assert ratio(certified / images) == Fraction(certified, images)
    assert Fraction(floored_share(certified / images, decimals).removesuffix(" %")) == truth // unit * unit
    assert Fraction(raised_share(certified / images, decimals).removesuffix(" %")) == -(-truth // unit) * unit


@pytest.mark.parametrize(
    ("share", "decimals", "down", "up"),
    [
        (199 / 200, 0, "99 %", "100 %"),
        (1999 / 2000, 1, "99.9 %", "100.0 %"),
        (29 / 100, 1, "29.0 %", "29.0 %"),
        (57 / 100, 0, "57 %", "57 %"),
        (1 / 3, 1, "33.3 %", "33.4 %"),
        (0.0, 1, "0.0 %", "0.0 %"),
        (1.0, 1, "100.0 %", "100.0 %"),
    ],
)
def test_a_share_is_whole_only_when_it_is(share: float, decimals: int, down: str, up: str) -> None:
    assert (floored_share(share, decimals), raised_share(share, decimals)) == (down, up)


@pytest.mark.parametrize(
    ("value", "figures", "down", "up"),
    [
        (Fraction(1, 3), 2, "0.33", "0.34"),
        (Fraction(1, 100), 3, "0.01", "0.01"),
        (Fraction(12345), 3, "12300", "12400"),
        (0.0009999, 2, "0.00099", "0.0010"),
        (9.93e-10, 1, "9e-10", "1e-9"),
    ],
)
def test_figures_are_those_that_count(value: float, figures: int, down: str, up: str) -> None:
    assert (floored(value, figures=figures), raised(value, figures=figures)) == (down, up)


@given(st.floats(0, 1e6))
def test_what_was_asked_for_can_be_typed_again(value: float) -> None:
    assert float(exact(value)) == value
    assert Fraction(exact(value)) == typed(value)


@pytest.mark.parametrize(("value", "shown"), [(0.25, "0.25"), (1.0, "1"), (0.0, "0"), (0.24999999, "0.24999999")])
def test_what_was_asked_for_is_shown_as_it_was_typed(value: float, shown: str) -> None:
    assert exact(value) == shown


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_no_number_is_said_to_be_none(value: float) -> None:
    assert floored(value) == raised(value, figures=2) == str(value)
