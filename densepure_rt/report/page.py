"""The report as one HTML file that needs nothing else: no network, no script. `data/report.html` lays it out.

Here are the texts that depend on the runs, those of the template do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from densepure_rt.images.pictures import data_address
from densepure_rt.report.accuracy import CONFIDENCE, RHO, band_half_width
from densepure_rt.report.charts import accuracy_chart, accuracy_lines, accuracy_name, samples_chart, samples_lines
from densepure_rt.report.gallery import SAMPLE, Shown
from densepure_rt.report.provenance import imported_notes, parity_rows, provenance
from densepure_rt.report.step_chart import COLOURS, Line, Look, look_of
from densepure_rt.report.summary import WHY, RunReport, imported, own, percent, table_radii, weakest
from densepure_rt.report.templates import render
from densepure_rt.rounding import exact, floored, floored_share, raised, raised_share, typed
from densepure_rt.runs.reader import Run
from densepure_rt.runs.records import ImageRecord
from densepure_rt.smoothing.certificate import abstention
from densepure_rt.smoothing.settings import RULES
from densepure_rt.text import duration, plural

Cell = str | tuple[str, str]  # a text, or one with a note beneath


@dataclass(frozen=True)
class Card:
    """A run with the figures that it is about: shares at radii."""

    name: str
    colour: str
    setting: str
    figures: list[tuple[str, str]]
    words: str


@dataclass(frozen=True)
class LegendRow:
    """A line's look and what it stands for."""

    look: Look
    name: str
    setting: str


@dataclass(frozen=True)
class Chart:
    """A chart, as markup, and its legend."""

    chart: str
    legend: list[LegendRow]


@dataclass(frozen=True)
class Outcome:
    """So many images that ended alike. kind: a class of the page; words: for who sees no bar; counted: with a share."""

    kind: str
    images: int
    words: str
    counted: str


@dataclass(frozen=True)
class Picture:
    """A picture as a data: address, with what is in it."""

    source: str
    words: str


@dataclass(frozen=True)
class ShownImage:
    """An image of the gallery with its answer and its pictures."""

    name: str
    words: str
    pictures: list[Picture]


def page(reports: Sequence[RunReport], gallery: Sequence[Shown] = ()) -> str:
    """Make the whole file. gallery: of the first run, an own one."""
    first, radii = reports[0], table_radii(reports)
    classes = first.source.manifest.identity.class_names if isinstance(first.source, Run) else ()
    return render(
        "report.html",
        names=", ".join(report.name for report in reports),
        cards=[card(report, i) for i, report in enumerate(reports)],
        what=accuracy_name([report.curve for report in reports]).capitalize(),
        accuracy=Chart(accuracy_chart(reports), legend(accuracy_lines(reports), reports)),
        accuracy_words=" ".join(accuracy_words(reports)),
        radii=[exact(radius) for radius in radii],
        accuracies=[
            ((report.name, report.setting), *(accuracy_cell(report, radius) for radius in radii)) for report in reports
        ],
        rho=exact(RHO),
        wrong=[(report.name, "".join(wrong_words(report))) for report in reports],
        counted=[(report.name, list(outcomes(report))) for report in reports],
        anytime=any(RULES[run.manifest.identity.rule.method].anytime for _, run in own(reports)),
        samples=samples(reports),
        costs=cost_rows(reports),
        gallery=[shown_image(shown, classes) for shown in gallery],
        sample=SAMPLE,
        first=first.name,
        weakest=[
            (f"{report.name}: the {plural(len(rows), 'weakest image')}", rows)
            for report, run in own(reports)
            if (rows := weakest_rows(run))
        ],
        imported=imported_notes(reports),
        parity=parity_rows(reports),
        provenance=provenance(reports),
    )


