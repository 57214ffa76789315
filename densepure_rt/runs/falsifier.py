"""Attacks a certificate inside the ball that it claims, with a budget of samples. Only a proof counts as a success.

The search. Candidates come in antithetic pairs around the direction that looks worst so far, and a few smoothed samples
of each are labelled. Every such sample is an experiment of its own: with y = candidate + noise, the covariance of y and
"the label is not A" is the gradient of that chance times sigma^2 (Stein's identity), so that the smoothing noise itself
is the population of an evolution strategy (Wierstra et al. 2014, NES). While no label differs, directions are random.

The proof. A candidate whose few samples have a rival in the majority is put to the test: all classes at once, whether
p_B > 1/2, on noise that nothing has seen. That noise is keyed with the candidate, for the purpose "falsify"; the search
draws its own for "select", and no candidate is tested twice, so however a candidate was found its test is fresh. The
k-th test of an attack has the level LEVEL / (k (k + 1)). These sum to LEVEL for any number of tests, also for one that
depends on how the earlier ones went; equal shares would need their number in advance. So with probability at least
1 - LEVEL, over the noise, no certificate that holds is called broken. One that is broken is one of the share alpha that
may be wrong, or there is a fault; one that is not broken is not thereby proven.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from densepure_rt.errors import UsageError
from densepure_rt.images.datasets import LabelledImage
from densepure_rt.json_files import STRICT, Count, Label, Probability, Radius
from densepure_rt.rounding import exact
from densepure_rt.runtime.device import NOT_FINITE
from densepure_rt.runtime.noise import (
    PIXEL_LEVELS,
    Key,
    Purpose,
    image_key,
    image_sha256,
    smoothing_law,
    smoothing_noise,
    vote_noise,
)
from densepure_rt.runtime.reverse import decide
from densepure_rt.smoothing.certificate import Certificate
from densepure_rt.smoothing.classifier import SmoothedClassifier
from densepure_rt.smoothing.decider import LOOK, Decision, Phases, certify_at
from densepure_rt.smoothing.sequential import SequentialRule, prediction_rule
from densepure_rt.smoothing.settings import Settings

LEVEL = 1e-6  # the chance to call a certificate broken that holds, over all tests of an image
PILOT = 16  # samples by which a candidate is judged before it is tested
ASIDE = 0.3  # how far the two of a pair lie from their common direction, in its length
NOISE_SHARE = 0.25  # of a test's level, at most, for the noise not being exactly normal
SCALES = 1024  # in which a push is scaled: parts of a grey level of its largest pixel
SCALE_LIMIT = 2**38  # at which all but pixels a millionth of the largest are at 0 or 255

Pixels = NDArray[np.uint8]  # [C, H, W]
Levels = NDArray[np.float64]  # differences in grey levels, [C, H, W]
Attack = Literal["nothing tried", "proposals", "random directions", "evolution of the noise"]


@dataclass(frozen=True)
class Falsification:
    """The result of an attack on the certificate of image `idx`, as a line of falsify.jsonl.

    radius: of the certificate. tried: candidates that samples were spent on; tested: those of them that were put to the
    test. samples: drawn, for the search and the tests. broken: a test has shown that the smoothed classifier answers
    `label` at a candidate whose `distance` (l2 in [0, 1] pixel units, rounded up) is inside the radius: `votes` of the
    `n` samples of the test are for it, and `level` is the chance to see that were it not so. All of these are None
    where nothing is broken. attack: what found the candidate, or what was tried last.
    """

    __pydantic_config__ = STRICT
    idx: int
    radius: Radius
    broken: bool
    attack: str
    tried: Count
    tested: Count
    samples: Count
    distance: Radius | None
    label: Label | None
    votes: Count | None
    n: Count | None
    level: Probability | None


def most_squares(radius: float) -> int:
    """The largest sum of squared differences, in grey levels, of an image inside the open l2 ball of `radius`.

    That is below (255 radius)^2, exactly, for the exact value of the float.
    """
    if not 0 <= radius < math.inf:
        raise UsageError(f"a radius is a distance in [0, 1] pixel units, at least 0, got {exact(radius)}")
    return max(0, math.ceil((PIXEL_LEVELS * Fraction(radius)) ** 2) - 1)


def squares(pixels: Pixels, candidate: Pixels) -> int:
    """The sum of squared differences in grey levels, exact."""
    gap = candidate.astype(np.int64) - pixels
    return int((gap * gap).sum())


def inside(pixels: Pixels, candidate: Pixels, radius: float) -> bool:
    """Return whether a candidate is another image, of the same shape, inside the open l2 ball around `pixels`."""
    alike = candidate.dtype == np.uint8 and candidate.shape == pixels.shape
    return alike and 0 < squares(pixels, candidate) <= most_squares(radius)


def distance_of(pixels: Pixels, candidate: Pixels) -> float:
    """The l2 distance in [0, 1] pixel units, rounded up: the least float that is not below it."""
    total = squares(pixels, candidate)
    distance = math.sqrt(total) / PIXEL_LEVELS * (1 - 1e-15)
    while (PIXEL_LEVELS * Fraction(distance)) ** 2 < total:
        distance = math.nextafter(distance, math.inf)
    return distance


def within(pixels: Pixels, push: Levels, radius: float) -> Pixels | None:
    """The image that lies from `pixels` in the direction of `push`, as far as the open ball and 0 ... 255 allow.

    None when the ball holds no other image in that direction. Inside by construction: the push is scaled up as long
    as it is inside once it is cut to whole levels; what the ball still allows goes to the largest remainders, a level
    each.
    """
    most, room = most_squares(radius), np.where(push < 0, pixels, PIXEL_LEVELS - pixels.astype(np.int64))
    size = np.where(room > 0, np.abs(push), 0.0)
    if not most or not size.any():
        return None
    size = size / size.max()

    def levels_at(scale: int) -> Levels:
        levels: Levels = np.minimum(size * (scale / SCALES), room)
        return levels

    def leaves(scale: int) -> bool:
        levels = np.floor(levels_at(scale)).astype(np.int64)
        return int((levels * levels).sum()) > most

    wanted = levels_at(bisect_left(range(SCALE_LIMIT), True, key=leaves) - 1)
    levels = np.floor(wanted).astype(np.int64)
    movable = np.flatnonzero((levels < room) & (size > 0))
    movable = movable[np.argsort((levels - wanted).flat[movable], kind="stable")]
    spent = np.cumsum(2 * levels.flat[movable] + 1)
    levels.flat[movable[: np.searchsorted(spent, most - int((levels * levels).sum()), side="right")]] += 1
    return (pixels + np.where(push < 0, -levels, levels)).astype(np.uint8)


def unit(direction: Levels) -> Levels:
    """Scale to length 1; zeros stay zeros."""
    found: Levels = direction / (float(np.linalg.norm(direction)) or 1.0)
    return found


def weighted_noise(
    key: Key, sigma: float, samples: range, weights: NDArray[np.float64], shape: tuple[int, ...]
) -> Levels:
    """The sum of the smoothing noise of some samples of `key`, each times its weight, in grey levels."""
    law, total = smoothing_law(sigma), np.zeros(shape)
    for place in np.flatnonzero(weights).tolist():
        total += weights[place] * smoothing_noise(law, key, samples[place], shape)
    return total


def majority(labels: NDArray[np.int64]) -> int | None:
    """The label that more than half of the samples have; None where none has, or where they were not finite."""
    found, counts = np.unique(labels, return_counts=True)
    place = int(counts.argmax())
    return int(found[place]) if 2 * counts[place] > len(labels) and found[place] != NOT_FINITE else None


def hopeful(labels: NDArray[np.int64], rival: int, rule: SequentialRule, errors: float) -> bool:
    """Return whether the rival's share, raised by so many standard errors, would do at a test's last look."""
    share = float((labels == rival).mean()) + errors * 0.5 / math.sqrt(len(labels))
    return share * rule.n_max >= certify_at(rule.tests[0], rule.n_max)


def labels_of(
    classifier: SmoothedClassifier, images: Sequence[Pixels], settings: Settings, purpose: Purpose, samples: range
) -> NDArray[np.int64]:
    """The voted labels of these samples of some images, int64 [images, samples]: so many are drawn, and no more."""
    if classifier.busy:
        raise UsageError("this classifier is already at work: finish or close that iteration, or load another one")
    device, chain, handles = classifier.device, classifier.chain(settings), list[int]()
    try:
        for image in images:
            key = image_key(classifier.secret, purpose, settings.sigma, image)
            handles.append(device.open_image(image, key, settings.sigma, chain.scale))
        work = itertools.product(handles, samples)
        labels = [outcome.label for outcome in decide(device, chain, work, settings.ballot)]
    finally:
        for handle in handles:
            device.close_image(handle)
    return np.array(labels, np.int64).reshape(len(images), len(samples))


def proposal_of_samples(
    classifier: SmoothedClassifier,
    image: LabelledImage,
    certificate: Certificate,
    settings: Settings,
    labels: NDArray[np.integer],
) -> Pixels | None:
    """The candidate that the certificate's own samples point at, for no further sample: the sum of the noise that
    changed the label.

    labels: of all samples of the certificate, in their order. None where it certifies no radius, or no label differs.
    """
    if not certificate.radius:
        return None
    phases: Phases = (("select", certificate.n0), ("certify", len(labels) - certificate.n0))
    ends = itertools.accumulate(samples for _, samples in phases)
    push = np.zeros(image.pixels.shape)
    for (purpose, samples), end in zip(phases, ends, strict=True):
        key = image_key(classifier.secret, purpose, settings.sigma, image.pixels)
        wrong = (labels[end - samples : end] != certificate.predict).astype(np.float64)
        push += weighted_noise(key, settings.sigma, range(samples), wrong, image.pixels.shape)
    return within(image.pixels, push, certificate.radius)


def falsify(
    classifier: SmoothedClassifier,
    image: LabelledImage,
    certificate: Certificate,
    settings: Settings,
    samples: int,
    proposals: Iterable[Pixels] = (),
) -> tuple[Falsification, Pixels | None]:
    """Try to break `certificate`, which was made for `image` under `settings`, with `samples` samples at most.

    proposals: further candidates, tried first, read as they are needed; one that lies outside the ball is pulled in.
    With what comes of it goes the candidate that breaks the certificate, uint8 [C, H, W], or None.
    It depends on the classifier and its secret, and on neither batch nor threads. Nothing is tried where
    nothing is certified, where the ball holds no other image, or where the samples do not pay for one test.
    """
    if samples < 0:
        raise UsageError(f"samples is how many an attack may take, at least 0, got {samples}")
    attack = _Attack(classifier, image, certificate, settings, samples)
    if certificate.predict is None or not most_squares(attack.radius):
        return attack.outcome(), None
    for name, population in attack.populations(proposals):
        affordable = attack.affordable()
        if not affordable:
            break
        for candidate, pilot in attack.looked_at(name, population[:affordable]):
            if (found := attack.tested_at(candidate, pilot)) is not None:
                return found
    return attack.outcome(), None


class _Attack:
    """An attack under way: what is left of the samples, and where the labels change.

    push: the sum, over all samples so far, of where a sample lies from the middle of those that were drawn with it,
    times whether its label is another one, less the mean of that. It points to where labels change.
    """

    def __init__(
        self,
        classifier: SmoothedClassifier,
        image: LabelledImage,
        certificate: Certificate,
        settings: Settings,
        samples: int,
    ) -> None:
        self.classifier, self.idx, self.pixels, self.settings = classifier, image.idx, image.pixels, settings
        self.answer, self.radius = certificate.predict, certificate.radius or 0.0
        self.samples = self.left = samples
        self.tried = self.tests = 0
        self.name: Attack = "nothing tried"
        self.push = np.zeros(image.pixels.shape)
        self.seen = set[bytes]()

    def populations(self, proposals: Iterable[Pixels]) -> Iterator[tuple[Attack, list[Pixels]]]:
        """The candidates that are to be looked at together, none of them a second time.

        Random directions are vote noise under the key "falsify" of the image itself, which is no candidate of its own.
        What brings nothing new costs nothing, so that proposals and generations must end in another way: each are no
        more than the samples.
        """
        for proposal in itertools.islice(proposals, self.samples):
            yield "proposals", self._new([self._checked(proposal)])
        key = image_key(self.classifier.secret, "falsify", self.settings.sigma, self.pixels)
        for generation in range(self.samples):
            middle = unit(self.push)
            aside = ASIDE * unit(vote_noise(key, generation, 0, 1, self.pixels.shape).astype(np.float64))
            pair = [within(self.pixels, middle + side, self.radius) for side in (aside, -aside)]
            yield "evolution of the noise" if middle.any() else "random directions", self._new(pair)

    def affordable(self) -> int:
        """Count the candidates that can be looked at so that one of them can still be tested."""
        agreeing = self._agreeing()
        return 0 if agreeing is None else max(0, self.left - agreeing) // PILOT

    def looked_at(self, name: Attack, population: list[Pixels]) -> list[tuple[Pixels, NDArray[np.int64]]]:
        """Each candidate of a population with the labels of a few samples."""
        if not population:
            return []
        self.name = name
        self.tried += len(population)
        return list(zip(population, self._drawn(population, "select", range(PILOT)), strict=True))

    def tested_at(self, candidate: Pixels, pilot: NDArray[np.int64]) -> tuple[Falsification, Pixels] | None:
        """Test the candidate; returns a falsification if it shows that the certificate is broken.

        It is made where a rival has the majority of the pilot's labels, and such a one as would do with what is left.
        """
        rival = majority(pilot)
        if rival is None or rival == self.answer or self._agreeing() is None:
            return None
        rule = self._rule(self._most())
        if not hopeful(pilot, rival, rule, errors=0):
            return None
        self.tests += 1
        decision = self._decision(candidate, rule, rival, pilot)
        broken = decision.predict not in (None, self.answer)
        if not broken:
            return None
        distance = distance_of(self.pixels, candidate)
        return self.outcome(distance, decision.predict, decision.n_a, decision.n, rule.alpha), candidate

    def outcome(
        self,
        distance: float | None = None,
        label: int | None = None,
        votes: int | None = None,
        n: int | None = None,
        level: float | None = None,
    ) -> Falsification:
        return Falsification(
            idx=self.idx,
            radius=self.radius,
            broken=distance is not None,
            attack=self.name,
            tried=self.tried,
            tested=self.tests,
            samples=self.samples - self.left,
            distance=distance,
            label=label,
            votes=votes,
            n=n,
            level=level,
        )

    def _decision(self, candidate: Pixels, rule: SequentialRule, rival: int, pilot: NDArray[np.int64]) -> Decision:
        """Test fresh noise, as long as there is hope. The pilot has a say in that, and in nothing else.

        It is drawn in blocks of a fixed size, so that what is drawn does not depend on the device.
        """
        decider, seen = rule.start(), pilot
        for first in range(0, rule.n_max, LOOK):
            (labels,) = self._drawn([candidate], "falsify", range(first, min(first + LOOK, rule.n_max)))
            seen = np.concatenate([seen, labels])
            if any(decider.add(label) for label in labels.tolist()) or not hopeful(seen, rival, rule, errors=1):
                break
        return decider.so_far()

    def _drawn(self, population: list[Pixels], purpose: Purpose, samples: range) -> NDArray[np.int64]:
        """The labels of these samples of each candidate, int64 [candidates, samples], which also move the push."""
        labels = labels_of(self.classifier, population, self.settings, purpose, samples)
        self.left -= labels.size
        wrong, middle = labels != self.answer, np.mean(population, axis=0)
        for candidate, weights in zip(population, wrong - wrong.mean(), strict=True):
            key = image_key(self.classifier.secret, purpose, self.settings.sigma, candidate)
            self.push += weights.sum() * (candidate - middle)
            self.push += weighted_noise(key, self.settings.sigma, samples, weights, candidate.shape)
        return labels

    @property
    def _level(self) -> float:
        """The level of the next test."""
        return LEVEL / ((self.tests + 1) * (self.tests + 2))

    @property
    def _charge(self) -> float:
        """The part of its level that a sample of a test costs, its noise not being exactly normal."""
        return self.pixels.size * smoothing_law(self.settings.sigma).total_variation

    def _rule(self, n: int) -> SequentialRule:
        """Make the rule of the next test: does any class have more than half of the votes, after each sample?"""
        return prediction_rule(n, self._level, n * self._charge)

    def _most(self) -> int:
        """The most samples of the next test: those that are left, and that its level pays for."""
        return min(self.left, int(NOISE_SHARE * self._level / self._charge))

    def _agreeing(self) -> int | None:
        """Return how many agreeing samples the next test takes; None when it may not take so many."""
        most = self._most()
        return self._rule(most).needed(0.0) if most else None

    def _checked(self, proposal: Pixels) -> Pixels | None:
        if proposal.dtype != np.uint8 or proposal.shape != self.pixels.shape:
            raise UsageError(
                f"a proposal must be uint8 {list(self.pixels.shape)}, as its image is, got {proposal.dtype} "
                f"{list(proposal.shape)}"
            )
        if inside(self.pixels, proposal, self.radius):
            return proposal
        return within(self.pixels, proposal.astype(np.float64) - self.pixels, self.radius)

    def _new(self, candidates: Iterable[Pixels | None]) -> list[Pixels]:
        """Those that are inside the ball and were not looked at before. All candidates come through here."""
        new = {
            image_sha256(candidate): candidate
            for candidate in candidates
            if candidate is not None and inside(self.pixels, candidate, self.radius)
        }
        kept = [candidate for digest, candidate in new.items() if digest not in self.seen]
        self.seen |= new.keys()
        return kept
