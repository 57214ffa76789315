"""Processes that would not end by themselves."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

HANGING = {
    "a thread": "threading.Thread(target=time.sleep, args=(3600,)).start()",
    "a thread that computes": "threading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()",
    "the main thread": "time.sleep(3600)",
    "a log that nobody takes": "logging.getLogger('densepure_rt').addHandler(Deaf())\ntime.sleep(3600)",
}
DEAF = "class Deaf(logging.Handler):\n    def emit(self, _): time.sleep(3600)\n"


@pytest.mark.parametrize("hanging", HANGING)
def test_whatever_hangs_the_process_ends_when_it_is_time(hanging: str) -> None:
    code = (
        "import logging, threading, time\nfrom densepure_rt import logs\n"
        "from densepure_rt.serving.ending import LastResort\n"
        f"{DEAF}logs.set_up(False, None)\nforce = LastResort()\nassert not force.set\n"
        f"force.within(3600, 5, '')\nforce.within(0.5, 7, 'it hangs')\nassert force.set\n{HANGING[hanging]}"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 7
    assert done.stderr == "ERROR: it hangs\n"
    assert 0.5 < time.monotonic() - began < 10
