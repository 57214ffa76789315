"""Where the numbers of a report come from: what was run, what was imported, how far an engine is from PyTorch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from densepure_rt.console import plural
from densepure_rt.elements import Html, element
from densepure_rt.import_reader import FlagRecord, ImportedRun
from densepure_rt.records import Manifest
from densepure_rt.report import RunReport, imported, own
from densepure_rt.report_parts import facts_table, folded, leaves, section, table
from densepure_rt.rounding import raised
from densepure_rt.run_reader import Run

SOURCES = 3  # named in the text of an import
LISTED_SOURCES = 100  # in its facts; a folder of label arrays has two for each image and seed
FLAGGED = 5  # images of a flag
READ = {
    "log": (
        "A log of another tool, as it stands: nothing was sampled again. Each radius is the lower end of what prints "
        "so; what contradicts itself, or its n and alpha where they are known, counts as an abstention."
    ),
    "label arrays": (
        "Labels that another tool sampled, voted and certified again by this one: what network and noise they come "
        "from is not known."
    ),
}


def imported_section(reports: Sequence[RunReport]) -> Html | None:
    """What the imported results are, and what is wrong with them."""
    notes = [note for report, found in imported(reports) for note in imported_note(report.name, found)]
    return section("Imported results", *notes) if notes else None


def imported_note(name: str, found: ImportedRun) -> Iterator[Html]:
    origin = found.origin
    sources = [f"{source}, SHA-256 {sha256}" for source, sha256 in sources_of(found)]
    more = len(sources) - SOURCES
    yield element("h3", name)
    yield element("p", READ[origin.settings.kind])
    yield element(
        "ul",
        *(element("li", source) for source in sources[:SOURCES]),
        element("li", f"and {plural(more, 'other file')}") if more > 0 else None,
    )
    if not origin.flags:
        yield element("p", "No flag was raised.")
        return
    yield element("p", "Flags that were raised:")
    yield element("ul", *(flag_item(flag) for flag in sorted(origin.flags, key=lambda flag: not flag.unsound)))


def flag_item(flag: FlagRecord) -> Html:
    some = ", ".join(map(str, flag.images[:FLAGGED])) + (", ..." if len(flag.images) > FLAGGED else "")
    which = f"{plural(len(flag.images), 'image')} ({some}): " if flag.images else ""
    kind = element("strong", "unsound: ") if flag.unsound else "note: "
    return element("li", kind, f"{flag.name}: {which}{flag.says}")


def sources_of(found: ImportedRun) -> list[tuple[str, str]]:
    """Each file that was read, without the folders that it lay in, and its SHA-256."""
    return [(re.split(r"[/\\]", name)[-1], sha256) for name, sha256 in found.origin.sources_sha256.items()]


def parity_section(reports: Sequence[RunReport]) -> Html | None:
    """How far the engines' ONNX files are from PyTorch, where runs have it written down."""
    rows = []
    for report, run in own(reports):
        if parity := run.manifest.provenance.parity:
            compared, differing = (
                (f"{parity.labels:,}", f"{parity.labels_differ:,}") if parity.labels else ("none", "-")
            )
            worst = raised(parity.relative_l2, figures=2)
            rows.append((report.name, parity.by, f"{parity.comparisons:,}", worst, compared, differing))
    head = ("", "evaluated by", "comparisons", "worst relative L2", "labels compared", "differing")
    words = (
        "Of the engine's ONNX file against float32 PyTorch on equal inputs, when it was exported. The certificates do "
        "not rest on it: they are about the engine as it ran. A plan built from the file rounds otherwise again."
    )
    return section("How far the engine is from PyTorch", table(head, rows, words)) if rows else None


def provenance_section(reports: Sequence[RunReport]) -> Html:
    folds = []
    for report in reports:
        source = report.source
        facts = run_facts(report, source.manifest) if isinstance(source, Run) else imported_facts(source)
        folds.append(folded(report.name, facts_table(facts)))
    return section("What was run", *folds)


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
