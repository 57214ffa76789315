"""`triton_python_backend_utils` as NVIDIA documents it (python_backend's README), for tests without a Triton.

Models are functions here. As in Triton, a tensor's memory is that of the request or response that it belongs to: it is
overwritten when that goes, so that whoever kept an array instead of a copy is found out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densepure_rt.runtime.bundle import Bundle
from densepure_rt.runtime.device import CLASSIFY_INPUTS, CLASSIFY_OUTPUTS, STEP_INPUTS, STEP_OUTPUTS
from densepure_rt.runtime.onnx_device import Network

Run = Callable[[Mapping[str, NDArray[Any]]], Sequence[NDArray[Any]]]
TRITONSERVER_MEMORY_CPU = "cpu"


class TritonModelException(Exception):
    pass


class TritonError:
    INTERNAL, INVALID_ARG, CANCELLED = "INTERNAL", "INVALID_ARG", "CANCELLED"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> str:
        return self._code


class Tensor:
    def __init__(self, name: str, array: NDArray[Any]) -> None:
        assert array.flags["C_CONTIGUOUS"]
        self._name = name
        self._memory: NDArray[Any] = array.copy()

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        return self._memory

    def overwrite(self) -> None:
        self._memory.fill(85)


class PreferredMemory:
    def __init__(self, memory_type: str, device_id: int = 0) -> None:
        assert (memory_type, device_id) == (TRITONSERVER_MEMORY_CPU, 0)


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self._tensors, self._error = list(output_tensors), error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def __del__(self) -> None:
        for tensor in self._tensors:
            tensor.overwrite()


class Asked:
    """A request as a model's `execute` gets it."""

    def __init__(self, inputs: Sequence[Tensor], parameters: Mapping[str, Any], cancelled: Callable[[], bool]) -> None:
        self._inputs, self._parameters, self.is_cancelled = list(inputs), parameters, cancelled

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def parameters(self) -> str:
        return json.dumps(self._parameters) if self._parameters else ""


class Triton:
    """A server of models by (name, version), and the module that a Python model imports in it."""

    def __init__(self, models: dict[tuple[str, int], tuple[Sequence[str], Run]]) -> None:
        self.models, self.calls = models, 0
        self.TRITONSERVER_MEMORY_CPU = TRITONSERVER_MEMORY_CPU
        for documented in (TritonModelException, TritonError, Tensor, PreferredMemory, InferenceResponse):
            setattr(self, documented.__name__, documented)
        server = self

        class InferenceRequest:
            def __init__(
                self,
                model_name: str,
                requested_output_names: Sequence[str],
                inputs: Sequence[Tensor],
                model_version: int = -1,
                preferred_memory: PreferredMemory | None = None,
            ) -> None:
                self._asked = (model_name, model_version), list(requested_output_names), list(inputs)

            def exec(self) -> InferenceResponse:
                return server.run(*self._asked)

        self.InferenceRequest = InferenceRequest

    def run(self, model: tuple[str, int], wanted: Sequence[str], inputs: Sequence[Tensor]) -> InferenceResponse:
        self.calls += 1
        if model not in self.models:
            raise TritonModelException(f"Failed for execute the inference request. Model '{model[0]}' is not ready.")
        outputs, run = self.models[model]
        try:
            results = dict(zip(outputs, run({tensor.name(): tensor.as_numpy() for tensor in inputs}), strict=True))
        except Exception as error:
            return InferenceResponse(error=TritonError(str(error)))
        return InferenceResponse([Tensor(name, np.ascontiguousarray(results[name])) for name in wanted])

    @staticmethod
    def get_input_tensor_by_name(request: Asked, name: str) -> Tensor | None:
        return next((tensor for tensor in request.inputs() if tensor.name() == name), None)

    @staticmethod
    def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor | None:
        return next((tensor for tensor in response.output_tensors() if tensor.name() == name), None)


def triton_of(bundle: Bundle) -> Triton:
    """A server of the two engines of a bundle, which ONNX Runtime runs."""
    step = Network(bundle.unet_path, bundle.unet, STEP_INPUTS, STEP_OUTPUTS)
    classify = Network(bundle.classifier_path, bundle.classifier, CLASSIFY_INPUTS, CLASSIFY_OUTPUTS)
    return Triton({("unet", 1): (STEP_OUTPUTS, step), ("classifier", 1): (CLASSIFY_OUTPUTS, classify)})
