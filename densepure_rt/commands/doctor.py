"""`densepure-rt doctor`: what this machine has, and the next command."""

from __future__ import annotations

import dataclasses
import json

import typer
from rich.text import Text

from densepure_rt.commands.console import stdout
from densepure_rt.commands.options import Json
from densepure_rt.errors import EnvironmentFault


def doctor(as_json: Json = False) -> None:
    """Say what this machine has, what is missing for what, and the next command."""
    from densepure_rt.commands.diagnosis import diagnose

    diagnosis = diagnose()
    if as_json:
        print(json.dumps(dataclasses.asdict(diagnosis), indent=2))
    else:
        for finding in diagnosis.findings:
            style = {"ok": "green", "missing": "yellow", "broken": "red"}[finding.state]
            stdout.print(Text(f"{finding.state:<8}", style) + f"{finding.what:<16} {finding.found}")
        print(f"next: {diagnosis.next_command}")
    if not diagnosis.healthy:
        raise typer.Exit(EnvironmentFault.exit_code)
