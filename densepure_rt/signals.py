"""Signals that ask a command to end: SIGTERM and SIGHUP are Ctrl-C, each with the exit code that a shell gives it.

Schedulers send SIGTERM, and a terminal that closes sends SIGHUP. The first signal raises KeyboardInterrupt in the main
thread, so that what is done is kept and told; a second one ends the process at once, as `kill -9` does, wherever it is.
A signal that the process was started to ignore, as `nohup` does, stays ignored.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ASKING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_ignored: set[int] = set()
_received: int | None = None


def asked() -> bool:
    """Whether a signal has come since the command began."""
    return _received is not None


def exit_code() -> int:
    """Return what a command that was asked to end exits with: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
    return 128 + (_received or signal.SIGINT)


def listen() -> None:
    """Raise KeyboardInterrupt at the first signal from now on. To be repeated after a library took them for itself.

    Does nothing outside the main thread, where no signal can be taken.
    """
    if threading.current_thread() is threading.main_thread():
        for number in ASKING:
            if number not in _ignored:
                signal.signal(number, _interrupt)


@contextmanager
def asking_to_end() -> Iterator[None]:
    """`listen` for as long as a command runs. After it, what is left is Python's own end, which nothing interrupts."""
    global _received
    _received = None
    _ignored.clear()
    _ignored.update(number for number in ASKING if signal.getsignal(number) is signal.SIG_IGN)
    listen()
    try:
        yield
    finally:
        _let_go()


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _received
    _received = number
    _let_go()
    raise KeyboardInterrupt


def _let_go() -> None:
    """Give the signals back to the kernel, which ends the process."""
    if threading.current_thread() is threading.main_thread():
        for number in ASKING:
            if number not in _ignored:
                signal.signal(number, signal.SIG_DFL)
