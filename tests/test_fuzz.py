"""The attacker itself: what it counts as a fault, and that it can be asked for the same cases again."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from densepure_rt.errors import UsageError
from tests import fuzz
from tests.fuzz import Found, Target, damaged, supervised, table


@pytest.fixture(autouse=True)
def kept_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fuzz, "OUT", tmp_path / "kept")
    monkeypatch.setattr(fuzz, "ROOT", tmp_path)
    return tmp_path


def found_by(read: fuzz.Read, folder: Path, seconds: float = 0.3) -> Found:
    return supervised(Target("made", [b"whole"], read), folder / "made", seconds, seed=0)


def answers(path: Path) -> None:
    if path.read_bytes() != b"whole":
        raise UsageError("no")


def test_answers_and_refusals_are_counted_and_are_no_faults(tmp_path: Path) -> None:
    found = found_by(answers, tmp_path)
    assert found.faults == {}
    assert found.cases == found.rejected + found.accepted > 50
    assert found.rejected > 10
    assert found.accepted >= 1


def raises(path: Path) -> None:
    if path.read_bytes() != b"whole":
        raise KeyError("x")


def sleeps(path: Path) -> None:
    if path.read_bytes() != b"whole":
        time.sleep(60)


def grows(path: Path) -> None:
    if path.read_bytes() != b"whole":
        bytearray(2 * fuzz.MOST_MEMORY).count(0)


def dies(path: Path) -> None:
    if path.read_bytes() != b"whole":
        os._exit(11)


def refuses(path: Path) -> None:
    raise UsageError("no")


def cannot_be_printed(path: Path) -> None:
    if path.read_bytes() != b"whole":
        raise UsageError("\ud800")


@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (raises, "KeyError in test_fuzz.py"),
        (sleeps, "more than 0.1 s"),
        (grows, "MiB"),
        (dies, "the process ended with 11"),
        (refuses, "a whole file is refused"),
        (cannot_be_printed, "cannot be printed"),
    ],
)
def test_what_is_neither_an_answer_nor_a_refusal_is_a_fault_whose_input_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: fuzz.Read, fault: str
) -> None:
    monkeypatch.setattr(fuzz, "LONGEST", 0.1 if read is sleeps else 5.0)
    monkeypatch.setattr(fuzz, "MOST_MEMORY", 2**25)
    found = found_by(read, tmp_path, 1.0)
    assert any(fault in what for what in found.faults), found
    kept = tmp_path / next(where for what, where in found.faults.items() if fault in what)
    assert (kept.read_bytes() == b"whole") == (read is refuses)


def test_memory_that_fork_brought_along_does_not_hide_that_of_a_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "MOST_MEMORY", 2**25)
    held = [bytearray(4 * fuzz.MOST_MEMORY)]
    blocks = [bytes(100_000) for _ in range(4 * fuzz.MOST_MEMORY // 100_000)]
    above = bytes(100_000)  # keeps what is free below it in the process
    del blocks

    def frees_then_grows(path: Path) -> None:
        held.clear()
        grows(path)

    found = found_by(frees_then_grows, tmp_path, 1.0)
    assert any("MiB" in what for what in found.faults), found
    assert len(above) == 100_000


def test_a_seed_gives_the_same_cases_again() -> None:
    data = b'{"a": [1, 2.5, null], "name": "x"}'
    cases = [damaged(data, random.Random(seed)) for seed in range(200)]
    assert cases == [damaged(data, random.Random(seed)) for seed in range(200)]
    assert len(set(cases)) > 150


def test_the_table_has_a_line_for_each_target() -> None:
    text = table([Found("npz", 10, 7, 3, 0.25, 2**21), Found("IDX", faults={"hangs": "x"})])
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["npz", "10", "7", "3", "0.25", "s", "2", "MiB", "0"],
        ["IDX", "0", "0", "0", "0.00", "s", "0", "MiB", "1"],
    ]
