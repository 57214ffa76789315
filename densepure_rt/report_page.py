"""The report as one HTML file that needs nothing else: no network, no script. What comes from files is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources
from string import Template

from densepure_rt.accuracy import CONFIDENCE, RHO, band_half_width
from densepure_rt.certify_run import abstention
from densepure_rt.console import duration, plural
from densepure_rt.elements import Html, element, joined
from densepure_rt.gallery import SAMPLE, Shown
from densepure_rt.pictures import data_address
from densepure_rt.records import ImageRecord
from densepure_rt.report import (
    WHY,
    RunReport,
    accuracy_chart,
    accuracy_lines,
    accuracy_name,
    imported,
    own,
    percent,
    samples_chart,
    samples_lines,
    table_radii,
    weakest,
)
from densepure_rt.report_origin import imported_section, parity_section, provenance_section
from densepure_rt.report_parts import folded, section, table
from densepure_rt.rounding import exact, floored, floored_share, raised, raised_share, typed
from densepure_rt.run_reader import Run
from densepure_rt.step_chart import COLOURS, STYLE, Line, swatch


def page(reports: Sequence[RunReport], gallery: Sequence[Shown] = ()) -> str:
    """The whole file. gallery: of the first run, an own one."""
    first = reports[0].source
    names = ", ".join(report.name for report in reports)
    sections = (
        heading(reports),
        accuracy_section(reports),
        table_section(reports),
        abstention_section(reports),
        cost_section(reports),
        gallery_section(reports[0].name, first, gallery) if gallery and isinstance(first, Run) else None,
        weakest_section(reports),
        imported_section(reports),
        parity_section(reports),
        meaning_section(),
        provenance_section(reports),
    )
    template = Template((resources.files("densepure_rt") / "data" / "report.html").read_text(encoding="utf-8"))
    title = joined(f"Certified robustness: {names}")
    return template.substitute(title=title, chart_style=STYLE, body=element("main", *sections))


def heading(reports: Sequence[RunReport]) -> Html:
    """The title and, for each run, the figure that it is about."""
    return element(
        "header",
        element("h1", "Certified robustness"),
        element(
            "p",
            "Randomized smoothing with purification by diffusion and voting (DensePure). A certificate says that the "
            "smoothed classifier answers the same for every change of the image within the radius; an image gets a "
            "wrong one with probability alpha at most.",
            class_="soft",
        ),
        element("div", *(card(report, i) for i, report in enumerate(reports)), class_="runs"),
    )


def card(report: RunReport, i: int) -> Html:
    """A run's certified accuracy at the ends of its grid, or at 0 and sigma."""
    curve, sigma = report.curve, report.sigma or 0.0
    ends = (curve.radii[0], curve.radii[-1]) if curve.grid and curve.radii else (0.0, sigma)
    figures = ((radius, share) for radius in dict.fromkeys(ends) if (share := curve.at(radius)) is not None)
    what = accuracy_name([report]) if curve.images else "no image is done yet"
    unfinished = ": not finished" if report.done < report.asked else ""
    return element(
        "div",
        element("strong", report.name),
        element("div", report.setting, class_="soft note"),
        element(
            "div",
            *(
                element("span", element("b", percent(share)), element("small", f"at radius {exact(radius)}"))
                for radius, share in figures
            ),
            class_="big",
        ),
        element("div", f"{what}, {report.done:,} of {plural(report.asked, 'image')}{unfinished}", class_="soft note"),
        class_=f"run line{i % len(COLOURS)}",
    )


def accuracy_section(reports: Sequence[RunReport]) -> Html:
    return section(
        accuracy_name(reports).capitalize(),
        element(
            "figure",
            accuracy_chart(reports),
            legend(accuracy_lines(reports), reports),
            element("figcaption", " ".join(accuracy_words(reports))),
        ),
    )


def accuracy_words(reports: Sequence[RunReport]) -> Iterator[str]:
    """What the chart shows and how far it may be trusted."""
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


def legend(lines: Sequence[Line], reports: Sequence[RunReport]) -> Html:
    rows = (
        element(
            "li",
            element("svg", swatch(line, i), viewBox="0 0 34 16", class_="chart", aria_hidden="true"),
            element("span", line.name, " ", element("small", report.setting)),
        )
        for i, (line, report) in enumerate(zip(lines, reports, strict=True))
        if line.corners
    )
    return element("ul", *rows, class_="legend")


