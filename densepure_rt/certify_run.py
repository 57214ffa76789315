"""A certification run from start to finish: manifest, forecast, images in, results out."""

from __future__ import annotations

import datetime
import logging
import math
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from densepure_rt import __version__, logs
from densepure_rt.certification import Certificate
from densepure_rt.console import Status, track
from densepure_rt.datasets import ImageSet
from densepure_rt.falsifier import Falsification
from densepure_rt.falsify_run import Proposals, attack_each, attacked, no_proposals
from densepure_rt.forecast import Forecast
from densepure_rt.records import (
    SCHEMA_VERSION,
    Abstention,
    ArithmeticIdentity,
    BudgetIdentity,
    Identity,
    ImageRecord,
    ImagesIdentity,
    Manifest,
    NamedFile,
    NoiseIdentity,
    Provenance,
    RuleIdentity,
    Summary,
    TimingRecord,
)
from densepure_rt.rounding import exact, floored, floored_share
from densepure_rt.run_folder import RunFolder
from densepure_rt.runtime.device import installed_versions
from densepure_rt.runtime.noise import NOISE_LAW, smoothing_law, vote_law
from densepure_rt.runtime.schedule import Coefficients
from densepure_rt.shards import Shard
from densepure_rt.smoothing import UNLIMITED, Budget, Certified, Settings, SmoothedClassifier, commitment
from densepure_rt.text import printable

RADII = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the papers' CIFAR-10 tables


def abstention(record: ImageRecord | Certificate) -> Abstention | None:
    """Why nothing was certified; None when something was."""
    if record.predict is not None:
        return None
    if record.stopped:
        return "out of time"
    result = record.outcomes[0].result if record.outcomes else "abstained"
    if result == "gave up":
        return "gave up"
    return "out of reach" if result == "skipped" else "at n"


def summarize(
    done: Sequence[tuple[ImageRecord, TimingRecord]],
    asked: int,
    interrupted: bool,
    radii: Sequence[float],
    reach: float | None,
    failed: Sequence[int] = (),
) -> Summary:
    """radii: of the accuracy; reach: the largest radius that n can certify; failed: further images, not certified."""
    records, timings = [record for record, _ in done], [timing for _, timing in done]
    reasons = Counter(why for record in records if (why := abstention(record)) is not None)
    labelled = [record for record in records if record.label is not None]
    uncertified = len(failed) if len(labelled) == len(records) else 0
    return Summary(
        done=len(done),
        asked=asked,
        interrupted=interrupted,
        radii=tuple(radii),
        accuracy=tuple(accuracy_at(labelled, radius, reach, uncertified) for radius in radii),
        abstained=reasons.total(),
        reasons=dict(reasons),
        samples=sum(timing.samples for timing in timings) / max(1, len(timings)),
        unet_calls=sum(timing.unet_calls for timing in timings),
        not_finite=sum(timing.not_finite for timing in timings),
        stopped=sum(record.stopped for record in records),
        failed=tuple(failed),
    )


def radii_of(settings: Settings) -> tuple[float, ...]:
    """At which a run's accuracy is told."""
    return settings.grid if settings.method == "sequential" else RADII


def accuracy_at(labelled: Sequence[ImageRecord], radius: float, reach: float | None, failed: int = 0) -> float | None:
    """The share of images that are certified for their own label at the radius; None of none, or beyond reach.

    failed: further images, which are not.
    """
    if not len(labelled) + failed or radius > (reach or 0.0):
        return None
    return sum(bool(record.correct) and (record.radius or 0.0) >= radius for record in labelled) / (
        len(labelled) + failed
    )


