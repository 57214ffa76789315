"""What the sections of a report's page are built of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from densepure_rt.elements import Html, element, joined
from densepure_rt.rounding import exact


def section(title: str, *children: str | None) -> Html:
    return element("section", element("h2", title), *children)


def folded(title: str, *children: str) -> Html:
    return element("details", element("summary", title), *children)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: str | None = None) -> Html:
    """The first cell of a row names it. words: beneath, so that they stay in place when a wide table is scrolled."""
    body = (
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    )
    titles = element("tr", *(element("th", name, scope="col") for name in head))
    whole = element("table", element("thead", titles), element("tbody", *body))
    return joined(
        element("div", whole, class_="wide"), None if words is None else element("p", words, class_="soft note")
    )


def facts_table(facts: Iterable[tuple[str, str]]) -> Html:
    rows = (element("tr", element("th", name, scope="row"), element("td", value)) for name, value in facts)
    return element("table", element("tbody", *rows), class_="facts")


def leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A nested record as names and readable values; what is None is left out."""
    for key, item in value.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(item, Mapping):
            yield from leaves(item, f"{name}: ")
        elif isinstance(item, list | tuple):
            if item:
                yield name, ", ".join(readable(part) for part in item)
        elif item is not None:
            yield name, readable(item)


def readable(value: Any) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{name} {readable(part)}" for name, part in value.items()) + ")"
    return exact(value) if isinstance(value, float) else str(value)
