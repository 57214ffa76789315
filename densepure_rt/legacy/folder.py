"""Imported results, read back from the folder that `densepure-rt import --out` made. Nothing is written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from densepure_rt.errors import CheckFailed
from densepure_rt.json_files import (
    STRICT,
    Count,
    Probability,
    Radius,
    Sha256,
    Text,
    content,
    parsed,
    read_lines,
    writing,
)
from densepure_rt.legacy.claims import Claim, Flag, Imported, ImportSettings
from densepure_rt.legacy.logs import COLUMNS
from densepure_rt.rounding import exact
from densepure_rt.runs.layout import tsv_columns

FILES = ("results.tsv", "results.jsonl", "imported.json")
ORIGIN = "imported.json"


@dataclass(frozen=True)
class Origin:
    """imported.json: what the results were read from. reach: the largest radius that n and alpha allow, if known."""

    __pydantic_config__ = STRICT
    settings: ImportSettings
    images: Count
    abstained: Count
    reach: Radius | None
    accuracy_as_printed: Mapping[Text, Probability | None]
    accuracy: Mapping[Text, Probability | None]
    flags: tuple[Flag, ...]
    sources_sha256: Mapping[Text, Sha256]


@dataclass(frozen=True)
class ImportedRun:
    """records: a claim an image on its sound reading. origin_sha256: of imported.json."""

    path: Path
    origin: Origin
    origin_sha256: str
    records: tuple[Claim, ...]


def read_imported(path: Path) -> ImportedRun:
    """Raises UsageError when a file is missing, CheckFailed when one is damaged or they do not belong together."""
    text = content(path / ORIGIN)
    origin = parsed(Origin, text, str(path / ORIGIN))
    records = tuple(read_lines(path / "results.jsonl", Claim))
    if not records or len(records) != origin.images:
        raise CheckFailed(f"{path}: results.jsonl holds {len(records)} images where {ORIGIN} counts {origin.images}")
    return ImportedRun(path, origin, hashlib.sha256(text).hexdigest(), records)


def report(found: Imported, grid: Sequence[float]) -> dict[str, Any]:
    """Collect what `--json` prints and imported.json keeps. accuracy: None where it is not known or beyond reach."""
    names = [exact(radius) for radius in grid]
    return {
        "settings": found.settings.told(),
        "images": len(found.claims),
        "abstained": sum(claim.predict is None for claim in found.claims),
        "reach": found.reach,
        "accuracy_as_printed": dict(zip(names, found.accuracy_as_printed(grid), strict=True)),
        "accuracy": dict(zip(names, found.accuracy(grid), strict=True)),
        "flags": [dataclasses.asdict(flag) for flag in found.flags],
    }


def write(found: Imported, grid: Sequence[float], folder: Path) -> None:
    """Keep the claims, rounded down, and what they were made of."""
    table = ["\t".join(COLUMNS), *(tsv_line(claim) for claim in found.claims)]
    records = [json.dumps(dataclasses.asdict(claim)) for claim in found.claims]
    origin = json.dumps(report(found, grid) | {"sources_sha256": dict(found.sources)}, indent=2)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, lines in zip(FILES, (table, records, [origin]), strict=True):
            (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def tsv_line(claim: Claim) -> str:
    return tsv_columns(claim.idx, claim.label, claim.predict, claim.radius, claim.correct)