def manifest_of(
    classifier: SmoothedClassifier,
    images: ImageSet,
    settings: Settings,
    budget: Budget,
    seed: int | None,
    shard: Shard | None = None,
) -> Manifest:
    """What is to be run. `identity` is all that a result depends on; `provenance` is who runs it where and when.

    images: all, also where a shard of them alone is run.
    """
    identity = identity_of(classifier, images, settings, budget, seed)
    bundle = classifier.bundle
    provenance = Provenance(
        argv=tuple(map(printable, sys.argv)),
        device=dict(classifier.sampler.describe()),
        started=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        host=platform.node(),
        images=printable(images.name),
        python=platform.python_version(),
        platform=platform.platform(),
        versions={"densepure-rt": __version__} | installed_versions("numpy", "scipy", "onnxruntime"),
        weights_sha256={"unet": bundle.unet.weights_sha256, "classifier": bundle.classifier.weights_sha256},
        seed_note=None if seed is None else "seed public: valid only for images fixed before the seed was chosen",
        shard=None if shard is None else str(shard),
        parity=bundle.unet.accuracy,
        left_out=images.left_out,
        grey_repeated=images.repeated,
    )
    return Manifest(SCHEMA_VERSION, identity.sha256, identity, provenance)


def identity_of(
    classifier: SmoothedClassifier, images: ImageSet, settings: Settings, budget: Budget, seed: int | None
) -> Identity:
    bundle, chain = classifier.bundle, classifier.chain(settings)
    device = classifier.sampler.describe()
    library = "onnxruntime" if "onnxruntime" in device else "tensorrt"
    capability = device.get("compute_capability")
    return Identity(
        engine=NamedFile(bundle.unet.file.name, bundle.unet.file.sha256, bundle.sidecars[0]),
        classifier=NamedFile(bundle.classifier.file.name, bundle.classifier.file.sha256, bundle.sidecars[1]),
        precision=bundle.unet.precision,
        runs_on=f"{device['provider']}, {library} {device[library]}",
        compute_capability=None if capability is None else str(capability),
        processor=str(device["gpu"] if "gpu" in device else device["processor"]),
        schedule=bundle.unet.schedule,
        variance=bundle.unet.variance,
        prediction=bundle.unet.prediction,
        clip=bundle.unet.clip,
        class_names=bundle.classifier.class_names,
        image=bundle.unet.image,
        images=ImagesIdentity(len(images), images.sha256()),
        sigma=settings.sigma,
        sigma_in_network_units=2 * settings.sigma,
        steps=settings.steps,
        timestep_rule=settings.timestep_rule or bundle.unet.timestep_rule,
        timesteps=chain.timesteps,
        conditioning=tuple(chain.t.tolist()),
        coefficients=tuple(Coefficients(*row)._asdict() for row in chain.coef.tolist()),
        alpha_bar=chain.scale**2,
        votes=settings.effective.votes,
        tie_rule="the label seen first",
        rule=rule_of(settings, math.prod(bundle.unet.image)),
        budget_seconds=BudgetIdentity(*(None if math.isinf(s) else s for s in (budget.image, budget.run))),
        noise=NoiseIdentity(NOISE_LAW, smoothing_law(settings.sigma).sha256, vote_law().sha256),
        secret_commitment=commitment(classifier.secret),
        public_seed=seed,
        arithmetic=arithmetic_of(device),
    )


def arithmetic_of(device: Mapping[str, str | int | bool]) -> ArithmeticIdentity:
    """Read off a device's description how its engines compute."""
    told = {name: str(device[name]) for name in ("cuda", "cudnn") if name in device}
    if "onnxruntime" in device and "tensorrt" in device:  # its provider; a plan's is in `runs_on`
        told["tensorrt"] = str(device["tensorrt"])
    if "driver" in device:
        told["driver"] = f"{device['driver_release']}, CUDA {device['driver']}"
    return ArithmeticIdentity(
        fingerprint=str(device["fingerprint"]),
        batch=None if device["independent_of_batch"] else int(device["batch"]),
        instruction_sets=tuple(str(device.get("instruction_sets", "")).split()),
        **told,
    )


def settings_of(identity: Identity) -> Settings:
    """What a run was asked for."""
    rule = identity.rule
    return Settings(
        sigma=identity.sigma,
        steps=identity.steps,
        votes=identity.votes,
        n0=Settings.n0 if rule.n0 is None else rule.n0,
        n=rule.n,
        alpha=rule.alpha,
        method=rule.method,
        radii=rule.radii,
        radius_loss=rule.radius_loss,
        timestep_rule=identity.timestep_rule,
    )