def run_head(report: RunReport) -> Html:
    return joined(report.name, element("small", report.setting))


def table_section(reports: Sequence[RunReport]) -> Html:
    """The papers' table, with the bound on the test set beneath each share, and what alpha allows to be wrong."""
    radii = table_radii(reports)
    rows = [
        (
            run_head(report),
            *(joined(percent(report.curve.at(radius)), bound_note(report.bound_at(radius))) for radius in radii),
        )
        for report in reports
    ]
    return section(
        f"{accuracy_name(reports).capitalize()} at radii",
        table(("radius", *map(exact, radii)), rows, TABLE_WORDS),
        element("ul", *(element("li", *wrong_words(report)) for report in reports)),
    )


TABLE_WORDS = (
    f"A dash: not asked, or beyond what n samples can reach. Small figures: but for a probability of {exact(RHO)} over "
    "the sampling, at least this share of these very images is certified rightly: accuracy - alpha - "
    "sqrt(alpha (1 - alpha) ln(1/rho) / M) - ln(1/rho) / (3 M), rounded down (Cohen et al. 2019), at each radius by "
    "itself. It supposes that the noise of each image is independent, and says nothing of other images."
)


def bound_note(bound: float | None) -> Html | None:
    return None if bound is None else element("small", f"≥ {floored(bound, 1, percent=True)}")


def wrong_words(report: RunReport) -> Iterator[str | Html]:
    expected = raised(typed(report.alpha) * report.done, figures=3)
    yield element("strong", report.name)
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


def abstention_section(reports: Sequence[RunReport]) -> Html:
    blocks = (
        joined(
            element("h3", report.name),
            element(
                "div",
                *(element("i", class_=kind, style=f"flex:{count}") for kind, _, count in outcomes(report)),
                class_="stack",
                role="img",
                aria_label=", ".join(f"{count} {name}" for _, name, count in outcomes(report)),
            )
            if report.done
            else None,
            element(
                "div",
                *(
                    element(
                        "span",
                        element("i", class_=f"key {kind}"),
                        f"{count:,} {name} ({shown_share(kind, count / report.done)})",
                    )
                    for kind, name, count in outcomes(report)
                ),
                class_="counts",
            ),
        )
        for report in reports
    )
    anytime = any(run.manifest.identity.rule.method != "fixed" for _, run in own(reports))
    return section(
        "Certified, and abstained",
        *blocks,
        element(
            "p",
            "Abstaining is an answer. Of an image with a label, a sequential or radius run asks about that label "
            "alone, so that an abstention covers a wrong class too: it is not comparable with that of a fixed run. "
            "Given up: more samples were thought futile.",
            class_="soft note",
        )
        if anytime
        else None,
    )


def shown_share(kind: str, share: float) -> str:
    """Show the share of images with one outcome: certified ones rounded down, the others up."""
    return floored_share(share) if kind == "good" else raised_share(share)


def outcomes(report: RunReport) -> Iterator[tuple[str, str, int]]:
    """(class of the page, what happened, how many), the best first; what did not happen is left out."""
    certified = "certified for their label" if report.curve.labelled else "certified"
    found = [("good", certified, report.certified), ("wrong", "certified for another class", report.other_class)]
    found += [(why.replace(" ", "-"), said, report.reasons.get(why, 0)) for why, said in WHY.items()]
    found.append(("unexplained", "abstained", report.abstained - sum(report.reasons.values())))
    yield from (outcome for outcome in found if outcome[2])


def cost_section(reports: Sequence[RunReport]) -> Html | None:
    """Of own runs: what the images of others took is not known."""
    head = ("", "samples", "UNet calls", "classifier calls", "time", "not finite", "cut short by time")
    rows = [
        (
            report.name,
            *(
                joined(f"{total:,}", element("small", f"{total / max(1, report.done):,.1f} an image"))
                for total in totals[:3]
            ),
            joined(
                duration(totals.seconds),
                element("small", f"{duration(totals.seconds / max(1, report.done))} an image"),
            ),
            f"{totals.not_finite:,}",
            f"{sum(record.stopped for record in run.records):,}",
        )
        for report, run in own(reports)
        if (totals := report.totals)
    ]
    if not rows:
        return None
    words = (
        "Samples: those that the answers rest on. Calls: all that were made for the images that are done. Time: wall "
        "seconds on the machine of the run. Not finite: samples whose output was NaN or Inf; they count against the "
        "class and are never dropped."
    )
    return section(
        "Samples and cost",
        element(
            "figure",
            samples_chart(reports),
            legend(samples_lines(reports), reports) if len(reports) > 1 else None,
            element("figcaption", "The share of images that took no more than so many samples (logarithmic)."),
        )
        if any(report.done for report, _ in own(reports))
        else None,
        table(head, rows, words),
    )


