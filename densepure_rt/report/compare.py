"""Two runs, image by image: which of them certifies more, and whether that is more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from scipy import special

from densepure_rt.errors import UsageError
from densepure_rt.report.accuracy import Curve, curve_of, holds
from densepure_rt.rounding import exact, typed
from densepure_rt.runs.identity import differing
from densepure_rt.runs.reader import Run
from densepure_rt.runs.records import ImageRecord
from densepure_rt.runs.summary import RADII


class Pair(NamedTuple):
    """The same image in both runs."""

    a: ImageRecord
    b: ImageRecord


@dataclass(frozen=True)
class Change:
    """An image whose radius differs, as far as both runs were asked; None: not certified for its label.

    name_a, name_b: of its file, None where a run names none.
    """

    idx_a: int
    idx_b: int
    label: int | None
    a: float | None
    b: float | None
    name_a: str | None = None
    name_b: str | None = None

    @property
    def gain(self) -> float:
        """The radius that b has more than a; infinite where only one of them has a certificate."""
        had, has = (-math.inf if radius is None else radius for radius in (self.a, self.b))
        return has - had


@dataclass(frozen=True)
class AtRadius:
    """Both runs at one radius, over the pairs. only_a, only_b: images certified by that run alone.

    p_value: exact McNemar test: of no difference, two-sided.
    """

    radius: float
    a: float
    b: float
    only_a: int
    only_b: int
    p_value: float

    def b_is_worse(self, level: float) -> bool:
        return self.only_a > self.only_b and self.p_value < level


@dataclass(frozen=True)
class Comparison:
    """pairs: distinct images that both runs have done. labelled: whether `radii` are of those with labels, else of all.

    unpaired_a, unpaired_b: distinct images that the other run has not. gained, lost: by radius, the largest changes
    first. other_class: images that both certify, for different classes. differs: (name, value in a, value in b) of the
    identities.
    """

    pairs: int
    labelled: bool
    unpaired_a: int
    unpaired_b: int
    radii: tuple[AtRadius, ...]
    gained: tuple[Change, ...]
    lost: tuple[Change, ...]
    other_class: int
    differs: tuple[tuple[str, Any, Any], ...]

    @property
    def same(self) -> int:
        return self.pairs - len(self.gained) - len(self.lost)

    def worse_at(self, level: float) -> tuple[AtRadius, ...]:
        return tuple(found for found in self.radii if found.b_is_worse(level))

    def false_alarm(self, level: float) -> Fraction:
        """Bound the probability that some radius is in `worse_at` though neither run is better at any.

        Each radius has half the level, as the p-value is two-sided and only one side counts, and the sum holds however
        the radii depend on each other (Bonferroni).
        """
        return min(Fraction(1), len(self.radii) * typed(level) / 2)


def mcnemar(only_a: int, only_b: int) -> float:
    """The two-sided exact p-value: how likely so uneven a split of the discordant pairs is when each is a fair coin."""
    smaller_tail = special.bdtr(min(only_a, only_b), only_a + only_b, 0.5)  # P(Bin(discordant, 1/2) <= the fewer)
    return min(1.0, 2 * float(smaller_tail))


def compare(a: Run, b: Run, radius: float | None = None) -> Comparison:
    """Pair the images of two runs by their pixels and compare at `radius`, None for all radii that both were asked.

    Raises UsageError when no image is in both, when an image has two labels, or when there is no such radius.
    """
    first, second = distinct(a.records), distinct(b.records)
    pairs = [Pair(record, second[sha]) for sha, record in first.items() if sha in second]
    check_pairs(pairs, a, b)
    curves = (curve_of(a), curve_of(b))
    radii = radii_of(*curves, radius)
    told = radii if radius is not None or any(curve.grid for curve in curves) else None
    changes = sorted(changes_of(pairs, told), key=lambda change: (abs(change.gain), largest(change)), reverse=True)
    labelled = [pair for pair in pairs if pair.a.label is not None]
    return Comparison(
        pairs=len(pairs),
        labelled=bool(labelled),
        unpaired_a=len(first) - len(pairs),
        unpaired_b=len(second) - len(pairs),
        radii=tuple(at_radius(labelled or pairs, each) for each in radii),
        gained=tuple(change for change in changes if change.gain > 0),
        lost=tuple(change for change in changes if change.gain < 0),
        other_class=sum(None not in (classes := {x.predict, y.predict}) and len(classes) > 1 for x, y in pairs),
        differs=tuple(differing(asdict(a.manifest.identity), asdict(b.manifest.identity))),
    )


def check_pairs(pairs: Sequence[Pair], a: Run, b: Run) -> None:
    """Raise UsageError when there are none, or when an image was certified against two labels."""
    if not pairs:
        raise UsageError(
            f"{a.path} and {b.path} have no image in common (of {len(a.records)} and {len(b.records)}), by the SHA-256 "
            f"of their pixels: compare runs over the same images"
        )
    for pair in pairs:
        if pair.a.label != pair.b.label:
            raise UsageError(
                f"image {pair.a} of {a.path} has label {pair.a.label} there and {pair.b.label} in {b.path}: the "
                f"two runs were asked different things; correct the labels and run again"
            )


def radii_of(a: Curve, b: Curve, asked: float | None) -> tuple[float, ...]:
    """The radius that was asked for, or all that both runs know. Raises UsageError when there is none."""
    common = common_radii(a, b)
    if asked is not None and (a.at(asked) is None or b.at(asked) is None):
        known = ", ".join(exact(radius) for radius in common) or "none"
        raise UsageError(f"the two runs do not both know the radius {exact(asked)}; of their radii both know {known}")
    if asked is None and not common:
        raise UsageError("the two runs were asked about no radius in common: run one again with `radii` of the other")
    return common if asked is None else (asked,)


def distinct(records: Sequence[ImageRecord]) -> dict[str, ImageRecord]:
    """By pixels, each image once: equal images share their noise, so that a second one is no further evidence."""
    found: dict[str, ImageRecord] = {}
    for record in records:
        found.setdefault(record.image_sha256, record)
    return found


def common_radii(a: Curve, b: Curve) -> tuple[float, ...]:
    """The radii of their grids, or of the papers' tables where neither has one, that both runs know."""
    asked = {radius for curve in (a, b) if curve.grid for radius in curve.radii} or set(RADII)
    return tuple(radius for radius in sorted(asked) if a.at(radius) is not None and b.at(radius) is not None)


