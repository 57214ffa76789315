"""Triton's two models, called as Triton calls them, against a classifier of this process on the same engines."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format
from numpy.typing import NDArray

from densepure_rt import load
from densepure_rt.export.convert.to_triton import export_repository
from densepure_rt.images.datasets import LabelledImage, open_images
from densepure_rt.keys import seeded_secret, store_key
from densepure_rt.runtime.bundle import open_bundle, shipped_engine, sidecar_path
from densepure_rt.serving.models import MOST_IMAGES, Values, values_of
from densepure_rt.serving.triton_model import TritonModel
from densepure_rt.smoothing.classifier import SmoothedClassifier
from densepure_rt.smoothing.settings import Settings
from tests.support.triton_backend import Asked, InferenceResponse, Tensor, Triton, TritonModelException, triton_of
from tests.support.triton_config import config_of

SECRET = seeded_secret(5)
QUICK = {"sigma": "0.25", "steps": "1", "votes": "1", "n": "96", "batch": "8"}
SETTINGS = Settings(sigma=0.25, steps=1, votes=1, n=96)
IMAGES = [image.pixels for image in open_images(None, (1, 28, 28), list("0123456789")).select(37, 4)]
Loader = Callable[..., TritonModel]


@pytest.fixture(scope="module")
def triton() -> Triton:
    return triton_of(open_bundle(shipped_engine()))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    export_repository(open_bundle(shipped_engine()), tmp_path / "models")
    store_key(tmp_path / "noise.key", SECRET)
    return tmp_path / "models"


@pytest.fixture
def loaded(repository: Path, triton: Triton, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loader]:
    """A model of the repository, loaded as Triton loads it, with these parameters in its configuration."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    models = []

    def load_model(name: str, **changed: str) -> TritonModel:
        config = json_format.MessageToDict(config_of(repository / name), preserving_proto_field_name=True)
        given = {"key_file": str(repository.parent / "noise.key")} | QUICK | changed
        config["parameters"] |= {name: {"string_value": value} for name, value in given.items()}
        model = TritonModel()
        model.initialize(
            {
                "model_config": json.dumps(config),
                "model_repository": str(repository / name),
                "model_name": name,
                "model_version": "1",
            }
        )
        models.append(model)
        return model

    yield load_model
    for model in models:
        model.finalize()


@pytest.fixture(scope="module")
def classifier() -> Iterator[SmoothedClassifier]:
    with load(secret=SECRET, batch=8, threads=1) as opened:
        yield opened


def response(
    model: TritonModel, count: int, parameters: Mapping[str, Any] | None = None, cancelled: bool = False
) -> InferenceResponse:
    pixels = np.stack([IMAGES[i % len(IMAGES)] for i in range(count)]) if count else np.empty((0, 1, 28, 28), np.uint8)
    request = Asked([Tensor("image", pixels)], parameters or {}, lambda: cancelled)
    found: InferenceResponse
    (found,) = model.execute([request])
    return found


def values(found: InferenceResponse) -> dict[str, NDArray[Any]]:
    assert (error := found.error()) is None, error.message()
    return {tensor.name(): tensor.as_numpy().copy() for tensor in found.output_tensors()}


def failure(found: InferenceResponse) -> tuple[str, str]:
    error = found.error()
    assert error is not None
    return error.code(), error.message()


def same(found: Mapping[str, Any], expected: Values) -> bool:
    return set(found) == set(expected) and all(
        list(found[name]) == list(expected[name]) for name in set(found) - {"votes"}
    )


def test_certificates_are_those_of_a_classifier_in_this_process(loaded: Loader, classifier: SmoothedClassifier) -> None:
    images = [LabelledImage(i, pixels, None) for i, pixels in enumerate(IMAGES[:3])]
    expected = values_of(list(classifier.certify_each(images, SETTINGS)))
    assert "certified" in expected["outcome"]
    assert same(values(response(loaded("certify"), 3)), expected)


