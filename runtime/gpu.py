"""The NVIDIA GPU of this machine, asked of the driver itself (libcuda), without any CUDA package."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from densepure_rt.errors import EnvironmentFault

LIBCUDA, NVML = "libcuda.so.1", "libnvidia-ml.so.1"
NAME_BYTES = 256
UNKNOWN = "unknown"
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR, cuda.h


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it.

    Attributes:
        name: Such as "NVIDIA H100".
        compute_capability: Such as "9.0".
        driver: The newest CUDA that the driver runs, such as "12.6".
        driver_release: The driver's own version, such as "550.54.15"; "unknown" where NVML does not tell.
        memory: Bytes in all; a Jetson shares them with its CPU.
    """

    name: str
    compute_capability: str
    driver: str
    driver_release: str = UNKNOWN
    memory: int = 0

    @property
    def cuda_major(self) -> int:
        """Return the major version of the newest CUDA that the driver runs."""
        return int(self.driver.partition(".")[0])

    @property
    def facts(self) -> dict[str, str]:
        """Return what a record says of the GPU, by name."""
        return {
            "gpu": self.name,
            "compute_capability": self.compute_capability,
            "driver": self.driver,
            "driver_release": self.driver_release,
        }


def find() -> Gpu:
    """The first GPU that this process sees. Raises EnvironmentFault when there is no driver or no GPU."""
    try:
        cuda = ctypes.CDLL(LIBCUDA)
    except OSError as error:
        raise EnvironmentFault(
            f"no NVIDIA GPU here: the driver library {LIBCUDA} is not found ({error}); run on the CPU with an .onnx "
            f'engine, or see "densepure-rt doctor" on the machine that has the GPU'
        ) from error
    device, version, value, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(NAME_BYTES)

    def ask(function: str, *arguments: object) -> None:
        if code := getattr(cuda, function)(*arguments):
            raise EnvironmentFault(
                f"the NVIDIA driver is here but gives no GPU ({function}: CUDA error {code}): check nvidia-smi and "
                f"CUDA_VISIBLE_DEVICES"
            )

    ask("cuInit", 0)
    ask("cuDriverGetVersion", ctypes.byref(version))
    ask("cuDeviceGet", ctypes.byref(device), 0)
    ask("cuDeviceGetName", name, NAME_BYTES, device)
    ask("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    capability = []
    for attribute in (MAJOR, MINOR):
        ask("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        capability.append(str(value.value))
    driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu(name.value.decode(errors="replace"), ".".join(capability), driver, driver_release(), memory.value)


def driver_release() -> str:
    """Ask NVML for the driver's version. Source: nvmlSystemGetDriverVersion of the NVML API."""
    release = ctypes.create_string_buffer(NAME_BYTES)
    try:
        nvml = ctypes.CDLL(NVML)
        if nvml.nvmlInit_v2():
            return UNKNOWN
        failed = nvml.nvmlSystemGetDriverVersion(release, NAME_BYTES)
        nvml.nvmlShutdown()
    except (OSError, AttributeError):  # an older Jetson has none
        return UNKNOWN
    return UNKNOWN if failed else release.value.decode(errors="replace")
