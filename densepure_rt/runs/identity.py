"""What makes two runs the same run: the identity in a manifest, and how two of them differ."""

from __future__ import annotations

import datetime
import json
import math
import platform
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import __version__ as PILLOW

from densepure_rt._version import __version__
from densepure_rt.errors import UsageError
from densepure_rt.images.datasets import ImageSet
from densepure_rt.keys import commitment
from densepure_rt.rounding import exact
from densepure_rt.runs.records import (
    SCHEMA_VERSION,
    ArithmeticIdentity,
    BudgetIdentity,
    Identity,
    ImagesIdentity,
    Manifest,
    NamedFile,
    NoiseIdentity,
    PreparedIdentity,
    Provenance,
    RuleIdentity,
)
from densepure_rt.runs.shards import Shard
from densepure_rt.runtime.machine import installed_versions
from densepure_rt.runtime.noise import NOISE_LAW, smoothing_law, vote_law
from densepure_rt.runtime.schedule import Coefficients
from densepure_rt.smoothing.classifier import SmoothedClassifier
from densepure_rt.smoothing.settings import Budget, Settings
from densepure_rt.text import all_printable, brief, printable

MOST_FIELDS = 4  # that a message names of those in which two identities differ, beside options
OPTIONS = {  # fields of the identity that are parameters as they stand
    **{name: name for name in ("sigma", "steps", "votes", "timestep_rule")},
    **{f"rule.{name}": name for name in ("method", "n0", "n", "alpha", "radii", "radius_loss")},
    **{"budget_seconds.image": "budget", "budget_seconds.run": "run_budget", "public_seed": "seed"},
}
CHOSEN_BY = {  # other fields, with the options that a run's manifest has of them
    "images": ("images", "files", "skip", "max", "fit", "convert", "background", "labels-csv"),
    "engine": ("engine",),
    "classifier": ("classifier",),
    "runs_on": ("provider",),
    "arithmetic": ("batch",),
}
DERIVED = (  # fields that follow from options
    *("sigma_in_network_units", "timesteps", "conditioning", "coefficients", "alpha_bar", "noise", "rule"),
    "secret_commitment",
)


def manifest_of(
    classifier: SmoothedClassifier,
    images: ImageSet,
    settings: Settings,
    budget: Budget,
    seed: int | None,
    shard: Shard | None = None,
    options: Mapping[str, str | int | float | bool | Sequence[str]] | None = None,
) -> Manifest:
    """Make the manifest. `identity` is all that a result depends on; `provenance` is who runs it where and when.

    images: all, also where a shard of them alone is run. options: those that it was asked for by, where it was.
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
        images_named=images.name_at is not None,
        options=None if options is None else all_printable(dict(options)),
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
        images=images_identity(images),
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


def images_identity(images: ImageSet) -> ImagesIdentity:
    """Hash the images, all being read; those that cannot be are named. Raises UsageError where none can be read."""
    sha256, how = images.sha256(), images.prepared
    unreadable = tuple(idx for idx in images.order if idx in images.unhashed or idx in images.unreadable)
    if images.unreadable and len(unreadable) == len(images):
        raise UsageError(next(iter(images.unreadable.values())))
    prepared = PreparedIdentity(how.fit, how.convert, how.background, PILLOW)
    return ImagesIdentity(len(images), sha256, unreadable or None, prepared if how else None)


def arithmetic_of(device: Mapping[str, str | int | bool]) -> ArithmeticIdentity:
    """Read off a device's description how its engines compute."""
    told = {name: str(device[name]) for name in ("cuda", "cudnn") if name in device}
    if "engines" in device:  # of ONNX Runtime's provider; the TensorRT of a plan is in `runs_on`
        told["tensorrt"] = f"{device.get('tensorrt', 'unknown')}, engines {device['engines']}"
    if "driver" in device:
        told["driver"] = f"{device['driver_release']}, CUDA {device['driver']}"
    return ArithmeticIdentity(
        fingerprint=str(device["fingerprint"]),
        batch=None if device["independent_of_batch"] else int(device["batch"]),
        instruction_sets=tuple(str(device.get("instruction_sets", "")).split()),
        **told,
    )


def settings_of(identity: Identity) -> Settings:
    """Return the settings of a run."""
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
    """Describe the rule by which samples become certificates."""
    given: dict[str, Any] = {"method": settings.method, "n": settings.n, "alpha": settings.alpha}
    rule = settings.rule(pixels, labelled=False)
    names = ("n0", "radii", "reserve", "radius_loss", "look")
    own = {name: getattr(rule, name) for name in names if hasattr(rule, name)}
    return RuleIdentity(**given, **own, alpha_charged_for_noise=rule.charge, tested=rule.tested)


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields, by dotted names, in which two identities differ."""
    for name in sorted({*ours, *theirs}):
        one, other = ours.get(name), theirs.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from differing(one, other, f"{prefix}{name}.")
        elif json.dumps(one) != json.dumps(other):
            yield prefix + name, one, other


def differences(one: Manifest, other: Manifest, where_one: str, where_other: str) -> str:
    """Say in what two identities differ, options first and what follows from them last; nothing when they are equal."""
    fields = list(differing(asdict(one.identity), asdict(other.identity)))
    options = [(OPTIONS[name], a, b) for name, a, b in fields if name in OPTIONS]
    options += options_behind({name.partition(".")[0] for name, _, _ in fields}, one, other)
    rest = [field for field in fields if field[0] not in OPTIONS]
    rest.sort(key=lambda field: field[0].partition(".")[0] in DERIVED)
    shown = [f"`{name}` {told(a)} {where_one}, {told(b)} {where_other}" for name, a, b in options]
    shown += [f"{name}: {brief(a)} {where_one}, {brief(b)} {where_other}" for name, a, b in rest[:MOST_FIELDS]]
    return "; ".join((*shown, *([f"and {len(rest) - MOST_FIELDS} more"] if len(rest) > MOST_FIELDS else [])))


def options_behind(fields: Collection[str], one: Manifest, other: Manifest) -> Iterator[tuple[str, Any, Any]]:
    """The options by which two runs chose what differs, where both say theirs and they differ: name and values."""
    ours, theirs = one.provenance.options, other.provenance.options
    if ours is None or theirs is None:
        return
    for name in (name for field, names in CHOSEN_BY.items() if field in fields for name in names):
        if ours.get(name) != theirs.get(name):
            yield name, ours.get(name), theirs.get(name)


def told(value: Any) -> str:
    """Write an option's value as it is typed."""
    if isinstance(value, list | tuple):
        return ",".join(map(told, value))
    return "not given" if value is None else exact(value) if isinstance(value, float) else printable(str(value))


def refuse_unrecorded_arithmetic(identity: Identity, path: Path) -> None:
    """Raise UsageError for a run that does not say how its machine computed: no other samples can be put beside its."""
    if identity.arithmetic is None:
        raise UsageError(
            f"{path} holds an old run, whose manifest does not say how its machine computed, so nothing shows that "
            f"more samples would be of the same classifier. It can still be audited, reported and replayed: certify "
            f"into a new folder with `out`"
        )
