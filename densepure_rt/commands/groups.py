"""Options in groups: a dataclass that a command takes whole, and whose fields are options of the command line."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import typer

from densepure_rt.errors import UsageError
from densepure_rt.text import printable

Value = str | int | float | bool | Sequence[str]
Command = Any  # Click's, which Typer has a copy of in some versions
FILES = "files"  # the argument that names image files: in a file of options it is one
CLICK_ERROR: Any = typer.BadParameter.__mro__[1]  # Click's UsageError: of any option


class Elsewhere(NamedTuple):
    """Options by their names, and where they were given, as messages name it. as_typed: whether they count as typed."""

    where: str
    options: Mapping[str, Any]
    as_typed: bool


@dataclass(frozen=True)
class TypedOptions:
    """A group of options: a field for each, declared as Typer reads it, and two of the whole command.

    typed: the parameters that were given. given: each option that has a value, by its name, paths absolute.
    """

    typed: frozenset[str] = field(default=frozenset(), kw_only=True)
    given: Mapping[str, Value] = field(default_factory=dict, kw_only=True, compare=False, repr=False)

    def elsewhere(self) -> Iterable[Elsewhere]:
        """Options that were given in another way than typed here; the first to name one counts."""
        return ()


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a Typer command for one that takes groups of options: each field of a group is an option of its own.

    A parameter is a group when its type is a dataclass; it needs no default. Raises ValueError when two options have
    one name.
    """
    own = inspect.signature(command, eval_str=True).parameters
    groups = {name: parameter.annotation for name, parameter in own.items() if is_group(parameter.annotation)}
    options = [option for parameter in own.values() for option in options_of(parameter)]
    parameters = set(own).difference(groups)
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    signature = inspect.Signature([context, *options])  # which refuses one name for two

    @wraps(command)
    def run(context: typer.Context, **given: Any) -> None:
        typed = frozenset(name for name in given if was_typed(context, name))
        asked = [found for group in made(groups, given, typed, context).values() for found in elsewhere(group)]
        for found in asked:
            typed |= fill(given, typed, found, context.command)
        own = {name: value for name, value in given.items() if name in parameters}
        command(**made(groups, given, typed, context), **own)

    # Typer reads both of these. A function may have a signature, which typeshed does not say.
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in signature.parameters.values()}
    return run


def made(
    groups: Mapping[str, type], given: Mapping[str, Any], typed: frozenset[str], context: typer.Context
) -> dict[str, Any]:
    """Make the groups of a command of the values of its parameters."""
    names = {key: name for name, key in named(context.command).items()}
    plain = {
        names[name]: as_plain(value)
        for name, value in given.items()
        if name in names and value not in (None, []) and value is not False
    }
    extra = {"typed": typed, "given": plain}
    return {
        name: group(
            **{option.name: given[option.name] for option in fields_of(group)},
            **(extra if issubclass(group, TypedOptions) else {}),
        )
        for name, group in groups.items()
    }


def elsewhere(group: object) -> Iterable[Elsewhere]:
    return group.elsewhere() if isinstance(group, TypedOptions) else ()


def fill(given: dict[str, Any], typed: frozenset[str], found: Elsewhere, command: Command) -> frozenset[str]:
    """Put options into what is `given`, but for those that were typed. Returns the parameters that now count as such.

    Raises UsageError for an option that is none of the command's, or of another type.
    """
    known, arguments, files = named(command), list[str](), list[str]()
    for name, value in found.options.items():
        if name not in known:
            raise UsageError(f'{found.where} names "{printable(name)}", which is no option of this command')
        several = isinstance(value, list | tuple)
        text = ",".join(map(str, value)) if several else str(value)
        if name == FILES and known[name] not in typed:
            files += map(str, value) if several else [text]
        elif known[name] not in typed and value is not False:
            arguments.append(f"--{name}" if value is True else f"--{name}={text}")
    try:
        context = command.make_context("", [*arguments, "--", *files])
    except CLICK_ERROR as error:
        raise UsageError(f"{found.where} does not fit: {printable(error.format_message())}") from None
    filled = {known[name] for name in found.options} - typed
    given |= {name: context.params[name] for name in filled}
    return frozenset(filled) if found.as_typed else frozenset()


def named(command: Command) -> dict[str, str]:
    """The parameters of a command that are options, by the long names of these without their dashes, and its files."""
    options = (each for each in command.params if each.param_type_name == "option" or each.name == FILES)
    return {max(each.opts, key=len).lstrip("-"): each.name for each in options}


def typed_before(command: Command, arguments: Sequence[str]) -> dict[str, Value]:
    """Parse arguments as the command does: options by their names; what is none is left out."""
    context = command.make_context("", list(arguments), resilient_parsing=True)
    names = {name: key for name, key in named(command).items() if was_typed(context, key)}
    return {name: as_plain(context.params[key]) for name, key in names.items() if context.params[key] is not None}


def as_plain(value: Any) -> Value:
    """Turn an option's value into one that JSON and TOML have; a path into an absolute one."""
    if isinstance(value, Path):
        return os.path.abspath(value)
    if isinstance(value, list | tuple):
        return [str(as_plain(one)) for one in value]
    return value if isinstance(value, bool | int | float) else str(value)


def is_group(annotation: object) -> bool:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def fields_of(group: type) -> list[dataclasses.Field[Any]]:
    return [option for option in dataclasses.fields(group) if option.name not in ("typed", "given")]


def options_of(parameter: inspect.Parameter) -> list[inspect.Parameter]:
    """Return a command's parameter as keyword parameters: one for each field of a group, else itself."""
    if not is_group(parameter.annotation):
        return [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
    hints = get_type_hints(parameter.annotation, include_extras=True)
    return [
        inspect.Parameter(
            option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=hints[option.name]
        )
        for option in fields_of(parameter.annotation)
    ]


def was_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
