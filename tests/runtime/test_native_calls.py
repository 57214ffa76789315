"""Calls that a process can leave. What a signal and an exit do is looked at in processes of their own."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import wait
from pathlib import Path

import pytest

from densepure_rt.runtime.native_calls import Callers, end_calls, stoppable

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60  # in which a script ends even on a loaded machine; one that hangs never does
START = """
import os, signal, sys, threading, time
from densepure_rt.runtime import native_calls
from densepure_rt.runtime.native_calls import Callers, leaving_calls, stoppable

told = threading.Event()


def interrupt_after(seconds):
    threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT)).start()


"""


def nothing() -> None:
    pass


def ended(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", START + script], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS
    )


def test_calls_give_what_they_return_and_raise_as_many_at_a_time_as_told() -> None:
    together = threading.Barrier(3, timeout=30)
    callers = Callers(3, nothing)
    assert {call.result(30) for call in [callers.submit(together.wait) for _ in range(3)]} == {0, 1, 2}
    with pytest.raises(ZeroDivisionError):
        callers.submit(divmod, 1, 0).result(30)
    assert callers.submit(divmod, 7, 2).result(30) == (3, 1)
    names = {callers.submit(threading.get_ident).result(30) for _ in range(20)}
    assert len(names) <= 3
    callers.close()


def test_threads_end_when_they_are_closed_or_when_nobody_holds_them() -> None:
    for end in (Callers.close, lambda callers: None):
        callers = Callers(2, nothing)
        threads = {callers.submit(threading.current_thread).result(30) for _ in range(2)}
        end(callers)
        del callers
        gc.collect()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()


def test_a_call_that_is_over_holds_nothing_of_it() -> None:
    class Held:
        def use(self) -> None:
            pass

    callers, held = Callers(1, nothing), Held()
    gone = weakref.ref(held)
    callers.submit(held.use).result(30)
    del held
    until = time.monotonic() + 30
    while gone() is not None and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    assert gone() is None
    callers.close()


def test_all_calls_of_the_process_are_told_to_stop_and_waited_for() -> None:
    told = threading.Event()
    callers = Callers(2, told.set)
    calls = [callers.submit(told.wait, 30) for _ in range(2)]
    while not all(call.running() for call in calls):
        time.sleep(0.01)
    assert end_calls()
    assert wait(calls, 0).not_done == set()
    callers.close()


def test_a_stoppable_call_returns_its_result_and_raises_its_error() -> None:
    assert stoppable(lambda: 5, nothing) == 5
    with pytest.raises(ZeroDivisionError):
        stoppable(lambda: 1 // 0, nothing)


def test_ctrl_c_stops_a_call_and_is_raised_once_it_has_ended() -> None:
    done = ended("""
seen = []
interrupt_after(0.2)
try:
    stoppable(lambda: seen.append(told.wait(60)), told.set)
except KeyboardInterrupt:
    print(seen)
""")
    assert (done.stdout.strip(), done.returncode) == ("[True]", 0), done.stderr


def test_exit_stops_the_calls_that_are_running_and_waits_for_them() -> None:
    done = ended("""
callers = Callers(1, told.set)
call = callers.submit(lambda: (told.wait(60), print("ended")))
while not call.running():
    time.sleep(0.01)
""")
    assert (done.stdout.strip(), done.returncode) == ("ended", 0), done.stderr


@pytest.mark.parametrize(("code", "expected"), [("7", 7), ("None", 0), ("'words'", 1)])
def test_a_process_ends_with_its_exit_code_although_a_call_does_not_stop(code: str, expected: int) -> None:
    """As one whose single kernel takes minutes: nothing is waited for any longer than told."""
    done = ended(f"""
native_calls.LAST_SECONDS = 0.2


@leaving_calls
def main():
    callers = Callers(1, told.set)
    call = callers.submit(time.sleep, 600)
    while not call.running():
        time.sleep(0.01)
    print("said", end="")
    sys.exit({code})


main()
""")
    assert (done.stdout, done.returncode) == ("said", expected), done.stderr
    assert ("words" in done.stderr) == (expected == 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_waits_for_none_of_its_parents_calls() -> None:
    done = ended("""
callers = Callers(1, told.set)
call = callers.submit(told.wait, 60)
while not call.running():
    time.sleep(0.01)
started = time.monotonic()
if os.fork() == 0:
    sys.exit(0 if native_calls.end_calls() and time.monotonic() - started < 4 else 1)
print(os.waitstatus_to_exitcode(os.wait()[1]))
""")
    assert (done.stdout.strip(), done.returncode) == ("0", 0), done.stderr
