"""`densepure-rt replay`: draw one counted sample of an image again, and show how it was purified."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from densepure_rt.commands.audit import warn_of_other_arithmetic
from densepure_rt.commands.console import rows, stderr, stdout
from densepure_rt.commands.from_run import file_of, images_of
from densepure_rt.commands.options import Json, RunImages, RunPath
from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.text import all_printable, printable, tsv_cell

if TYPE_CHECKING:
    from densepure_rt.images.datasets import ImageSet, LabelledImage
    from densepure_rt.smoothing.replay import Replayed


def replay(
    run: RunPath,
    image: Annotated[
        str, typer.Option(metavar="IDX|NAME", help="Index of the image in the results (idx), or its file name.")
    ],
    sample: Annotated[
        int, typer.Option(help="Number of the sample, from 0. fixed: among the n samples, not the n0.")
    ] = 0,
    engine: Annotated[
        Path | None, typer.Option(help="The engine that was run. Default: the one that the run names.")
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="The classifier engine. Default: the one that the run names.")
    ] = None,
    images: RunImages = None,
    batch: Annotated[int | None, typer.Option(help="Images per call of the engine.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures; default: RUN/replay-IMAGE-SAMPLE.")] = None,
    as_json: Json = False,
) -> None:
    """Draw one sample of a run again, alone: its label, its noisy and its purified pictures.

    Exit code 1 when the label is not the one that the run counted.
    """
    from densepure_rt.images.datasets import open_images
    from densepure_rt.runs.identity import settings_of
    from densepure_rt.runs.layout import read_manifest
    from densepure_rt.runs.secret import secret_of
    from densepure_rt.runtime.bundle import shipped_engine_of
    from densepure_rt.smoothing.classifier import load
    from densepure_rt.smoothing.replay import replay as draw

    manifest = read_manifest(run)
    identity = manifest.identity
    settings = settings_of(identity)
    if batch is None and identity.arithmetic is not None:
        batch = identity.arithmetic.batch
    place = sample + (identity.rule.n0 or 0)
    engine, classifier = file_of(run, "engine", engine), file_of(run, "classifier", classifier)
    chosen = open_images(images_of(run, images), identity.image, identity.class_names, identity.images.preparation)
    idx = idx_of(image, chosen, run)
    counted = counted_label(run, idx, place, identity.rule.most_samples)
    engine = engine or shipped_engine_of(identity.engine.sha256)
    with load(engine, classifier, secret=secret_of(run, manifest), batch=batch, threads=1) as smoothed:
        bundle = smoothed.bundle
        for ref, known in ((bundle.unet.file, identity.engine), (bundle.classifier.file, identity.classifier)):
            if ref.sha256 != known.sha256:
                raise UsageError(
                    f"{ref.name} has the SHA-256 {ref.sha256[:16]}, the run used {known.name} of {known.sha256[:16]}: "
                    f"name that one with --engine or --classifier"
                )
        warn_of_other_arithmetic(identity, str(smoothed.device.describe()["fingerprint"]))
        the_one = the_image(chosen, idx, run)
        found = draw(smoothed, the_one, settings, sample)
    folder = out or run / f"replay-{idx}-{sample}"
    save_pictures(found, folder)
    report = {"image": idx, "sample": sample, "label": found.label, "votes": found.labels, "counted": counted}
    if as_json:
        print(json.dumps(all_printable(report | {"out": str(folder), "name": the_one.name})))
    else:
        names = ["not finite" if label < 0 else identity.class_names[label] for label in found.labels]
        told = {"votes": ", ".join(names), "label": str(found.label), "pictures": str(folder)}
        rows(stdout, ({"image": str(the_one)} | told).items())
    if counted is None:
        stderr.print(f"the run has not counted sample {sample} of image {the_one}: there is nothing to compare with")
    elif counted != found.label:
        stderr.print(
            f"error: the run, on {identity.runs_on} ({identity.processor}), counted {counted}, not {found.label}"
        )
        raise typer.Exit(CheckFailed.exit_code)


def idx_of(asked: str, chosen: ImageSet, run: Path) -> int:
    """Return the idx of the image that was asked for, by it or by its name. Raises UsageError for none and for several.

    A name is looked for in the results, else among the images.
    """
    from densepure_rt.runs.reader import read_run

    if re.fullmatch(r"[0-9]{1,18}", asked):
        return int(asked)
    name = printable(asked)
    for names in (read_run(run).names, {idx: printable(name) for idx, name in chosen.names.items()}):
        found = [idx for idx, known in names.items() if name in (known, tsv_cell(known))]
        if len(found) == 1:
            return found[0]
        if found:
            raise UsageError(f"{name} is the name of images {', '.join(map(str, found))}: ask for one by its idx")
    raise UsageError(
        f"no image of {run} has the idx or the name {name}, and none of {chosen.name}: see its results.tsv, or name "
        f"what was certified with --images"
    )


def counted_label(run: Path, idx: int, place: int, most: int) -> int | None:
    """Return the label that the ledger has for a sample, None where there is none yet. most: labels of an image."""
    from densepure_rt.runs.ledger import NAME, Ledger

    with Ledger(run / NAME, read_only=True, most_labels=most) as ledger:
        labels = next((image.labels() for image in ledger.done() if image.idx == idx), None)
        if labels is None:
            labels = ledger.saved(idx).labels
    return int(labels[place]) if 0 <= place < len(labels) else None


def the_image(chosen: ImageSet, idx: int, run: Path) -> LabelledImage:
    from densepure_rt.runs.reader import read_run
    from densepure_rt.runtime.noise import image_sha256

    found = next((image for image in chosen.readable() if image.idx == idx), None)
    if found is None:
        raise UsageError(f"{chosen.name} has no image {idx}: name what was certified with --images")
    record = next((record for record in read_run(run).records if record.idx == idx), None)
    if record is not None and record.image_sha256 != image_sha256(found.pixels).hex():
        raise UsageError(f"image {found} of {chosen.name} is not the one that was certified: name those with --images")
    return found


def save_pictures(found: Replayed, folder: Path) -> None:
    from densepure_rt.images.pictures import as_picture

    pictures = {"noisy": found.noisy} | {f"vote-{i}": picture for i, picture in enumerate(found.purified, start=1)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, pixels in pictures.items():
            (folder / f"{name}.png").unlink(missing_ok=True)  # a link, in a foreign folder, may lead anywhere
            as_picture(pixels).save(folder / f"{name}.png")
    except OSError as error:
        raise EnvironmentFault(f"cannot write {folder} ({error.strerror}): choose another folder with --out") from error
