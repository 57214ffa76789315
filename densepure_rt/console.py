"""What a run shows while it works: a bar on a terminal, plain lines elsewhere. Results go to stdout, this to stderr."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from densepure_rt.text import printable

PLAIN_EVERY = 10.0  # seconds between plain lines
BAR_EVERY = 0.5  # seconds between changes of a bar's status


class PlainConsole(Console):
    """Prints text as it stands, but for what would steer the terminal: names of files and of runs are others'."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(one, keep="\n") if isinstance(one, str) else one for one in objects), **options)


stderr = PlainConsole(stderr=True, highlight=False, markup=False, soft_wrap=True)
stdout = PlainConsole(highlight=False, markup=False, soft_wrap=True)
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]  # of every command
T = TypeVar("T")


def duration(seconds: float) -> str:
    """Two figures that a person can read: 0.4 s, 12 s, 3 min, 2.1 h, 5 days."""
    units = ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h"), (math.inf, 86_400, "days"))
    divisor, unit = next((divisor, unit) for limit, divisor, unit in units if seconds < limit)
    value = seconds / divisor
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"


def plural(count: int, noun: str) -> str:
    """1 image, 2 images."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def rows(console: Console, pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values, aligned; a terminal wraps long values, and nothing is ever cut."""
    pairs = list(pairs)
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        console.print(f"{name:<{width}}  {value}")


class Status:
    """text: one line on how it goes so far, asked for when it is shown."""

    def __init__(self, text: Callable[[], str] = str) -> None:
        self.text = text


_quiet = False


def be_quiet(quiet: bool) -> None:
    """Whether `track` shows nothing."""
    global _quiet
    _quiet = quiet


def track(work: Iterable[T], total: int, status: Status, before: int = 0) -> Iterator[T]:
    """`work`, item by item, while images done, rate, time left and `status` are shown.

    total: with those that were done `before`.
    """
    if _quiet:
        return iter(work)
    show = _bar if stderr.is_terminal else _lines
    return show(work, total, status, before)


def _bar(work: Iterable[T], total: int, status: Status, before: int) -> Iterator[T]:
    columns = (
        MofNCompleteColumn(),
        TextColumn("images"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=stderr, transient=True, redirect_stdout=stdout.is_terminal) as progress:
        task = progress.add_task("", total=total, completed=before, rate="", status="")
        started = said = time.monotonic()
        for done, item in enumerate(work, start=1):
            yield item
            now = time.monotonic()
            if now - said >= BAR_EVERY or before + done == total:
                said = now
                progress.update(task, status=status.text())
            rate = f"{duration((time.monotonic() - started) / done)} an image"
            progress.update(task, completed=before + done, rate=rate)


def _lines(work: Iterable[T], total: int, status: Status, before: int) -> Iterator[T]:
    started = said = time.monotonic()
    for done, item in enumerate(work, start=1):
        yield item
        now = time.monotonic()
        if now - said >= PLAIN_EVERY or before + done == total:
            said = now
            each, left = (now - started) / done, total - before - done
            line = f"{before + done}/{total} images, {duration(each)} an image, {duration(each * left)} left"
            print(f"{line}; {status.text()}" if status.text() else line, file=sys.stderr, flush=True)
