"""Results of older tools on their sound reading, and what they claim without ground.

A log keeps rounded radii alone: each is read as the lower end of what prints so, and held against the largest radius
that its n and alpha allow. Label arrays keep every vote: they are voted and certified again, and held against the
merged file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from itertools import accumulate, compress, pairwise
from typing import Any, Literal

from scipy import special

from densepure_rt.errors import UsageError
from densepure_rt.json_files import STRICT, Count, Label, Probability, Radius, Text
from densepure_rt.legacy.label_arrays import LabelFolder, Reader, Retaken, SeedAgreement, retake
from densepure_rt.legacy.logs import ALPHA, PRINTED_DIGITS, Log, Row, below, printed_interval
from densepure_rt.rounding import exact, floored, raised
from densepure_rt.smoothing.certificate import Certificate
from densepure_rt.smoothing.fixed import FixedRule
from densepure_rt.text import plural

ResultKind = Literal["log", "label arrays"]
SETTINGS: Mapping[ResultKind, tuple[str, ...]] = {
    "log": ("kind", "sigma", "n", "alpha", "printed_digits"),
    "label arrays": ("kind", "sigma", "n0", "n", "alpha", "classes", "seeds", "tie_rule", "alpha_of_merged"),
}
Watch = Callable[[Iterable[int], int], Iterable[int]]  # passes images on, so many in all, and shows how far it is
SLACK = 1e-9  # relative; more than the outward rounding of a bound, or than the older tools' float64 may be off


@dataclass(frozen=True)
class Flag:
    """Something to know. unsound: a claim that the file makes does not hold. images: by idx; none: the whole file."""

    __pydantic_config__ = STRICT
    name: Text
    unsound: bool
    says: Text
    images: tuple[int, ...]


@dataclass(frozen=True)
class Claim:
    """The part of a result that a sound reading leaves; a line of an import's results.jsonl.

    label: None where it is not known. predict, radius: None abstains. printed: the radius as the older tool printed it.
    Counts and bound are known where labels were voted again. correct: None without a label.
    """

    __pydantic_config__ = STRICT
    idx: int
    label: Label | None
    predict: Label | None
    radius: Radius | None
    printed_predict: Label | None
    printed: Text | None
    n0: Count | None
    n: Count | None
    n_a: Count | None
    alpha: Probability | None
    p_lower: Probability | None
    ties: Count | None
    correct: bool | None

    @classmethod
    def of(cls, idx: int, label: int | None, predict: int | None, radius: float | None, **known: Any) -> Claim:
        """Make a claim; what is not known of it is None."""
        values: dict[str, Any] = dict.fromkeys(entry.name for entry in fields(cls)) | known
        values |= {"idx": idx, "label": label, "predict": predict, "radius": radius}
        return cls(**values | {"correct": None if label is None else predict == label})

    def covers(self, radius: float) -> bool:
        """Return whether the label is certified at `radius`, on the sound reading."""
        return self.correct is True and self.radius is not None and self.radius >= radius

    def covers_as_printed(self, radius: float) -> bool:
        """The same if the printed radius is taken at its word, as locuslab's analyze.py does."""
        known = self.label is not None and self.printed_predict == self.label
        return known and self.printed is not None and float(self.printed) >= radius


@dataclass(frozen=True)
class ImportSettings:
    """Say what the numbers were made with, by the files or the caller; what is not known is None."""

    __pydantic_config__ = STRICT
    kind: ResultKind
    sigma: Radius | None
    n: Count | None
    alpha: Probability
    n0: Count | None = None
    printed_digits: Count | None = None
    classes: Count | None = None
    seeds: tuple[int, ...] | None = None
    tie_rule: Text | None = None
    alpha_of_merged: Probability | None = None

    def told(self) -> dict[str, Any]:
        """Return what belongs to its kind, by name, as it is printed and kept."""
        return {name: getattr(self, name) for name in SETTINGS[self.kind]}


