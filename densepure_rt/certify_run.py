"""A certification run from start to finish: manifest, forecast, images in, results out."""

from __future__ import annotations

import dataclasses
import datetime
import math
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from densepure_rt import __version__
from densepure_rt.certification import Certificate, certified_accuracy
from densepure_rt.console import Status, track
from densepure_rt.datasets import ImageSet
from densepure_rt.forecast import Forecast
from densepure_rt.run_folder import SCHEMA_VERSION, RunFolder
from densepure_rt.runtime.bundle import FileRef
from densepure_rt.runtime.device import installed_versions
from densepure_rt.runtime.noise import NOISE_LAW, smoothing_law, vote_law
from densepure_rt.runtime.schedule import Coefficients
from densepure_rt.smoothing import UNLIMITED, Budget, Settings, SmoothedClassifier, commitment

RADII = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the papers' CIFAR-10 tables


Abstention = Literal["gave up", "at n", "out of reach", "out of time"]


@dataclass(frozen=True)
class Summary:
    """done: images certified, of `asked`; fewer when `interrupted`, by Ctrl-C, or when the run's budget was spent.

    accuracy: certified accuracy at each of `radii`; None where n cannot reach. reasons: how many abstained for each.
    samples: what an image was judged by, in the mean.
    """

    done: int
    asked: int
    interrupted: bool
    radii: Sequence[float]
    accuracy: Sequence[float | None]
    abstained: int
    reasons: Mapping[Abstention, int]
    samples: float
    not_finite: int


def abstention(certificate: Certificate) -> Abstention | None:
    """Why nothing was certified; None when something was."""
    if certificate.predict is not None:
        return None
    if certificate.stopped:
        return "out of time"
    result = certificate.outcomes[0].result if certificate.outcomes else "abstained"
    if result == "gave up":
        return "gave up"
    return "out of reach" if result == "skipped" else "at n"


def manifest(
    classifier: SmoothedClassifier, images: ImageSet, settings: Settings, budget: Budget, seed: int | None
) -> dict[str, Any]:
    """What was run. `identity` is all that a result depends on; `provenance` is who ran it where and when."""
    bundle, chain = classifier.bundle, classifier.chain(settings)
    pixels = math.prod(bundle.unet.image)

    device = dict(classifier.device.describe())

    def file(ref: FileRef) -> dict[str, str]:
        return {"name": ref.name, "sha256": ref.sha256}

    return {
        "schema_version": SCHEMA_VERSION,
        "identity": {
            "engine": file(bundle.unet.file),
            "classifier": file(bundle.classifier.file),
            "precision": bundle.unet.precision,
            "provider": device.pop("provider"),
            "onnxruntime": device.pop("onnxruntime"),
            "schedule": dataclasses.asdict(bundle.unet.schedule),
            "variance": bundle.unet.variance,
            "prediction": bundle.unet.prediction,
            "clip": bundle.unet.clip,
            "class_names": list(bundle.classifier.class_names),
            "images": {"name": images.name, "count": len(images), "sha256": images.sha256()},
            "sigma": settings.sigma,
            "sigma_in_network_units": 2 * settings.sigma,
            "steps": settings.steps,
            "timestep_rule": settings.timestep_rule or bundle.unet.timestep_rule,
            "timesteps": list(chain.timesteps),
            "conditioning": chain.t.tolist(),
            "coefficients": [Coefficients(*row)._asdict() for row in chain.coef.tolist()],
            "alpha_bar": chain.scale**2,
            "votes": settings.effective.votes,
            "tie_rule": "the label seen first",
            **rule_of(settings, pixels),
            "budget_seconds": {
                name: None if math.isinf(seconds) else seconds for name, seconds in dataclasses.asdict(budget).items()
            },
            "noise": {
                "law": NOISE_LAW,
                "smoothing_table_sha256": smoothing_law(settings.sigma).sha256,
                "vote_table_sha256": vote_law().sha256,
            },
            "secret_commitment": commitment(classifier.secret),
            "public_seed": seed,
        },
        "provenance": {
            "argv": sys.argv,
            "device": device,
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "versions": {"densepure-rt": __version__} | installed_versions("numpy", "scipy", "onnxruntime"),
            "seed_note": None
            if seed is None
            else "seed public: valid only for images fixed before the seed was chosen",
        },
    }


def rule_of(settings: Settings, pixels: int) -> dict[str, Any]:
    """How samples become certificates."""
    if settings.method == "fixed":
        fixed = settings.rule(pixels)
        charge, method = fixed.charge, {"method": "fixed", "n0": fixed.n0}
    else:
        rule = settings.anytime_rule(pixels, labelled=False)
        own = ("radii", "reserve", "radius_loss", "look")
        charge, method = rule.charge, {name: getattr(rule, name) for name in own if hasattr(rule, name)}
        method |= {"method": settings.method, "tested": "the label of an image that has one, else every class"}
    return method | {"n": settings.n, "alpha": settings.alpha, "alpha_charged_for_noise": charge}


def run(
    classifier: SmoothedClassifier,
    images: ImageSet,
    settings: Settings,
    expected: Forecast,
    out: Path,
    seed: int | None,
    budget: Budget = UNLIMITED,
) -> Summary:
    """Certify `images` into the folder `out`, a line an image. Ctrl-C ends it after the images that are done."""
    radii = settings.grid if settings.method == "sequential" else RADII
    results: list[tuple[int | None, Certificate]] = []
    samples = not_finite = 0
    interrupted = True

    def summary() -> Summary:
        reasons = Counter(why for _, certificate in results if (why := abstention(certificate)) is not None)
        accuracy = certified_accuracy(results, radii, expected.reach)
        mean = samples / max(1, len(results))
        return Summary(
            len(results), len(images), interrupted, radii, accuracy, reasons.total(), dict(reasons), mean, not_finite
        )

    status = Status()
    described = manifest(classifier, images, settings, budget, seed)
    with RunFolder(out, described, classifier.secret if seed is None else None) as folder, suppress(KeyboardInterrupt):
        for result in track(classifier.certify_each(images, settings, budget), len(images), status):
            folder.add(result)
            results.append((result.image.label, result.certificate))
            samples += result.cost.samples
            not_finite += result.cost.not_finite
            status.text = accuracy_so_far(summary()) if images.labelled else ""
        interrupted = False
    return summary()


def accuracy_so_far(summary: Summary) -> str:
    reached = [(r, share) for r, share in zip(summary.radii, summary.accuracy, strict=True) if share is not None]
    return "certified " + ", ".join(f"{100 * share:.0f} % at {r:g}" for r, share in reached)
