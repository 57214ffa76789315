"""HTML and SVG from Python values: what comes in as text is escaped, always, so that no name can become markup.

It is made printable too, but for its lines' ends: a control of a terminal or of the direction of text is written out.
"""

from __future__ import annotations

from html import escape

from densepure_rt.text import printable

VOID = {"br", "hr", "img", "meta"}  # have no end tag


class Html(str):
    """Text that is markup already: made by `element` and `joined` alone."""


def element(name: str, *children: str | None, **attributes: str | float | None) -> Html:
    """<name attributes>children</name>. A child is markup when it is Html, else text; None is left out.

    Attributes are named as in HTML with `_` for `-`; a trailing `_` (class_) is dropped.
    """
    words = (
        f' {key.rstrip("_").replace("_", "-")}="{escaped(shown(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    head = f"<{name}{''.join(words)}>"
    return Html(head if name in VOID else f"{head}{joined(*children)}</{name}>")


def joined(*children: str | None) -> Html:
    """Children side by side, without an element around them."""
    return Html(
        "".join(child if isinstance(child, Html) else escaped(child) for child in children if child is not None)
    )


def escaped(text: str) -> str:
    return escape(printable(text, keep="\n"))


def shown(value: str | float) -> str:
    """Coordinates with two decimals, and no more digits than they need."""
    return value if isinstance(value, str) else f"{round(value, 2):g}"
