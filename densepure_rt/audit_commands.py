"""The commands that check a run: `audit`, `replay` and `reveal`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from densepure_rt.console import Json, plural, rows, stderr, stdout
from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.text import printable

if TYPE_CHECKING:
    from densepure_rt.datasets import ImageSet, LabelledImage
    from densepure_rt.records import Identity, Manifest
    from densepure_rt.replay import Replayed

MOST_SHOWN = 5  # faults of one check
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
Images = Annotated[
    Path | None, typer.Option(help="What was certified; default: the shipped images, where it was those.")
]


def audit(run: RunPath, images: Images = None, as_json: Json = False) -> None:
    """Check a run offline, without its engine: bounds, radii, tables and hashes, all computed again.

    Exit code 1 when anything does not hold.
    """
    from densepure_rt.audit import audit as check
    from densepure_rt.datasets import open_images
    from densepure_rt.run_folder import read_manifest

    chosen = None
    if images is not None:
        identity = read_manifest(run).identity
        chosen = open_images(images, identity.image, identity.class_names)
    findings = check(run, chosen)
    failed = [finding for finding in findings if not finding.holds]
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) | {"holds": finding.holds} for finding in findings]))
    for finding in () if as_json else findings:
        word, style = ("holds", "green") if finding.holds else ("FAILS", "red")
        stdout.print(Text(f"{word:<7}", style) + printable(f"{finding.what:<15} {finding.said}"))
        for fault in finding.faults[:MOST_SHOWN]:
            stdout.print(f"       {fault}")
        if len(finding.faults) > MOST_SHOWN:
            stdout.print(f"       and {len(finding.faults) - MOST_SHOWN} more")
    if failed:
        stderr.print(f"error: {plural(len(failed), 'check')} of {len(findings)} failed: do not rely on {run}")
        raise typer.Exit(CheckFailed.exit_code)


def replay(
    run: RunPath,
    image: Annotated[int, typer.Option(help="Its idx in the results.")],
    sample: Annotated[int, typer.Option(help="Which of its samples, from 0; fixed: of the n, not of the n0.")] = 0,
    engine: Annotated[Path | None, typer.Option(help="The engine that was run; default: the one that ships.")] = None,
    classifier: Annotated[Path | None, typer.Option(help="The classifier engine, where it was named.")] = None,
    images: Images = None,
    batch: Annotated[int | None, typer.Option(help="Items a call of the engine.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures; default: RUN/replay-IMAGE-SAMPLE.")] = None,
    as_json: Json = False,
) -> None:
    """Draw one sample of a run again, alone: its label, its noisy and its purified pictures.

    Exit code 1 when the label is not the one that the run counted.
    """
    from densepure_rt.certify_run import settings_of
    from densepure_rt.datasets import open_images
    from densepure_rt.replay import replay as draw
    from densepure_rt.run_folder import read_manifest
    from densepure_rt.smoothing import load

    manifest = read_manifest(run)
    identity = manifest.identity
    settings = settings_of(identity)
    if batch is None and identity.arithmetic is not None:
        batch = identity.arithmetic.batch
    place = sample + (settings.n0 if settings.method == "fixed" else 0)
    counted = counted_label(run, image, place, identity.rule.most_samples)
    with load(engine, classifier, secret=secret_of(run, manifest), batch=batch, threads=1) as smoothed:
        bundle = smoothed.bundle
        for ref, known in ((bundle.unet.file, identity.engine), (bundle.classifier.file, identity.classifier)):
            if ref.sha256 != known.sha256:
                raise UsageError(
                    f"{ref.name} has the SHA-256 {ref.sha256[:16]}, the run used {known.name} of {known.sha256[:16]}: "
                    f"name that one with --engine or --classifier"
                )
        warn_of_other_arithmetic(identity, str(smoothed.device.describe()["fingerprint"]))
        chosen = open_images(images, identity.image, identity.class_names)
        found = draw(smoothed, the_image(chosen, image, run), settings, sample)
    folder = out or run / f"replay-{image}-{sample}"
    save_pictures(found, folder)
    report = {"image": image, "sample": sample, "label": found.label, "votes": found.labels, "counted": counted}
    if as_json:
        print(json.dumps(report | {"out": str(folder)}))
    else:
        names = ["not finite" if label < 0 else identity.class_names[label] for label in found.labels]
        rows(stdout, {"votes": ", ".join(names), "label": str(found.label), "pictures": str(folder)}.items())
    if counted is None:
        stderr.print(f"the run has not counted sample {sample} of image {image}: there is nothing to compare with")
    elif counted != found.label:
        stderr.print(
            f"error: the run, on {identity.runs_on} ({identity.processor}), counted {counted}, not {found.label}"
        )
        raise typer.Exit(CheckFailed.exit_code)


def reveal(
    run: RunPath,
    key: Annotated[
        Path | None,
        typer.Option(help="The file that the run was keyed with: renamed to FILE.revealed, and refused from then on."),
    ] = None,
) -> None:
    """Make the secret of a run public: anybody can then draw its noise again, and no more may be drawn with it.

    The run itself goes on no more. A key file does until --key retires it, as do other runs and servers that have it.
    """
    from densepure_rt.keys import retired
    from densepure_rt.run_folder import reveal as make_public

    print(make_public(run, key))
    if key is not None:
        stderr.print(f"{key} is {retired(key)} now")
    stderr.print(
        "remove every other key file that holds this secret, such as that of --key, reveal the other runs that were "
        "keyed with it, and stop the servers that have it: no more noise may be drawn with it"
    )


def warn_of_other_arithmetic(identity: Identity, fingerprint: str) -> None:
    """Warn where the engines here do not compute what those of the run did, or where the run does not say."""
    if identity.arithmetic is None:
        stderr.print("warning: this old run does not say how its machine computed: labels may differ here and there")
    elif identity.arithmetic.fingerprint != fingerprint:
        stderr.print(
            f"warning: the engines compute otherwise here than in the run, on {identity.processor} (fingerprint "
            f"{fingerprint[:16]} here, {identity.arithmetic.fingerprint[:16]} there): labels may differ here and there"
        )


def secret_of(run: Path, manifest: Manifest) -> bytes:
    from densepure_rt.keys import stored_key
    from densepure_rt.run_folder import KEY, REVEALED
    from densepure_rt.smoothing import commitment, seeded_secret

    if manifest.identity.public_seed is not None:
        return seeded_secret(manifest.identity.public_seed)
    found = stored_key(run / KEY) or stored_key(run / REVEALED)
    if found is None and manifest.provenance.revealed_secret is not None:
        found = bytes.fromhex(manifest.provenance.revealed_secret)
    if found is None:
        raise UsageError(
            f"the secret of the run in {run} is neither there nor revealed: its noise cannot be drawn again"
        )
    if commitment(found) != manifest.identity.secret_commitment:
        raise CheckFailed(f"the key in {run} is not the one that the run committed itself to")
    return found


def counted_label(run: Path, idx: int, place: int, most: int) -> int | None:
    """Return the label that the ledger has for a sample, None where there is none yet. most: labels of an image."""
    from densepure_rt.ledger import NAME, Ledger

    with Ledger(run / NAME, read_only=True, most_labels=most) as ledger:
        labels = next((image.labels() for image in ledger.done() if image.idx == idx), None)
        if labels is None:
            labels = ledger.taken(idx).labels
    return int(labels[place]) if 0 <= place < len(labels) else None


def the_image(chosen: ImageSet, idx: int, run: Path) -> LabelledImage:
    from densepure_rt.run_reader import read_run
    from densepure_rt.runtime.noise import image_sha256

    found = next((image for image in chosen if image.idx == idx), None)
    if found is None:
        raise UsageError(f"{chosen.name} has no image {idx}: name what was certified with --images")
    record = next((record for record in read_run(run).records if record.idx == idx), None)
    if record is not None and record.image_sha256 != image_sha256(found.pixels).hex():
        raise UsageError(f"image {idx} of {chosen.name} is not the one that was certified: name those with --images")
    return found


def save_pictures(found: Replayed, folder: Path) -> None:
    from densepure_rt.pictures import as_picture

    pictures = {"noisy": found.noisy} | {f"vote-{i}": picture for i, picture in enumerate(found.purified, start=1)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, pixels in pictures.items():
            (folder / f"{name}.png").unlink(missing_ok=True)  # a link, in a foreign folder, may lead anywhere
            as_picture(pixels).save(folder / f"{name}.png")
    except OSError as error:
        raise EnvironmentFault(f"cannot write {folder} ({error.strerror}): choose another folder with --out") from error
