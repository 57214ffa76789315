"""The device whose networks are other models of a Triton, against the ONNX Runtime device on the same engines."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

import numpy as np
import pytest
from numpy.typing import NDArray

from densepure_rt.errors import EnvironmentFault
from densepure_rt.runtime.bundle import Bundle, open_bundle, shipped_engine
from densepure_rt.runtime.device import Device
from densepure_rt.runtime.onnx_device import OnnxDevice
from densepure_rt.runtime.reverse import Outcome, decide
from densepure_rt.runtime.schedule import make_chain
from densepure_rt.runtime.triton_device import Cancelled, TritonDevice
from densepure_rt.smoothing.voting import Ballot
from tests.support.triton_backend import Triton, triton_of

SIGMA, STEPS, VOTES, SAMPLES, BATCH = 0.5, 2, 3, 8, 4


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return open_bundle(shipped_engine())


@pytest.fixture
def triton(bundle: Bundle) -> Triton:
    return triton_of(bundle)


def outcomes(bundle: Bundle, device: Device) -> list[Outcome]:
    chain = make_chain(bundle.unet.schedule, bundle.unet.variance, SIGMA, STEPS)
    pixels = np.random.default_rng(5).integers(0, 256, bundle.unet.image, np.uint8)
    image = device.open_image(pixels, (1, 2), SIGMA, chain.scale)
    return list(decide(device, chain, ((image, sample) for sample in range(SAMPLES)), lambda: Ballot(VOTES)))


@pytest.mark.parametrize("callers", [1, 3])
def test_the_engines_called_by_bls_give_the_outcomes_of_onnx_runtime(
    bundle: Bundle, triton: Triton, callers: int
) -> None:
    with closing(OnnxDevice(bundle, BATCH, threads=1)) as reference:
        expected = outcomes(bundle, reference)
    with closing(TritonDevice(triton, bundle, BATCH, callers)) as device:
        assert outcomes(bundle, device) == expected
        assert device.in_flight == callers


def test_a_model_that_is_not_loaded_is_named(bundle: Bundle, triton: Triton) -> None:
    del triton.models["classifier", 1]
    with pytest.raises(EnvironmentFault, match="Triton's model 'classifier', version 1, gave no result .*not ready"):
        TritonDevice(triton, bundle, BATCH, 1)


def test_another_version_of_a_model_is_not_what_was_hashed(bundle: Bundle, triton: Triton) -> None:
    triton.models["unet", 2] = triton.models.pop(("unet", 1))
    with pytest.raises(EnvironmentFault, match="'unet', version 1"):
        TritonDevice(triton, bundle, BATCH, 1)


def test_what_a_model_answers_with_an_error_says_so(bundle: Bundle, triton: Triton) -> None:
    def broken(feed: Mapping[str, NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        raise ValueError("out of memory on GPU 0")

    triton.models["unet", 1] = (triton.models["unet", 1][0], broken)
    with pytest.raises(EnvironmentFault, match="out of memory on GPU 0"):
        TritonDevice(triton, bundle, BATCH, 1)


def test_a_triton_that_cannot_read_this_numpy_says_what_to_install(bundle: Bundle, triton: Triton) -> None:
    def empty(feed: Mapping[str, NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        raise ValueError(
            "input byte size mismatch for input 'coef' for model 'unet'. Expected 768, got 0"
        )  # Triton 2.51

    triton.models["unet", 1] = (triton.models["unet", 1][0], empty)
    move = "see the server's log" if np.__version__.startswith("1.") else "pip install 'numpy<2' in its Python"
    with pytest.raises(EnvironmentFault, match=move):
        TritonDevice(triton, bundle, BATCH, 1)


def test_nothing_more_is_asked_of_the_engines_once_a_request_is_cancelled(bundle: Bundle, triton: Triton) -> None:
    with closing(TritonDevice(triton, bundle, BATCH, 2)) as device:
        before = triton.calls
        device.cancelled = lambda: triton.calls >= before + 3
        with pytest.raises(Cancelled):
            outcomes(bundle, device)
        assert triton.calls <= before + 3 + device.in_flight
        device.cancelled = lambda: False
        assert len(outcomes(bundle, device)) == SAMPLES


def test_it_describes_itself(bundle: Bundle, triton: Triton) -> None:
    with closing(TritonDevice(triton, bundle, BATCH, 2)) as device:
        said = device.describe()
    assert (said["provider"], said["callers"], said["batch"]) == ("triton", 2, BATCH)
