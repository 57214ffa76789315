"""The commands that check a run: `audit`, `replay` and `reveal`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from densepure_rt.commands.console import in_options, stderr, stdout
from densepure_rt.commands.options import Json, RunImages, RunPath
from densepure_rt.errors import CheckFailed
from densepure_rt.text import plural, printable

if TYPE_CHECKING:
    from densepure_rt.runs.records import Identity

MOST_SHOWN = 5  # faults of one check


def audit(run: RunPath, images: RunImages = None, as_json: Json = False) -> None:
    """Check a run offline, without its engine: bounds, radii, tables and hashes, all computed again.

    Exit code 1 when anything does not hold.
    """
    from densepure_rt.images.datasets import open_images
    from densepure_rt.runs.audit import audit as check
    from densepure_rt.runs.layout import read_manifest

    chosen = None
    if images is not None:
        identity = read_manifest(run).identity
        chosen = open_images(images, identity.image, identity.class_names, identity.images.preparation)
    findings = [
        dataclasses.replace(finding, faults=tuple(map(in_options, finding.faults))) for finding in check(run, chosen)
    ]
    failed = [finding for finding in findings if not finding.holds]
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) | {"holds": finding.holds} for finding in findings]))
    for finding in () if as_json else findings:
        word, style = ("holds", "green") if finding.holds else ("FAILS", "red")
        stdout.print(Text(f"{word:<7}", style) + printable(f"{finding.what:<15} {finding.said}"))
        for fault in finding.faults[:MOST_SHOWN]:
            stdout.print(f"       {fault}")
        if len(finding.faults) > MOST_SHOWN:
            stdout.print(f"       and {len(finding.faults) - MOST_SHOWN} more")
    if failed:
        stderr.print(f"error: {plural(len(failed), 'check')} of {len(findings)} failed: do not rely on {run}")
        raise typer.Exit(CheckFailed.exit_code)


def warn_of_other_arithmetic(identity: Identity, fingerprint: str) -> None:
    """Warn where the engines here do not compute what those of the run did, or where the run does not say."""
    if identity.arithmetic is None:
        stderr.print("warning: this old run does not say how its machine computed: labels may differ here and there")
    elif identity.arithmetic.fingerprint != fingerprint:
        stderr.print(
            f"warning: the engines compute otherwise here than in the run, on {identity.processor} (fingerprint "
            f"{fingerprint[:16]} here, {identity.arithmetic.fingerprint[:16]} there): labels may differ here and there"
        )
