"""What every test can rely on."""

from __future__ import annotations

import signal

ASKED_TO_END = [getattr(signal, name) for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM") if hasattr(signal, name)]


def pytest_configure() -> None:
    """Let the processes that tests start hear signals that pytest ignores, as it does under nohup or `make test &`.

    An ignored signal is ignored in every child, a handled one is not: exec resets handlers alone. pytest stays deaf.
    """
    for number in ASKED_TO_END:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
