"""The two flavours of TensorRT behind one name: `tensorrt` (10.3 to 11) and `tensorrt-rtx` (1.x).

Their Python bindings differ in a few names, which stand in `GUARDED`, and a plan of one does not run on the other.
Neither raises: failure is None or False, and what went wrong goes to the logger alone.
"""

from __future__ import annotations

import importlib
from typing import Any

from densepure_rt.errors import EnvironmentFault
from densepure_rt.runtime.bundle import Flavour

MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}

# Names that not every flavour and version has, and which have them. All other names that are used here exist in
# tensorrt 10.3.0 (JetPack 6), the newest 10.x, 11.x and tensorrt-rtx 1.7: a test reads them off the libraries.
GUARDED = {
    "ComputeCapability": "tensorrt-rtx",
    "num_compute_capabilities": "tensorrt-rtx",
    "set_compute_capability": "tensorrt-rtx",
    "create_runtime_config": "tensorrt-rtx, and tensorrt from 10.9",
    "CudaGraphStrategy": "tensorrt-rtx",
    "cuda_graph_strategy": "tensorrt-rtx",
    "WHOLE_GRAPH_CAPTURE": "tensorrt-rtx",
    "SAME_COMPUTE_CAPABILITY": "tensorrt-rtx, and tensorrt later than 10.3",
}


def import_flavour(flavour: Flavour) -> Any:
    """The Python module of that flavour. Raises EnvironmentFault with the repair when it cannot be imported."""
    try:
        return importlib.import_module(MODULES[flavour])
    except Exception as error:  # missing, or the bindings are here and the libraries are not
        extra = "on a Jetson it comes with JetPack: make the virtual environment with --system-site-packages"
        raise EnvironmentFault(
            f"{flavour} cannot be imported ({first_line(error)}): run \"pip install 'densepure-rt[{flavour}]'\""
            + (f"; {extra}" if flavour == "tensorrt" else "")
        ) from error


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def new_logger(trt: Any) -> Any:
    """A logger that keeps warnings and errors in `messages` instead of printing them.

    TensorRT holds no reference to it: keep it for as long as anything that was made with it.
    """

    class Messages(trt.ILogger):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 insists on its own base, not on super()
            self.messages: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            if severity != trt.ILogger.VERBOSE:
                self.messages.append(message)

        def summary(self, lines: int = 4) -> str:
            """The last errors, or else the last messages: TensorRT says the cause before it says that it failed."""
            return "; ".join(dict.fromkeys(message.strip() for message in (self.errors or self.messages)[-lines:]))

    return Messages()