def card(report: RunReport, i: int) -> Card:
    """Show a run's certified accuracy at the ends of its grid, or at 0 and sigma."""
    curve, sigma = report.curve, report.sigma or 0.0
    ends = (curve.radii[0], curve.radii[-1]) if curve.grid and curve.radii else (0.0, sigma)
    figures = ((radius, share) for radius in dict.fromkeys(ends) if (share := curve.at(radius)) is not None)
    what = accuracy_name([curve]) if curve.images else "no image is done yet"
    unfinished = ": not finished" if report.done < report.asked else ""
    return Card(
        name=report.name,
        colour=f"line{i % len(COLOURS)}",
        setting=report.setting,
        figures=[(percent(share), exact(radius)) for radius, share in figures],
        words=f"{what}, {report.done:,} of {plural(report.asked, 'image')}{unfinished}",
    )


def accuracy_words(reports: Sequence[RunReport]) -> Iterator[str]:
    """Say what the chart shows and how far it may be trusted."""
    yield "The share of images that are certified for their own label at a radius of r or more, over r."
    if not all(report.curve.labelled for report in reports if report.done):
        yield "Images of a run without labels count when they are certified for any class."
    if counted := [report for report in reports if report.curve.images]:
        sizes = sorted({report.curve.images for report in counted})
        widths = " and ".join(
            f"{raised(100 * band_half_width(size), 1)} points for {plural(size, 'image')}" for size in sizes
        )
        yield (
            f"The bands hold the whole curve at once with {floored_share(CONFIDENCE, 0)} confidence for images drawn "
            f"independently from the same source (Dvoretzky-Kiefer-Wolfowitz): to either side {widths}."
        )
    if any(report.curve.grid for report in reports):
        yield (
            "A sequential run knows its curve at the radii it was asked about alone: the points. The thin line between "
            "two of them is what the larger one guarantees."
        )
    if any(not report.curve.grid and not report.curve.open_ended for report in reports):
        yield "The curve of a run that measures radii ends at the largest one that its n samples can certify."
    if open_ended := [report.name for report in reports if report.curve.open_ended]:
        yield (
            f"Of {' and '.join(open_ended)} it is not known how far its samples could reach: the curve ends at its "
            f"largest radius."
        )
    if any(imported(reports)):
        yield "Imported radii are read at the lowest that their files bear out."
    rules = (run.manifest.identity.rule for _, run in own(reports))
    for loss in sorted({rule.radius_loss for rule in rules if rule.radius_loss is not None}):
        yield (
            f"A radius run settles for {floored(1 - typed(loss), 1, percent=True)} of the radius that n samples would "
            f"give, so that its curve may lie to the left of theirs."
        )
    for report in reports:
        if skipped := sorted(set(report.radii) - set(report.curve.radii)):
            radii = ", ".join(map(exact, skipped))
            yield f"{report.name} was asked about {radii} too, which its n samples cannot reach."


def legend(lines: Sequence[Line], reports: Sequence[RunReport]) -> list[LegendRow]:
    return [
        LegendRow(look_of(line, i), line.name, report.setting)
        for i, (line, report) in enumerate(zip(lines, reports, strict=True))
        if line.corners
    ]


def accuracy_cell(report: RunReport, radius: float) -> Cell:
    """Show the accuracy as the papers' tables do, with the bound on the test set beneath."""
    share, bound = percent(report.curve.at(radius)), report.bound_at(radius)
    return share if bound is None else (share, f"≥ {floored(bound, 1, percent=True)}")


def wrong_words(report: RunReport) -> Iterator[str]:
    """Say what alpha allows to be wrong."""
    expected = raised(typed(report.alpha) * report.done, figures=3)
    if report.distinct is None:
        yield (
            f": imported. If alpha = {exact(report.alpha)} holds for its {plural(report.done, 'answer')}, as was said "
            f"when they were imported, at most {expected} are expected to be wrong certificates; whether the noise of "
            f"its images was independent is not known, so that no bound on the test set is given."
        )
        return
    yield (
        f": of {plural(report.done, 'answer')} at alpha = {exact(report.alpha)}, at most {expected} are expected to be "
        f"wrong certificates."
    )
    if report.distinct < report.done:
        again = report.done - report.distinct
        yield (
            f" {again:,} of the images {'equals' if again == 1 else 'equal'} another one; equal images share their "
            f"noise, so that their errors are not independent and no bound on the test set is given."
        )


