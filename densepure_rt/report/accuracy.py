"""Certified accuracy over radii, of a run as it was recorded or imported: for reports and comparisons.

certified accuracy(r) = share of the labelled images that are certified for their own label at a radius of r or more.
All radii are l2 in [0, 1] pixel units.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from densepure_rt.legacy.folder import ImportedRun
from densepure_rt.runs.identity import settings_of
from densepure_rt.runs.reader import Run
from densepure_rt.runs.records import Identity
from densepure_rt.smoothing.decider import Rule

CONFIDENCE = 0.95  # of everything that a report says of images beyond those that were run
RHO = 0.05  # of `right_of_these`, which does not hold for much smaller ones


class Answer(Protocol):
    """The answer for an image, own or imported. radius: None for an abstention. correct: None without a label."""

    @property
    def label(self) -> int | None: ...
    @property
    def radius(self) -> float | None: ...
    @property
    def correct(self) -> bool | None: ...


A = TypeVar("A", bound=Answer)


@dataclass(frozen=True)
class Curve:
    """A certified-accuracy curve: `accuracy[i]` holds on (radii[i - 1], radii[i]]; radii[0] is the smallest known.

    grid: the run was asked about `radii` alone, so that only these are known; else all from 0 to the last. images: how
    many it is the share of. labelled: whether these have labels; else it counts certificates for whatever class.
    open_ended: nothing is certified beyond the last of `radii`, and whether n samples could have is not known.
    """

    radii: tuple[float, ...]
    accuracy: tuple[float, ...]
    grid: bool
    images: int
    labelled: bool
    open_ended: bool = False

    def at(self, radius: float) -> float | None:
        """None where the run was not asked, or where its n samples cannot reach."""
        if not radius >= 0:
            return None
        place = bisect_left(self.radii, radius)
        if place == len(self.radii):
            return 0.0 if self.open_ended else None
        if self.grid and self.radii[place] != radius:
            return None
        return self.accuracy[place]


def curve_of(run: Run) -> Curve:
    """The curve of the labelled images that are done, or of all where none has a label. No image: no radii."""
    counted, labelled = counted_of(run.records)
    identity = run.manifest.identity
    grid = settings_of(identity).decided is not None
    radii = (rule_of(identity).reachable() if grid else breakpoints(run)) if counted else ()
    return Curve(radii, shares_certified(counted, radii), grid, len(counted), labelled)


def curve_of_imported(found: ImportedRun) -> Curve:
    """The same on the sound reading of another tool's radii: up to their reach, else up to the last one."""
    counted, labelled = counted_of(found.records)
    end = found.origin.reach
    radii = tuple(sorted({0.0, end or 0.0} | {record.radius for record in counted if record.radius is not None}))
    shares = shares_certified(counted, radii)
    return Curve(radii, shares, False, len(counted), labelled, open_ended=end is None)


def counted_of(records: Sequence[A]) -> tuple[Sequence[A], bool]:
    """The answers that a curve is the share of, and whether these have labels: all, where none has."""
    labelled = tuple(record for record in records if record.label is not None)
    return labelled or records, bool(labelled)


def shares_certified(records: Sequence[Answer], radii: Sequence[float]) -> tuple[float, ...]:
    """Return the share of the records that `holds` at each radius, 0 or more, in the order of `radii`.

    The certified radii are sorted once: a run has as many different radii as images, and a scan of all for each of
    them takes minutes at 50,000.
    """
    certified = sorted(record.radius or 0.0 for record in records if holds(record, 0.0))
    return tuple((len(certified) - bisect_left(certified, radius)) / len(records) for radius in radii)


def holds(record: Answer, radius: float) -> bool:
    """Return whether the image is certified at `radius`, and for its own label where it has one."""
    return record.correct is not False and record.radius is not None and record.radius >= radius


def breakpoints(run: Run) -> tuple[float, ...]:
    """Return where the curve of a run that measures radii may fall: 0, each image's radius, the largest asked for."""
    radii = {record.radius for record in run.records if record.radius is not None}
    return tuple(sorted({0.0, rule_of(run.manifest.identity).sought()} | radii))


def reach(identity: Identity) -> float | None:
    """The largest radius that all n samples agreeing on the label certify; None when even they certify nothing."""
    return rule_of(identity).reach()


def rule_of(identity: Identity) -> Rule:
    return settings_of(identity).rule(math.prod(identity.image), labelled=True)


def band_half_width(images: int, confidence: float = CONFIDENCE) -> float:
    """Half the width of a band that holds the whole curve of the images' source at once, at this confidence.

    Dvoretzky, Kiefer & Wolfowitz with Massart's constant: P(sup |F_M - F| > h) <= 2 exp(-2 M h^2), for M images that
    were drawn independently.
    """
    return math.sqrt(math.log(2 / (1 - confidence)) / (2 * images))


def right_of_these(accuracy: float, images: int, alpha: float) -> float:
    """But for probability RHO over the sampling, at least this share of the images truly is as their certificates say.

    locuslab/smoothing's `HighProbAccuracy`: up to `alpha` of the certificates are wrong in the mean, and more by
    chance. Needs errors that are independent from image to image. It lacks a factor of two beneath the root of
    Bernstein's inequality; at RHO it holds all the same, at a rho of 0.001 it does not (exact binomial, in the tests).
    """
    by_chance = math.sqrt(alpha * (1 - alpha) * math.log(1 / RHO) / images) + math.log(1 / RHO) / (3 * images)
    return max(0.0, accuracy - alpha - by_chance)
