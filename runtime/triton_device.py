"""The device inside Triton's Python backend: the networks are other models of the same server, called by BLS.

BLS (business logic scripting) is how a Python model of Triton calls the others. Triton gives it as the module
`triton_python_backend_utils`, which exists in that process alone, and answers it while a request is executed only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from densepure_rt.errors import DensePureError, EnvironmentFault
from densepure_rt.runtime.bundle import Bundle
from densepure_rt.runtime.device import CLASSIFY_OUTPUTS, STEP_OUTPUTS, Floats
from densepure_rt.runtime.gpu_noise import best_noise
from densepure_rt.runtime.host_device import HostDevice, Networks
from densepure_rt.runtime.machine import processor

STEP_MODEL, CLASSIFY_MODEL = "unet", "classifier"  # their names in the model repository
VERSION = 1  # of both: what was hashed is what is called
EMPTY = ", got 0"  # ends Triton's error about a tensor of no bytes: its Python backend, to 2.51 at least, wants NumPy 1


class Cancelled(DensePureError):
    """Whoever asked has gone: nothing more is spent on the answer."""


class BlsNetwork:
    """An engine as a model of this Triton: feed -> outputs, whole batches. backend: triton_python_backend_utils.

    cancelled: asked before each call.
    """

    def __init__(self, backend: Any, model: str, outputs: Sequence[str], cancelled: Callable[[], bool]) -> None:
        self.backend, self.model, self.outputs, self.cancelled = backend, model, list(outputs), cancelled

    def __call__(self, feed: Mapping[str, Floats]) -> list[Floats]:
        """Raises Cancelled, or EnvironmentFault when the model is not there or cannot run the batch."""
        if self.cancelled():
            raise Cancelled("the request was cancelled: nothing is answered")
        backend = self.backend
        host = backend.PreferredMemory(backend.TRITONSERVER_MEMORY_CPU, 0)  # outputs of a plan would stay on its GPU
        request = backend.InferenceRequest(
            model_name=self.model,
            model_version=VERSION,
            requested_output_names=self.outputs,
            inputs=[backend.Tensor(name, np.ascontiguousarray(value)) for name, value in feed.items()],
            preferred_memory=host,
        )
        try:
            response = request.exec()
        except backend.TritonModelException as error:
            raise self._failed(str(error)) from error
        if response.has_error():
            raise self._failed(response.error().message())
        tensors = [backend.get_output_tensor_by_name(response, name) for name in self.outputs]
        return [np.array(tensor.as_numpy()) for tensor in tensors]  # copies: the response's memory goes with it

    def _failed(self, message: str) -> EnvironmentFault:
        move = "see the server's log, and whether the model is loaded"
        if EMPTY in message and not np.__version__.startswith("1."):
            move = f"this Triton cannot read arrays of NumPy {np.__version__}: pip install 'numpy<2' in its Python"
        return EnvironmentFault(f"Triton's model {self.model!r}, version {VERSION}, gave no result ({message}): {move}")


class TritonDevice(HostDevice):
    """`callers` batches are with Triton at the same time, which runs as many as the models have instances.

    cancelled: whether the request that is executed now was given up; what waits for batches then gets Cancelled.
    """

    def __init__(self, backend: Any, bundle: Bundle, batch: int, callers: int) -> None:
        self.cancelled: Callable[[], bool] = lambda: False
        step = BlsNetwork(backend, STEP_MODEL, STEP_OUTPUTS, lambda: self.cancelled())
        classify = BlsNetwork(backend, CLASSIFY_MODEL, CLASSIFY_OUTPUTS, lambda: self.cancelled())
        facts: Mapping[str, str | int | bool] = {
            "provider": "triton",
            "processor": processor(),
            "callers": callers,
        }
        super().__init__(bundle, Networks(step, classify), batch, callers, facts)
        self.draw_by(best_noise)