def test_predictions_are_those_of_a_classifier_in_this_process(loaded: Loader, classifier: SmoothedClassifier) -> None:
    images = [LabelledImage(i, pixels, None) for i, pixels in enumerate(IMAGES[:3])]
    expected = values_of(list(classifier.predict_each(images, SETTINGS)))
    found = values(response(loaded("predict"), 3))
    assert same(found, expected)
    assert np.array_equal(found["votes"], expected["votes"])


def test_the_outputs_are_those_of_the_configuration(loaded: Loader, repository: Path) -> None:
    types = {"TYPE_INT64": np.int64, "TYPE_BOOL": np.bool_, "TYPE_FP64": np.float64, "TYPE_STRING": np.object_}
    for name in ("predict", "certify"):
        promised = json_format.MessageToDict(config_of(repository / name))["output"]
        found = values(response(loaded(name, deadline_ms="1"), 2))
        assert {one["name"]: types[one["dataType"]] for one in promised} == {
            key: array.dtype.type for key, array in found.items()
        }
        for one in promised:
            shape = np.shape(found[one["name"]])
            assert [2, *map(int, one["dims"][1:])] == list(shape)


@pytest.mark.parametrize("name", ["predict", "certify"])
def test_images_that_time_did_not_suffice_for_are_answered_as_stopped(loaded: Loader, name: str) -> None:
    found = values(response(loaded(name), 3, {"deadline_ms": 0.001}))
    assert list(found["stopped"]) == [True] * 3
    assert list(found["label"]) == [-1] * 3
    assert list(found["abstain"]) == [True] * 3


def test_a_request_without_a_deadline_has_that_of_the_configuration(loaded: Loader) -> None:
    assert list(values(response(loaded("certify", deadline_ms="0.001"), 1))["stopped"]) == [True]


@pytest.mark.parametrize(
    "deadline", [0, -1, 300_001, "soon", True, [1], 10**400, float("nan")], ids=lambda given: f"{given}"[:8]
)
def test_a_deadline_that_is_none_is_the_clients_error(loaded: Loader, deadline: object) -> None:
    code, message = failure(response(loaded("certify"), 1, {"deadline_ms": deadline}))
    assert code == "INVALID_ARG"
    assert "deadline_ms is milliseconds above 0, 300000 at most" in message


@pytest.mark.parametrize("count", [0, MOST_IMAGES + 1])
def test_too_many_images_or_none_are_the_clients_error(loaded: Loader, count: int) -> None:
    code, message = failure(response(loaded("predict"), count))
    assert (code, message) == ("INVALID_ARG", f"a request has 1 to {MOST_IMAGES} images, got {count}")


def test_a_cancelled_request_is_given_up_and_the_next_one_answered(loaded: Loader) -> None:
    model = loaded("predict")
    assert failure(response(model, 1, cancelled=True))[0] == "CANCELLED"
    assert list(values(response(model, 1))["abstain"]) == [False]


def test_an_engine_that_is_not_there_yet_fails_the_request_and_not_the_server(loaded: Loader, triton: Triton) -> None:
    model, engine = loaded("predict"), triton.models.pop(("unet", 1))
    try:
        code, message = failure(response(model, 1))
    finally:
        triton.models["unet", 1] = engine
    assert (code, "'unet', version 1" in message) == ("INTERNAL", True)
    assert list(values(response(model, 1))["abstain"]) == [False]


def test_each_start_without_a_key_file_has_its_own_noise(loaded: Loader) -> None:
    secrets = [loaded("predict", key_file="").secret for _ in range(2)]
    assert len({*secrets, SECRET}) == 3


def test_a_key_file_that_is_not_there_is_made_once_for_both_models(loaded: Loader, tmp_path: Path) -> None:
    file = tmp_path / "made.key"
    assert loaded("predict", key_file=str(file)).secret == loaded("certify", key_file=str(file)).secret
    assert file.stat().st_mode & 0o777 == 0o600


