"""Logs against what `{:.3}` prints, and the reader against arbitrary bytes."""

from __future__ import annotations

import math
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from densepure_rt.errors import EnvironmentFault, UsageError
from densepure_rt.files import MOST_BYTES
from densepure_rt.legacy.logs import Log, Row, below, bounded_bytes, parsed_rows, printed_interval, read_log

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
MERGED = "idx\tlabel\tpredict\tradius\tcorrect\n"
QUICK = settings(deadline=None, max_examples=300)
RADII = st.one_of(st.just(0.0), st.floats(1e-90, 20))  # no three-digit exponents


def log_of(*radii: str) -> Log:
    return Log("log", "", tuple(Row(idx, 1, 1, radius, 1) for idx, radius in enumerate(radii)), False)


def rows_of(text: str) -> tuple[Row, ...]:
    return parsed_rows(text.encode(), "log")[0]


def test_a_log_of_each_tool_is_read() -> None:
    locuslab = HEADER + "0\t3\t3\t0.497\t1\t0:02:31.238689\n20\t8\t-1\t0.0\t0\t15.4\n"
    assert rows_of(locuslab) == (Row(0, 3, 3, "0.497", 1), Row(20, 8, None, "0.0", 0))
    assert rows_of(MERGED + "0\t3\t3\t0.497\t1\n") == (Row(0, 3, 3, "0.497", 1),)
    forked = "idx\tlabel\tpredict\tradius\tcorrect_num\tcorrect\ttime\n0\t3\t3\t1.23e-05\t7\tTrue\t1.0\n"
    assert rows_of(forked) == (Row(0, 3, 3, "1.23e-05", 1),)


def test_line_ends_of_windows_and_empty_lines_are_nothing() -> None:
    assert rows_of((MERGED + "0\t3\t3\t0.497\t1\n\n").replace("\n", "\r\n")) == (Row(0, 3, 3, "0.497", 1),)


def test_a_last_line_that_was_cut_off_is_left_out() -> None:
    whole = HEADER + "0\t3\t3\t0.497\t1\t1.0\n"
    rows, unfinished = parsed_rows((whole + "1\t3\t3\t0.4").encode(), "log")
    assert (rows, unfinished) == (rows_of(whole), True)
    assert parsed_rows(whole.encode(), "log")[1] is False


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "first line"),
        ("idx\tlabel\tpredict\tcorrect\ttime\n0\t1\t1\t1\t2\n", "first line"),  # of predict.py
        ("idx label predict radius correct\n", "first line"),
        ("idx\tidx\tlabel\tpredict\tradius\tcorrect\n", "first line"),
        (MERGED, "no results"),
        (MERGED + "0\t1\t1\t0.5\n1\t1\t1\t0.5\t1\n", "line 2: 4 columns"),
        (MERGED + "0\t1\t1\t0.5\t1\t9\n", "line 2: 6 columns"),
        (MERGED + "0\t1\t1\tnan\t1\n", "line 2: radius"),
        (MERGED + "0\t1\t1\tinf\t1\n", "radius"),
        (MERGED + "0\t1\t1\t-0.5\t1\n", "radius"),
        (MERGED + "0\t1\t1\t0.5 \t1\n", "radius"),
        (MERGED + "0\t1\t1\t1_0\t1\n", "radius"),
        (MERGED + f"0\t1\t1\t{'9' * 5000}\t1\n", "radius"),
        (MERGED + "0\t1\t1.0\t0.5\t1\n", "predict"),
        (MERGED + "0\t1\t-2\t0.5\t1\n", "predict"),
        (MERGED + "0\t-2\t1\t0.5\t1\n", "label"),
        (MERGED + "-1\t1\t1\t0.5\t1\n", "idx"),
        (MERGED + f"{'9' * 5000}\t1\t1\t0.5\t1\n", "idx"),
        (MERGED + "٣\t1\t1\t0.5\t1\n", "idx"),
        (MERGED + "0\t1\t1\t0.5\tyes\n", "correct"),
    ],
)
def test_what_is_no_log_is_named(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        rows_of(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


@QUICK
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=100).map(lambda tail: MERGED.encode() + tail)))
@example(b"\xff\xfe")
@example(MERGED.encode() + b"0\t1\t1\t0.5\t1\r\r\n")
@example(MERGED.encode() + b"\x00\t\t\t\t\n")
def test_arbitrary_bytes_are_an_error_or_rows_within_bounds(content: bytes) -> None:
    try:
        rows, _ = parsed_rows(content, "log")
    except UsageError:
        return
    for row in rows:
        assert row.idx >= 0
        assert all(label is None or label >= 0 for label in (row.label, row.predict))
        assert row.correct >= 0
        assert Decimal(row.radius) >= 0


@QUICK
@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 999), st.integers(-1, 999), RADII, st.integers(0, 1)),
        min_size=1,
        max_size=5,
    )
)
def test_what_the_tools_write_is_read_as_it_was(rows: list[tuple[int, int, int, float, int]]) -> None:
    text = MERGED + "".join("{}\t{}\t{}\t{:.3}\t{}\n".format(*row) for row in rows)
    assert rows_of(text) == tuple(
        Row(idx, label, None if predict == -1 else predict, f"{radius:.3}", correct)
        for idx, label, predict, radius, correct in rows
    )


@QUICK
@given(RADII)
@example(0.24996)
@example(0.9995)
@example(9.995)
def test_a_radius_lies_in_the_interval_of_what_it_prints_as(radius: float) -> None:
    low, high = printed_interval(f"{radius:.3}", 3)
    assert low <= Decimal(radius) <= high
    assert high - low <= (Decimal(radius) / 50 or Decimal("0.001"))  # and the interval is narrow


@QUICK
@given(RADII, st.integers(1, 6))
def test_a_radius_with_fixed_decimals_lies_in_the_interval_of_its_last_one(radius: float, decimals: int) -> None:
    low, high = printed_interval(f"{radius:.{decimals}f}", None)
    assert low <= Decimal(radius) <= high
    assert high - low <= Decimal(10) ** -decimals


def test_a_log_is_read_as_three_digits_only_when_it_shows_them() -> None:
    assert log_of("0.5", "0.497", "1.0", "0.0").digits == 3
    assert log_of("0.5", "0.3").digits is None  # one decimal would print the same
    assert log_of("0.50", "0.497").digits is None
    assert log_of("0.4971", "0.497").digits is None


@QUICK
@given(st.decimals(0, 10, places=12))
def test_below_is_the_largest_float_that_is_not_above(value: Decimal) -> None:
    found = below(value)
    assert Decimal(found) <= value < Decimal(math.nextafter(found, 99))


def test_a_log_is_read_within_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"12345")
    assert bounded_bytes(path, "log") == b"12345"
    with path.open("wb") as file:
        file.truncate(MOST_BYTES["log"] + 1)
    with pytest.raises(UsageError, match="67,108,865 bytes, more than any log"):
        read_log(path)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_log(tmp_path / "absent")
    with pytest.raises(UsageError, match="it is a folder"):
        read_log(tmp_path)
    with pytest.raises((UsageError, EnvironmentFault)):
        read_log(tmp_path / ("x" * 400))
    with pytest.raises((UsageError, EnvironmentFault)):
        read_log(Path("\0"))
