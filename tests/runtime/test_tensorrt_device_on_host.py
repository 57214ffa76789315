"""The whole TensorRT device on this processor (host_cuda.py), bit for bit against the reference device."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import logging
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import parser

from densepure_rt.errors import CheckFailed, DensePureError, EnvironmentFault, UsageError
from densepure_rt.images.datasets import ImageSet, LabelledImage
from densepure_rt.keys import seeded_secret
from densepure_rt.runs.identity import identity_of
from densepure_rt.runtime import onnx_device, tensorrt_device
from densepure_rt.runtime.bundle import Bundle, Flavour, open_bundle, shipped_engine, sidecar_path
from densepure_rt.runtime.control import ITEM
from densepure_rt.runtime.device import NOT_FINITE, Batch, Device
from densepure_rt.runtime.noise import Key
from densepure_rt.runtime.onnx_device import OnnxDevice
from densepure_rt.runtime.open_device import open_device
from densepure_rt.runtime.probe import ITEMS
from densepure_rt.runtime.reverse import Outcome, decide
from densepure_rt.runtime.schedule import Chain, make_chain
from densepure_rt.runtime.tensorrt_api import CACHE_SUFFIX
from densepure_rt.runtime.tensorrt_device import IMAGE, IN_FLIGHT, KERNELS, UPLOADS, TensorRTDevice, most_states
from densepure_rt.smoothing.classifier import SmoothedClassifier
from densepure_rt.smoothing.samplers import OnDevice
from densepure_rt.smoothing.settings import Budget, Settings
from densepure_rt.smoothing.voting import Ballot
from tests.runtime import host_cuda
from tests.runtime.host_cuda import (
    PARAMETERS,
    HostCuda,
    HostError,
    HostTensorRT,
    Stream,
    as_bytes,
    as_plans,
    compile_host,
    on_host,
    opened_on_host,
)
from tests.support.batches import random_batch
from tests.support.cli import densepure_rt
from tests.support.small_engines import (
    ALARM,
    BATCH_MEAN_GRAPH,
    CLASSIFIER,
    CLASSIFY_GRAPH,
    ENGINE,
    KEY,
    SHAPE,
    SIGMA,
    finish,
    items,
    picture,
    replace_file,
    small_bundle,
    trajectory,
)

FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
HALF_GRAPH = """
<ir_version: 8, opset_import: ["" : 18]>
classify (float16[B,1,4,4] mean) => (float16[B,3] logits)
<int64[2] flat = {0, -1}, int64[1] begin = {0}, int64[1] end = {3}, int64[1] axis = {1}>
{
    flattened = Reshape(mean, flat)
    logits = Slice(flattened, begin, end, axis)
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to build the kernels for this processor")
    return compile_host(compiler, tmp_path_factory.mktemp("kernels"))


def copy_of_shipped(folder: Path) -> Path:
    for name in (ENGINE, CLASSIFIER):
        for path in (shipped_engine().with_name(name), sidecar_path(shipped_engine().with_name(name))):
            shutil.copy(path, folder)
    return folder / ENGINE


@pytest.fixture
def small(tmp_path: Path) -> Bundle:
    """ONNX files of small graphs, whose step calls some draws not finite."""
    return small_bundle(copy_of_shipped(tmp_path), ALARM)


@contextmanager
def reference(bundle: Bundle, batch: int) -> Iterator[tuple[Device, list[bytes]]]:
    """The reference device, taking work in the same order; and what its engines are given in batches of this size.

    Its probe tries another size too, which a plan does not take.
    """
    fed: list[bytes] = []

    class Listening(onnx_device.Network):
        def __call__(self, feed: Any) -> Any:
            if len(feed["mean"]) == batch:
                fed.append(as_bytes(feed))
            return super().__call__(feed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_device, "Network", Listening)
        device = OnnxDevice(bundle, batch, threads=1)
    device.in_flight = IN_FLIGHT
    with closing(device):
        yield device, fed


def chain_of(bundle: Bundle, sigma: float = SIGMA, steps: int = 3) -> Chain:
    return make_chain(bundle.unet.schedule, bundle.unet.variance, sigma, steps)


def images_of(bundle: Bundle, count: int) -> list[tuple[NDArray[np.uint8], Key]]:
    shape = bundle.unet.image
    draw = np.random.default_rng(2)
    return [(draw.integers(0, 256, shape, np.uint8), (i, 2**64 - 1 - i)) for i in range(count)]


def decided(
    device: Device, bundle: Bundle, sigma: float, steps: int, votes: int, samples: int, images: int = 2
) -> list[Outcome]:
    """The outcomes of `samples` of each image, by the images' places; an image is opened when its work is due."""
    chain, handles = chain_of(bundle, sigma, steps), []

    def work() -> Iterator[tuple[int, int]]:
        for pixels, key in images_of(bundle, images):
            handles.append(device.open_image(pixels, key, sigma, chain.scale))
            yield from ((handles[-1], sample) for sample in range(samples))

    found = list(decide(device, chain, work(), lambda: Ballot(votes if steps > 1 else 1)))
    for handle in handles:
        device.close_image(handle)
    return [outcome._replace(image=handles.index(outcome.image)) for outcome in found]


@contextmanager
def watched(device: Device) -> Iterator[list[Batch]]:
    """The batches that are submitted meanwhile."""
    submit: Callable[[Batch], int] = device.submit
    seen: list[Batch] = []

    def noting(batch: Batch) -> int:
        seen.append(batch)
        return submit(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "submit", noting)
        yield seen


def as_bytes_of(states: tuple[NDArray[np.float32], NDArray[np.float32]]) -> list[bytes]:
    return [part.tobytes() for part in states]


def smoothed(device: Device, chain: Chain, pixels: NDArray[np.uint8], meanwhile: Callable[[], object]) -> bytes:
    """The smoothed state of one sample, with something done between opening the image and using it."""
    device.reserve(1)
    handle = device.open_image(pixels, KEY, SIGMA, chain.scale)
    meanwhile()
    finish(device, items("smooth", chain, handle, [1], [0]))
    device.close_image(handle)
    return device.read([0])[0].tobytes()


def test_python_packs_what_the_kernels_read(library: ctypes.CDLL) -> None:
    assert ITEM.itemsize == library.size_of_item()
    assert IMAGE.itemsize == library.size_of_image()
    assert set(KERNELS) == PARAMETERS.keys()


Shipped = tuple[Device, list[TensorRTDevice], Bundle]


@pytest.fixture(scope="module")
def shipped(library: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shipped]:
    """The shipped engines on the reference device, and as plans of both flavours, in batches of 4."""
    bundle = open_bundle(copy_of_shipped(tmp_path_factory.mktemp("shipped")))
    with ExitStack() as stack:
        device, _ = stack.enter_context(reference(bundle, 4))
        plans = [as_plans(bundle, flavour, (4,)) for flavour in FLAVOURS]
        yield device, [stack.enter_context(opened_on_host(library, plan))[0] for plan in plans], bundle


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("sigma", [0.25, 0.5])
def test_shipped_engines_give_the_labels_votes_and_states_of_the_reference_device(
    shipped: Shipped, sigma: float, steps: int
) -> None:
    expected_by, devices, bundle = shipped
    with watched(expected_by) as batches:
        expected = decided(expected_by, bundle, sigma, steps, votes=3, samples=3)
    assert len(expected) == 6
    written = sorted({slot for batch in batches for slot in batch.target.tolist()})
    states = expected_by.read(written)
    assert np.isfinite(states).all()
    for device in devices:
        assert decided(device, bundle, sigma, steps, votes=3, samples=3) == expected
        assert as_bytes_of(device.read(written)) == as_bytes_of(states)


def test_shipped_engines_pass_through_the_same_states_on_the_way(shipped: Shipped) -> None:
    expected_by, devices, bundle = shipped
    work = (chain_of(bundle, steps=2), [40, 2, 7], [5, 0, 3], picture(bundle.unet.image))
    everywhere: list[Device] = [expected_by, *devices]
    assert len({trajectory(device, *work) for device in everywhere}) == 1


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("batch", [1, 5, 16])
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_engines_are_given_the_same_bytes_in_the_same_order_as_by_the_reference_device(
    library: ctypes.CDLL, small: Bundle, flavour: Flavour, early: bool, batch: int, steps: int
) -> None:
    """Padding included; so the probe, every state and every noise are the same, and each batch runs once."""
    count = 11 if batch == 1 else 37  # no multiple of a batch
    with reference(small, batch) as (device, fed):
        expected = decided(device, small, SIGMA, steps, votes=5, samples=count)
    with opened_on_host(library, as_plans(small, flavour, (batch,)), early=early) as (device, trt):
        with watched(device) as batches:
            assert decided(device, small, SIGMA, steps, votes=5, samples=count) == expected
        assert trt.cuda.fed == fed
        kinds = Counter(batch.kind for batch in batches)
        probes = math.ceil(ITEMS / batch) + 1  # each item once, and some beside others
        assert trt.cuda.ran == Counter(
            {
                "smooth": kinds["smooth"],
                "gather": kinds["step"],
                "step engine": kinds["step"] + probes,
                "scatter": kinds["step"],
                "gather_means": kinds["classify"],
                "classifier": kinds["classify"] + probes,
                "argmax": kinds["classify"],
            }
        )
    if steps == 3 and batch > 1:
        assert NOT_FINITE in {outcome.label for outcome in expected}
        assert len({outcome.votes for outcome in expected}) > 2


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_certificates_of_images_that_come_and_go_are_those_of_the_reference_device(
    library: ctypes.CDLL, small: Bundle, flavour: Flavour, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for so few images that each place in the table is used many times, by two sigmas."""
    monkeypatch.setattr(tensorrt_device, "MAX_IMAGES", 7)
    labelled = [LabelledImage(i, pixels, None) for i, (pixels, _) in enumerate(images_of(small, 12))]

    def certified(bundle: Bundle, device: Device) -> list[Any]:
        classifier = SmoothedClassifier(bundle, OnDevice(device), seeded_secret(3))
        return [
            (found.certificate, found.cost.unet_calls, found.cost.classifier_calls, found.cost.not_finite)
            for sigma in (0.5, 0.25, 0.5)
            for found in classifier.certify_each(
                labelled, Settings(sigma, steps=2, votes=3, n0=3, n=20, method="fixed")
            )
        ]

    with reference(small, 6) as (device, fed):
        expected = certified(small, device)
    with opened_on_host(library, as_plans(small, flavour, (6,))) as (device, trt):
        assert certified(small, device) == expected
        assert trt.cuda.fed == fed
    assert len({certificate for certificate, *_ in expected}) > 3


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_run_on_a_plan_names_the_library_and_the_gpu_in_its_identity(
    library: ctypes.CDLL, small: Bundle, flavour: Flavour
) -> None:
    pixels = [pixels for pixels, _ in images_of(small, 2)]
    images = ImageSet("two", range(2), None, pixels.__getitem__, range(2))
    with opened_on_host(library, as_plans(small, flavour, (6,))) as (device, trt):
        classifier = SmoothedClassifier(small, OnDevice(device), seeded_secret(3))
        identity = identity_of(classifier, images, Settings(steps=2), Budget(), seed=3)
        described = device.describe()
    assert identity.runs_on == f"{flavour}, tensorrt {described['tensorrt']}"
    assert identity.compute_capability == described["compute_capability"]


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_random_batches_two_in_flight_leave_what_they_leave_on_the_reference_device(
    library: ctypes.CDLL, small: Bundle, flavour: Flavour, early: bool
) -> None:
    draw, slots, batch = np.random.default_rng(4), 14, 5
    chain = chain_of(small)
    batches = [random_batch(draw, batch, 3, slots) for _ in range(80)]
    with reference(small, batch) as (expected_by, _), ExitStack() as stack:
        device, _ = stack.enter_context(opened_on_host(library, as_plans(small, flavour, (batch,)), early=early))
        both: list[Device] = [expected_by, device]
        for each in both:
            handles = [each.open_image(*image, SIGMA, chain.scale) for image in images_of(small, 3)]
            assert handles == [0, 1, 2]
            each.reserve(slots)
            for start in range(0, slots, batch):
                places = list(range(start, min(start + batch, slots)))
                finish(each, items("smooth", chain, 0, places, places))
        seen: set[int] = set()
        for one, other in zip(batches[::2], batches[1::2], strict=True):
            results = [[each.submit(one), each.submit(other)] for each in both]
            for ticket, other_ticket in zip(*results, strict=True):
                (expected_ticket, expected), (found_ticket, found) = expected_by.collect(), device.collect()
                assert (expected_ticket, found_ticket) == (ticket, other_ticket)
                assert (found is None) == (expected is None)
                if found is not None and expected is not None:
                    assert found.dtype == np.int64
                    assert found.tolist() == expected.tolist()
                    seen.update(found.tolist())
            assert as_bytes_of(device.read(range(slots))) == as_bytes_of(expected_by.read(range(slots)))
    assert {NOT_FINITE} < seen


def test_each_kind_of_batch_is_captured_once_for_each_time_the_slots_grow(library: ctypes.CDLL, small: Bundle) -> None:
    with reference(small, 4) as (device, _):
        expected = decided(device, small, SIGMA, 3, votes=5, samples=30)
    with opened_on_host(library, as_plans(small, "tensorrt", (4,))) as (device, trt):
        device.reserve(1)
        for slots in (1, 30, 30):  # the loop itself asks for more
            device.reserve(slots)
            assert decided(device, small, SIGMA, 3, votes=5, samples=30) == expected
            assert len(trt.cuda.graphs) == 3
        device.reserve(500)
        with watched(device) as batches:
            assert decided(device, small, SIGMA, 3, votes=5, samples=30) == expected
        assert len(trt.cuda.graphs) == 6
        assert sum(graph.launches for graph in trt.cuda.graphs[3:]) == len(batches) - 3  # the first is not replayed
        assert device.read([499])[0].shape == (1, *SHAPE)


def test_what_a_dla_runs_is_not_captured(library: ctypes.CDLL, small: Bundle) -> None:
    with reference(small, 4) as (device, _):
        expected = decided(device, small, SIGMA, 3, votes=5, samples=30)
    plans = as_plans(small, "tensorrt", (4,), use_dla_core="0", allow_gpu_fallback="true")
    with opened_on_host(library, plans) as (device, trt):
        assert decided(device, small, SIGMA, 3, votes=5, samples=30) == expected
        assert trt.cuda.graphs == []


def test_tensorrt_rtx_keeps_the_kernels_that_it_compiled_beside_each_plan(library: ctypes.CDLL, small: Bundle) -> None:
    plans = as_plans(small, "tensorrt-rtx", (4,))
    files = [path.with_name(path.name + CACHE_SUFFIX) for path in (plans.unet_path, plans.classifier_path)]
    with opened_on_host(library, plans) as (_, trt):
        assert trt.caches == []
    assert [file.read_bytes() for file in files] == [trt.compiled] * 2
    written = [file.stat().st_mtime_ns for file in files]
    with opened_on_host(library, plans) as (_, trt):
        assert trt.caches == [trt.compiled] * 2
    assert [file.stat().st_mtime_ns for file in files] == written
    files[0].chmod(0o000)
    files[0].unlink()
    files[0].mkdir()  # nothing can be read there, nor written
    with opened_on_host(library, plans) as (_, trt):
        assert trt.caches == [trt.compiled]


def test_kernels_that_another_user_left_beside_a_plan_are_not_taken(
    library: ctypes.CDLL, small: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = as_plans(small, "tensorrt-rtx", (4,))
    with opened_on_host(library, plans):
        pass
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with opened_on_host(library, plans) as (_, trt):
        assert trt.caches == []


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_tensorrt_warns_of_when_a_plan_is_opened_is_said_once(
    library: ctypes.CDLL, small: Bundle, flavour: Flavour, caplog: pytest.LogCaptureFixture
) -> None:
    plans = as_plans(small, flavour, (4,))
    trt = HostTensorRT(HostCuda(library), flavour, [4])
    trt.warning = "Using an engine plan file across different models of devices is not recommended"
    with on_host(trt), closing(open_device(plans, None, threads=1)):
        pass
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == [f"{flavour} {trt.__version__}: {trt.warning}"]


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
def test_images_are_opened_without_waiting_for_the_gpu_and_without_new_pinned_memory(
    library: ctypes.CDLL, small: Bundle, early: bool
) -> None:
    chain = chain_of(small)
    with opened_on_host(library, as_plans(small, "tensorrt", (4,)), early=early) as (device, trt):
        assert device.open_image(picture(SHAPE), KEY, SIGMA, chain.scale) == 0
        before = [trt.cuda.pinned, len(trt.cuda.memory.live), *(stream.syncs for stream in trt.cuda.streams.values())]
        first = device.open_image(picture(SHAPE), KEY, SIGMA, chain.scale)
        other_sigma = device.open_image(picture(SHAPE), KEY, SIGMA / 2, chain.scale)
        after = [trt.cuda.pinned, len(trt.cuda.memory.live), *(stream.syncs for stream in trt.cuda.streams.values())]
        assert after == [before[0], before[1] + 3, *before[2:]]  # two images, and the law of the other sigma
        device.close_image(first)
        device.close_image(other_sigma)
        for _ in range(3 * UPLOADS):  # and all of it is used again
            device.close_image(device.open_image(picture(SHAPE), KEY, SIGMA, chain.scale))
        assert [trt.cuda.pinned, *(stream.syncs for stream in trt.cuda.streams.values())] == [before[0], *before[2:]]
        assert len(trt.cuda.memory.live) <= after[1]


def test_what_is_larger_than_a_region_of_pinned_memory_goes_to_the_gpu_in_parts(
    library: ctypes.CDLL, small: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reference(small, 4) as (device, _):
        expected = decided(device, small, SIGMA, 3, votes=5, samples=20, images=5)
    monkeypatch.setattr(tensorrt_device, "UPLOAD_BYTES", 56)
    monkeypatch.setattr(tensorrt_device, "UPLOADS", 3)
    with opened_on_host(library, as_plans(small, "tensorrt", (4,))) as (device, _):
        assert decided(device, small, SIGMA, 3, votes=5, samples=20, images=5) == expected


@pytest.mark.parametrize("memory", [0, 24 << 30, 80 << 30])
def test_no_batch_takes_more_of_the_gpus_memory_for_its_states_than_is_left_beside_engines(
    library: ctypes.CDLL, small: Bundle, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    """42 GB, of batches of 256 with 40 votes of ImageNet's images, on no GPU; 10.6 GB, of batches of 64, on most."""
    monkeypatch.setattr(host_cuda, "GPU", dataclasses.replace(host_cuda.GPU, memory=memory))
    imagenet, slots = 3 * 256 * 256, 105 * 64
    most = most_states(imagenet, memory)
    assert slots <= most < 4 * slots
    with opened_on_host(library, as_plans(small, "tensorrt", (4,))) as (device, trt):
        device.reserve(2)
        monkeypatch.setattr(device, "size", imagenet)
        monkeypatch.setattr(trt.cuda, "allocate", None)
        live = dict(trt.cuda.memory.live)
        with pytest.raises(UsageError, match=r"26880 states, 39\.4 GiB .*use `batch` 1 or less.*fewer `votes`"):
            device.reserve(4 * slots)
        monkeypatch.undo()
        assert trt.cuda.memory.live == live
        assert device.read([1])[0].shape == (1, *SHAPE)


def test_a_batch_that_is_chosen_for_the_gpus_memory_is_said(
    library: ctypes.CDLL, small: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(host_cuda, "GPU", dataclasses.replace(host_cuda.GPU, memory=12_000))
    with opened_on_host(library, as_plans(small, "tensorrt", (4, 8))) as (device, _):
        assert device.batch == 4
    assert "batches of 4: the states of 8 may take more of the GPU's memory" in caplog.text
    with opened_on_host(library, as_plans(small, "tensorrt", (4, 8)), batch=8) as (device, _):
        assert device.batch == 8


def test_the_states_that_were_held_are_freed_before_more_are_asked_for(
    library: ctypes.CDLL, small: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened_on_host(library, as_plans(small, "tensorrt", (4,)), early=True) as (device, trt):
        device.reserve(5)
        held, allocate, seen = len(trt.cuda.memory.live), trt.cuda.allocate, []

        def noting(*arguments: Any) -> Any:
            seen.append(len(trt.cuda.memory.live))
            return allocate(*arguments)

        monkeypatch.setattr(trt.cuda, "allocate", noting)
        device.reserve(9)
        assert seen == [held - 3, held - 2, held - 1]


def test_tensorrt_rtx_captures_its_engines_itself(library: ctypes.CDLL, small: Bundle) -> None:
    with opened_on_host(library, as_plans(small, "tensorrt-rtx", (4,))) as (device, trt):
        decided(device, small, SIGMA, 2, votes=3, samples=9)
        assert trt.cuda.graphs == []


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_states_that_are_not_finite_give_no_label_and_leave_their_batch_mates_alone(
    library: ctypes.CDLL, tmp_path: Path, flavour: Flavour
) -> None:
    bundle = small_bundle(copy_of_shipped(tmp_path))
    chain = chain_of(bundle)

    def labels(device: Device, spoil: float) -> list[int]:
        device.reserve(4)
        handle = device.open_image(picture(SHAPE), KEY, SIGMA, chain.scale)
        finish(device, items("smooth", chain, handle, [1, 2, 3], [0, 1, 2]))
        step = items("step", chain, handle, [1, 2, 3], [0, 1, 2])
        step.coef[1, 2] = spoil
        finish(device, step)
        found = finish(device, items("classify", chain, handle, [1, 2, 3], [0, 1, 2]))
        assert found is not None
        return [int(label) for label in found]

    with opened_on_host(library, as_plans(bundle, flavour, (4,))) as (device, _):
        whole = labels(device, 1.0)
        assert NOT_FINITE not in whole
        for spoil in (math.nan, math.inf):
            assert labels(device, spoil) == [whole[0], NOT_FINITE, whole[2]]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_loop_that_is_left_half_way_leaves_the_device_usable(
    library: ctypes.CDLL, small: Bundle, flavour: Flavour
) -> None:
    chain = chain_of(small)
    with reference(small, 4) as (device, _):
        expected = decided(device, small, SIGMA, 3, votes=5, samples=20)
    with opened_on_host(library, as_plans(small, flavour, (4,))) as (device, _):
        for outcomes in range(6):
            handle = device.open_image(picture(SHAPE), KEY, SIGMA, chain.scale)
            with closing(decide(device, chain, ((handle, i) for i in range(40)), lambda: Ballot(5))) as loop:
                assert len([next(loop) for _ in range(outcomes)]) == outcomes
            device.close_image(handle)
            assert decided(device, small, SIGMA, 3, votes=5, samples=20) == expected


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_loop_may_run_in_another_thread_than_the_one_that_opened_the_device(
    library: ctypes.CDLL, small: Bundle, flavour: Flavour
) -> None:
    with reference(small, 4) as (device, _):
        expected = decided(device, small, SIGMA, 3, votes=5, samples=20)
    with opened_on_host(library, as_plans(small, flavour, (4,))) as (device, _), ThreadPoolExecutor(1) as other:
        assert other.submit(decided, device, small, SIGMA, 3, votes=5, samples=20).result() == expected


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_batches_that_fail_leave_the_device_usable(library: ctypes.CDLL, small: Bundle, flavour: Flavour) -> None:
    """More of them than there is pinned memory for batches in flight."""
    chain = chain_of(small)
    with reference(small, 4) as (device, _):
        expected = decided(device, small, SIGMA, 3, votes=5, samples=20)
    with opened_on_host(library, as_plans(small, flavour, (4,))) as (device, trt):
        handle = device.open_image(picture(SHAPE), KEY, SIGMA, chain.scale)
        for _ in range(IN_FLIGHT + 1):
            with pytest.raises(KeyError):
                list(decide(device, chain, [(handle, 0), (99, 0)], lambda: Ballot(5)))
        for _ in range(IN_FLIGHT + 1):
            trt.failing = True
            with pytest.raises(CheckFailed, match=f"{flavour} .* failed to run an engine: .*out of memory"):
                list(decide(device, chain, [(handle, 0)], lambda: Ballot(5)))
            trt.failing = False
        assert decided(device, small, SIGMA, 3, votes=5, samples=20) == expected


def test_an_engine_that_fails_while_it_is_captured_leaves_no_capture_open(library: ctypes.CDLL, small: Bundle) -> None:
    chain = chain_of(small)
    with opened_on_host(library, as_plans(small, "tensorrt", (4,))) as (device, trt):
        handle = device.open_image(picture(SHAPE), KEY, SIGMA, chain.scale)
        trt.failing_in_capture = True
        with pytest.raises(CheckFailed, match="failed to run an engine"):
            list(decide(device, chain, [(handle, 0)], lambda: Ballot(5)))
        trt.failing_in_capture = False
        assert [outcome.sample for outcome in decide(device, chain, [(handle, 7)], lambda: Ballot(5))] == [7]


def test_draining_raises_nothing_though_the_gpu_has_failed(
    library: ctypes.CDLL, small: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(stream: Stream) -> None:
        raise HostError("an illegal memory access was encountered")

    chain = chain_of(small)
    with opened_on_host(library, as_plans(small, "tensorrt", (4,))) as (device, _):
        handle = device.open_image(picture(SHAPE), KEY, SIGMA, chain.scale)
        device.reserve(4)
        device.submit(items("smooth", chain, handle, [1], [0]))
        with monkeypatch.context() as broken:
            broken.setattr(Stream, "sync", fail)
            device.drain()
        assert finish(device, items("smooth", chain, handle, [1], [0])) is None


@pytest.mark.parametrize(
    ("complaint", "move"),
    [("CUDA_ERROR_OUT_OF_MEMORY: no room", "smaller `batch`"), ("CUDA_ERROR_ILLEGAL_ADDRESS: bad", "nvidia-smi")],
)
def test_what_cuda_complains_of_is_one_plain_error(
    library: ctypes.CDLL, small: Bundle, monkeypatch: pytest.MonkeyPatch, complaint: str, move: str
) -> None:
    cuda_utils = pytest.importorskip("cuda.core._utils.cuda_utils", reason="cuda-core is not installed")

    def fail(*arguments: object, **options: object) -> None:
        raise cuda_utils.CUDAError(complaint)

    chain = chain_of(small)
    with opened_on_host(library, as_plans(small, "tensorrt", (4,))) as (device, trt):
        handle = device.open_image(picture(SHAPE), KEY, SIGMA, chain.scale)
        with monkeypatch.context() as broken:
            broken.setattr(HostCuda, "allocate", fail)
            with pytest.raises(EnvironmentFault, match=f"the GPU failed .*{complaint}.*{move}"):
                device.reserve(4)
            with pytest.raises(EnvironmentFault, match="the GPU failed"):
                device.open_image(picture(SHAPE), KEY, SIGMA, chain.scale)
        device.reserve(4)
        assert finish(device, items("smooth", chain, handle, [1], [0])) is None


def test_slots_are_kept_when_fewer_are_asked_for(library: ctypes.CDLL, small: Bundle) -> None:
    chain = chain_of(small)
    with opened_on_host(library, as_plans(small, "tensorrt", (4,))) as (device, _):
        device.reserve(9)
        handle = device.open_image(picture(SHAPE), KEY, SIGMA, chain.scale)
        finish(device, items("smooth", chain, handle, [5], [8]))
        before = as_bytes_of(device.read([8]))
        device.reserve(3)
        assert as_bytes_of(device.read([8])) == before


def test_the_pixels_are_copied_when_an_image_is_opened(library: ctypes.CDLL, small: Bundle) -> None:
    chain, pixels = chain_of(small), picture(SHAPE)
    with opened_on_host(library, as_plans(small, "tensorrt", (4,))) as (device, _):
        expected = smoothed(device, chain, pixels, lambda: None)
        assert smoothed(device, chain, pixels, lambda: pixels.fill(0)) == expected


def test_no_more_images_are_opened_than_there_is_room_for(
    library: ctypes.CDLL, small: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_device, "MAX_IMAGES", 3)
    image = (picture(SHAPE), KEY, SIGMA, 0.5)
    with opened_on_host(library, as_plans(small, "tensorrt", (4,))) as (device, _):
        for sigma in (math.nan, 1e-9):  # refused: no place in the table is lost
            with pytest.raises(UsageError, match=r"noise|sigma"):
                device.open_image(*image[:2], sigma, 0.5)
        handles = [device.open_image(*image) for _ in range(3)]
        with pytest.raises(UsageError, match="3 images are open on the GPU"):
            device.open_image(*image)
        device.close_image(handles[1])
        device.close_image(handles[1])
        handles.append(device.open_image(*image))
        assert len(set(handles)) == 4
        with pytest.raises(UsageError, match="3 images are open on the GPU"):
            device.open_image(*image)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_closing_frees_everything_and_is_safe_twice_and_before_images_are_closed(
    library: ctypes.CDLL, small: Bundle, flavour: Flavour
) -> None:
    chain = chain_of(small)
    with opened_on_host(library, as_plans(small, flavour, (4,))) as (device, _):  # it looks at the memory that is left
        handle = device.open_image(picture(SHAPE), KEY, SIGMA, chain.scale)
        loop = decide(device, chain, ((handle, i) for i in range(40)), lambda: Ballot(5))
        next(loop)
        device.close()
        device.close()
        device.close_image(handle)
        loop.close()
        assert device.describe()["batch"] == 4


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_times_of_layers_are_means_of_the_rounds(library: ctypes.CDLL, small: Bundle, flavour: Flavour) -> None:
    with opened_on_host(library, as_plans(small, flavour, (4,))) as (device, trt):
        ran = trt.cuda.ran["step engine"]
        assert device.layer_times(5) == {"step": trt.layers, "classify": trt.layers}
        assert trt.cuda.ran["step engine"] == ran + 5
        trt.layers = {}
        with pytest.raises(CheckFailed, match=f"{flavour} .* reports no times of layers"):
            device.layer_times(1)


@pytest.mark.parametrize("as_json", [False, True])
def test_bench_shows_the_layers_of_a_plan_by_their_times(library: ctypes.CDLL, small: Bundle, as_json: bool) -> None:
    plans = as_plans(small, "tensorrt", (4,))
    with on_host(HostTensorRT(HostCuda(library), "tensorrt", [4])):
        arguments = ["--profile", "--engine", plans.unet_path, "--rounds", "3", *(["--json"] if as_json else [])]
        done = densepure_rt("bench", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    if as_json:
        layers = {"a convolution": 0.25, "an activation": 0.5}
        assert json.loads(done.stdout) == {"batch": 4, "rounds": 3, "ms": {"step": layers, "classify": layers}}
        return
    lines = done.stdout.splitlines()
    assert lines[0] == "step: 0.750 ms a call of 4 images, 2 layers"
    assert lines[1].split(maxsplit=3) == ["0.5000", "ms", "66.7%", "an activation"]
    assert lines[3].startswith("classify: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--profile times the layers of a plan, and .*unet.onnx is none: give one with --engine"),
        (["--sigma", "0.5"], "--sigma: only for other measurements than --profile"),
    ],
)
def test_bench_profiles_plans_alone(arguments: list[str], words: str) -> None:
    done = densepure_rt("bench", "--profile", *arguments)
    assert done.returncode == 2
    assert re.search(words, done.stderr)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_record_names_what_ran(library: ctypes.CDLL, small: Bundle, flavour: Flavour) -> None:
    with opened_on_host(library, as_plans(small, flavour, (4,))) as (device, trt):
        described = device.describe()
        assert (device.batch, device.in_flight) == (4, IN_FLIGHT)
    assert (described["provider"], described["tensorrt"]) == (flavour, trt.__version__)
    assert (described["gpu"], described["compute_capability"]) == ("a processor", "8.9")
    assert described["batch"] == 4


@pytest.mark.parametrize("batch", [2, 8])
def test_the_profile_of_the_batch_that_was_asked_for_runs(library: ctypes.CDLL, small: Bundle, batch: int) -> None:
    with reference(small, batch) as (device, fed):
        expected = decided(device, small, SIGMA, 2, votes=3, samples=15)
    with opened_on_host(library, as_plans(small, "tensorrt", (8, 2)), batch) as (device, trt):
        assert decided(device, small, SIGMA, 2, votes=3, samples=15) == expected
        assert trt.cuda.fed == fed


def refusal(
    library: ctypes.CDLL, bundle: Bundle, flavour: Flavour, trt: HostTensorRT | None = None, batch: int = 4
) -> DensePureError:
    """What opening the plans of this bundle ends in."""
    plans = as_plans(bundle, flavour, (batch,))
    with on_host(trt or HostTensorRT(HostCuda(library), flavour, [batch])), pytest.raises(DensePureError) as caught:
        open_device(plans, None, threads=1)
    return caught.value


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_plan_that_does_not_deserialise_is_refused_in_its_own_words_with_the_command_that_builds_it_again(
    library: ctypes.CDLL, small: Bundle, flavour: Flavour
) -> None:
    replace_file(small.classifier_path, b"garbage")
    error = refusal(library, open_bundle(small.unet_path), flavour)
    assert isinstance(error, EnvironmentFault)
    for words in (
        f"{flavour} {HostTensorRT.__version__} refuses classifier.",
        "Serialization assertion failed",
        f'run "densepure-rt export --target {flavour} --out {small.unet_path.parent} --precision fp32 --batch 4',
    ):
        assert words in str(error)


def test_a_plan_that_streams_its_weights_is_refused_since_no_graph_captures_that(
    library: ctypes.CDLL, small: Bundle
) -> None:
    trt = HostTensorRT(HostCuda(library), "tensorrt", [4])
    trt.streamable = 1 << 20
    error = refusal(library, small, "tensorrt", trt)
    assert isinstance(error, UsageError)
    assert "which no captured graph does" in str(error)


@pytest.mark.parametrize("name", [ENGINE, CLASSIFIER])
def test_a_plan_with_the_tensors_of_another_is_refused(library: ctypes.CDLL, small: Bundle, name: str) -> None:
    other = {ENGINE: CLASSIFIER, CLASSIFIER: ENGINE}[name]
    content = small.unet_path.with_name(other).read_bytes()
    sidecar = sidecar_path(small.unet_path.with_name(name)).read_text()
    replace_file(small.unet_path.with_name(name), content)
    error = refusal(library, open_bundle(small.unet_path), "tensorrt")
    assert isinstance(error, CheckFailed), sidecar
    assert f"{name.replace('.onnx', '.plan')} has the tensors mean" in str(error)


def test_a_plan_whose_tensors_are_not_float32_is_refused(library: ctypes.CDLL, small: Bundle) -> None:
    replace_file(small.classifier_path, parser.parse_model(HALF_GRAPH).SerializeToString())
    error = refusal(library, open_bundle(small.unet_path), "tensorrt")
    assert isinstance(error, CheckFailed)
    assert "tensor mean is not float32" in str(error)


def test_a_plan_without_the_profile_that_its_sidecar_promises_is_refused(library: ctypes.CDLL, small: Bundle) -> None:
    trt = HostTensorRT(HostCuda(library), "tensorrt", [16, 1])
    error = refusal(library, small, "tensorrt", trt)
    assert isinstance(error, UsageError)
    assert "holds profiles for batches [16, 1], not 4" in str(error)


def test_a_plan_for_images_of_another_size_than_its_sidecar_says_is_refused(
    library: ctypes.CDLL, small: Bundle
) -> None:
    for path in (small.classifier_path, small.unet_path):
        replace_file(path, path.read_bytes(), image=[3, 8, 8])
    error = refusal(library, open_bundle(small.unet_path), "tensorrt")
    assert isinstance(error, CheckFailed)
    assert "takes [4, 1, 4, 4], its sidecar says [4, 3, 8, 8]" in str(error)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_gpu_without_room_for_an_engine_says_so(library: ctypes.CDLL, small: Bundle, flavour: Flavour) -> None:
    trt = HostTensorRT(HostCuda(library), flavour, [4])
    trt.short = True
    error = refusal(library, small, flavour, trt)
    assert isinstance(error, EnvironmentFault)
    assert "could not be allocated): use a smaller `batch`" in str(error)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_engines_whose_items_see_their_batch_mates_are_refused_unless_alone(
    library: ctypes.CDLL, small: Bundle, flavour: Flavour
) -> None:
    replace_file(small.classifier_path, parser.parse_model(BATCH_MEAN_GRAPH).SerializeToString())
    bundle = open_bundle(small.unet_path)
    error = refusal(library, bundle, flavour)
    assert isinstance(error, CheckFailed)
    assert "depends on the others in its batch of 4" in str(error)
    with opened_on_host(library, as_plans(bundle, flavour, (1,))):
        pass


def test_engines_that_give_nan_on_ordinary_input_are_refused(library: ctypes.CDLL, small: Bundle) -> None:
    spoilt = CLASSIFY_GRAPH.replace("logits = Add(scaled, edge)", "root = Sqrt(edge)\n    logits = Add(scaled, root)")
    replace_file(small.classifier_path, parser.parse_model(spoilt).SerializeToString())
    assert "NaN or Inf on ordinary input" in str(refusal(library, open_bundle(small.unet_path), "tensorrt"))
