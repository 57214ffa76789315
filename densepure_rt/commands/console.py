"""What a run shows while it works: a bar on a terminal, plain lines elsewhere. Results go to stdout, this to stderr."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from densepure_rt.errors import PARAMETER, CheckFailed, EnvironmentFault
from densepure_rt.optional import optional
from densepure_rt.rounding import exact
from densepure_rt.text import duration, numbered, plural, printable

if TYPE_CHECKING:
    from densepure_rt.runs.falsifier import Falsification

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


def track(work: Iterable[T], total: int, text: Callable[[], str] = str, before: int = 0) -> Iterator[T]:
    """`work`, item by item, while images done, rate, time left and `text` are shown.

    total: with those that were done `before`.
    """
    show = _bar if stderr.is_terminal else _lines
    return show(work, total, text, before)


def _bar(work: Iterable[T], total: int, text: Callable[[], str], before: int) -> Iterator[T]:
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
                progress.update(task, status=text())
            rate = f"{duration((time.monotonic() - started) / done)} an image"
            progress.update(task, completed=before + done, rate=rate)


def _lines(work: Iterable[T], total: int, text: Callable[[], str], before: int) -> Iterator[T]:
    started = said = time.monotonic()
    for done, item in enumerate(work, start=1):
        yield item
        now = time.monotonic()
        if now - said >= PLAIN_EVERY or before + done == total:
            said = now
            each, left = (now - started) / done, total - before - done
            line = f"{before + done}/{total} images, {duration(each)} an image, {duration(each * left)} left"
            print(f"{line}; {text()}" if text() else line, file=sys.stderr, flush=True)


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
