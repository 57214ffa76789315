"""Pictures of what the networks saw: one sample of a few images, drawn again from the run's key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.images.datasets import ImageSet, LabelledImage, open_images
from densepure_rt.images.formats import Pixels
from densepure_rt.runs.identity import settings_of
from densepure_rt.runs.reader import Run
from densepure_rt.runs.records import ImageRecord
from densepure_rt.runtime.noise import image_sha256
from densepure_rt.smoothing.classifier import load
from densepure_rt.smoothing.replay import Replayed, replay

SAMPLE = 0  # of each image


@dataclass(frozen=True, eq=False)
class Shown:
    """An image of the gallery. pixels: uint8 [C, H, W]."""

    record: ImageRecord
    pixels: Pixels
    replayed: Replayed


def gallery(
    run: Run, count: int, secret: bytes, engine: Path | None, images: Path | Sequence[Path] | None
) -> list[Shown]:
    """`count` images of the run with their first sample. engine: the run's; images: those that it certified.

    Raises UsageError when the images or the classifier are others, CheckFailed when the engine is.
    """
    if count < 1:
        raise UsageError(f"`count` {count}: ask for one image at least")
    identity, chosen = run.manifest.identity, choose(run.records, count)
    opened = open_images(images, identity.image, identity.class_names, identity.images.preparation)
    found = find(opened, chosen)
    settings = settings_of(identity)
    with load(engine, secret=secret) as classifier:
        if (ref := classifier.bundle.unet.file).sha256 != identity.engine.sha256:
            raise CheckFailed(
                f"{classifier.bundle.unet_path} has the SHA-256 {ref.sha256[:16]}, the run used {identity.engine.name} "
                f"of {identity.engine.sha256[:16]}: name that one with `engine`"
            )
        if (ref := classifier.bundle.classifier.file).sha256 != identity.classifier.sha256:
            raise UsageError(
                f"{ref.name} is not the classifier of the run, {identity.classifier.name} of "
                f"{identity.classifier.sha256[:16]}: name the engine that it lies beside with `engine`"
            )
        return [
            Shown(record, image.pixels, replay(classifier, image, settings, SAMPLE))
            for record, image in zip(chosen, found, strict=True)
        ]


def choose(records: Sequence[ImageRecord], count: int) -> list[ImageRecord]:
    """Evenly from the strongest certificate down to the images that have none, in that order."""
    ranked = sorted(records, key=lambda record: (bool(record.correct), record.radius or 0.0), reverse=True)
    last, of = len(ranked) - 1, min(count, len(ranked))
    return [ranked[round(i * last / max(1, of - 1))] for i in range(of)]


def find(images: ImageSet, records: Sequence[ImageRecord]) -> list[LabelledImage]:
    """The image of each record, by its pixels."""
    wanted = {record.image_sha256 for record in records}
    found = {sha: image for image in images.readable() if (sha := image_sha256(image.pixels).hex()) in wanted}
    if missing := [record for record in records if record.image_sha256 not in found]:
        raise UsageError(
            f"image {missing[0]} of the run is not among {images.name}: name the images it certified with `images`"
        )
    return [found[record.image_sha256] for record in records]