def at_radius(pairs: Sequence[Pair], radius: float) -> AtRadius:
    in_a, in_b = ([holds(record, radius) for record in records] for records in zip(*pairs, strict=True))
    only_a = sum(one and not other for one, other in zip(in_a, in_b, strict=True))
    only_b = sum(other and not one for one, other in zip(in_a, in_b, strict=True))
    return AtRadius(radius, sum(in_a) / len(pairs), sum(in_b) / len(pairs), only_a, only_b, mcnemar(only_a, only_b))


def changes_of(pairs: Sequence[Pair], radii: Sequence[float] | None) -> list[Change]:
    """Images whose radius differs. radii: those that count, ascending; None where both runs measure any radius."""
    changes = []
    for a, b in pairs:
        had, has = told_radius(a, radii), told_radius(b, radii)
        if had != has:
            changes.append(Change(a.idx, b.idx, a.label, had, has, a.name, b.name))
    return changes


def told_radius(record: ImageRecord, radii: Sequence[float] | None) -> float | None:
    """The radius that the image is certified at for its label, rounded down to one of `radii` where there are any."""
    if radii is None:
        return record.radius if holds(record, 0.0) else None
    return max((radius for radius in radii if holds(record, radius)), default=None)


def largest(change: Change) -> float:
    return max(radius for radius in (change.a, change.b) if radius is not None)
