"""What can go wrong, by the exit code it ends in.

DensePureError
    CheckFailed        1   something was checked and does not hold: a hash, parity, an engine's output
    UsageError         2   what was asked cannot be done: a missing file, a wrong shape, an impossible option
    EnvironmentFault   3   this machine cannot do it: a package or device is missing, a folder cannot be written

A message says what was asked, what was found and the next move. The command line prints it alone, without a traceback.
It has parameters of ours between backticks, `engine_sha256` or `antialias`=False, where the command line says options.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

PARAMETER = re.compile(r"`([a-z]\w*)`(=False)?")


class DensePureError(Exception):
    """The root of this package's errors; `exit_code` is what the command line ends with."""

    exit_code = 1

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters that the message speaks of, such as "sigma", each once."""
        return tuple(dict.fromkeys(found[1] for found in PARAMETER.finditer(str(self))))


class CheckFailed(DensePureError):
    """Something was checked and does not hold."""

    exit_code = 1


class UsageError(DensePureError, ValueError):
    """Refuse what was asked for."""

    exit_code = 2


class EnvironmentFault(DensePureError, RuntimeError):
    """This machine cannot do it."""

    exit_code = 3


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, then what caused it, the first cause last."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def raise_interrupt(error: BaseException) -> None:
    """Raise KeyboardInterrupt where an error came of one: a compiled module makes an ImportError of it."""
    if any(isinstance(cause, KeyboardInterrupt) or "KeyboardInterrupt" in str(cause) for cause in causes(error)):
        raise KeyboardInterrupt from error
