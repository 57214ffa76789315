"""Read a run's options from its manifest, so that continuing the run needs none of them typed again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from densepure_rt.commands.console import command, stderr
from densepure_rt.commands.groups import Elsewhere, Value, named, typed_before
from densepure_rt.errors import UsageError

if TYPE_CHECKING:
    from densepure_rt.smoothing.settings import Settings

PRESET = ("steps", "votes", "method", "n0", "n")  # what --preset says
PATHS = ("images", "engine", "classifier", "labels", "labels-csv")  # options that name what may have been moved
# Options of one call, no part of what is run. No folder that somebody else made may say the last four: a cluster is
# sent code, and a plan that is trusted is code. Nor does any result depend on them.
OF_A_CALL = (
    *("out", "resume", "dry-run", "json", "config", "save-config", "quiet", "verbose", "log-json", "key"),
    *("cluster", "workers", "group", "trust"),
)


def options_of(run: Path) -> Mapping[str, Value]:
    """Return the options of `certify` that a run was made with; of an old run those of its command line, if it has one.

    Raises UsageError when there is no run, CheckFailed when its manifest is damaged.
    """
    from densepure_rt.runs.layout import read_manifest

    provenance = read_manifest(run).provenance
    options: Mapping[str, Value] = provenance.options or {}
    if provenance.options is None and provenance.argv[1:2] == ("certify",):
        options = typed_before(command("certify"), provenance.argv[2:])
    return {name: value for name, value in options.items() if name not in OF_A_CALL}


def to_keep(asked: Mapping[str, Value], settings: Settings) -> dict[str, Value]:
    """Return the options that a run is made again by, those of a preset by what it stands for in its settings."""
    from densepure_rt.smoothing.settings import RULES

    given = {name: value for name, value in asked.items() if name not in OF_A_CALL}
    if given.pop("preset", None) is not None:
        given |= {name: getattr(settings, name) for name in PRESET}
    if RULES[settings.method].anytime:
        given.pop("n0", None)
    if not given.get("convert") and given.get("fit") != "pad":
        given.pop("background", None)
    return given


def taken(run: Path, typed: Collection[str], configured: Collection[str]) -> Iterator[Elsewhere]:
    """Take the options of a run that was begun, but for those that were typed or configured, and say so."""
    from densepure_rt.runs.layout import MANIFEST

    if not (run / MANIFEST).exists():
        return
    known, sources = named(command("certify")), {"images", "files"}
    if not sources.isdisjoint(configured) or not sources.isdisjoint(typed):
        configured = sources.union(configured)
    options = {
        name: value
        for name, value in options_of(run).items()
        if name not in configured and known.get(name) not in typed
    }
    say(run, options)
    for name in PATHS:
        if name in options:
            there(run, name, options[name])
    yield Elsewhere(f"the run in {run}", options, as_typed=False)


def file_of(run: Path, name: str, given: Path | None) -> Path | None:
    """Return the file that was named, else the one that a run was made with, and say so; None for the shipped one.

    name: of the option, one of PATHS. Raises UsageError where nothing is there any more.
    """
    if given is not None or (recorded := options_of(run).get(name)) is None:
        return given
    say(run, {name: recorded})
    return there(run, name, recorded)


def images_of(run: Path, given: Path | None) -> Path | Sequence[Path] | None:
    """As `file_of` for images, which may have been named one by one."""
    files = options_of(run).get("files")
    if given is not None or not isinstance(files, list | tuple):
        return file_of(run, "images", given)
    say(run, {"files": files})
    return [Path(file) for file in files]


def there(run: Path, name: str, recorded: Value) -> Path:
    """Return a path that a run was made with. Raises UsageError where nothing is there any more."""
    path = Path(str(recorded))
    if not path.exists():
        raise UsageError(
            f"the run in {run} was made with --{name} {path}, where there is nothing now: say with --{name} where it "
            f"went"
        )
    return path


def say(run: Path, options: Mapping[str, Value]) -> None:
    """Say which options are taken from a run."""
    if not options:
        return
    files = options.get("files")
    words = [f"--{name} {value}" for name, value in options.items() if name != "files"]
    words += files if isinstance(files, list | tuple) else []
    stderr.print(f"as the run in {run} was made: {' '.join(words)}")
