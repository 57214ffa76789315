"""A certification run from start to finish: manifest, forecast, images in, results out."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from densepure_rt import logs
from densepure_rt.images.datasets import ImageSet
from densepure_rt.rounding import floored
from densepure_rt.runs.falsifier import Falsification
from densepure_rt.runs.falsify import Proposals, attack_each, attacked, no_proposals
from densepure_rt.runs.folder import RunFolder
from densepure_rt.runs.identity import manifest_of
from densepure_rt.runs.layout import MANIFEST, read_manifest
from densepure_rt.runs.progress import Progress
from densepure_rt.runs.records import Summary
from densepure_rt.runs.shards import Shard
from densepure_rt.runs.summary import accuracy_so_far, radii_of, summarize
from densepure_rt.smoothing.classifier import Certified, SmoothedClassifier
from densepure_rt.smoothing.forecast import Range, require_reach
from densepure_rt.smoothing.settings import UNLIMITED, Budget, Settings
from densepure_rt.text import plural

T = TypeVar("T")


Left = Callable[[], Range | None]


def unknown() -> Range | None:
    """Time of which nothing is known."""
    return None


class Watch(Protocol):
    """Pass `work` on, item by item, and show how far it is, of `total`, with `before` done when it began.

    text: returns one line on how it goes so far. left: returns the seconds that are left, where it is known better than
    by the items that are done. Both are asked from any thread, also while an item is worked at.
    """

    def __call__(
        self, work: Iterable[T], total: int, text: Callable[[], str] = str, before: int = 0, left: Left = unknown
    ) -> Iterator[T]: ...


def unwatched(
    work: Iterable[T], total: int, text: Callable[[], str] = str, before: int = 0, left: Left = unknown
) -> Iterator[T]:
    return iter(work)


@dataclass(frozen=True)
class RunRequest:
    """A request for a run: the images, how they are certified, and where the results go.

    images: all that the run is about. shard: the part of them to certify here; None for all. seed: public; None where a
    secret keys the noise. falsify: the share of their samples to attack the certificates with, once all are there.
    options: what it was asked for by, for the manifest.
    """

    images: ImageSet
    settings: Settings
    out: Path
    seed: int | None = None
    budget: Budget = UNLIMITED
    shard: Shard | None = None
    falsify: float | None = None
    options: Mapping[str, str | int | float | bool | Sequence[str]] | None = None

    @property
    def mine(self) -> ImageSet:
        return self.images if self.shard is None else self.shard.select(self.images)


def certify_images(
    classifier: SmoothedClassifier,
    request: RunRequest,
    proposals: Proposals = no_proposals,
    watch: Watch = unwatched,
) -> tuple[Summary, list[Falsification]]:
    """Certify images into the folder `request.out`, a line an image, and go on where an earlier run of them ended.

    Ctrl-C, or a signal that means the same, ends it after the images that are done. proposals: gives an attack further
    candidates. watch: passes the work on, item by item, and shows how far it is.
    """
    known = unreadable_of(request.out)
    request = replace(request, images=request.images.hashed_as(known))
    settings, images = request.settings, request.mine
    secret = classifier.secret if request.seed is None else None
    reach = require_reach(settings, math.prod(classifier.bundle.unet.image))
    manifest = manifest_of(
        classifier, request.images, settings, request.budget, request.seed, request.shard, request.options
    )
    places = {idx: place for place, idx in enumerate(request.images.order)}
    attacks: list[Falsification] = []
    interrupted = True

    def summary() -> Summary:
        done = {record.idx for record, _ in folder.done}
        failed = sorted({*classifier.failed, *images.unreadable}.intersection(images.order) - done)
        return summarize(folder.done, len(images), interrupted, radii_of(settings), reach, failed)

    def status() -> str:
        accuracy = accuracy_so_far(summary()) if images.labelled and folder.done else ""
        said = (plural(progress.samples(), "sample"), progress.slow(), classifier.sampler.status(), accuracy)
        return "; ".join(filter(None, said))

    with RunFolder(request.out, manifest, secret) as folder:
        with suppress(KeyboardInterrupt):
            finished = {record.idx for record, _ in folder.done}
            logs.say(
                f"{'going on with' if finished else 'starting'} the run in {request.out}",
                identity=manifest.identity_sha256,
                images=len(images),
                done=len(finished),
            )
            others = (image for image in images.readable() if image.idx not in finished)
            work = classifier.certify_each(others, settings, request.budget, folder.ledger)
            rule = settings.rule(math.prod(classifier.bundle.unet.image), images.labelled)
            progress = Progress(classifier, rule, len(images), lambda: folder.done, request.budget)
            for result in watch(work, len(images), status, before=len(finished), left=progress.left):
                folder.add(result, places[result.image.idx])
                report(result)
            if request.falsify is not None:
                each = attack_each(classifier, images, settings, folder, request.falsify, proposals)
                attacks += watch(each, len(attacked(folder.done, request.falsify)))
                folder.keep_attacks(attacks)
            interrupted = False
        folder.read_done()
        found = summary()
        folder.finish(found)
        logs.say(f"{found.done} of {found.asked} images are done", interrupted=interrupted, abstained=found.abstained)
        return found, attacks


def unreadable_of(path: Path) -> tuple[int, ...] | None:
    """Return which images could not be read when the run in a folder began; None where there is no run."""
    return read_manifest(path).identity.images.unreadable if os.path.exists(path / MANIFEST) else None


def report(result: Certified) -> None:
    """Log what came of an image; samples that were NaN or Inf as a warning."""
    image, certificate, cost = result
    radius = "abstains" if certificate.radius is None else f"radius {floored(certificate.radius)}"
    logs.say(
        f"image {image}: {radius}, {cost.samples} samples",
        idx=image.idx,
        name=image.name,
        label=image.label,
        predict=certificate.predict,
        radius=certificate.radius,
        stopped=certificate.stopped,
        **vars(cost),
    )
    if cost.not_finite:
        lost = f"image {image}: {cost.not_finite} samples were NaN or Inf and counted against the class"
        logs.say(lost, logging.WARNING, idx=image.idx, name=image.name, not_finite=cost.not_finite)
