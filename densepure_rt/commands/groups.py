"""Options in groups: a dataclass that a command takes whole, and whose fields are options of the command line."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, get_type_hints

import typer


@dataclass(frozen=True)
class TypedOptions:
    """A group of options: a field for each, declared as Typer reads it, and `typed`: those that were given."""

    typed: frozenset[str] = field(default=frozenset(), kw_only=True)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a Typer command for one that takes groups of options: each field of a group is an option of its own.

    A parameter is a group when its type is a dataclass; it needs no default. Raises ValueError when two options have
    one name.
    """
    own = inspect.signature(command, eval_str=True).parameters
    groups = {name: parameter.annotation for name, parameter in own.items() if is_group(parameter.annotation)}
    options = [option for parameter in own.values() for option in options_of(parameter)]
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    signature = inspect.Signature([context, *options])  # which refuses one name for two

    @wraps(command)
    def run(context: typer.Context, **given: Any) -> None:
        typed = frozenset(name for name in given if was_typed(context, name))
        made = {}
        for name, group in groups.items():
            values = {option.name: given.pop(option.name) for option in fields_of(group)}
            made[name] = group(**values, **({"typed": typed} if issubclass(group, TypedOptions) else {}))
        command(**made, **given)

    # Typer reads both of these. A function may have a signature, which typeshed does not say.
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in signature.parameters.values()}
    return run


def is_group(annotation: object) -> bool:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def fields_of(group: type) -> list[dataclasses.Field[Any]]:
    return [option for option in dataclasses.fields(group) if option.name != "typed"]


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
