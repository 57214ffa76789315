from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENDED_BY_EACH_SIGNAL = """
import signal
import subprocess

import pytest


@pytest.mark.parametrize("name", "HUP INT QUIT TERM".split())
def test_a_child_hears(name):
    number = getattr(signal, f"SIG{name}")
    with subprocess.Popen(["sleep", "5"]) as child:
        child.send_signal(number)
    assert child.returncode == -number


def test_pytest_itself_stays_deaf():
    for name in "HUP INT QUIT TERM".split():
        signal.raise_signal(getattr(signal, f"SIG{name}"))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are a POSIX matter")
def test_children_hear_the_signals_that_pytest_was_started_to_ignore(tmp_path: Path) -> None:
    """As under nohup, in the background of a script, and in some CI."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(ENDED_BY_EACH_SIGNAL)
    deaf = 'trap "" HUP INT QUIT TERM; exec "$0" -m pytest -q -p no:cacheprovider -p no:xdist "$1"'
    command = ["sh", "-c", deaf, sys.executable, str(tmp_path / "test_it.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout
