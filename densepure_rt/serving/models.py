"""The two models that a server shows, `predict` and `certify`: what they take and give, and say of themselves."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densepure_rt.json_files import canonical
from densepure_rt.runtime.noise import NOISE_LAW, smoothing_law, vote_law
from densepure_rt.serving.protocol import Model, Tensor
from densepure_rt.serving.service import ModelName, Served
from densepure_rt.smoothing.certificate import abstention
from densepure_rt.smoothing.classifier import Certified, Predicted
from densepure_rt.smoothing.radius import RADIUS_LOSS
from densepure_rt.smoothing.settings import PREDICT_N

MOST_IMAGES = 16  # of a request
MOST_VALUES = 2**16  # of a request of more than one image, so that as JSON it stays small
ABSTAINS = -1  # in place of a label
EACH = (-1,)  # a value an image
Values = Mapping[str, NDArray[Any] | Sequence[str]]


def models_of(served: Served, runs_on: Mapping[str, Any], most_open: int) -> dict[ModelName, Model]:
    """Both models, by name. runs_on: what the device says of itself. most_open: images that the service holds."""
    image = served.bundle.unet.image
    most_images = max(1, min(MOST_IMAGES, most_open, MOST_VALUES // math.prod(image)))
    return {
        name: Model(name, pixels_of(image), outputs, most_images, about(served, runs_on, name))
        for name, outputs in outputs_of(len(served.class_names)).items()
    }


def pixels_of(image: tuple[int, int, int]) -> Tensor:
    """Return the input of both models. image: [channels, height, width]."""
    return Tensor("image", "UINT8", (-1, *image))


def outputs_of(classes: int) -> dict[ModelName, tuple[Tensor, ...]]:
    """Return the outputs of each model."""
    answer = (Tensor("label", "INT64", EACH), Tensor("abstain", "BOOL", EACH))
    effort = (Tensor("n", "INT64", EACH), Tensor("stopped", "BOOL", EACH))
    predict = (*answer, Tensor("confidence", "FP64", EACH), Tensor("votes", "INT64", (-1, classes)), *effort)
    bound = (Tensor("radius", "FP64", EACH), Tensor("p_lower", "FP64", EACH), Tensor("n_a", "INT64", EACH))
    return {"predict": predict, "certify": (*answer, *bound, *effort, Tensor("outcome", "BYTES", EACH))}


def about(served: Served, runs_on: Mapping[str, Any], model: ModelName) -> dict[str, Any]:
    """Collect what answers depend on, except the secret, and its hash as their identity."""
    bundle, settings = served.bundle, served.settings
    method: dict[str, Any] = {"method": "sequential", "n": PREDICT_N, "radii": [0.0]}
    if model == "certify" and settings.method == "radius":
        loss = RADIUS_LOSS if settings.radius_loss is None else settings.radius_loss
        method = {"method": "radius", "n": settings.n, "radius_loss": loss}
    elif model == "certify":
        method = {"method": "sequential", "n": settings.n, "radii": list(settings.grid)}
    found = method | {
        "sigma": settings.sigma,
        "steps": settings.steps,
        "votes": settings.effective.votes,
        "alpha": settings.alpha,
        "timestep_rule": settings.timestep_rule or bundle.unet.timestep_rule,
        "class_names": list(served.class_names),
        "precision": bundle.unet.precision,
        "engine_sha256": bundle.unet.file.sha256,
        "classifier_sha256": bundle.classifier.file.sha256,
        "noise": [NOISE_LAW, smoothing_law(settings.sigma).sha256, vote_law().sha256],
        "runs_on": {name: value for name, value in runs_on.items() if name not in ("threads", "batch")},
    }
    return found | {"identity": hashlib.sha256(canonical(found)).hexdigest()}


def values_of(answers: Sequence[Predicted | Certified]) -> Values:
    """The outputs of a model by name, for each image: see `prediction` and `certificate`."""
    each = [prediction(answer) if isinstance(answer, Predicted) else certificate(answer) for answer in answers]
    columns = {name: [values[name] for values in each] for name in each[0]}
    return {name: column if isinstance(column[0], str) else np.array(column) for name, column in columns.items()}


def prediction(found: Predicted) -> dict[str, Any]:
    """confidence: 1 - error_bound, rounded down; 0.0 when it abstains.

    A label other than the smoothed classifier's comes with a confidence of c or more with probability at most 1 - c.
    """
    return {
        "label": label_of(found.label),
        "abstain": found.label is None,
        "confidence": 0.0 if found.error_bound is None else max(0.0, math.nextafter(1.0 - found.error_bound, 0.0)),
        "votes": found.votes,
        "n": found.n,
        "stopped": found.stopped,
    }


def certificate(found: Certified) -> dict[str, Any]:
    """radius: 0.0 when it abstains, and outcome is then the reason."""
    certified = found.certificate
    return {
        "label": label_of(certified.predict),
        "abstain": certified.predict is None,
        "radius": certified.radius or 0.0,
        "p_lower": certified.p_lower,
        "n_a": certified.n_a,
        "n": certified.n,
        "stopped": certified.stopped,
        "outcome": abstention(certified) or "certified",
    }


def label_of(label: int | None) -> int:
    return ABSTAINS if label is None else label
