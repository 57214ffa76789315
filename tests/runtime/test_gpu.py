from __future__ import annotations

import ctypes

import pytest

from densepure_rt.errors import EnvironmentFault
from densepure_rt.runtime import gpu


def driver_is_here() -> bool:
    try:
        ctypes.CDLL(gpu.LIBCUDA)
    except OSError:
        return False
    return True


@pytest.mark.skipif(driver_is_here(), reason="there is an NVIDIA driver here")
def test_without_a_driver_there_is_no_gpu_and_the_error_says_so() -> None:
    with pytest.raises(EnvironmentFault, match=r"no NVIDIA GPU here: .*libcuda\.so\.1.*\.onnx engine") as caught:
        gpu.find()
    assert caught.value.exit_code == 3


@pytest.mark.gpu
@pytest.mark.skipif(not driver_is_here(), reason="there is no NVIDIA driver here")
def test_a_gpu_has_a_name_a_compute_capability_and_a_driver() -> None:
    found = gpu.find()
    assert found.name
    assert all(part.isdigit() for part in (*found.compute_capability.split("."), *found.driver.split(".")))
