"""JSON read and written: strictly parsed, checked against types, one spelling for equal values, files written whole.

A file that somebody else may have written is never trusted to have the right fields, types or ranges: `parsed` says in
one line what is wrong with it.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from densepure_rt import files
from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.text import printable

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
Text = Annotated[str, AfterValidator(printable)]  # what is shown, and part of no hash
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Radius = Annotated[float, Field(ge=0)]
Label = Annotated[int, Field(ge=0)]
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
T = TypeVar("T")

_adapters: dict[Any, TypeAdapter[Any]] = {}  # making one takes longer than reading a thousand records by it


def adapter(kind: type[T]) -> TypeAdapter[T]:
    return _adapters.setdefault(kind, _adapters.get(kind) or TypeAdapter(kind))


def strict(text: str | bytes) -> Any:
    """Parse JSON in UTF-8. Raises ValueError, for NaN, a name twice in an object and deep nesting, too."""
    try:
        content = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(content, parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in it")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"an object has the name {printable(name[:40])!r} twice")
        found[name] = value
    return found


def parsed(kind: type[T], content: str | bytes, what: str) -> T:
    """`content` as JSON of this kind; what: the file, as messages name it. Raises CheckFailed with the first fault."""
    try:
        return adapter(kind).validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckFailed(f"{what} is damaged{f', at {where}' if where else ''}: {first['msg']}") from None


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


UNUSED = ("prepared", "unreadable")  # fields that files have only where they say something: those of before have none


def without_unused(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dataclass's fields a dict, for `asdict`."""
    return {name: value for name, value in fields if value is not None or name not in UNUSED}


def line(value: Any) -> str:
    """A record as a line of JSON, its fields in their order."""
    return json.dumps(asdict(value), ensure_ascii=False) + "\n"


def page(value: Any) -> str:
    """A manifest or a summary as a file."""
    return json.dumps(asdict(value, dict_factory=without_unused), indent=2, ensure_ascii=False) + "\n"


def read_lines(path: Path, kind: type[T]) -> list[T]:
    with reading(path):
        lines = enumerate(files.lines(path, "results file"), start=1)
        return [parsed(kind, line, f"{path}, line {number}") for number, line in lines]


def content(path: Path, kind: files.Kind = "run file") -> bytes:
    with reading(path):
        return files.content(path, kind)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError into one clear message."""
    try:
        yield
    except FileNotFoundError:
        raise UsageError(f"{path.parent} holds no whole run: {path.name} is missing") from None
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path} ({error.strerror})") from error


def replaced(path: Path, text: str) -> None:
    """Write a file whole, or leave the one that is there. What a link of its name points to is never written."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with new.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into one clear message."""
    try:
        yield
    except OSError as error:
        repair = "free some space, or " if error.errno in NO_SPACE else ""
        raise EnvironmentFault(
            f"cannot write {error.filename or path} ({error.strerror}): {repair}choose another folder with `out`; "
            f"what was written so far is kept"
        ) from error
