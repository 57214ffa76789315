"""The models `predict` and `certify` that Triton's Python backend runs before the engines of a repository.

`densepure-rt export --target triton` writes the repository; each of its two `model.py` names one of the classes below.
Everything that decides an answer is in the parameters of the model's `config.pbtxt`, which are read when it is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from densepure_rt.errors import CheckFailed, DensePureError, UsageError
from densepure_rt.images.datasets import LabelledImage
from densepure_rt.keys import new_secret, shared_key
from densepure_rt.runtime.bundle import Bundle, open_bundle, verified_engine
from densepure_rt.runtime.device import MAX_BATCH, MAX_THREADS
from densepure_rt.runtime.triton_device import Cancelled, TritonDevice
from densepure_rt.serving.models import MOST_IMAGES, outputs_of, pixels_of, values_of
from densepure_rt.serving.service import ModelName
from densepure_rt.smoothing.classifier import Certified, Predicted, SmoothedClassifier, chain_of, prediction_of
from densepure_rt.smoothing.samplers import OnDevice
from densepure_rt.smoothing.scheduling import Cost
from densepure_rt.smoothing.settings import Budget, Settings

MODEL_NAMES: tuple[ModelName, ...] = ("predict", "certify")
DEADLINE = "deadline_ms"  # a parameter of requests


def numbers(text: str) -> tuple[float, ...] | None:
    """Read numbers with commas between them; None for none."""
    return tuple(float(word) for word in text.split(",") if word.strip()) or None


Real = Annotated[float, Field(description="should be a number")]
Whole = Annotated[int, Field(description="should be a whole number")]
Milliseconds = Annotated[float, Field(gt=0, description="is milliseconds above 0")]


class Parameters(BaseModel):
    """Hold the parameters of a model's configuration: all of them have to be there, and no other."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    engine: str
    engine_sha256: str
    classifier: str
    classifier_sha256: str
    key_file: str
    sigma: Real
    steps: Whole
    votes: Whole
    n: Whole
    alpha: Real
    batch: int = Field(ge=1, le=MAX_BATCH, description=f"should be a whole number from 1 to {MAX_BATCH}")
    callers: int = Field(ge=1, le=MAX_THREADS, description=f"should be a whole number from 1 to {MAX_THREADS}")
    deadline_ms: Milliseconds
    max_deadline_ms: Milliseconds

    @property
    def settings(self) -> Settings:
        """Return what the model answers by. Raises UsageError."""
        return Settings(self.sigma, self.steps, self.votes, n=self.n, alpha=self.alpha)


class CertifyParameters(Parameters):
    method: Literal["sequential", "radius"] = Field(description="is sequential or radius")  # that may be stopped
    radii: Annotated[tuple[float, ...] | None, BeforeValidator(numbers)] = Field(
        description="should be numbers with commas"
    )

    @property
    def settings(self) -> Settings:
        return replace(super().settings, method=self.method, radii=self.radii)


def parameters_of(kind: type[Parameters], where: str, given: Mapping[str, Mapping[str, str]]) -> Parameters:
    """Read the parameters in a model's configuration, the file `where`. Raises UsageError, which names both."""
    # Names in capitals are Triton's own, such as FORCE_CPU_ONLY_INPUT_TENSORS.
    values = {name: entry.get("string_value", "").strip() for name, entry in given.items() if not name.isupper()}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
    name, found = str(fault["loc"][0]), fault["input"]
    if fault["type"] == "missing":
        raise UsageError(f"{where} lacks the parameter {name!r}: export the repository again")
    if fault["type"] == "extra_forbidden":
        unknown = sorted(values.keys() - kind.model_fields.keys())
        raise UsageError(f"{where} has parameters that are not known: {', '.join(unknown)}")
    raise UsageError(f"{where}: {name!r} {kind.model_fields[name].description}, found {found!r}")


def checked_bundle(repository: Path, parameters: Parameters, where: str) -> Bundle:
    """The bundle in a model repository, found to be the one that it was exported with, byte for byte.

    Raises CheckFailed when it is another, UsageError when a file is not there.
    """
    bundle = open_bundle(
        repository / parameters.engine,
        repository / parameters.classifier,
        engine_sha256=parameters.engine_sha256,
    )
    expected = parameters.classifier_sha256
    if not bundle.classifier.file.sha256 == bundle.unet.classifier.sha256 == expected:
        raise CheckFailed(
            f"{where} pins the classifier {expected[:16]}..., the sidecars of {bundle.classifier_path} and "
            f"{bundle.unet_path} say {bundle.classifier.file.sha256[:16]}... and "
            f"{bundle.unet.classifier.sha256[:16]}...: export the repository again"
        )
    for path, sidecar in ((bundle.unet_path, bundle.unet), (bundle.classifier_path, bundle.classifier)):
        verified_engine(path, sidecar)
    return bundle


