"""The last resort of a process that has to end: whatever thread hangs, it ends when it is time."""

from __future__ import annotations

import logging
import os
import threading

from densepure_rt import logs

WORD_SECONDS = 0.2  # in which what is logged has to be written


class LastResort:
    """Ends the process, without a word to any thread, when its time has come. Until then it does nothing."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    @property
    def set(self) -> bool:
        return self._timer is not None

    def within(self, seconds: float, exit_code: int, why: str) -> None:
        """Set the time anew, from now on. why: what is logged then; an empty one is no fault and is not."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self._end, [exit_code, why])
        self._timer.daemon = True
        self._timer.start()

    def _end(self, exit_code: int, why: str) -> None:
        hurry = threading.Timer(WORD_SECONDS, os._exit, [exit_code])  # should nobody take what is logged
        hurry.daemon = True
        hurry.start()
        if why:
            logs.say(why, logging.ERROR)
        os._exit(exit_code)
