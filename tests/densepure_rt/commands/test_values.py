from __future__ import annotations

import math
from pathlib import Path

import pytest

from densepure_rt.commands.values import folder_of, radii_of, seconds_of
from densepure_rt.errors import UsageError


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("30s", 30), ("1.5 min", 90), (" 2h ", 7200)])
def test_times_are_said_in_seconds_minutes_or_hours(text: str, seconds: float) -> None:
    assert seconds_of(text, "--budget") == seconds


def test_no_budget_is_no_limit() -> None:
    assert seconds_of(None, "--budget") == math.inf


def test_a_folder_of_no_name_is_not_the_folder_here() -> None:
    assert folder_of(".") == Path()
    with pytest.raises(UsageError, match="it is empty"):
        folder_of("")


@pytest.mark.parametrize("text", ["", "s", "0", "-1s", "nan", "inf", "1d", "1 s min", "1e999h"])
def test_what_is_no_time_is_refused_by_its_option(text: str) -> None:
    with pytest.raises(UsageError, match="--rotate"):
        seconds_of(text, "--rotate")


def test_radii_are_said_in_pixel_units_or_in_multiples_of_sigma() -> None:
    assert radii_of("0,0.5", None, sigma=0.25) == (0.0, 0.5)
    assert radii_of(None, "0,0.5", sigma=0.25) == (0.0, 0.125)
    assert radii_of(None, None, sigma=0.25) is None


@pytest.mark.parametrize(("radii", "multiples", "words"), [("0", "0", "give one"), ("0;1", None, "'0;1'")])
def test_radii_that_are_none_are_refused(radii: str, multiples: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        radii_of(radii, multiples, sigma=0.25)