class TritonModel:
    """`predict` or `certify`, by the name of its folder: Triton calls `initialize`, `execute` and `finalize`.

    The engines are hashed when the model is loaded, which fails where they are others. They are first run for the first
    request, since Triton lets a model call others only then; engines that fail their probe fail every request.
    """

    device: TritonDevice | None = None  # from the first request on

    def initialize(self, args: Mapping[str, str]) -> None:
        self.backend: Any = import_module("triton_python_backend_utils")  # Triton's own, in its own process
        try:
            config = json.loads(args["model_config"])
            self.load(args["model_name"], Path(args["model_repository"]).parent, config)
        except DensePureError as error:
            raise self.backend.TritonModelException(str(error)) from error

    def load(self, name: str, repository: Path, config: Mapping[str, Any]) -> None:
        """Raises CheckFailed for other engines, UsageError for parameters that no answer can come of."""
        if name not in MODEL_NAMES:
            raise UsageError(f"{name!r} is not one of {', '.join(MODEL_NAMES)}: a model goes by the name of its folder")
        self.name: ModelName = name
        kind, where = CertifyParameters if name == "certify" else Parameters, f"{name}/config.pbtxt"
        self.parameters = parameters_of(kind, where, config.get("parameters", {}))
        self.settings = self.parameters.settings
        self.bundle = checked_bundle(repository, self.parameters, where)
        chain_of(self.bundle, self.settings)  # raises where there is none
        pixels = math.prod(self.bundle.unet.image)
        self.rule = (
            self.settings.prediction_rule(pixels) if name == "predict" else self.settings.rule(pixels, labelled=False)
        )
        if name == "certify":
            self.settings.check_reach(pixels, labelled=False)
        self.secret = shared_key(Path(key_file)) if (key_file := self.parameters.key_file) else new_secret()
        self.outputs = outputs_of(len(self.bundle.classifier.class_names))[self.name]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return [self.respond(request) for request in requests]

    def finalize(self) -> None:
        if self.device is not None:
            self.device.close()

    def respond(self, request: Any) -> Any:
        backend = self.backend
        try:
            images, seconds = self.images_of(request), self.seconds_of(request)
            device = self.opened()
            device.cancelled = request.is_cancelled
            values = values_of(self.answers(device, images, seconds))
        except DensePureError as error:
            return backend.InferenceResponse(error=backend.TritonError(str(error), self.code_of(error)))
        types = {output.name: np.object_ if output.datatype == "BYTES" else None for output in self.outputs}
        return backend.InferenceResponse(
            [backend.Tensor(name, np.array(values[name], dtype)) for name, dtype in types.items()]
        )

    def images_of(self, request: Any) -> NDArray[np.uint8]:
        """The request's images, uint8 [images, channels, height, width]; Triton has checked all but their number."""
        tensor = self.backend.get_input_tensor_by_name(request, pixels_of(self.bundle.unet.image).name)
        images: NDArray[np.uint8] = tensor.as_numpy()
        if not 1 <= len(images) <= MOST_IMAGES:
            raise UsageError(f"a request has 1 to {MOST_IMAGES} images, got {len(images)}")
        return images

    def answers(
        self, device: TritonDevice, images: NDArray[np.uint8], seconds: float
    ) -> list[Predicted] | list[Certified]:
        """In the order of the images; after `seconds` by what the samples bear out, which may be none."""
        labelled = [LabelledImage(idx, image, None) for idx, image in enumerate(images)]
        classifier, budget = SmoothedClassifier(self.bundle, OnDevice(device), self.secret), Budget(run=seconds)
        if self.name == "predict":
            predicted = {found.image.idx: found for found in classifier.predict_each(labelled, self.settings, budget)}
            return [predicted.get(image.idx) or self.no_prediction(image) for image in labelled]
        certified = {found.image.idx: found for found in classifier.certify_each(labelled, self.settings, budget)}
        return [certified.get(image.idx) or self.no_certificate(image) for image in labelled]

    def no_prediction(self, image: LabelledImage) -> Predicted:
        """Abstain for an image that was not reached in time."""
        decider, classes = self.rule.start(), len(self.bundle.classifier.class_names)
        return prediction_of(image, decider, self.rule.charge, classes, Cost(), stopped=True)

    def no_certificate(self, image: LabelledImage) -> Certified:
        """Abstain for an image that was not reached in time."""
        return Certified(image, self.rule.start().certificate(stopped=True), Cost())

    def opened(self) -> TritonDevice:
        """The engines, ready to run. Only while a request is executed."""
        if self.device is None:
            self.device = TritonDevice(self.backend, self.bundle, self.parameters.batch, self.parameters.callers)
        return self.device

    def code_of(self, error: DensePureError) -> Any:
        codes = self.backend.TritonError
        if isinstance(error, UsageError):
            return codes.INVALID_ARG
        return codes.CANCELLED if isinstance(error, Cancelled) else codes.INTERNAL

    def seconds_of(self, request: Any) -> float:
        """The time that an answer may take; what the request waited in Triton's queue is not in it."""
        given = json.loads(request.parameters() or "{}").get(DEADLINE)
        if given is None:
            return self.parameters.deadline_ms / 1000
        with suppress(TypeError, ValueError, OverflowError):
            if 0 < float(given) <= self.parameters.max_deadline_ms and not isinstance(given, bool):
                return float(given) / 1000
        raise UsageError(
            f"{DEADLINE} is milliseconds above 0, {self.parameters.max_deadline_ms:g} at most, got {str(given)[:40]!r}"
        )