@dataclass(frozen=True)
class Imported:
    """Results of an older tool. reach: the largest radius that n and alpha allow, None where they are not known.

    sources: SHA-256 of each file, by name.
    """

    claims: tuple[Claim, ...]
    flags: tuple[Flag, ...]
    reach: float | None
    sources: Mapping[str, str]
    settings: ImportSettings

    @property
    def labelled(self) -> bool:
        return all(claim.label is not None for claim in self.claims)

    @property
    def unsound(self) -> bool:
        return any(flag.unsound for flag in self.flags)

    def accuracy(self, radii: Sequence[float]) -> list[float | None]:
        """The share of images certified at each radius; None where it is not known or beyond reach."""
        return [
            None
            if not self.labelled or (self.reach is not None and radius > self.reach)
            else sum(claim.covers(radius) for claim in self.claims) / len(self.claims)
            for radius in radii
        ]

    def accuracy_as_printed(self, radii: Sequence[float]) -> list[float | None]:
        """The same with every printed radius taken at its word; None where nothing was printed."""
        if not self.labelled or any(claim.printed is None for claim in self.claims):
            return [None for _ in radii]
        return [sum(claim.covers_as_printed(radius) for claim in self.claims) / len(self.claims) for radius in radii]


def import_log(log: Log, sigma: float | None, n: int | None, alpha: float, radii: Sequence[float]) -> Imported:
    """A log on its sound reading: lower ends of radii, and no claim where a row contradicts itself or n and alpha.

    sigma in [0, 1] pixel units and n: what the log was made with; with None its radii cannot be held against them.
    """
    claims = [claim_of_row(row, log.digits) for row in log.rows]
    flags = [*flags_of(log), *rounded_up(claims, radii)]
    settings = ImportSettings("log", sigma, n, alpha, printed_digits=log.digits)
    reach = None
    if sigma is not None and n is not None:
        reach = FixedRule(n0=1, n=n, alpha=alpha, sigma=sigma).reach() or 0.0
        beyond = [claim.radius is not None and claim.radius > reach * (1 + SLACK) for claim in claims]
        flags += beyond_reach(list(compress(claims, beyond)), sigma, n, reach)
        claims = [abstaining(claim) if too_far else claim for claim, too_far in zip(claims, beyond, strict=True)]
    return Imported(tuple(claims), tuple(flags), reach, {log.name: log.sha256}, settings)


def beyond_reach(claims: Sequence[Claim], sigma: float, n: int, reach: float) -> Iterable[Flag]:
    """Claims beyond the reach, and the least alpha that allows them: Phi(radius / sigma)^n."""
    if claims:
        largest = max(claim.radius or 0.0 for claim in claims)
        needed = raised(math.exp(n * float(special.log_ndtr(largest / sigma))), figures=2)
        says = (
            f"more than {raised(reach, 4)}, the most that n and alpha allow: {floored(largest, 4)} takes an alpha of "
            f"{needed}, or another n or sigma; read as abstentions"
        )
        yield Flag("beyond reach", True, says, tuple(claim.idx for claim in claims))


def claim_of_row(row: Row, digits: int | None) -> Claim:
    return Claim.of(
        idx=row.idx,
        label=row.label,
        predict=row.predict,
        radius=None if row.predict is None else below(printed_interval(row.radius, digits)[0]),
        printed_predict=row.predict,
        printed=row.radius,
    )


def abstaining(claim: Claim) -> Claim:
    """The same image with nothing claimed of it."""
    return replace(claim, predict=None, radius=None, correct=None if claim.label is None else False)


