"""Certify logs of older tools, read strictly.

locuslab/smoothing, diffusion_denoised_smoothing (DDS), DensePure and their forks write a line an image, with tabs
between idx, label, predict, radius, correct and time. They print the radius with `{:.3}`, which rounds up as often as
down, so that a printed radius stands for any in an interval. Its lower end is the sound reading.

Files are untrusted: bounded in size, every field matched before it is converted, nothing evaluated.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from densepure_rt import files
from densepure_rt.errors import EnvironmentFault, UsageError
from densepure_rt.files import Kind

COLUMNS = ("idx", "label", "predict", "radius", "correct")  # `time` is missing from DensePure's merged file
ABSTAIN = -1  # in a file, for a label that is none
PRINTED_DIGITS = 3  # significant, of `{:.3}`: locuslab/smoothing code/certify.py, 78a4d94
ALPHA = 0.001  # the default of all these tools; DensePure's merge knows no other (results/merge_results.py, 1ed105d)
INTEGER = re.compile(r"-?[0-9]{1,9}", re.ASCII)
RADIUS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,18})?(e[+-][0-9]{2})?", re.ASCII)
WORDS = {"True": 1, "False": 0}  # `correct`, in forks


class Row(NamedTuple):
    """A line of a log. predict: None abstains. radius: as printed. correct: as the file has it."""

    idx: int
    label: int | None
    predict: int | None
    radius: str
    correct: int


@dataclass(frozen=True)
class Log:
    """unfinished: its last line was cut off in the middle, and is left out."""

    name: str
    sha256: str
    rows: tuple[Row, ...]
    unfinished: bool

    @cached_property
    def digits(self) -> int | None:
        """The significant digits that its radii were printed with; None where every digit was printed as it stands.

        `{:.3}` drops zeros at the end: 0.5 may have been 0.4996. So a log is read only when each radius is what `{:.3}`
        prints, and one of them shows all three digits.
        """
        texts = [row.radius for row in self.rows]
        shown = any(len(Decimal(text).normalize().as_tuple().digits) == PRINTED_DIGITS for text in texts)
        return PRINTED_DIGITS if shown and all(f"{float(text):.{PRINTED_DIGITS}}" == text for text in texts) else None


def bounded_bytes(path: Path, kind: Kind) -> bytes:
    """Read a file that is no larger than its kind can be."""
    try:
        return files.content(path, kind)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} does not exist") from None
    except files.UnfitFile as error:
        raise UsageError(f"{path} is no result file of these tools: {error.strerror}") from error
    except (OSError, ValueError) as error:
        raise EnvironmentFault(f"cannot read {path} ({error})") from error


def read_log(path: Path) -> Log:
    """A certify log. Raises UsageError, with the line, when it is none."""
    content = bounded_bytes(path, "log")
    return Log(str(path), hashlib.sha256(content).hexdigest(), *parsed_rows(content, str(path)))


def parsed_rows(content: bytes, what: str) -> tuple[tuple[Row, ...], bool]:
    """The rows of a log, and whether its last line was cut off; what: the file, as messages name it."""
    try:
        first, *lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise UsageError(f"{what} is no certify log: it is not text") from None
    header = first.removesuffix("\r").split("\t")
    if not set(COLUMNS) <= set(header) or len(set(header)) < len(header):
        raise UsageError(
            f"{what} is no certify log: its first line should name {', '.join(COLUMNS)} with tabs between, and is "
            f"{first[:60]!r}"
        )
    unfinished = lines != [] and lines[-1] != "" and lines[-1].count("\t") < len(header) - 1
    kept = lines[:-1] if unfinished else lines
    rows = tuple(
        parsed_row(line.removesuffix("\r"), header, f"{what}, line {number}")
        for number, line in enumerate(kept, start=2)
        if line.strip()
    )
    if not rows:
        raise UsageError(f"{what} holds no results: nothing follows its header")
    return rows, unfinished


def parsed_row(line: str, header: Sequence[str], what: str) -> Row:
    texts = line.split("\t")
    if len(texts) != len(header):
        raise UsageError(f"{what}: {len(texts)} columns where the header has {len(header)}")
    cells = dict(zip(header, texts, strict=True))
    return Row(
        idx=integer(cells["idx"], 0, f"{what}: idx"),
        label=label(cells["label"], f"{what}: label"),
        predict=label(cells["predict"], f"{what}: predict"),
        radius=radius_text(cells["radius"], f"{what}: radius"),
        correct=WORDS[cells["correct"]]
        if cells["correct"] in WORDS
        else integer(cells["correct"], 0, f"{what}: correct"),
    )


def integer(text: str, least: int, what: str) -> int:
    if not INTEGER.fullmatch(text) or int(text) < least:
        raise UsageError(f"{what} should be a whole number from {least} on, and is {text[:40]!r}")
    return int(text)


def label(text: str, what: str) -> int | None:
    found = integer(text, ABSTAIN, what)
    return None if found == ABSTAIN else found


def radius_text(text: str, what: str) -> str:
    if not RADIUS.fullmatch(text):
        raise UsageError(f"{what} should be a decimal number such as 0.497, and is {text[:40]!r}")
    return text


def printed_interval(text: str, digits: int | None) -> tuple[Decimal, Decimal]:
    """Radii between which the one lies that was printed as `text`: half a unit of its last digit to either side.

    The last digit is the last of `digits` significant ones, or the last that is shown where that is further right.
    """
    value = Decimal(text)
    exponent = int(value.as_tuple().exponent)
    if digits is not None:
        exponent = min(exponent, value.adjusted() - digits + 1)
    half = Decimal((0, (5,), exponent - 1))
    return max(Decimal(0), value - half), value + half


def below(value: Decimal) -> float:
    """The largest float that is not above `value`."""
    near = float(value)
    return near if Decimal(near) <= value else math.nextafter(near, 0.0)
