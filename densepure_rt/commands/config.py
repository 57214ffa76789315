"""Options in a TOML file: one key for each, named as the option is, such as `run-budget = "2h"`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from densepure_rt import files
from densepure_rt.commands.groups import Value
from densepure_rt.errors import EnvironmentFault, UsageError
from densepure_rt.text import printable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


OF_A_CALL = ("out", "resume", "config", "save-config")  # options that no file gives


def read_config(path: Path) -> Mapping[str, Any]:
    """Return the options in a file. Raises UsageError when it is no TOML of them, EnvironmentFault when unreadable."""
    try:
        found: dict[str, Any] = tomllib.loads(files.text(path, "config file"))
    except FileNotFoundError:
        raise UsageError(f"no file at {path}: name a TOML file of options, such as --save-config writes") from None
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no TOML file: {error}") from None
    if of_a_call := [name for name in OF_A_CALL if name in found]:
        raise UsageError(f"{path} gives {of_a_call[0]}, which belongs to one call: type --{of_a_call[0]} instead")
    for name, value in found.items():
        each = value if isinstance(value, list) else [value]
        if not all(isinstance(one, str | int | float) for one in each):
            raise UsageError(
                f"{path} gives {printable(name)} no value that an option has: write options at the top of the file, "
                f"each a text, a number, true or false, or a list of numbers"
            )
    return found


def write_config(path: Path, options: Mapping[str, Value]) -> None:
    """Write options to a file, whole or not at all. Raises EnvironmentFault when it cannot be written."""
    from densepure_rt.json_files import replaced

    lines = ["# densepure-rt certify --config\n", *(f"{name} = {toml(value)}\n" for name, value in options.items())]
    try:
        replaced(path, "".join(lines))
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write {path} ({error.strerror}): choose another file with --save-config"
        ) from error


def toml(value: Value) -> str:
    """Write a value as TOML has it; a text as JSON does, which is a basic string of TOML but for one character."""
    if isinstance(value, str):
        return json.dumps(printable(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower()