def rule_of(settings: Settings, pixels: int) -> RuleIdentity:
    """How samples become certificates."""
    given: dict[str, Any] = {"method": settings.method, "n": settings.n, "alpha": settings.alpha}
    if settings.method == "fixed":
        fixed = settings.rule(pixels)
        return RuleIdentity(
            **given, alpha_charged_for_noise=fixed.charge, n0=fixed.n0, tested="the class that n0 samples select"
        )
    rule = settings.anytime_rule(pixels, labelled=False)
    own = {name: getattr(rule, name) for name in ("radii", "reserve", "radius_loss", "look") if hasattr(rule, name)}
    tested = "the label of an image that has one, else every class"
    return RuleIdentity(**given, **own, alpha_charged_for_noise=rule.charge, tested=tested)


def run(
    classifier: SmoothedClassifier,
    images: ImageSet,
    settings: Settings,
    expected: Forecast,
    out: Path,
    seed: int | None,
    budget: Budget = UNLIMITED,
    falsify: float | None = None,
    proposals: Proposals = no_proposals,
    shard: Shard | None = None,
) -> tuple[Summary, list[Falsification]]:
    """Certify `images` into the folder `out`, a line an image, and go on where an earlier run of them ended.

    Ctrl-C, or a signal that means the same, ends it after the images that are done. falsify: the share of their samples
    to attack the certificates with, once all are there; `proposals` gives an attack further candidates. shard: the part
    of the images to certify here.
    """
    attacks: list[Falsification] = []
    interrupted = True

    def summary() -> Summary:
        return summarize(folder.done, len(images), interrupted, radii_of(settings), expected.reach, classifier.failed)

    def progress() -> str:
        said = (classifier.sampler.status(), accuracy_so_far(summary()) if images.labelled else "")
        return "; ".join(filter(None, said))

    status = Status(progress)
    manifest = manifest_of(classifier, images, settings, budget, seed, shard)
    places = {idx: place for place, idx in enumerate(images.order)}
    images = images if shard is None else shard.select(images)
    with RunFolder(out, manifest, classifier.secret if seed is None else None) as folder:
        with suppress(KeyboardInterrupt):
            finished = {record.idx for record, _ in folder.done}
            logs.say(
                f"{'going on with' if finished else 'starting'} the run in {out}",
                identity=manifest.identity_sha256,
                images=len(images),
                done=len(finished),
            )
            left = (image for image in images if image.idx not in finished)
            work = classifier.certify_each(left, settings, budget, folder.ledger)
            for result in track(work, len(images), status, before=len(finished)):
                folder.add(result, places[result.image.idx])
                report(result)
            if falsify is not None:
                each = attack_each(classifier, images, settings, folder, falsify, proposals)
                attacks += track(each, len(attacked(folder.done, falsify)), Status())
                folder.keep_attacks(attacks)
            interrupted = False
        folder.read_done()
        found = summary()
        folder.finish(found)
        logs.say(f"{found.done} of {found.asked} images are done", interrupted=interrupted, abstained=found.abstained)
        return found, attacks


def report(result: Certified) -> None:
    """Log what came of an image; samples that were NaN or Inf as a warning."""
    image, certificate, cost = result
    radius = "abstains" if certificate.radius is None else f"radius {floored(certificate.radius)}"
    logs.say(
        f"image {image.idx}: {radius}, {cost.samples} samples",
        idx=image.idx,
        label=image.label,
        predict=certificate.predict,
        radius=certificate.radius,
        stopped=certificate.stopped,
        **vars(cost),
    )
    if cost.not_finite:
        lost = f"image {image.idx}: {cost.not_finite} samples were NaN or Inf and counted against the class"
        logs.say(lost, logging.WARNING, idx=image.idx, not_finite=cost.not_finite)


def accuracy_so_far(summary: Summary) -> str:
    reached = [(r, share) for r, share in zip(summary.radii, summary.accuracy, strict=True) if share is not None]
    return "certified " + ", ".join(f"{floored_share(share, 0)} at {exact(r)}" for r, share in reached)
