"""What every test can rely on, and what makes none of them wait for the same thing twice."""

from __future__ import annotations

import functools
import gc
import os
import signal
import sys

import pytest

ASKED_TO_END = [getattr(signal, name) for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM") if hasattr(signal, name)]

# Before torch is imported: on a machine that runs several test files, threads that wait for each other burn processors.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    """Let the processes that tests start hear signals that pytest ignores, as it does under nohup or `make test &`.

    An ignored signal is ignored in every child, a handled one is not: exec resets handlers alone. pytest stays deaf.
    """
    for number in ASKED_TO_END:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def pytest_collection_finish() -> None:
    """Spare the garbage collector the millions of objects of torch and of other modules, which stay anyway."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_table_of_operators() -> None:
    """torch's ONNX exporter makes the same table of operators for every export, half a second each time: keep it."""
    if "torch" not in sys.modules:
        return
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:  # another version of torch: it is slower without, no more
        return
    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]
