from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from densepure_rt.commands import console
from densepure_rt.commands.console import track
from densepure_rt.smoothing.forecast import Range
from densepure_rt.text import duration

ROOT = Path(__file__).resolve().parents[3]
SECONDS = {"s": 1, "min": 60, "h": 3600, "days": 86_400}


def in_seconds(text: str) -> float:
    """What a person reads: the number times its unit."""
    value, unit = text.split(" ")
    return float(value) * SECONDS[unit]


@pytest.fixture(params=["terminal", "file"])
def shown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What `track` writes through the console, on a terminal and without one."""
    written = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=written, force_terminal=request.param == "terminal"))
    return written


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (12, "12 s"),
        (119, "119 s"),
        (180, "3.0 min"),
        (7560, "2.1 h"),
        (432_000, "5.0 days"),
    ],
)
def test_a_duration_is_a_short_number_and_a_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.floats(0, 1e9))
def test_a_duration_has_two_or_three_figures_up_to_days(seconds: float) -> None:
    match = re.fullmatch(r"([0-9]+\.[0-9]|[0-9]+) (s|min|h|days)", duration(seconds))
    assert match
    assert match[2] == "days" or len(match[1].replace(".", "")) <= 3


@given(st.floats(1, 172_800, exclude_max=True))
def test_a_duration_reads_back_within_five_percent(seconds: float) -> None:
    assert in_seconds(duration(seconds)) == pytest.approx(seconds, rel=0.0501)


@given(st.floats(172_800, 1e9))
def test_days_are_rounded_to_the_nearest(seconds: float) -> None:
    assert abs(in_seconds(duration(seconds)) - seconds) <= 0.5 * 86_400


@given(st.floats(0, 1e9), st.floats(0, 1e9))
def test_a_longer_time_never_reads_shorter(one: float, other: float) -> None:
    shorter, longer = sorted((one, other))
    assert in_seconds(duration(shorter)) <= in_seconds(duration(longer))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_tracking_yields_the_same_items_with_and_without_a_terminal(shown: io.StringIO, count: int) -> None:
    items = [object() for _ in range(count)]
    assert list(track(iter(items), count)) == items


@pytest.mark.usefixtures("shown")
def test_tracking_takes_an_item_only_when_it_is_asked_for() -> None:
    taken: list[int] = []

    def work() -> Iterator[int]:
        for i in range(3):
            taken.append(i)
            yield i

    tracked = iter(track(work(), 3))
    assert taken == []
    assert next(tracked) == 0
    assert taken == [0]


@pytest.mark.usefixtures("shown")
def test_tracking_hands_an_error_of_the_work_on() -> None:
    def work() -> Iterator[int]:
        yield 1
        raise OSError("disk")

    tracked = track(work(), 2)
    assert next(tracked) == 1
    with pytest.raises(OSError, match="disk"):
        next(tracked)


def test_without_a_terminal_the_last_item_is_always_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "stderr", Console(file=io.StringIO(), force_terminal=False))
    seen = [""]
    for item in track(range(3), 3, lambda: seen[0]):
        seen[0] = f"seen {item}"
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("3/3 images, ")
    assert line.endswith("seen 2")


def test_without_a_terminal_lines_are_printed_at_an_interval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "stderr", Console(file=io.StringIO(), force_terminal=False))
    monkeypatch.setattr(console, "PLAIN_EVERY", 0.0)
    assert list(track(range(3), 3)) == [0, 1, 2]
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["1/3", "2/3", "3/3"]


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_shown_moves_while_one_item_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    written = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=written, force_terminal=terminal, width=200))
    monkeypatch.setattr(console, "PLAIN_EVERY", 1.0)
    monkeypatch.setattr(console, "BAR_EVERY", 0.1)
    began = time.monotonic()

    def work() -> Iterator[int]:
        until = time.monotonic() + 30
        while time.monotonic() < until and "7 samples" not in written.getvalue():
            written.write(capsys.readouterr().err)
            time.sleep(0.05)
        yield 0

    def samples() -> str:
        return f"{7 if time.monotonic() - began > 1.5 else 3} samples; image 0 at 7 of 9"

    assert list(track(work(), 2, samples, left=lambda: Range(1, 60, 1e6))) == [0]
    shown = written.getvalue() + capsys.readouterr().err
    assert "0/2" in shown
    assert "7 samples; image 0 at 7 of 9" in shown
    assert "about 60 s (1.0 s to 12 days) left" in shown
    assert time.monotonic() - began < 25
    assert not [thread for thread in threading.enumerate() if thread.name == "densepure-rt lines"]


def test_on_a_terminal_the_bar_shows_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=written, force_terminal=True, width=200))
    seen = [""]
    for item in track(range(2), 2, lambda: seen[0]):
        seen[0] = f"seen {item}"
    assert "2/2" in written.getvalue()
    assert "seen 1" in written.getvalue()
    assert math.isclose(written.getvalue().count("\x1b[?25l"), written.getvalue().count("\x1b[?25h"))  # cursor is back


def test_the_bar_stays_off_stdout_on_a_real_terminal(tmp_path: Path) -> None:
    """stderr is a pseudo-terminal, stdout a file, as in `densepure-rt predict > labels.tsv`."""
    pty = pytest.importorskip("pty", reason="pseudo-terminals are a POSIX matter")
    code = """
from densepure_rt.commands.console import track
for item in track(range(3), 3):
    print(item)
"""
    ours, theirs = pty.openpty()
    with (tmp_path / "out").open("w") as out:
        env = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
        subprocess.run([sys.executable, "-c", code], stdout=out, stderr=theirs, env=env, check=True, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert (tmp_path / "out").read_text() == "0\n1\n2\n"
    assert "3/3" in shown
    assert "images" in shown
