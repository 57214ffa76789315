"""What can go wrong, by the exit code it ends in.

DensePureError
    CheckFailed        1   something was checked and does not hold: a hash, parity, an engine's output
    UsageError         2   what was asked cannot be done: a missing file, a wrong shape, an impossible option
    EnvironmentFault   3   this machine cannot do it: a package or device is missing, a folder cannot be written

A message says what was asked, what was found and the next move. The command line prints it alone, without a traceback.
"""

from __future__ import annotations


class DensePureError(Exception):
    """The root of this package's errors; `exit_code` is what the command line ends with."""

    exit_code = 1


class CheckFailed(DensePureError):
    """Something was checked and does not hold."""

    exit_code = 1


class UsageError(DensePureError, ValueError):
    """What was asked cannot be done.

    parameter: of a function, such as "sigma", where one is to blame and the message begins with its name; the command
    line then says --sigma in its place.
    """

    exit_code = 2

    def __init__(self, message: str = "", parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class EnvironmentFault(DensePureError, RuntimeError):
    """This machine cannot do it."""

    exit_code = 3


def raise_interrupt(error: BaseException) -> None:
    """Raise KeyboardInterrupt where an error came of one: a compiled module makes an ImportError of it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt) or "KeyboardInterrupt" in str(cause):
            raise KeyboardInterrupt from error
        cause = cause.__cause__ or cause.__context__
