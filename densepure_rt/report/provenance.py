"""Where the numbers of a report come from: what was run, what was imported, how far an engine is from PyTorch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from densepure_rt.legacy.claims import Flag
from densepure_rt.legacy.folder import ImportedRun
from densepure_rt.report.summary import RunReport, imported, own
from densepure_rt.rounding import exact, raised
from densepure_rt.runs.reader import Run
from densepure_rt.runs.records import Manifest
from densepure_rt.text import plural

SOURCES = 3  # named in the text of an import
LISTED_SOURCES = 100  # in its facts; a folder of label arrays has two for each image and seed
FLAGGED = 5  # images of a flag


@dataclass(frozen=True)
class FlagWords:
    """A flag of an import, in a sentence."""

    unsound: bool
    words: str


@dataclass(frozen=True)
class ImportedNote:
    """A note on imported results and what is wrong with them. kind: of the file that was read."""

    name: str
    kind: str
    sources: list[str]
    flags: list[FlagWords]


def imported_notes(reports: Sequence[RunReport]) -> list[ImportedNote]:
    return [imported_note(report.name, found) for report, found in imported(reports)]


def imported_note(name: str, found: ImportedRun) -> ImportedNote:
    sources = [f"{source}, SHA-256 {sha256}" for source, sha256 in sources_of(found)]
    more = [f"and {plural(len(sources) - SOURCES, 'other file')}"] if len(sources) > SOURCES else []
    flags = sorted(found.origin.flags, key=lambda flag: not flag.unsound)
    return ImportedNote(name, found.origin.settings.kind, sources[:SOURCES] + more, [flag_of(flag) for flag in flags])


def flag_of(flag: Flag) -> FlagWords:
    some = ", ".join(map(str, flag.images[:FLAGGED])) + (", ..." if len(flag.images) > FLAGGED else "")
    which = f"{plural(len(flag.images), 'image')} ({some}): " if flag.images else ""
    return FlagWords(flag.unsound, f"{flag.name}: {which}{flag.says}")


def sources_of(found: ImportedRun) -> list[tuple[str, str]]:
    """List each file that was read, without the folders that it lay in, and its SHA-256."""
    return [(re.split(r"[/\\]", name)[-1], sha256) for name, sha256 in found.origin.sources_sha256.items()]


def parity_rows(reports: Sequence[RunReport]) -> list[tuple[str, ...]]:
    """Say how far the engines' ONNX files are from PyTorch, where runs have it written down."""
    rows: list[tuple[str, ...]] = []
    for report, run in own(reports):
        if parity := run.manifest.provenance.parity:
            compared, differing = (
                (f"{parity.labels:,}", f"{parity.labels_differ:,}") if parity.labels else ("none", "-")
            )
            worst = raised(parity.relative_l2, figures=2)
            rows.append((report.name, parity.by, f"{parity.comparisons:,}", worst, compared, differing))
    return rows


def provenance(reports: Sequence[RunReport]) -> list[tuple[str, list[tuple[str, str]]]]:
    """List the facts of each report under its name."""
    found = []
    for report in reports:
        source = report.source
        facts = run_facts(report, source.manifest) if isinstance(source, Run) else imported_facts(source)
        found.append((report.name, list(facts)))
    return found


def run_facts(report: RunReport, manifest: Manifest) -> Iterator[tuple[str, str]]:
    reach = None if report.reach is None else raised(report.reach)
    yield from leaves({"identity SHA-256": manifest.identity_sha256, "no radius beyond": reach})
    yield from leaves(asdict(manifest.identity))
    yield from leaves(asdict(manifest.provenance) | {"parity": None}, "run by ")


def imported_facts(found: ImportedRun) -> Iterator[tuple[str, str]]:
    origin, sources = found.origin, sources_of(found)
    yield "imported.json SHA-256", found.origin_sha256
    yield from leaves(asdict(origin.settings))
    reach = None if origin.reach is None else raised(origin.reach)
    yield from leaves({"no radius beyond": reach, "images": origin.images, "abstained": origin.abstained})
    yield from leaves({"accuracy as printed": origin.accuracy_as_printed, "accuracy": origin.accuracy})
    yield from ((f"SHA-256 of {name}", sha256) for name, sha256 in sources[:LISTED_SOURCES])
    if len(sources) > LISTED_SOURCES:
        yield "and", f"{len(sources) - LISTED_SOURCES:,} other files, which imported.json lists"


def leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Flatten a nested record to names and readable values; what is None is left out."""
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
