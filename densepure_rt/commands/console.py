"""What a run shows while it works: a bar on a terminal, plain lines elsewhere. Results go to stdout, this to stderr."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from densepure_rt.errors import PARAMETER, CheckFailed, EnvironmentFault
from densepure_rt.optional import optional
from densepure_rt.rounding import exact
from densepure_rt.text import duration, numbered, plural, printable

if TYPE_CHECKING:
    from densepure_rt.runs.falsifier import Falsification
    from densepure_rt.smoothing.forecast import Range

PLAIN_EVERY = 10.0  # seconds between plain lines
BAR_EVERY = 0.5  # seconds between changes of a bar's status


class PlainConsole(Console):
    """Prints text as it stands, but for what would steer the terminal: names of files and of runs are others'."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(one, keep="\n") if isinstance(one, str) else one for one in objects), **options)


stderr = PlainConsole(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
stdout = PlainConsole(highlight=False, markup=False, emoji=False, soft_wrap=True)
T = TypeVar("T")


def rows(console: Console, pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values, aligned; a terminal wraps long values, and nothing is ever cut."""
    pairs = list(pairs)
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        console.print(f"{name:<{width}}  {value}")


def track(
    work: Iterable[T],
    total: int,
    text: Callable[[], str] = str,
    before: int = 0,
    left: Callable[[], Range | None] = lambda: None,
) -> Iterator[T]:
    """`work`, item by item, while images done, rate, time left and `text` are shown, also while one takes long.

    total: with those that were done `before`. left: of the seconds, where it is known better than by the items done.
    """
    pace = Pace(total, text, before, left)
    return (_bar if stderr.is_terminal else _lines)(work, pace)


class Pace:
    """The progress of the work, in words. total, text, before, left: as in `track`."""

    def __init__(self, total: int, text: Callable[[], str], before: int, left: Callable[[], Range | None]) -> None:
        self.total, self.text, self.done, self._before, self._left = total, text, before, before, left
        self._started = time.monotonic()

    def rate(self) -> str:
        """Say the time per item; nothing before the first."""
        came = self.done - self._before
        return f"{duration((time.monotonic() - self._started) / came)} an image" if came else ""

    def left(self) -> str:
        """The time that is left; nothing while it is not known."""
        if (found := self._left()) is not None:
            return f"{ranged(found, duration)} left"
        came, seconds = self.done - self._before, time.monotonic() - self._started
        return f"{duration(seconds / came * (self.total - self.done))} left" if came else ""


def ranged(found: Range, show: Callable[[float], str]) -> str:
    """Show what is expected, and how little or much it can be."""
    least, expected, most = (show(value) for value in found)
    return least if least == most else f"about {expected} ({least} to {most})"


class LiveColumn(ProgressColumn):
    """Words that change while nothing else does, asked for no more often than BAR_EVERY."""

    def __init__(self, words: Callable[[], str]) -> None:
        super().__init__()
        self._words, self._asked, self._said = words, (-math.inf, -1.0), Text()

    def render(self, task: Task) -> Text:
        now = time.monotonic()
        asked, completed = self._asked
        if now - asked >= BAR_EVERY or (task.finished and completed < task.completed):
            self._asked, self._said = (now, task.completed), Text(printable(self._words()))
        return self._said


def _bar(work: Iterable[T], pace: Pace) -> Iterator[T]:
    columns = (
        MofNCompleteColumn(),
        TextColumn("images"),
        BarColumn(),
        *map(LiveColumn, (pace.rate, pace.left, pace.text)),
    )
    with Progress(*columns, console=stderr, transient=True, redirect_stdout=stdout.is_terminal) as progress:
        task = progress.add_task("", total=pace.total, completed=pace.done)
        for item in work:
            yield item
            pace.done += 1
            progress.update(task, completed=pace.done)


def _lines(work: Iterable[T], pace: Pace) -> Iterator[T]:
    said, ended, speaking = [time.monotonic()], threading.Event(), threading.Lock()

    def speak() -> None:
        with speaking:
            if time.monotonic() - said[0] >= PLAIN_EVERY or pace.done == pace.total:
                said[0] = time.monotonic()
                line = ", ".join(filter(None, (f"{pace.done}/{pace.total} images", pace.rate(), pace.left())))
                print("; ".join(filter(None, (line, pace.text()))), file=sys.stderr, flush=True)

    def go_on() -> None:
        while not ended.wait(max(PLAIN_EVERY, 1.0)):
            speak()

    between = threading.Thread(target=go_on, name="densepure-rt lines", daemon=True)
    between.start()
    try:
        for item in work:
            yield item
            pace.done += 1
            speak()
    finally:
        ended.set()
        between.join()


def needs_pytorch(command: str) -> AbstractContextManager[None]:
    """For the imports of a command that needs the extra `export`. Raises EnvironmentFault where PyTorch is not there.

    It is looked for first: what else the extra brings is missing then too, and would be named in its place.
    """
    cure = "run \"pip install 'densepure-rt[cpu,export]'\""
    if importlib.util.find_spec("torch") is None:
        raise EnvironmentFault(f"{command} needs PyTorch, and torch is not installed: {cure}")
    return optional(command, "PyTorch and what goes with it", cure)


OPTIONS = {  # of parameters that have another name
    "address": "cluster",
    "allowed": "allow-host",
    "batches": "batch",
    "calibration": "calibration-images",
    "compute_capabilities": "compute-capability",
    "count": "gallery",
    "default": "deadline",
    "file": "key",
    "hardware": "hw-compat",
    "keep": "keep-fp32",
    "kind": "precision",
    "label_samples": "parity-samples",
    "level": "builder-level",
    "lifetime": "rotate",
    "limit": "max",
    "most": "max-deadline",
    "public": "seed",
}


_apps: list[typer.Typer] = []


def speak_for(app: typer.Typer) -> None:
    """Let `in_options` name the options of an application's commands."""
    _apps[:] = [app]
    known_options.cache_clear()


def command(name: str) -> Any:
    """Return a command of the application, as Click has it."""
    return getattr(typer.main.get_command(_apps[0]), "commands")[name]  # noqa: B009  of a group, which mypy cannot know


@cache
def known_options() -> frozenset[str]:
    """Every option of every command, as it is typed."""
    commands = getattr(typer.main.get_command(_apps[0]), "commands", {}).values() if _apps else ()
    return frozenset(
        name for command in commands for option in command.params for name in (*option.opts, *option.secondary_opts)
    )


def in_options(message: str) -> str:
    """Return a message with the options that are typed for the parameters it speaks of; other backticks stay."""

    def option(found: re.Match[str]) -> str:
        name, off = OPTIONS.get(found[1], found[1].replace("_", "-")), found[2]
        typed = f"--no-{name}" if off else f"--{name}"
        return typed if typed in known_options() else found[0]

    return PARAMETER.sub(option, message)


def say(line: str) -> None:
    stderr.print(f"{in_options(line)} ...")


def finite(value: Any) -> Any:
    """A report as JSON can hold it: null for what is NaN or infinite."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show_report(report: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    """Print a report as JSON for programs, or what `show` prints for a person."""
    if as_json:
        print(json.dumps(report))
    else:
        show()


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error) from error


def write_report(out: Path, name: str, report: dict[str, Any], draw: Callable[[Path], None]) -> None:
    try:
        (out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        draw(out / f"{name}.png")
    except EnvironmentFault as fault:  # no matplotlib: the numbers are written all the same
        stderr.print(f"the picture was left out: {in_options(str(fault))}")
    except OSError as error:
        raise unwritable(out, error) from error


def unwritable(out: Path, error: OSError) -> EnvironmentFault:
    return EnvironmentFault(f"cannot write {out} ({error.strerror}): choose another folder with --out")


def watched(work: Iterable[T], total: int) -> Iterable[T]:
    return track(work, total)


def print_attacks(attacks: Sequence[Falsification], names: Mapping[int, str]) -> None:
    """Exit code 1 when a certificate is broken. names: by the images' idx."""
    broken = [attack for attack in attacks if attack.broken]
    for attack in broken:
        image = numbered(attack.idx, names.get(attack.idx))
        stderr.print(
            f"error: image {image}: {attack.votes} of {attack.n} samples are for class {attack.label} at a "
            f"distance of {attack.distance}, inside the certified radius {exact(attack.radius)}"
        )
    samples = sum(attack.samples for attack in attacks)
    if not attacks:
        stderr.print("no certificate was attacked: the share of the samples does not pay for an attack, ask for more")
    else:
        stderr.print(f"{plural(len(attacks), 'certificate')} attacked with {samples:,} samples, {len(broken)} broken")
    if broken:
        raise typer.Exit(CheckFailed.exit_code)