def flags_of(log: Log) -> Iterable[Flag]:
    """Flag what a log says of itself that does not fit together."""
    rows = log.rows
    right = [int(row.predict is not None and row.predict == row.label) for row in rows]
    if (correct := [row.correct for row in rows]) != right:
        wrong = tuple(row.idx for row, expected in zip(rows, right, strict=True) if row.correct != expected)
        says = "differs from predict == label, which is used here instead"
        if correct == list(accumulate(right)):
            says = "is the running total of the right ones, as DDS writes it: locuslab's analyze.py misreads it"
        yield Flag("correct column", True, says, wrong)
    if odd := tuple(row.idx for row in rows if row.predict is None and float(row.radius) > 0):
        yield Flag("abstains with a radius", True, "predict is -1 and radius is not 0.0; read as an abstention", odd)
    if bare := tuple(row.idx for row in rows if row.predict is not None and float(row.radius) == 0):
        yield Flag(
            "label without a radius", False, "predict is a class and radius is 0: counts at radius 0 alone", bare
        )
    if repeated := tuple(idx for idx, count in Counter(row.idx for row in rows).items() if count > 1):
        yield Flag("repeated", True, "stand in more than one row, and count more than once", repeated)
    if log.unfinished:
        yield Flag("cut short", False, f"the last line of {log.name} has no end, and is left out", ())


def rounded_up(claims: Sequence[Claim], radii: Sequence[float]) -> Iterable[Flag]:
    """List, at each radius, the images that reach it only because their radius was printed rounded."""
    for radius in radii:
        images = tuple(
            claim.idx
            for claim in claims
            if claim.predict == claim.printed_predict and claim.covers_as_printed(radius) and not claim.covers(radius)
        )
        if images:
            yield Flag(
                "rounding", False, f"certified at {exact(radius)} only if the printed radius was not rounded up", images
            )


def import_folder(
    folder: LabelFolder,
    alpha: float,
    classes: int | None,
    labels: Log | None,
    merged: Log | None,
    radii: Sequence[float],
    watch: Watch,
) -> Imported:
    """Vote and certify every image again.

    labels: a log that names the images' labels, the merged one unless it is given. merged: what the official merge made
    of this folder, which it is held against.
    """
    naming = labels or merged
    named = {} if naming is None else labels_by_image(naming, folder.images)
    merged_rows = {} if merged is None else {row.idx: row for row in merged.rows}
    agreements = {pair: SeedAgreement() for pair in pairwise(folder.seeds)}
    retaken: dict[int, Retaken] = {}
    reader = Reader(folder, classes)
    for idx in watch(folder.images, len(folder.images)):
        selection, estimation = reader.labels(idx, "n0"), reader.labels(idx, "n")
        retaken[idx] = retake(selection, estimation, folder.sigma, alpha)
        for agreement, (one, other) in zip(agreements.values(), pairwise(estimation), strict=True):
            agreement.add(one, other)
    claims = [claim_of(idx, named.get(idx), found, merged_rows.get(idx)) for idx, found in retaken.items()]
    flags = [*flags_of_agreement(agreements), *flags_of_ties(retaken)]
    if any(agreement.verdict == "other noise" for agreement in agreements.values()):
        claims = [abstaining(claim) for claim in claims]
    if merged is not None:
        wrong = [*flags_of(merged), *flags_of_merged(merged, retaken, named)]
        flagged = {idx for flag in wrong for idx in flag.images}
        flags += [*wrong, *rounded_up([claim for claim in claims if claim.idx not in flagged], radii)]
    n0, n = reader.sizes["n0"], reader.sizes["n"]
    settings = ImportSettings(
        "label arrays",
        folder.sigma,
        n,
        alpha,
        n0=n0,
        classes=classes,
        seeds=folder.seeds,
        tie_rule="the label seen first",
        alpha_of_merged=None if merged is None else ALPHA,
    )
    sources = reader.digests | {log.name: log.sha256 for log in (labels, merged) if log is not None}
    reach = FixedRule(n0=n0, n=n, alpha=alpha, sigma=folder.sigma).reach() or 0.0
    return Imported(tuple(claims), tuple(flags), reach, sources, settings)


def labels_by_image(log: Log, images: Sequence[int]) -> dict[int, int]:
    named = {row.idx: row.label for row in log.rows if row.label is not None}
    if missing := [idx for idx in images if idx not in named]:
        others = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise UsageError(
            f"{log.name} has no label of image {missing[0]}{others}: `labels` names a log that has them all"
        )
    return named


