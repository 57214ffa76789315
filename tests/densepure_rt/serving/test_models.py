from __future__ import annotations

import dataclasses
import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest

from densepure_rt.images.datasets import LabelledImage
from densepure_rt.json_files import canonical
from densepure_rt.runtime.bundle import open_bundle, shipped_engine
from densepure_rt.serving.models import MOST_IMAGES, models_of, values_of
from densepure_rt.serving.protocol import InferRequest, encode_response, metadata
from densepure_rt.serving.service import Served
from densepure_rt.smoothing.certificate import Certificate, EpsOutcome
from densepure_rt.smoothing.classifier import Certified, Predicted
from densepure_rt.smoothing.scheduling import Cost
from densepure_rt.smoothing.settings import Settings

IMAGE = LabelledImage(0, np.zeros((1, 28, 28), np.uint8), None)
DEVICE = {"provider": "onnxruntime CPU", "threads": 2, "batch": 32}


async def nobody(image: object, deadline: float | None) -> object:
    raise AssertionError("nobody asks")


def served(settings: Settings, image: tuple[int, int, int] = (1, 28, 28)) -> Served:
    bundle = open_bundle(shipped_engine(), None, None, False)
    bundle = dataclasses.replace(bundle, unet=dataclasses.replace(bundle.unet, image=image))
    return Served(bundle, settings, bundle.classifier.class_names, bytes, nobody, nobody)  # type: ignore[arg-type]


def prediction(label: int | None, bound: float | None, stopped: bool = False) -> Predicted:
    return Predicted(IMAGE, label, 13, np.array([0] * 9 + [13]), bound, Cost(), stopped)


def certified(predict: int | None, radius: float | None, result: str, stopped: bool = False) -> Certified:
    outcomes = (EpsOutcome(0.0, result, 64, 60),)  # type: ignore[arg-type]
    return Certified(IMAGE, Certificate(predict, radius, 0, 64, 60, 0.001, 0.7, outcomes, stopped), Cost())


@pytest.mark.parametrize("bound", [1e-3, 0.3, 1 / 3, 5e-17, 1.0])
def test_confidence_is_never_more_than_one_less_the_bound(bound: float) -> None:
    (found,) = values_of([prediction(9, bound)])["confidence"]
    assert Fraction(float(found)) <= 1 - Fraction(bound)
    assert found == pytest.approx(1 - bound, abs=1e-15)


def test_an_abstention_is_minus_1_without_confidence_and_without_radius() -> None:
    found = values_of([prediction(9, 1e-3), prediction(None, None, stopped=True)])
    assert list(found["label"]) == [9, -1]
    assert list(found["abstain"]) == [False, True]
    assert found["confidence"][1] == 0.0
    assert list(found["stopped"]) == [False, True]
    assert np.shape(found["votes"]) == (2, 10)
    found = values_of([certified(7, 0.25, "certified"), certified(None, None, "gave up")])
    assert (list(found["label"]), list(found["radius"])) == ([7, -1], [0.25, 0.0])


def test_an_outcome_is_certified_or_why_not() -> None:
    answers = [
        certified(7, 0.25, "certified"),
        certified(7, 0.1, "undecided", stopped=True),
        certified(None, None, "gave up"),
        certified(None, None, "abstained"),
        certified(None, None, "skipped"),
        certified(None, None, "undecided", stopped=True),
    ]
    words = ["certified", "certified", "gave up", "at n", "out of reach", "out of time"]
    assert values_of(answers)["outcome"] == words


@pytest.mark.parametrize("model", ["predict", "certify"])
def test_values_are_of_the_shapes_and_types_that_the_metadata_promises(model: str) -> None:
    answers = [prediction(9, 1e-3)] * 2 if model == "predict" else [certified(7, 0.25, "certified")] * 2
    described = models_of(served(Settings()), DEVICE, 256)[model]  # type: ignore[index]
    values = values_of(answers)
    assert set(values) == {output.name for output in described.outputs}
    kinds = {"INT64": "i", "FP64": "f", "BOOL": "b", "BYTES": "U"}
    for output in described.outputs:
        assert np.shape(values[output.name]) == (2, *output.shape[1:])
        assert np.asarray(values[output.name]).dtype.kind == kinds[output.datatype]
    names = dict.fromkeys(values, False)
    encode_response(described, InferRequest(None, np.zeros((2, 1, 28, 28), np.uint8), names, None), values)


@pytest.mark.parametrize(
    ("image", "most_open", "most"),
    [((1, 28, 28), 256, MOST_IMAGES), ((3, 32, 32), 256, MOST_IMAGES), ((3, 224, 224), 256, 1), ((1, 28, 28), 5, 5)],
)
def test_a_request_is_of_as_many_images_as_are_small_in_json_and_fit_the_queue(
    image: tuple[int, int, int], most_open: int, most: int
) -> None:
    for model in models_of(served(Settings(), image), DEVICE, most_open).values():
        assert model.most_images == most
        assert model.input.shape == (-1, *image)


def test_the_identity_is_the_hash_of_all_that_answers_depend_on_and_of_nothing_else() -> None:
    def about(settings: Settings, **device: object) -> dict[str, object]:
        models = models_of(served(settings), DEVICE | device, 256)
        return metadata(models["certify"])["parameters"]  # type: ignore[no-any-return]

    found = about(Settings())
    rest = {name: value for name, value in found.items() if name != "identity"}
    assert found["identity"] == hashlib.sha256(canonical(rest)).hexdigest()
    assert about(Settings(), batch=8, threads=1)["identity"] == found["identity"]
    others = [Settings(sigma=0.25), Settings(steps=1), Settings(votes=3), Settings(alpha=0.01), Settings(n=99)]
    others += [Settings(method="radius"), Settings(method="radius", radius_loss=0.2), Settings(radii=(0.1,))]
    identities = {about(settings)["identity"] for settings in others} | {found["identity"]}
    assert len(identities) == len(others) + 1


def test_what_is_said_of_a_model_is_json_without_infinities() -> None:
    for model in models_of(served(Settings(method="radius")), DEVICE, 256).values():
        canonical(metadata(model))
        assert math.isfinite(metadata(model)["parameters"]["alpha"])
