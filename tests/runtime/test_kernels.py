"""The GPU's kernels, run on the processor against numpy; and that NVRTC compiles them without rounding otherwise."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from densepure_rt.runtime import onnx_device
from densepure_rt.runtime.bundle import open_bundle, shipped_engine
from densepure_rt.runtime.device import NOT_FINITE, Batch
from densepure_rt.runtime.noise import (
    Key,
    RoundedNormal,
    first_state,
    random_words,
    smoothing_law,
    smoothing_noise,
    vote_law,
    vote_noise,
)
from densepure_rt.runtime.onnx_device import OnnxDevice
from tests.support.batches import random_batch

RUNTIME = Path(__file__).resolve().parents[2] / "runtime"
SOURCE = RUNTIME / "kernels.cu"
HOST_SOURCE = Path(__file__).with_name("kernels_host.cpp")
KERNELS = ("smooth", "gather", "scatter", "gather_means", "argmax")
IMAGE_FORMAT, ITEM_FORMAT = "<4Q2if4x", "<6q"
THREADS = WARP = 32  # of a block; few, so that the last block overhangs most images
ARCHITECTURES = [f"sm_{each}" for each in (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)]

SANITIZED = "KERNELS_SANITIZED"  # in the environment, says that these tests run with the sanitizers' library loaded
SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

QUICK = settings(deadline=None, max_examples=50)
WORD = st.integers(0, 2**64 - 1)
KEY: Key = (0x0123456789ABCDEF, 0xFEDCBA9876543210)
NO_PIXELS = np.empty(0, np.uint8)
SHAPES = [(1, 1, 1), (1, 3, 5), (3, 5, 7), (3, 8, 8), (2, 33, 1)]

Floats = NDArray[np.float32]
Argument = NDArray[Any] | int | ctypes.c_void_p


def as_argument(value: Argument) -> ctypes.c_void_p | ctypes.c_int32:
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        return ctypes.c_void_p(value.ctypes.data)
    return ctypes.c_int32(value) if isinstance(value, int) else value


class Host:
    """The kernels on this processor. Arrays stand for device buffers."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.random_word_of.argtypes = [ctypes.c_uint64] * 6
        library.random_word_of.restype = ctypes.c_uint64
        library.size_of_image.restype = library.size_of_item.restype = ctypes.c_size_t

    def launch(self, kernel: str, *arguments: Argument, across: int, items: int = 1) -> None:
        """As cuda.core.launch: an array goes by its address, an integer as int32. `across` elements, `items` rows."""
        values = [as_argument(value) for value in arguments]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self.library[f"launch_{kernel}"](-(-across // THREADS), items, THREADS, addresses)

    def word(self, key: Key, sample: int, vote: int, step: int, pixel: int) -> int:
        return int(self.library.random_word_of(*key, sample, vote, step, pixel))


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to build the kernels for this processor")
    library = tmp_path_factory.mktemp("kernels") / "kernels.so"
    options = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    options += SANITIZERS if os.environ.get(SANITIZED) else []
    command = [compiler, *options, f"-I{RUNTIME}", str(HOST_SOURCE), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return Host(ctypes.CDLL(str(library)))


class Slots(NamedTuple):
    """Slots of states, mean and std [slots, size], and whether each is finite."""

    mean: Floats
    std: Floats
    finite: NDArray[np.uint8]

    def copy(self) -> Slots:
        return Slots(self.mean.copy(), self.std.copy(), self.finite.copy())

    def tobytes(self) -> tuple[bytes, ...]:
        return self.mean.tobytes(), self.std.tobytes(), self.finite.tobytes()


def random_slots(count: int, size: int, seed: int = 0) -> Slots:
    draw = np.random.default_rng(seed)
    mean, std = draw.standard_normal((2, count, size), np.float32)
    return Slots(mean, np.abs(std), draw.integers(0, 2, count, np.uint8))


def item_rows(
    batch: int, *, image: Any = 0, sample: Any = 0, vote: Any = 0, step: Any = 0, source: Any = 0, target: Any = 0
) -> NDArray[np.int64]:
    """Items as the kernels take them, int64 [batch, 6]; a column is given as a number or a sequence."""
    columns = [np.broadcast_to(np.asarray(c, np.int64), batch) for c in (image, sample, vote, step, source, target)]
    return np.ascontiguousarray(np.stack(columns, axis=1))


def image_rows(images: Sequence[tuple[NDArray[np.uint8], Key, RoundedNormal, float]]) -> NDArray[np.uint8]:
    """Open images as the kernels take them. What they point to must outlive them."""
    rows = [
        struct.pack(
            IMAGE_FORMAT, pixels.ctypes.data, law.thresholds.ctypes.data, *key, len(law.thresholds), law.lowest, scale
        )
        for pixels, key, law, scale in images
    ]
    packed: NDArray[np.uint8] = np.frombuffer(b"".join(rows), np.uint8).copy()
    return packed


def random_image(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def keyed_rows(*keys: Key) -> NDArray[np.uint8]:
    """Open images for kernels that ask for nothing but their keys."""
    return image_rows([(NO_PIXELS, key, smoothing_law(0.5), 1.0) for key in keys])


def smoothed(host: Host, pixels: NDArray[np.uint8], law: RoundedNormal, scale: float) -> bytes:
    """What `smooth` writes as the mean of sample 0 under KEY."""
    slots, size = random_slots(1, pixels.size), pixels.size
    rows = image_rows([(pixels, KEY, law, scale)])
    host.launch("smooth", item_rows(1), rows, *slots, size, across=size)
    return slots.mean.tobytes()


def test_structs_have_the_sizes_that_python_packs(host: Host) -> None:
    assert host.library.size_of_image() == struct.calcsize(IMAGE_FORMAT) == 48
    assert host.library.size_of_item() == struct.calcsize(ITEM_FORMAT) == item_rows(1).nbytes == 48


@QUICK
@given(key=st.tuples(WORD, WORD), sample=WORD, vote=WORD, step=WORD)
@example(key=(2**64 - 1, 2**64 - 1), sample=2**64 - 1, vote=2**64 - 1, step=2**64 - 1)
@example(key=(0, 0), sample=0, vote=0, step=0)
def test_words_are_those_of_the_noise_module(host: Host, key: Key, sample: int, vote: int, step: int) -> None:
    expected = random_words(key, sample, vote, step, 13)
    assert [host.word(key, sample, vote, step, pixel) for pixel in range(13)] == expected.tolist()


@QUICK
@given(key=st.tuples(WORD, WORD), sample=WORD, vote=WORD, step=WORD, pixel=st.integers(0, 2**63 - 1))
@example(key=KEY, sample=1, vote=2, step=3, pixel=2**34 + 3)
def test_words_of_far_pixels_are_numpys(host: Host, key: Key, sample: int, vote: int, step: int, pixel: int) -> None:
    counter = np.array([pixel // 4, step, vote, sample], np.uint64)
    words = np.random.Philox(key=np.array(key, np.uint64), counter=counter).random_raw(4)
    assert host.word(key, sample, vote, step, pixel) == words[pixel % 4]


@QUICK
@given(
    chosen=st.lists(st.tuples(st.integers(0, 34), st.sampled_from([-1, 0, 0, 1])), max_size=40),
    ends=st.lists(st.sampled_from([0, 2**64 - 1]), max_size=3),
    lowest=st.integers(-40_000, 40_000),
)
@example(chosen=[], ends=[], lowest=-7)
@example(chosen=[], ends=[0, 0, 2**64 - 1], lowest=0)
def test_rounded_normal_is_numpys_on_and_beside_every_threshold(
    host: Host, chosen: list[tuple[int, int]], ends: list[int], lowest: int
) -> None:
    pixels = random_image((5, 7))
    words = random_words(KEY, 0, 0, 0, pixels.size)
    thresholds = sorted([*ends, *((int(words[i]) + beside) % 2**64 for i, beside in chosen)])
    law = RoundedNormal(Fraction(1), lowest, np.array(thresholds, np.uint64))
    expected = first_state(pixels + law(words).reshape(pixels.shape), 1.0)
    assert smoothed(host, pixels, law, 1.0) == expected.tobytes()


@QUICK
@given(lowest=st.integers(-300_000, 300_000), scale=st.floats(1e-3, 1.0))
def test_first_state_is_numpys_at_every_level_and_scale(host: Host, lowest: int, scale: float) -> None:
    pixels = np.arange(256, dtype=np.uint8)
    constant = RoundedNormal(Fraction(1), lowest, np.empty(0, np.uint64))
    expected = first_state(np.arange(lowest, lowest + 256, dtype=np.int32), scale)
    assert smoothed(host, pixels, constant, scale) == expected.tobytes()


@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_smoothing_is_numpys_bit_for_bit(host: Host, sigma: float, shape: tuple[int, ...]) -> None:
    size, law = int(np.prod(shape)), smoothing_law(sigma)
    keys: list[Key] = [KEY, (2**64 - 1, 5)]
    images = [(random_image(shape, i), key, law, 1 / (1 + 4 * sigma**2) ** 0.5) for i, key in enumerate(keys)]
    handles, samples, targets = [1, 0, 1, 0, 0], [0, 83_217, 2**40, 3, 9], [6, 0, 3, 5, -1]
    slots = random_slots(7, size)
    expected = slots.copy()
    for handle, sample, target in zip(handles[:-1], samples, targets, strict=False):
        pixels, key, _, scale = images[handle]
        expected.mean[target] = first_state(pixels + smoothing_noise(law, key, sample, shape), scale).ravel()
        expected.std[target], expected.finite[target] = 0, 1
    items = item_rows(5, image=handles, sample=samples, step=1, vote=1, target=targets)  # its step and vote are 0
    host.launch("smooth", items, image_rows(images), *slots, size, across=size, items=5)
    assert slots.tobytes() == expected.tobytes()


def gathered(
    host: Host, items: NDArray[np.int64], rows: NDArray[np.uint8], slots: Slots
) -> tuple[Floats, Floats, Floats]:
    """mean, std and noise as `gather` lays them before a step engine."""
    size, law = slots.mean.shape[1], vote_law()
    mean, std, noise = np.full((3, len(items), size), np.nan, np.float32)
    tables = (law.thresholds, len(law.thresholds), law.lowest)
    host.launch(
        "gather", items, rows, slots.mean, slots.std, *tables, mean, std, noise, size, across=size, items=len(items)
    )
    return mean, std, noise


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_inputs_are_the_sources_and_vote_noise_bit_for_bit(host: Host, shape: tuple[int, ...]) -> None:
    size, keys = int(np.prod(shape)), [KEY, (7, 2**63)]
    rows = keyed_rows(*keys)
    slots = random_slots(6, size)
    image, sample = [0, 1, 1, 0], [0, 83_217, 2**40, 5]
    vote, step, source = [0, 39, 2**33, 1], [1, 9, 2**35, 2], [5, 0, 0, 2]
    items = item_rows(4, image=image, sample=sample, vote=vote, step=step, source=source, target=[1, 2, 3, 4])
    mean, std, noise = gathered(host, items, rows, slots)
    expected = [vote_noise(keys[image[i]], sample[i], vote[i], step[i], shape) for i in range(4)]
    assert mean.tobytes() == slots.mean[source].tobytes()
    assert std.tobytes() == slots.std[source].tobytes()
    assert noise.tobytes() == np.stack(expected).tobytes()


def test_nothing_is_drawn_at_step_0_and_in_padding(host: Host) -> None:
    slots = random_slots(3, 105)
    items = item_rows(4, step=[0, 1, 3, 0], source=[2, 1, 2, 2], target=[2, 0, -1, -1])
    mean, std, noise = gathered(host, items, keyed_rows(KEY), slots)
    assert noise[[0, 2, 3]].tobytes() == bytes(3 * 105 * 4)  # +0.0, not -0.0
    assert noise[1].any()
    assert mean.tobytes() == slots.mean[[2, 1, 2, 2]].tobytes()
    assert std.tobytes() == slots.std[[2, 1, 2, 2]].tobytes()


def test_branches_of_one_source_share_its_state_and_not_their_noise(host: Host) -> None:
    slots = random_slots(9, 105)
    items = item_rows(8, sample=4, vote=range(8), step=1, source=8, target=range(8))
    mean, std, noise = gathered(host, items, keyed_rows(KEY), slots)
    assert (mean == slots.mean[8]).all()
    assert (std == slots.std[8]).all()
    assert len({row.tobytes() for row in noise}) == 8


def scattered(host: Host, items: NDArray[np.int64], outputs: Slots, finite: Sequence[float], slots: Slots) -> Slots:
    """The slots after `scatter` of a step engine's outputs."""
    found, size = slots.copy(), slots.mean.shape[1]
    given = (outputs.mean, outputs.std, np.array(finite, np.float32))
    host.launch("scatter", items, *given, *found, size, across=size, items=len(items))
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_outputs_reach_their_targets_and_nothing_else(host: Host, shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape))
    slots, outputs = random_slots(9, size), random_slots(6, size, seed=1)
    slots.finite[:] = [1, 1, 1, 1, 0, 1, 0, 0, 1]
    source, target = [0, 0, 0, 3, 4, 4], [0, 7, 1, 5, 6, -1]  # the first writes its own source; 2, 3, 4, 8 are left
    items = item_rows(6, source=source, target=target)
    found = scattered(host, items, outputs, [1] * 6, slots)
    expected = slots.copy()
    expected.mean[target[:5]], expected.std[target[:5]] = outputs.mean[:5], outputs.std[:5]
    expected.finite[[0, 7, 1, 5, 6]] = [1, 1, 1, 1, 0]
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("finite", [1.0, 0.5, 1e-45, 0.0, -0.0, -1.0, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("target", [0, 1], ids=["in place", "elsewhere"])
def test_state_is_finite_if_its_source_was_and_the_engine_says_so(
    host: Host, before: bool, finite: float, target: int
) -> None:
    slots, outputs = random_slots(2, 5), random_slots(1, 5, seed=1)
    slots.finite[:] = before, 1
    found = scattered(host, item_rows(1, source=0, target=target), outputs, [finite], slots)
    assert found.finite[target] == (before and finite > 0)


def test_step_of_a_slot_onto_itself_keeps_it_not_finite(host: Host) -> None:
    slots, outputs = random_slots(3, 5), random_slots(3, 5, seed=1)
    slots.finite[:] = 1, 1, 0
    items = item_rows(3, source=[0, 1, 2], target=[0, 1, 2])
    once = scattered(host, items, outputs, [1, np.nan, 1], slots)
    twice = scattered(host, items, outputs, [1, 1, 1], once)
    assert once.finite.tolist() == twice.finite.tolist() == [1, 0, 0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_classifier_inputs_are_the_means_of_their_sources(host: Host, shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape))
    slots, mean = random_slots(4, size), np.full((5, size), np.nan, np.float32)
    source = [3, 0, 0, 2, 3]
    items = item_rows(5, source=source, target=[0, 0, 1, 2, -1])
    host.launch("gather_means", items, slots.mean, mean, size, across=size, items=5)
    assert mean.tobytes() == slots.mean[source].tobytes()


def test_slots_beyond_two_billion_elements_are_reached(host: Host) -> None:
    state, mean, far = random_slots(1, 105).mean, np.full((1, 105), np.nan, np.float32), 2**31 + 5
    first_slot = ctypes.c_void_p(state.ctypes.data - far * state.nbytes)  # so that `state` is slot `far`
    host.launch("gather_means", item_rows(1, source=far), first_slot, mean, 105, across=105)
    assert mean.tobytes() == state.tobytes()


def labels_of(host: Host, logits: Floats, finite: NDArray[np.uint8]) -> NDArray[np.int32]:
    """What `argmax` makes of logits [batch, classes] when item i reads slot i."""
    batch, classes = logits.shape
    labels = np.full(batch, -7, np.int32)
    items = item_rows(batch, source=range(batch))
    host.launch("argmax", items, logits, finite, labels, classes, batch, across=WARP * batch)
    return labels


SPECIAL = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 1.0, 2.0, 3.4e38, -3.4e38, 1e-45, -1e-45])


@QUICK
@given(
    logits=arrays.arrays(
        np.float32, st.tuples(st.integers(1, 40), st.integers(1, 12)), elements=SPECIAL | st.floats(-9, 9, width=32)
    ),
    data=st.data(),
)
def test_label_is_the_first_maximum_of_finite_logits(host: Host, logits: Floats, data: st.DataObject) -> None:
    finite = data.draw(arrays.arrays(np.uint8, len(logits), elements=st.sampled_from([1, 1, 1, 0])))
    usable = (finite > 0) & np.isfinite(logits).all(axis=1)
    expected = np.where(usable, logits.argmax(axis=1), NOT_FINITE)
    assert labels_of(host, logits, finite).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ([1, 2, 2], 1),
        ([0, 0, 0], 0),
        ([-0.0, 0.0, -1], 0),
        ([-3, -2, -1], 2),
        ([3.4e38, -3.4e38, 0], 0),
        ([np.nan, 1, 2], NOT_FINITE),
        ([1, 2, np.nan], NOT_FINITE),
        ([1, np.inf, 2], NOT_FINITE),
        ([1, 2, -np.inf], NOT_FINITE),
    ],
    ids=str,
)
def test_known_labels(host: Host, row: list[float], label: int) -> None:
    logits = np.array([row], np.float32)
    assert labels_of(host, logits, np.ones(1, np.uint8)) == [label]
    assert labels_of(host, logits, np.zeros(1, np.uint8)) == [NOT_FINITE]


@pytest.mark.parametrize("classes", [1, 2, 10, 31, 32, 33, 64, 65, 1000])
def test_a_warp_finds_what_numpy_finds_whichever_lane_has_it(host: Host, classes: int) -> None:
    draw, special = np.random.default_rng(classes), [np.nan, np.inf, -np.inf]
    places = sorted({0, 1, 30, 31, 32, 33, 63, 64, classes // 2, classes - 2, classes - 1} & set(range(classes)))
    rows = [draw.standard_normal(classes), np.zeros(classes), np.full(classes, -3.4e38), np.arange(classes)]
    rows += [draw.integers(0, 2, classes) for _ in range(50)]  # ties in many lanes
    rows += [np.where(draw.random(classes) < 0.5, 0.0, -0.0) for _ in range(9)]  # equal, but not the same bits
    for place in places:
        top = np.arange(classes) == place
        rows += [np.where(top, 1.0, draw.random(classes)), np.where(top, 1e-45, 0.0), np.where(top, -1.0, 0.0)]
        rows += [np.where(top, value, draw.standard_normal(classes)) for value in special]
        rows += [np.where(top | (np.arange(classes) == other), 7.0, 0.0) for other in places]
    logits = np.array(rows, np.float32)
    finite = (np.arange(len(logits)) % 11 > 0).astype(np.uint8)
    usable = (finite > 0) & np.isfinite(logits).all(axis=1)
    expected = np.where(usable, logits.argmax(axis=1), NOT_FINITE)
    assert NOT_FINITE in expected
    assert labels_of(host, logits, finite).tolist() == expected.tolist()


class Networks:
    """Stands for an ONNX Runtime session, of a step or of a classifier; not finite where a state passes `alarm`."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.alarm = np.inf

    def get_modelmeta(self) -> SimpleNamespace:
        return SimpleNamespace(custom_metadata_map={})

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(shape=["batch"])]

    def run(self, _: Sequence[str], feed: Mapping[str, Floats], options: object = None) -> list[Floats]:
        return self.step(**feed) if "std" in feed else self.classify(**feed)

    def step(self, mean: Floats, std: Floats, noise: Floats, t: Floats, coef: Floats) -> list[Floats]:
        a, b, c, *_ = coef.T.reshape(6, -1, *[1] * (mean.ndim - 1))
        x = mean + std * noise
        loud = np.abs(x).reshape(len(x), -1).max(axis=1) >= self.alarm
        return [a * x + b, np.abs(c * x) + t.reshape(b.shape), np.where(loud, np.float32(np.nan), np.float32(1))]

    def classify(self, mean: Floats) -> list[Floats]:
        logits = np.round(mean.reshape(len(mean), -1)[:, : self.classes])  # so that many tie
        return [np.where(np.abs(logits) < self.alarm, logits, np.float32(np.inf))]


class KernelDevice:
    """The kernels around the same networks, as a device runs them: whole batches, padded."""

    def __init__(self, host: Host, batch: int, slots: Slots, rows: NDArray[np.uint8], networks: Sequence[Networks]):
        self.host, self.batch, self.slots, self.rows = host, batch, slots, rows
        self.step, self.classify = networks

    def run(self, batch: Batch) -> NDArray[np.int32] | None:
        n, slots, size = len(batch.image), self.slots, self.slots.mean.shape[1]
        columns = (batch.image, batch.sample, batch.vote, batch.step, batch.source, batch.target)
        padded = [*range(n), *[0] * (self.batch - n)]
        items = np.stack(columns, axis=1)[padded]
        items[n:, -1] = -1
        grid = {"across": size, "items": self.batch}
        if batch.kind == "smooth":
            self.host.launch("smooth", items, self.rows, *slots, size, **grid)
            return None
        if batch.kind == "step":
            inputs = gathered(self.host, items, self.rows, slots)
            outputs = self.step.step(*inputs, batch.t[padded], batch.coef[padded])
            self.host.launch("scatter", items, *outputs, *slots, size, **grid)
            return None
        mean = np.full((self.batch, size), np.nan, np.float32)
        self.host.launch("gather_means", items, slots.mean, mean, size, **grid)
        (logits,) = self.classify.classify(mean)
        labels = np.full(self.batch, -7, np.int32)
        counts = (logits.shape[1], self.batch)
        self.host.launch("argmax", items, logits, slots.finite, labels, *counts, across=WARP * self.batch)
        return labels[:n]


def classify_batch(slots: Sequence[int]) -> Batch:
    zeros, none = np.zeros(len(slots), np.int64), np.empty(0, np.float32)
    source = np.array(slots, np.int64)
    return Batch("classify", zeros, zeros, zeros, zeros, source, source, none, none.reshape(0, 6))


@pytest.mark.parametrize("seed", range(4))
def test_random_batches_leave_what_they_leave_on_the_reference_device(
    host: Host, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    draw, shape, size, count = np.random.default_rng(seed), (3, 5, 7), 5, 16
    shipped = open_bundle(shipped_engine())
    bundle = dataclasses.replace(shipped, unet=dataclasses.replace(shipped.unet, image=shape))
    networks = [Networks(len(bundle.classifier.class_names)) for _ in range(2)]
    opening = iter(networks)
    monkeypatch.setattr(onnx_device, "open_session", lambda *_, **__: next(opening))
    sigmas, keys = [0.25, 0.5, 1.0], draw.integers(0, 1 << 64, (3, 2), np.uint64).tolist()
    images = [(random_image(shape, i), (low, high), sigmas[i], 0.7) for i, (low, high) in enumerate(keys)]
    rows = image_rows([(pixels, key, smoothing_law(sigma), scale) for pixels, key, sigma, scale in images])
    mean, std = np.zeros((2, count, 105), np.float32)
    slots = Slots(mean, std, np.zeros(count, np.uint8))
    device, seen = KernelDevice(host, size, slots, rows, networks), set()
    with closing(OnnxDevice(bundle, size, threads=1)) as reference:
        assert [reference.open_image(*image) for image in images] == [0, 1, 2]
        reference.reserve(count)
        for network, alarm in zip(networks, [40, 12], strict=True):
            network.alarm = alarm
        everything = [classify_batch(range(i, min(i + size, count))) for i in range(0, count, size)]
        for batch in [random_batch(draw, size, len(images), count) for _ in range(60)] + everything:
            reference.submit(batch)
            _, expected = reference.collect()
            labels = device.run(batch)
            for found, state in zip((slots.mean, slots.std), reference.read(range(count)), strict=True):
                assert found.tobytes() == state.tobytes()
            assert (labels is None) == (expected is None)
            if labels is not None and expected is not None:
                assert labels.tolist() == expected.tolist()
                seen.update(labels.tolist())
    assert NOT_FINITE in seen
    assert len(seen) > 2


@pytest.mark.skipif(SANITIZED in os.environ, reason="these are the tests that run under it")
def test_all_of_this_holds_under_the_address_and_undefined_behaviour_sanitizers() -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to build the kernels for this processor")
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, timeout=60
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")  # the latter since the former looks for it when Python starts
    ]
    if not Path(libraries[0]).is_absolute():
        pytest.skip("this g++ has no address sanitizer")
    environment = os.environ | {
        SANITIZED: "1",
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaves memory behind
        "PYTHONMALLOC": "malloc",
    }
    on_host = "not nvrtc and not on_the_gpu"  # NVRTC does not run under them
    this = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-k", on_host, __file__]
    done = subprocess.run(this, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:3000]
    assert "passed" in done.stdout


def compiled(*options: str) -> tuple[Any, Any]:
    """NVRTC, and kernels.cu compiled by it."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings, with nvidia-cuda-nvrtc")
    _, program = nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), b"kernels.cu", 0, [], [])
    arguments = [option.encode() for option in ("--std=c++17", *options)]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
    _, length = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytes(length)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    return nvrtc, program


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles_every_kernel(architecture: str) -> None:
    nvrtc, program = compiled(f"--gpu-architecture={architecture}", "--fmad=false")
    _, length = nvrtc.nvrtcGetCUBINSize(program)
    cubin = bytes(length)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    assert cubin.startswith(b"\x7fELF")
    for kernel in KERNELS:
        assert f"\0.text.{kernel}\0".encode() in cubin


def arithmetic(fused: str) -> set[str]:
    """The float instructions that round, or that could be fused, in the PTX of kernels.cu."""
    nvrtc, program = compiled("--gpu-architecture=compute_80", f"--fmad={fused}")
    _, length = nvrtc.nvrtcGetPTXSize(program)
    ptx = bytes(length)
    nvrtc.nvrtcGetPTX(program, ptx)
    return set(re.findall(r"\b(?:add|sub|mul|div|rcp|fma|mad|cvt)\S*\.f32\b", ptx.decode()))


def test_every_rounding_on_the_gpu_is_ieees_and_none_is_fused() -> None:
    exact = {f"{name}.rn.f32" for name in ("add", "sub", "mul", "div", "cvt")}
    assert {"div.rn.f32", "mul.rn.f32"} <= arithmetic("false") <= exact
    assert "mul.f32" in arithmetic("true")  # which the assembler may fuse: the test would see it


def test_the_list_of_kernels_is_complete() -> None:
    assert tuple(re.findall(r'extern "C" __global__ void (\w+)\(', SOURCE.read_text())) == KERNELS
