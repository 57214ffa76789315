"""Native calls that a process can leave: Ctrl-C ends them, and exit waits for none of them for long.

Python sees a signal only between two of its own instructions, and joins the threads of an executor before it ends. So a
call whose end depends on a file, such as the run of an ONNX graph, has a daemon thread of its own, and a way to be told
to stop.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial, wraps
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, NoReturn, TypeVar

T = TypeVar("T")
STOP_SECONDS = 5.0  # for a call that was told to stop; ONNX Runtime looks after each node of a graph
LAST_SECONDS = 1.0  # more at the end of the process, for those that had their time
THREAD_NAME = "densepure-rt"

_running: dict[Future[Any], Callable[[], None]] = {}  # the calls of this process, each with what stops it
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_running.clear)


class Call(NamedTuple):
    future: Future[Any]
    run: Callable[[], Any]
    stop: Callable[[], None]


class Callers:
    """Threads that run calls, started as they are needed. Exit joins none of them.

    Args:
        most: Threads at a time.
        stop: Tells the calls that are running to end soon. It may be called from any thread, and more than once.
    """

    def __init__(self, most: int, stop: Callable[[], None]) -> None:
        self._most, self._stop, self._started = most, stop, 0
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        weakref.finalize(self, self._calls.put, None)
        # After the import of the library that is called: what is registered last runs first.
        atexit.unregister(end_calls)
        atexit.register(end_calls)

    def submit(self, function: Callable[..., T], *arguments: object) -> Future[T]:
        """Run `function(*arguments)` in one of the threads."""
        future = Future[T]()
        self._calls.put(Call(future, partial(function, *arguments), self._stop))
        if self._started < self._most and not self._idle.acquire(blocking=False):
            self._started += 1
            threading.Thread(target=_run_calls, args=(self._calls, self._idle), name=THREAD_NAME, daemon=True).start()
        return future

    def close(self) -> None:
        """End the threads, each after the call that it runs. Safe to call twice."""
        self._calls.put(None)


def _run_calls(calls: SimpleQueue[Call | None], idle: threading.Semaphore) -> None:
    """Run calls until None comes, which the next thread must see too."""
    while True:
        try:
            call = calls.get_nowait()
        except Empty:
            idle.release()
            call = calls.get()
        if call is None:
            calls.put(None)
            return
        _run(call)
        del call  # or it would live, with all that it holds, until the next one comes


def _run(call: Call) -> None:
    if not call.future.set_running_or_notify_cancel():
        return
    _running[call.future] = call.stop
    try:
        result = call.run()
    except BaseException as error:
        call.future.set_exception(error)
    else:
        call.future.set_result(result)
    finally:
        _running.pop(call.future, None)


def stoppable(function: Callable[[], T], stop: Callable[[], None]) -> T:
    """Return `function()`, run in a thread of its own, which `stop` ends where this thread is interrupted."""
    callers = Callers(1, stop)
    future = callers.submit(function)
    callers.close()
    try:
        return future.result()
    except BaseException:
        if not future.done():
            stop()
            wait([future], STOP_SECONDS)
        raise


def end_calls(seconds: float = STOP_SECONDS) -> bool:
    """Stop every call of this process. Returns whether all have ended within `seconds`."""
    for stop in list(_running.values()):
        stop()
    return not wait(list(_running), seconds).not_done


def leaving_calls(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate an entry point: the process ends with its exit code, even where a call does not stop.

    The libraries whose calls are running must not be taken down beneath them.
    """

    @wraps(main)
    def entry() -> None:
        try:
            main()
        except SystemExit as ended:
            if _running and not end_calls(LAST_SECONDS):
                _end_at_once(ended)
            raise

    return entry


def _end_at_once(ended: SystemExit) -> NoReturn:
    if isinstance(ended.code, str):
        with suppress(OSError):
            print(ended.code, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1)