def claim_of(idx: int, label: int | None, found: Retaken, row: Row | None) -> Claim:
    certificate = found.certificate
    return Claim.of(
        idx=idx,
        label=label,
        predict=certificate.predict,
        radius=certificate.radius,
        printed_predict=None if row is None else row.predict,
        printed=None if row is None else row.radius,
        n0=certificate.n0,
        n=certificate.n,
        n_a=certificate.n_a,
        alpha=certificate.alpha,
        p_lower=certificate.p_lower,
        ties=found.ties,
    )


def flags_of_agreement(agreements: Mapping[tuple[int, int], SeedAgreement]) -> Iterable[Flag]:
    """Flag neighbouring runs that voted on equal noise. All did if each did with the next one."""
    if apart := [pair for pair, agreement in agreements.items() if agreement.verdict == "other noise"]:
        says = (
            f"seeds {pairs(apart)} agree no more than by chance, as runs of different smoothing noise do: their votes "
            f"are not on the same samples, and no radius follows; read as abstentions"
        )
        yield Flag("misaligned", True, says, ())
    if untold := [pair for pair, agreement in agreements.items() if agreement.verdict == "unknown"]:
        yield Flag(
            "alignment unknown", False, f"too few labels vary to tell whether seeds {pairs(untold)} had equal noise", ()
        )
    told = [pair for pair, agreement in agreements.items() if agreement.verdict == "equal noise"]
    if equal := [pair for pair in told if not agreements[pair].differing]:
        says = (
            f"seeds {pairs(equal)} gave equal labels throughout: one step, or one run twice; their votes count as one"
        )
        yield Flag("equal runs", False, says, ())


def pairs(seeds: Sequence[tuple[int, int]]) -> str:
    shown = ", ".join(f"{one} and {other}" for one, other in seeds[:3])
    return shown + (f" (and {len(seeds) - 3} pairs more)" if len(seeds) > 3 else "")


def flags_of_merged(merged: Log, retaken: Mapping[int, Retaken], named: Mapping[int, int]) -> Iterable[Flag]:
    """Flag where the merged file is not what these arrays give, at the alpha that the official merge knows."""
    rows = [row for row in merged.rows if row.idx in retaken]
    renamed = tuple(row.idx for row in rows if row.label != named[row.idx])
    if renamed:
        says = "the merged file takes labels by row, and has another image's here: used are those of --labels"
        yield Flag("label differs", True, says, renamed)
    official = {idx: found.as_merged for idx, found in retaken.items()}
    voted = {row.idx: None for row in rows if row.predict != official[row.idx].predict}
    if voted:
        yield Flag("predict differs", True, "the merged file has another answer than these arrays give", tuple(voted))
    for name, sign in (("radius overstated", 1), ("radius understated", -1)):
        images = tuple(row.idx for row in rows if row.idx not in voted and off_by(row, official[row.idx]) == sign)
        if images:
            more = "larger" if sign > 0 else "smaller"
            says = f"the merged file has a {more} one than these arrays give, beyond rounding"
            yield Flag(name, sign > 0, says, images)
    only_there = {row.idx for row in merged.rows} - set(retaken)
    if only_one := tuple(sorted(only_there | (set(retaken) - {row.idx for row in rows}))):
        yield Flag("in one only", False, "are in the merged file or in the folder, not in both", only_one)


def off_by(row: Row, certificate: Certificate) -> int:
    """1 when the printed radius is more than rounding above the certificate's, -1 when it is below, 0 when it fits."""
    radius = Decimal(certificate.radius or 0.0)
    low, high = printed_interval(row.radius, PRINTED_DIGITS)
    slack = Decimal(SLACK) * max(radius, Decimal(SLACK))
    return int(low > radius + slack) - int(high < radius - slack)


def flags_of_ties(retaken: Mapping[int, Retaken]) -> Iterable[Flag]:
    ties = sum(found.ties for found in retaken.values())
    images = tuple(idx for idx, found in retaken.items() if found.by_tie_rule)
    if ties:
        matters = "their certificates may depend on it" if images else "no certificate depends on it"
        yield Flag(
            "ties", False, f"{plural(ties, 'sample')} tied, decided by the order of the seeds; {matters}", images
        )
