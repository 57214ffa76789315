"""What a run says of itself, through the standard library's logging: on stderr, and as JSON lines in a file."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from densepure_rt.errors import EnvironmentFault
from densepure_rt.text import all_printable, printable

logger = logging.getLogger("densepure_rt")
logger.addHandler(logging.NullHandler())  # a library is silent until it is told where to speak
_own: list[logging.Handler] = []
_lost = False
FIELDS = "fields"  # the attribute of a log record that holds values beside its message


class JsonLines(logging.Formatter):
    """A record as one JSON object: time (UTC), level, message, and what it is about by name."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        said = {"time": time.isoformat(timespec="milliseconds"), "level": record.levelname.lower()}
        said |= {"message": record.getMessage()} | getattr(record, FIELDS, {})
        plain = json.loads(json.dumps(said, default=str))  # paths and tuples as JSON has them
        return json.dumps(all_printable(plain), ensure_ascii=False)


class Plain(logging.Formatter):
    """A record as one line for a person."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n")


class Screen(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 takes none
    """Lines for a person. A terminal that is gone takes none, and nothing is lost."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class File(logging.FileHandler):
    """Lines in a file. When it takes no more, that is said once, and `lost` tells of it."""

    def handleError(self, record: logging.LogRecord) -> None:
        global _lost
        _lost, error = True, sys.exc_info()[1]
        why = error.strerror if isinstance(error, OSError) else error
        logger.removeHandler(self)
        with contextlib.suppress(OSError):
            self.close()
        say(f"cannot write the log {self.baseFilename} ({why}): it ends here, and the work goes on", logging.ERROR)


def lost() -> bool:
    """Say whether a log could not be written since this was last asked."""
    global _lost
    found, _lost = _lost, False
    return found


def say(message: str, level: int = logging.INFO, **fields: object) -> None:
    """Log a message with values by name."""
    logger.log(level, message, extra={FIELDS: fields})


def set_up(verbose: bool, log_json: Path | None, word: Callable[[str], str] = str) -> None:
    """Send what is logged to stderr (`verbose`: all, else warnings), and all of it to `log_json` as JSON lines.

    word: puts messages into the reader's words. Raises EnvironmentFault when the file cannot be written.
    """

    def reworded(record: logging.LogRecord) -> bool:
        record.msg, record.args = word(record.getMessage()), ()
        return True

    logger.setLevel(logging.DEBUG)
    while _own:  # of an earlier command in this process
        logger.removeHandler(_own[-1])
        _own.pop().close()
    screen = Screen(sys.stderr)
    screen.setLevel(logging.DEBUG if verbose else logging.WARNING)
    screen.setFormatter(Plain("%(levelname)s: %(message)s"))
    screen.addFilter(reworded)
    listen(screen)
    if log_json is not None:
        try:
            lines = File(log_json, encoding="utf-8")
        except OSError as error:
            raise EnvironmentFault(
                f"cannot write the log {log_json} ({error.strerror}): name another `log_json`"
            ) from error
        lines.setFormatter(JsonLines())
        lines.addFilter(reworded)
        listen(lines)


def listen(handler: logging.Handler) -> None:
    logger.addHandler(handler)
    _own.append(handler)