def shown_share(kind: str, share: float) -> str:
    """Show the share of images with one outcome: certified ones rounded down, the others up."""
    return floored_share(share) if kind == "good" else raised_share(share)


def outcomes(report: RunReport) -> Iterator[Outcome]:
    """Count what happened, the best first; what did not happen is left out."""
    certified = "certified for their label" if report.curve.labelled else "certified"
    found = [("good", certified, report.certified), ("wrong", "certified for another class", report.other_class)]
    found += [(why.replace(" ", "-"), said, report.reasons.get(why, 0)) for why, said in WHY.items()]
    found.append(("unexplained", "abstained", report.abstained - sum(report.reasons.values())))
    for kind, name, images in found:
        if images:
            share = shown_share(kind, images / report.done)
            yield Outcome(kind, images, f"{images} {name}", f"{images:,} {name} ({share})")


def samples(reports: Sequence[RunReport]) -> Chart | None:
    """Draw the samples that images took; None where nothing is known of them."""
    if not any(report.done for report, _ in own(reports)):
        return None
    return Chart(samples_chart(reports), legend(samples_lines(reports), reports) if len(reports) > 1 else [])


def cost_rows(reports: Sequence[RunReport]) -> list[tuple[Cell, ...]]:
    """Add up what own runs took: of others it is not known."""
    rows: list[tuple[Cell, ...]] = []
    for report, run in own(reports):
        if totals := report.totals:
            an_image = duration(totals.seconds / max(1, report.done))
            rows.append(
                (
                    report.name,
                    *((f"{total:,}", f"{total / max(1, report.done):,.1f} an image") for total in totals[:3]),
                    (duration(totals.seconds), f"{an_image} an image"),
                    f"{totals.not_finite:,}",
                    f"{sum(record.stopped for record in run.records):,}",
                )
            )
    return rows


def shown_image(shown: Shown, classes: Sequence[str]) -> ShownImage:
    ballot = Counter(class_name(label, classes) for label in shown.replayed.labels)
    counted = ", ".join(f"{name} {count}" for name, count in ballot.most_common())
    decided = class_name(shown.replayed.label, classes)
    votes = zip(shown.replayed.purified, shown.replayed.labels, strict=True)
    return ShownImage(
        name=f"Image {shown.record}",
        words=f": {answer(shown.record, classes)}. Ballot: {counted}; decided: {decided}.",
        pictures=[
            Picture(data_address(shown.pixels), class_name(shown.record.label, classes)),
            Picture(data_address(shown.replayed.noisy), "with noise"),
            *(Picture(data_address(pixels), class_name(label, classes)) for pixels, label in votes),
        ],
    )


def class_name(label: int | None, classes: Sequence[str]) -> str:
    if label is None:
        return "no label"
    return classes[label] if 0 <= label < len(classes) else "not finite"


def answer(record: ImageRecord, classes: Sequence[str]) -> str:
    """Say what a run answered of an image."""
    if record.predict is None or record.radius is None:
        why = abstention(record)
        return f"abstained ({WHY[why] if why else 'undecided'})"
    right = "" if record.correct is None or record.correct else ", which is not its label"
    return f"certified {class_name(record.predict, classes)} within {floored(record.radius)}{right}"


def weakest_rows(run: Run) -> list[tuple[Cell, ...]]:
    samples, classes = {timing.idx: timing.samples for timing in run.timings}, run.manifest.identity.class_names
    return [
        (
            str(record.idx) if record.name is None else (str(record.idx), record.name),
            class_name(record.label, classes),
            answer(record, classes),
            f"{record.n_a:,} of {record.n:,}",
            f"{samples[record.idx]:,}",
        )
        for record in weakest(run)
    ]
