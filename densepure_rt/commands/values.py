"""Parse the value of an option: radii, times, words and numbers, separated by commas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from densepure_rt.errors import UsageError


def folder_of(text: str) -> Path:
    """A folder's path. The empty name, such as that of a shell variable that is not set, would be the folder here."""
    if not text:
        raise UsageError("it is empty, and names no folder")
    return Path(text)


def radii_of(radii: str | None, radii_sigma: str | None, sigma: float) -> tuple[float, ...] | None:
    """The grid of --radii or of --radii-sigma, in pixel units; None for neither."""
    if radii is not None and radii_sigma is not None:
        raise UsageError("--radii and --radii-sigma are two ways to say the same: give one")
    text = radii if radii is not None else radii_sigma
    if text is None:
        return None
    try:
        numbers = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise UsageError(f"radii are numbers with commas between, such as 0,0.25,0.5; got {text!r}") from None
    return numbers if radii is not None else tuple(sigma * number for number in numbers)


def seconds_of(text: str | None, option: str) -> float:
    """The seconds of 30s, 5min, 1.5h or 90; endless for None."""
    if text is None:
        return math.inf
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = {"": 1, "s": 1, "min": 60, "h": 3600}.get(text.strip()[len(number) :].strip())
    try:
        seconds = float(number) * (unit or 0)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise UsageError(f"{option} {text}: a time is a number above 0 with s, min or h behind it, such as 30s")
    return seconds


def batch_of(text: str) -> int | Literal["auto"]:
    """Parse a batch: a number, or auto."""
    try:
        return "auto" if text == "auto" else int(text)
    except ValueError:
        raise UsageError(f"--batch {text} is neither a number nor auto") from None


def none_as(default: int, value: int | None) -> int:
    return default if value is None else value


def words(value: str, option: str, known: Sequence[str]) -> list[str]:
    """A comma list, each word known."""
    found = [word.strip() for word in value.split(",")]
    for word in found:
        if word not in known:
            raise UsageError(f"{option} {word} is not known: {', '.join(known)}")
    return found


def number(word: str, option: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise UsageError(f"{option} takes whole numbers with commas between, found {word!r}") from None
