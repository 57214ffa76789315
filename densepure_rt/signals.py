"""Signals that ask a command to end: SIGTERM and SIGHUP are Ctrl-C, each with the exit code that a shell gives it.

Schedulers send SIGTERM, and a terminal that closes sends SIGHUP. The first signal raises KeyboardInterrupt in the main
thread, so that what is done is kept and told; a second one ends the process at once, as `kill -9` does, wherever it is.
A signal that the process was started to ignore, as `nohup` does, stays ignored.

Compiled code may swallow a KeyboardInterrupt (pydantic does, while it looks at a file): it is then raised again.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

ASKING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_ignored: set[int] = set()
AGAIN_AFTER = 0.02  # seconds
_received: signal.Signals | None = None
_swallowed = False


def asked() -> bool:
    """Say whether a signal has come since the command began."""
    return _received is not None


def swallowed() -> bool:
    """Say whether the last signal was lost in compiled code, so that an error that comes now may be made of it."""
    return _swallowed


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
    global _received, _swallowed
    _received, _swallowed = None, False
    _ignored.clear()
    _ignored.update(number for number in ASKING if signal.getsignal(number) is signal.SIG_IGN)
    hook = sys.unraisablehook
    sys.unraisablehook = partial(_raise_again, hook)
    listen()
    try:
        yield
    finally:
        _let_go()
        sys.unraisablehook = hook


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _received, _swallowed
    _received, _swallowed = signal.Signals(number), False
    _let_go()
    raise KeyboardInterrupt


def _raise_again(hook: Callable[[sys.UnraisableHookArgs], object], ignored: sys.UnraisableHookArgs) -> None:
    """Bring a swallowed KeyboardInterrupt to what runs after it in the main thread: none can be raised from here."""
    if _received is None or not issubclass(ignored.exc_type, KeyboardInterrupt):
        hook(ignored)
        return
    global _swallowed
    _swallowed = True
    listen()
    again = threading.Timer(AGAIN_AFTER, _send, (_received,))
    again.daemon = True
    again.start()


def _send(number: signal.Signals) -> None:
    """Send a signal to the main thread, which may be asleep, if it still listens."""
    main = threading.main_thread().ident
    if signal.getsignal(number) is not _interrupt:
        return
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, number)
    else:
        os.kill(os.getpid(), number)


def _let_go() -> None:
    """Give the signals back to the kernel, which ends the process."""
    if threading.current_thread() is threading.main_thread():
        for number in ASKING:
            if number not in _ignored:
                signal.signal(number, signal.SIG_DFL)
