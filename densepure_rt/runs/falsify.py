"""`certify --falsify SHARE`: attacks on certificates that a run has given, for a share of the samples that they took.

A certificate of an image that is clear rests on fewer samples than one attack needs. So the shares of all images go
into one pool, and the pool pays for whole attacks on certificates that lie evenly among those with a radius.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from densepure_rt.errors import UsageError
from densepure_rt.images.datasets import ImageSet, LabelledImage
from densepure_rt.images.pictures import as_picture
from densepure_rt.rounding import exact
from densepure_rt.runs.falsifier import Falsification, falsify, proposal_of_samples
from densepure_rt.runs.folder import RunFolder
from densepure_rt.runs.layout import broken_picture
from densepure_rt.runs.records import ImageRecord, TimingRecord
from densepure_rt.smoothing.certificate import Certificate
from densepure_rt.smoothing.classifier import SmoothedClassifier
from densepure_rt.smoothing.settings import Settings

# Samples of one attack: at 300 most shipped images whose certificate was forged to a radius of 4 are broken
# (tests/densepure_rt/runs/test_falsifier.py has the smallest case), and a test alone takes 41 at least.
EACH = 300

Proposals = Callable[[LabelledImage, Certificate], Iterable[NDArray[np.uint8]]]


def no_proposals(image: LabelledImage, certificate: Certificate) -> Iterable[NDArray[np.uint8]]:
    return ()


def check_share(share: float) -> None:
    """Raise UsageError unless it is a share."""
    if not 0 < share <= 1:
        raise UsageError(
            f"`falsify` is a share of the samples of the certificates, above 0 and at most 1, got {exact(share)}"
        )


def attacked(done: Sequence[tuple[ImageRecord, TimingRecord]], share: float) -> list[int]:
    """The idx of the images whose certificates the share of the samples pays an attack for, evenly among them."""
    with_radius = [record.idx for record, _ in done if record.radius]
    count = min(len(with_radius), int(share * sum(timing.samples for _, timing in done)) // EACH)
    return [with_radius[place * len(with_radius) // count] for place in range(count)]


def attack_each(
    classifier: SmoothedClassifier,
    images: ImageSet,
    settings: Settings,
    folder: RunFolder,
    share: float,
    proposals: Proposals = no_proposals,
) -> Iterator[Falsification]:
    """Attack certificates of a run, one after another; what breaks one is kept as a picture in the run's folder."""
    records = {record.idx: record for record, _ in folder.done}
    done = {image.idx: image for image in folder.ledger.done()}
    chosen = set(attacked(folder.done, share))
    for image in images.readable():
        if image.idx not in chosen:
            continue
        certificate = certificate_of_record(records[image.idx])
        pointed = proposal_of_samples(classifier, image, certificate, settings, done[image.idx].labels())
        candidates = [] if pointed is None else [pointed]
        candidates += proposals(image, certificate)
        found, candidate = falsify(classifier, image, certificate, settings, EACH, candidates)
        if candidate is not None:
            folder.keep_picture(broken_picture(image.idx), as_picture(candidate))
        yield found


def certificate_of_record(record: ImageRecord) -> Certificate:
    return Certificate(**{field.name: getattr(record, field.name) for field in fields(Certificate)})
