"""What a report says of runs, as numbers, lines and a table; `densepure_rt.report.page` makes a page of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from densepure_rt.errors import UsageError
from densepure_rt.legacy.folder import ImportedRun
from densepure_rt.report.accuracy import (
    Curve,
    curve_of,
    curve_of_imported,
    holds,
    reach,
    right_of_these,
)
from densepure_rt.rounding import exact, floored_share
from densepure_rt.runs.reader import Run
from densepure_rt.runs.records import ImageRecord
from densepure_rt.runs.summary import RADII
from densepure_rt.smoothing.certificate import Abstention, abstention
from densepure_rt.text import plural, printable

WEAKEST = 25  # images listed of a run
WHY: Mapping[Abstention, str] = {
    "gave up": "given up as futile",
    "at n": "undecided after all n samples",
    "out of reach": "no radius within reach",
    "out of time": "out of time",
}


class Totals(NamedTuple):
    """Over the images that are done. samples: those that they were judged by."""

    samples: int
    unet_calls: int
    classifier_calls: int
    not_finite: int
    seconds: float


@dataclass(frozen=True)
class RunReport:
    """A run, or imported results, as a report shows it. source: which; what it does not know is None.

    asked: images. radii: those that it was asked about alone. reach: the largest radius that n can certify. distinct:
    images, equal ones once. certified: for the image's own label, or for any where it has none; other_class: for
    another than its label. reasons: of those that abstained, where they are known.
    """

    name: str
    source: Run | ImportedRun
    setting: str
    sigma: float | None
    alpha: float
    asked: int
    radii: tuple[float, ...]
    curve: Curve
    reach: float | None
    distinct: int | None
    certified: int
    other_class: int
    abstained: int
    reasons: Mapping[Abstention, int]
    totals: Totals | None

    @property
    def done(self) -> int:
        return len(self.source.records)

    def bound_at(self, radius: float) -> float | None:
        """`right_of_these` at a radius; None where the accuracy is not known, or whether images share their noise."""
        accuracy = self.curve.at(radius)
        if accuracy is None or self.distinct is None or self.distinct < self.done:
            return None
        return right_of_these(accuracy, self.curve.images, self.alpha)


def report_of(source: Run | ImportedRun, name: str) -> RunReport:
    return report_of_run(source, name) if isinstance(source, Run) else report_of_imported(source, name)


def report_of_run(run: Run, name: str) -> RunReport:
    identity, records, timings = run.manifest.identity, run.records, run.timings
    shape = f"{plural(identity.steps, 'step')}, {plural(identity.votes, 'vote')}"
    certified = sum(holds(record, 0.0) for record in records)
    reasons = Counter(why for record in records if (why := abstention(record)) is not None)
    return RunReport(
        name=name,
        source=run,
        setting=f"sigma {identity.sigma:g}, {shape}, {identity.precision}, {identity.rule.method}",
        sigma=identity.sigma,
        alpha=identity.rule.alpha,
        asked=run.manifest.asked,
        radii=identity.rule.radii or (),
        curve=curve_of(run),
        reach=reach(identity),
        distinct=len({record.image_sha256 for record in records}),
        certified=certified,
        other_class=len(records) - certified - reasons.total(),
        abstained=reasons.total(),
        reasons=reasons,
        totals=Totals(
            samples=sum(timing.samples for timing in timings),
            unet_calls=sum(timing.unet_calls for timing in timings),
            classifier_calls=sum(timing.classifier_calls for timing in timings),
            not_finite=sum(timing.not_finite for timing in timings),
            seconds=sum(timing.seconds for timing in timings),
        ),
    )


def report_of_imported(found: ImportedRun, name: str) -> RunReport:
    """Results of another tool on their sound reading."""
    settings, records = found.origin.settings, found.records
    words = [f"imported {settings.kind}"]
    words += [] if settings.sigma is None else [f"sigma {settings.sigma:g}"]
    words += [] if settings.seeds is None else [plural(len(settings.seeds), "vote")]
    words += [] if settings.n is None else [f"n = {settings.n:,}"]
    certified = sum(holds(record, 0.0) for record in records)
    abstained = sum(record.radius is None for record in records)
    return RunReport(
        name=name,
        source=found,
        setting=", ".join(words),
        sigma=settings.sigma,
        alpha=settings.alpha,
        asked=len(records),
        radii=(),
        curve=curve_of_imported(found),
        reach=found.origin.reach,
        distinct=None,
        certified=certified,
        other_class=len(records) - certified - abstained,
        abstained=abstained,
        reasons={},
        totals=None,
    )


def own(reports: Sequence[RunReport]) -> Iterator[tuple[RunReport, Run]]:
    return ((report, report.source) for report in reports if isinstance(report.source, Run))


def imported(reports: Sequence[RunReport]) -> Iterator[tuple[RunReport, ImportedRun]]:
    return ((report, report.source) for report in reports if isinstance(report.source, ImportedRun))


def weakest(run: Run) -> list[ImageRecord]:
    """Images that did worst: certified for another class, then not certified, then by radius and share of votes."""

    def strength(record: ImageRecord) -> tuple[int, float, float]:
        kind = 2 if holds(record, 0.0) else int(record.predict is None)
        return kind, record.radius or 0.0, record.n_a / max(1, record.n)

    return sorted(run.records, key=strength)[:WEAKEST]


def names_of(paths: Sequence[Path]) -> list[str]:
    """Each run by its folder's name, or by its path where two share one. Raises UsageError for a run given twice."""
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        twice = next(path for path, count in Counter(resolved).items() if count > 1)
        raise UsageError(f"{twice} is given twice: name each run once")
    names = [printable(path.name) for path in resolved]
    return names if len(set(names)) == len(names) else [printable(str(path)) for path in paths]


def table_radii(reports: Sequence[RunReport]) -> tuple[float, ...]:
    """The radii of the papers' tables, and of the runs' grids."""
    return tuple(sorted({*RADII}.union(*(report.radii for report in reports))))


def percent(share: float | None) -> str:
    """Show a certified accuracy in a table."""
    return "-" if share is None else floored_share(share)


def markdown(reports: Sequence[RunReport]) -> str:
    """Certified accuracy at the radii of the papers' tables, a row a run."""
    radii = table_radii(reports)
    head = ("run", "setting", "images", *map(exact, radii), "abstained")
    rows = [head, ("---",) * 3 + ("--:",) * (len(radii) + 1)]
    for report in reports:
        shares = (percent(report.curve.at(radius)) for radius in radii)
        images, abstained = f"{report.done} of {report.asked}", str(report.abstained)
        rows.append((report.name, report.setting, images, *shares, abstained))
    return "".join(f"| {' | '.join(map(plain_cell, row))} |\n" for row in rows)


def plain_cell(text: str) -> str:
    """Text that Markdown and a terminal take for nothing else: names come from files."""
    marks = "\\`*_[]<>|#!&~$"
    text = printable(" ".join(text.split()))
    return text if set(text) <= {"-", ":"} else "".join(f"\\{c}" if c in marks else c for c in text)
