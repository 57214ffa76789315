from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from densepure_rt import logs
from densepure_rt.errors import EnvironmentFault


@pytest.fixture(autouse=True)
def silent_again() -> Iterator[None]:
    yield
    logs.set_up(verbose=False, log_json=None)


def test_what_is_logged_is_a_json_object_a_line_with_its_values(tmp_path: Path) -> None:
    logs.set_up(verbose=False, log_json=tmp_path / "log.jsonl")
    logs.say("image 3: radius 0.25", idx=3, radius=0.25, predict=None)
    logs.say("gone", logging.WARNING, where=Path("runs/a"))
    first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert first | {"time": ""} == {
        "time": "",
        "level": "info",
        "message": "image 3: radius 0.25",
        "idx": 3,
        "radius": 0.25,
        "predict": None,
    }
    assert datetime.datetime.fromisoformat(first["time"]).utcoffset() == datetime.timedelta(0)
    assert (second["level"], second["where"]) == ("warning", "runs/a")


def test_what_steers_a_terminal_is_written_out_in_lines_that_are_still_json(tmp_path: Path) -> None:
    logs.set_up(verbose=False, log_json=tmp_path / "log.jsonl")
    logs.say("a\x7fb\x9b31m", where=Path("c\x9bd"), names=("e\u202e", "T\u00e4sche"))
    (line,) = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    said = json.loads(line)
    assert said["message"] == r"a\x7fb\x9b31m"
    assert said["where"] == r"c\x9bd"
    assert said["names"] == [r"e\u202e", "T\u00e4sche"]
    assert line.isprintable()


def test_a_log_is_appended_to(tmp_path: Path) -> None:
    for _ in range(2):
        logs.set_up(verbose=False, log_json=tmp_path / "log.jsonl")
        logs.say("again")
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("verbose", [False, True])
def test_the_screen_shows_warnings_and_all_the_rest_when_asked(
    capsys: pytest.CaptureFixture[str], verbose: bool
) -> None:
    logs.set_up(verbose, log_json=None)
    logs.say("an image")
    logs.say("not finite", logging.WARNING)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == (["INFO: an image"] if verbose else []) + ["WARNING: not finite"]


def test_a_log_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"cannot write the log .*`log_json`"):
        logs.set_up(verbose=False, log_json=tmp_path / "nowhere" / "log.jsonl")
