"""Noise by the GPU's kernels, on what stands for a GPU, against numpy's bit for bit; and who draws by it."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace

import numpy as np
import pytest

from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.runtime import gpu, gpu_noise
from densepure_rt.runtime.bundle import Bundle, open_bundle, shipped_engine
from densepure_rt.runtime.gpu_noise import KernelNoise, best_noise
from densepure_rt.runtime.host_device import Drawn, NumpyNoise, OpenImage
from densepure_rt.runtime.noise import smoothing_law, vote_law
from densepure_rt.runtime.triton_device import TritonDevice
from tests.runtime.host_cuda import GPU, PARAMETERS, HostCuda, HostError, compile_host
from tests.runtime.test_host_device import bundle, device_of, labels_by, labels_by_hand
from tests.support.triton_backend import triton_of

__all__ = ["bundle"]  # a fixture

SHAPE, BATCH = (3, 5, 7), 6


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to build the kernels for this processor")
    return compile_host(compiler, tmp_path_factory.mktemp("kernels"))


@contextmanager
def with_gpu(library: ctypes.CDLL) -> Iterator[HostCuda]:
    """While this machine has a GPU, which `host_cuda` stands for. What was drawn by must leave no memory there."""
    cuda = HostCuda(library)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "find", lambda: GPU)
        patch.setattr(gpu_noise, "import_cuda", lambda here: cuda)
        patch.setattr(gpu_noise, "compile_kernels", lambda cuda, arch: {name: name for name in PARAMETERS})
        yield cuda
    for stream in cuda.streams.values():
        stream.sync()
    assert not cuda.memory.live
    assert cuda.memory.fences_hold()


def images(*sigmas: float, shape: tuple[int, ...] = SHAPE) -> list[OpenImage]:
    draw = np.random.default_rng(len(sigmas))
    return [
        OpenImage(draw.integers(0, 256, shape, np.uint8), (2**64 - 1 - i, i), smoothing_law(sigma), 1 / (1 + i))
        for i, sigma in enumerate(sigmas)
    ]


def random_draws(n: int, seed: int = 0) -> Drawn:
    draw = np.random.default_rng(seed)
    return Drawn(draw.integers(0, 2**40, n), draw.integers(0, 1000, n), draw.integers(1, 1000, n))


@pytest.mark.parametrize("n", [1, 2, BATCH])
def test_every_draw_is_numpys_bit_for_bit(library: ctypes.CDLL, n: int) -> None:
    host, opened = NumpyNoise(), images(0.25, 1.0, 0.5)
    with with_gpu(library) as cuda, closing(KernelNoise(BATCH, SHAPE)) as noise:
        for seed in range(5):
            chosen, drawn = [opened[i % 3] for i in range(seed, seed + n)], random_draws(n, seed)
            for kernels, numpy in ((noise.smooth, host.smooth), (noise.votes, host.votes)):
                found = kernels(chosen, drawn)
                assert found.dtype == np.float32
                assert found.shape == (n, *SHAPE)
                assert found.tobytes() == numpy(chosen, drawn).tobytes()
        assert cuda.ran["smooth"] == cuda.ran["gather"] == 1 + 5  # one launch a batch, and the comparison


def test_a_result_stays_when_more_is_drawn(library: ctypes.CDLL) -> None:
    opened = images(0.5)
    with with_gpu(library), closing(KernelNoise(1, SHAPE)) as noise:
        first = noise.votes(opened, Drawn.of(1, 2, 3))
        before = first.tobytes()
        noise.votes(opened, Drawn.of(4, 5, 6))
        assert first.tobytes() == before


def test_threads_draw_one_after_another_and_each_gets_its_own(library: ctypes.CDLL) -> None:
    opened, host, draws = images(0.5, 0.25), NumpyNoise(), [random_draws(2, seed) for seed in range(40)]
    with with_gpu(library), closing(KernelNoise(2, SHAPE)) as noise, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda drawn: noise.votes(opened, drawn).tobytes(), draws))
    assert found == [host.votes(opened, drawn).tobytes() for drawn in draws]


def test_kernels_that_draw_otherwise_than_numpy_are_refused(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    law = vote_law()
    monkeypatch.setattr(gpu_noise, "vote_law", lambda: replace(law, lowest=law.lowest + 1))
    with with_gpu(library), pytest.raises(CheckFailed, match=r"draws other noise than numpy \(votes\)"):
        best_noise(BATCH, SHAPE)


def test_nothing_is_drawn_after_close_or_in_a_forked_child(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    with with_gpu(library):
        noise = KernelNoise(1, SHAPE)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 0)
            with pytest.raises(EnvironmentFault, match="forked .* its noise is drawn on a GPU"):
                noise.votes(images(0.5), Drawn.of(0, 0, 1))
        noise.close()
        noise.close()
        with pytest.raises(UsageError, match="closed"):
            noise.votes(images(0.5), Drawn.of(0, 0, 1))


def test_without_a_gpu_numpy_draws_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO, "densepure_rt"):
        patch.setattr(gpu, "LIBCUDA", "libcuda-that-is-not-there.so.1")
        assert isinstance(best_noise(BATCH, SHAPE), NumpyNoise)
    assert "noise is drawn by numpy: no NVIDIA GPU here" in caplog.text


def test_a_gpu_without_room_leaves_the_noise_to_numpy(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(self: HostCuda, *_: object) -> None:
        raise type("CUDAError", (HostError,), {"__module__": "cuda.core"})("CUDA_ERROR_OUT_OF_MEMORY")

    with with_gpu(library):
        monkeypatch.setattr(HostCuda, "allocate", none_left)
        assert isinstance(best_noise(BATCH, SHAPE), NumpyNoise)


def test_a_host_device_gives_the_same_labels_by_either(library: ctypes.CDLL, bundle: Bundle) -> None:
    with with_gpu(library) as cuda, closing(device_of(bundle)) as device:
        device.draw_by(best_noise)
        before = cuda.ran.copy()
        assert labels_by(bundle, device) == list(labels_by_hand(bundle))
        assert cuda.ran["smooth"] > before["smooth"]
        assert cuda.ran["gather"] > before["gather"]


def test_triton_draws_on_a_gpu_where_there_is_one(library: ctypes.CDLL) -> None:
    shipped = open_bundle(shipped_engine())
    with with_gpu(library), closing(TritonDevice(triton_of(shipped), shipped, 4, 1)) as device:
        assert isinstance(device.noise, KernelNoise)