def test_no_answer_error_or_log_shows_the_secret(
    loaded: Loader, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    model = loaded("certify")
    answers = values(response(model, 1))
    said = [str(failure(response(model, 0))), *(str(array.tolist()) for array in answers.values())]
    (tmp_path / "damaged.key").write_text(f"{SECRET.hex()}!")
    with pytest.raises(TritonModelException, match="is no key") as refused:
        loaded("predict", key_file=str(tmp_path / "damaged.key"))
    said += [str(refused.value), *caplog.messages, *capfd.readouterr()]
    assert SECRET.hex() not in "\n".join(said)
    assert all(SECRET not in array.tobytes() for array in answers.values())


@pytest.mark.parametrize("name", ["unet/1/model.onnx", "classifier/1/model.onnx"])
def test_an_engine_of_other_bytes_is_not_loaded(loaded: Loader, repository: Path, name: str) -> None:
    content = bytearray((repository / name).read_bytes())
    content[len(content) // 2] ^= 1
    (repository / name).write_bytes(content)
    with pytest.raises(TritonModelException, match=r"has SHA-256 .* damaged or is another engine"):
        loaded("certify")


@pytest.mark.parametrize("model", ["unet", "classifier"])
def test_an_engine_exchanged_with_its_sidecar_is_not_the_one_that_the_configuration_pins(
    loaded: Loader, repository: Path, model: str
) -> None:
    engine = repository / model / "1" / "model.onnx"
    content = engine.read_bytes() + b"\n"
    engine.write_bytes(content)
    sidecar = json.loads(sidecar_path(engine).read_text())
    sidecar["file"]["sha256"] = hashlib.sha256(content).hexdigest()
    sidecar_path(engine).write_text(json.dumps(sidecar))
    with pytest.raises(TritonModelException, match="pins"):
        loaded("predict")


def test_engines_that_are_elsewhere_are_named(loaded: Loader, repository: Path) -> None:
    (repository / "unet" / "1" / "model.onnx").unlink()
    with pytest.raises(TritonModelException, match="no engine at .*unet/1/model.onnx"):
        loaded("predict")


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("predict", {"sigma": "half"}, "'sigma' should be a number, found 'half'"),
        ("predict", {"votes": "2.5"}, "'votes' should be a whole number, found '2.5'"),
        ("predict", {"votes": "0"}, "`votes` is a count from 1"),
        ("predict", {"sigma": "-1"}, "sigma"),
        ("predict", {"alpha": "0.7"}, "alpha is a probability of failure"),
        ("predict", {"steps": "100000"}, "steps"),
        ("predict", {"batch": "0"}, "'batch' should be a whole number from 1 to 65535, found '0'"),
        ("predict", {"callers": "many"}, "'callers' should be a whole number"),
        ("predict", {"deadline_ms": "inf"}, "'deadline_ms' is milliseconds above 0, found 'inf'"),
        ("predict", {"vote": "3"}, "parameters that are not known: vote"),
        ("predict", {"radii": "0"}, "parameters that are not known: radii"),
        ("predict", {"key_file": "/nowhere/noise.key"}, "cannot write the key /nowhere/noise.key"),
        ("certify", {"method": "fixed"}, "'method' is sequential or radius, found 'fixed'"),
        ("certify", {"method": "radius", "radii": "0,1"}, "`radii` are what the method sequential decides"),
        ("certify", {"radii": "0;1"}, "'radii' should be numbers with commas"),
        ("certify", {"radii": "1,0"}, "radii"),
        ("certify", {"alpha": "1e-12"}, "costs"),
    ],
)
def test_a_parameter_that_makes_no_sense_fails_the_load_by_name(
    loaded: Loader, name: str, changed: dict[str, str], message: str
) -> None:
    with pytest.raises(TritonModelException, match=message):
        loaded(name, **changed)


def test_parameters_of_tritons_own_are_left_to_it(loaded: Loader) -> None:
    assert loaded("predict", FORCE_CPU_ONLY_INPUT_TENSORS="yes").settings.sigma == 0.25


def test_a_parameter_that_is_missing_is_named(loaded: Loader, repository: Path) -> None:
    config = repository / "certify" / "config.pbtxt"
    lines = [line for line in config.read_text().splitlines() if '"max_deadline_ms"' not in line]
    config.write_text("\n".join(lines))
    with pytest.raises(TritonModelException, match="certify/config.pbtxt lacks the parameter 'max_deadline_ms'"):
        loaded("certify")
