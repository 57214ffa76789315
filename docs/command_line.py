"""Write the reference of the command line from the Typer app itself, so that it cannot differ from `--help`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import typer

from densepure_rt.cli import app

OTHER = "Other options"  # those without a panel


def plain(text: str | None) -> str:
    """Put help into one line of Markdown, with Rich's escapes removed and Markdown's own marks escaped."""
    line = " ".join((text or "").replace("\\[", "[").split())
    for mark in "|*_<[":
        line = line.replace(mark, f"\\{mark}")
    return line.replace("{", "\\{")


def default_of(parameter: Any) -> str:
    """Return the default as it is typed; nothing where there is none or the help names it."""
    value = parameter.default
    if value in (None, False, ()) or callable(value) or parameter.required:
        return ""
    return f"`{value}`"


def rows(parameters: Iterable[Any]) -> Iterator[str]:
    """Yield a table of options."""
    yield "| option | default | meaning |"
    yield "|---|---|---|"
    for parameter in parameters:
        names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
        yield f"| {names} | {default_of(parameter)} | {plain(parameter.help)} |"


def panel(parameter: Any) -> str:
    return getattr(parameter, "rich_help_panel", None) or OTHER


def command_page(name: str, command: Any) -> Iterator[str]:
    """Yield the section of one command."""
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    context = command.make_context(name, [], resilient_parsing=True)
    names = [" ".join(argument.get_usage_pieces(context)) for argument in arguments]
    yield f"## {name}\n"
    yield f"```\ndensepure-rt {name} [OPTIONS] {' '.join(names)}".rstrip() + "\n```\n"
    yield from (plain(part) + "\n" for part in (command.help or "").split("\n\n"))
    yield from (f"- `{shown}`: {plain(argument.help)}\n" for shown, argument in zip(names, arguments, strict=True))
    order = list(dict.fromkeys(map(panel, options)))
    options.sort(key=lambda option: order.index(panel(option)))
    for title, members in groupby(options, panel):
        yield "" if len(order) == 1 else f"**{title}**\n"
        yield "\n".join(rows(members)) + "\n"


def write_page(path: Path) -> None:
    """Write the sections of all commands, in the order of `densepure-rt --help`."""
    group: Any = typer.main.get_command(app)
    text = "\n".join(line for name, command in group.commands.items() for line in command_page(name, command))
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
