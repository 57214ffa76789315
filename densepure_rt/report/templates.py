"""Pages and pictures from the Jinja templates of `densepure_rt/data`, which get plain values and lay them out.

What comes in as text is escaped, always, so that no name can become markup. It is made printable too, but for its
lines' ends: a control of a terminal or of the direction of text is written out.
"""

from __future__ import annotations

from typing import Any

from jinja2 import BaseLoader, Environment, PackageLoader, StrictUndefined

from densepure_rt.text import printable


def render(name: str, **values: object) -> str:
    """Lay `values` out by the template `name`; of these, `markupsafe.Markup` alone is taken for markup."""
    return rendered(ENVIRONMENT, name, values)


def environment(loader: BaseLoader) -> Environment:
    """Make an environment that escapes whatever a template is called, and prints neither None nor a float."""
    made = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        finalize=laid_out,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["place"] = place
    return made


def rendered(templates: Environment, name: str, values: dict[str, Any]) -> str:
    text = templates.get_template(name).render(values)
    return "\n".join(map(printable, text.split("\n")))


def laid_out(value: object) -> object:
    """Pass `value` on. Raises TypeError for what is no text: a claim that is rounded here would be rounded wrongly."""
    if value is None or isinstance(value, float):
        raise TypeError(f"a template prints {value!r}: make it a text in Python, or filter it by place")
    return value


def place(value: float) -> str:
    """Show a place on a page with two decimals, and no more digits than it needs."""
    return f"{round(value, 2):g}"


ENVIRONMENT = environment(PackageLoader("densepure_rt", "data"))