def gallery_section(name: str, run: Run, gallery: Sequence[Shown]) -> Html:
    classes = run.manifest.identity.class_names
    return section(
        "What the networks saw",
        element(
            "p",
            f"Sample {SAMPLE} of some images of {name}, drawn again from its key: the image, with noise "
            "(clipped to what can be shown), and purified, once for each vote. From the strongest certificate down.",
            class_="soft",
        ),
        *(shown_image(shown, classes) for shown in gallery),
    )


def shown_image(shown: Shown, classes: Sequence[str]) -> Html:
    votes = zip(shown.replayed.purified, shown.replayed.labels, strict=True)
    ballot: dict[str, int] = {}
    for label in shown.replayed.labels:
        ballot[class_name(label, classes)] = ballot.get(class_name(label, classes), 0) + 1
    counted = ", ".join(f"{name} {count}" for name, count in sorted(ballot.items(), key=lambda item: -item[1]))
    return element(
        "div",
        element("strong", f"Image {shown.record.idx}"),
        f": {answer(shown.record, classes)}. Ballot: {counted}; decided: {class_name(shown.replayed.label, classes)}.",
        element(
            "div",
            framed(data_address(shown.pixels), class_name(shown.record.label, classes)),
            framed(data_address(shown.replayed.noisy), "with noise"),
            *(framed(data_address(pixels), class_name(label, classes)) for pixels, label in votes),
            class_="pictures",
        ),
        class_="shown",
    )


def framed(source: str, words: str) -> Html:
    return element("figure", element("img", src=source, alt=words), element("figcaption", words))


def class_name(label: int | None, classes: Sequence[str]) -> str:
    if label is None:
        return "no label"
    return classes[label] if 0 <= label < len(classes) else "not finite"


def answer(record: ImageRecord, classes: Sequence[str]) -> str:
    """What a run said of an image."""
    if record.predict is None or record.radius is None:
        why = abstention(record)
        return f"abstained ({WHY[why] if why else 'undecided'})"
    right = "" if record.correct is None or record.correct else ", which is not its label"
    return f"certified {class_name(record.predict, classes)} within {floored(record.radius)}{right}"


def weakest_section(reports: Sequence[RunReport]) -> Html:
    folds = []
    for report, run in own(reports):
        samples = {timing.idx: timing.samples for timing in run.timings}
        classes = run.manifest.identity.class_names
        rows = [
            (
                str(record.idx),
                class_name(record.label, classes),
                answer(record, classes),
                f"{record.n_a:,} of {record.n:,}",
                f"{samples[record.idx]:,}",
            )
            for record in weakest(run)
        ]
        if rows:
            head = ("image", "label", "answer", "votes for the class", "samples")
            title = f"{report.name}: the {plural(len(rows), 'weakest image')}"
            folds.append(folded(title, element("div", table(head, rows), class_="images")))
    return section("Weakest images", *folds) if folds else Html("")


def meaning_section() -> Html:
    points = (
        "The certificate is about the smoothed classifier: the engines, noise and votes named below, bit for bit. "
        "Another precision or runtime is another classifier.",
        "It says that the answer does not change within the radius, in l2 and in [0, 1] pixel units. It does not say "
        "that the answer is right: spoofed certificates at wrong labels exist (GhostCert, arXiv 2511.14003).",
        "An image that is asked about gets a wrong one with probability alpha at most over the noise. Keeping the best "
        "of r runs costs a factor r in alpha, whether they differ in secret or, under one secret, in n, method, "
        "options or engine. With a public seed it is valid only for images fixed before the seed was chosen.",
        "It says nothing of changes that are not small in l2: rotation, weather, another camera.",
        "Every figure that claims something is rounded to the weaker claim: radii, lower bounds and accuracies down, "
        "upper bounds up.",
    )
    return section("What a certificate says, and what it does not", element("ul", *(element("li", p) for p in points)))
