"""Text that somebody else wrote, made fit to be shown: on a terminal, in a table, on a page, as JSON."""

from __future__ import annotations

import json
import math
import unicodedata
from typing import Any

# Control characters, lone surrogates, separators of lines and paragraphs: Unicode Standard, table 4-4.
UNFIT = ("Cc", "Cs", "Zl", "Zp")
# Bidi controls: UAX 9, section 2.
TURNING = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str, keep: str = "") -> str:
    """Write out what would steer a terminal, break a table or fit no encoding, as Python's string literals would.

    A tab becomes `\\t`, an escape `\\x1b`, half of a surrogate pair `\\ud800`. Once is as good as twice.

    Args:
        text: Anything, also a path that is no Unicode.
        keep: Characters to leave as they are, such as a line's end.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(one if one in keep or is_fit(one) else repr(one)[1:-1] for one in text)


def is_fit(character: str) -> bool:
    return unicodedata.category(character) not in UNFIT and character not in TURNING


def numbered(idx: int, name: str | None) -> str:
    """Speak of an image by its number, and by its name where it has one: 7 (cats/tom.png)."""
    return str(idx) if name is None else f"{idx} ({printable(name)})"


def tsv_cell(text: str) -> str:
    """Fit a text into a table of tabs, with no quote in it that would open a quoted field: `\\x22`, `\\x27`."""
    return printable(text).replace('"', "\\x22").replace("'", "\\x27")


def all_printable(value: Any) -> Any:
    """Make all text in a value of JSON `printable`, names of fields too."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [all_printable(item) for item in value]
    if isinstance(value, dict):
        return {printable(name): all_printable(item) for name, item in value.items()}
    return value


def duration(seconds: float) -> str:
    """Two figures that a person can read: 0.4 s, 12 s, 3 min, 2.1 h, 5 days."""
    units = ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h"), (math.inf, 86_400, "days"))
    divisor, unit = next((divisor, unit) for limit, divisor, unit in units if seconds < limit)
    value = seconds / divisor
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"


def plural(count: int, noun: str) -> str:
    """1 image, 2 images."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def brief(value: Any) -> str:
    text = printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 40 else f"{text[:37]}..."
