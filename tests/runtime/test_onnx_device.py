"""The ONNX Runtime device on the shipped engines, and on small graphs whose every result is known."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from densepure_rt.errors import CheckFailed
from densepure_rt.runtime.bundle import Bundle, open_bundle, shipped_engine
from densepure_rt.runtime.device import NOT_FINITE, Device
from densepure_rt.runtime.noise import smoothing_law, smoothing_noise, vote_noise
from densepure_rt.runtime.open_device import open_device
from densepure_rt.runtime.reverse import decide
from densepure_rt.runtime.schedule import Variance, make_chain
from densepure_rt.smoothing.voting import Ballot
from tests.support.bundles import engines_copied
from tests.support.small_engines import (
    ALARM,
    BATCH_MEAN_GRAPH,
    CLASSIFIER,
    CLASSIFY_GRAPH,
    ENGINE,
    KEY,
    MU,
    SHAPE,
    SIGMA,
    STEP_GRAPH,
    WIDTH,
    finish,
    items,
    picture,
    replace_file,
    small_bundle,
    trajectory,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def shipped_copy(tmp_path: Path) -> Path:
    return engines_copied(tmp_path)


def spoiled(path: Path, value: float) -> bytes:
    """An engine whose last large weight holds `value`."""
    model = onnx.load(path)
    weight = [initializer for initializer in model.graph.initializer if math.prod(initializer.dims) > 8][-1]
    values = numpy_helper.to_array(weight).copy()
    assert values.dtype == np.float32
    values.ravel()[:] = value
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    return bytes(model.SerializeToString())


@contextmanager
def opened(bundle: Bundle, batch: int, threads: int = 1) -> Iterator[Device]:
    with closing(open_device(bundle, batch, threads)) as device:
        yield device


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_shipped_engine_gives_an_item_the_same_bits_in_any_company(batch: int) -> None:
    bundle = open_bundle(shipped_engine())
    chain = make_chain(bundle.unet.schedule, bundle.unet.variance, SIGMA, 2)
    image = picture(bundle.unet.image)
    with opened(bundle, batch) as device:
        device.reserve(80)
        companies = [
            ([40], [0]),  # alone, the batch padded
            ([40, *range(batch - 1)], list(range(batch))),
            ([40, *range(100, 99 + batch)], [77, *range(batch - 1)]),
            ([40, *range(200, 199 + batch)][: batch // 2 + 1], list(range(batch // 2 + 1))),
        ]
        seen = {trajectory(device, chain, samples, slots, image) for samples, slots in companies}
    assert len(seen) == 1
    assert np.isfinite(np.frombuffer(seen.pop()[:-8], np.float32)).all()


def test_place_in_the_batch_does_not_change_an_items_bits() -> None:
    bundle = open_bundle(shipped_engine())
    chain = make_chain(bundle.unet.schedule, bundle.unet.variance, SIGMA, 1)
    with opened(bundle, 7) as device:
        device.reserve(7)
        handle = device.open_image(picture(bundle.unet.image), KEY, SIGMA, chain.scale)
        seen = set()
        for place in range(7):
            samples = [90 + i for i in range(7)]
            samples[place] = 40
            for kind in ("smooth", "step"):
                finish(device, items(kind, chain, handle, samples, list(range(7))))
            seen.add(device.read([place])[0].tobytes())
    assert len(seen) == 1


def test_last_step_of_the_shipped_engine_lands_without_spread_and_inside_its_clip() -> None:
    bundle = open_bundle(shipped_engine())
    chain = make_chain(bundle.unet.schedule, bundle.unet.variance, SIGMA, 1)
    with opened(bundle, 4) as device:
        device.reserve(4)
        handle = device.open_image(picture(bundle.unet.image), KEY, SIGMA, chain.scale)
        finish(device, items("smooth", chain, handle, [0, 1, 2, 3], [0, 1, 2, 3]))
        finish(device, items("step", chain, handle, [0, 1, 2, 3], [0, 1, 2, 3]))
        mean, std = device.read([0, 1, 2, 3])
    assert (std == 0).all()
    assert bundle.unet.clip is not None
    assert bundle.unet.clip[0] <= mean.min() < mean.max() <= bundle.unet.clip[1]


def test_smoothed_image_is_the_scaled_sum_of_image_and_integer_noise() -> None:
    bundle = open_bundle(shipped_engine())
    image = picture(bundle.unet.image)
    chain = make_chain(bundle.unet.schedule, bundle.unet.variance, SIGMA, 2)
    with opened(bundle, 3) as device:
        device.reserve(3)
        handle = device.open_image(image, KEY, SIGMA, chain.scale)
        finish(device, items("smooth", chain, handle, [8, 9], [2, 0]))
        finish(device, items("step", chain, handle, [8, 9], [2, 0]))
        assert (device.read([2, 0])[1] > 0).all()  # slots are used again, and nothing of their past may stay
        finish(device, items("smooth", chain, handle, [5, 6], [2, 0]))
        mean, std = device.read([2, 0])
    for found, sample in zip(mean, (5, 6), strict=True):
        levels = image.astype(float) + smoothing_noise(smoothing_law(SIGMA), KEY, sample, image.shape)
        np.testing.assert_allclose(found, (2 * levels / 255 - 1) / math.sqrt(1 + 4 * SIGMA**2), rtol=1e-6, atol=1e-6)
    assert (std == 0).all()


def affine_procedure(image: NDArray[np.uint8], sample: int, votes: int, steps: int, large: bool) -> list[int]:
    """The label of each vote on the small graphs, in float64; NOT_FINITE where a draw sums up to ALARM."""
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    own = 1 / (1 + 4 * SIGMA**2)
    start = int(np.abs(bars - own).argmin())
    levels = [own, *(bars[round(start - i * start / steps)] for i in range(1, steps))]
    labels = []
    for vote in range(votes):
        noisy = image.astype(float) + smoothing_noise(smoothing_law(SIGMA), KEY, sample, image.shape)
        x, finite = (2 * noisy / 255 - 1) * math.sqrt(own), True
        for i, ab in enumerate(levels):
            x0 = MU + math.sqrt(ab) * WIDTH**2 / (ab * WIDTH**2 + 1 - ab) * (x - math.sqrt(ab) * MU)
            if i + 1 == steps:
                x = x0
                continue
            after = levels[i + 1]
            ratio = ab / after
            precision = 1 / (1 - after) + ratio / (1 - ratio)
            mean = (math.sqrt(after) / (1 - after) * x0 + math.sqrt(ratio) / (1 - ratio) * x) / precision
            variance = 1 - ratio if large else 1 / precision
            drawn = math.sqrt(variance) * vote_noise(KEY, sample, vote, i + 1, image.shape)
            x, finite = mean + drawn, finite and drawn.sum() < ALARM
        total = x.sum()
        labels.append(int(np.argmax([0, total - 1.2, 2 * total - 1.0])) if finite else NOT_FINITE)
    return labels


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (5, 2), (16, 3)])
def test_loop_on_this_device_is_the_float64_procedure(
    shipped_copy: Path, batch: int, threads: int, variance: Variance
) -> None:
    bundle = small_bundle(shipped_copy, ALARM)
    image = np.full(SHAPE, 132, np.uint8)
    chain = make_chain(bundle.unet.schedule, variance, SIGMA, 3)
    with opened(bundle, batch, threads) as device:
        handle = device.open_image(image, KEY, SIGMA, chain.scale)
        outcomes = list(decide(device, chain, ((handle, i) for i in range(60)), lambda: Ballot(5)))
    everything = [affine_procedure(image, i, 5, 3, variance == "fixed_large") for i in range(60)]
    cast = [labels[: outcome.votes] for labels, outcome in zip(everything, outcomes, strict=True)]
    expected = [NOT_FINITE if NOT_FINITE in labels else max(labels, key=labels.count) for labels in cast]
    assert [outcome.label for outcome in outcomes] == expected
    assert all(
        max(labels, key=labels.count) == outcome.label
        for labels, outcome in zip(everything, outcomes, strict=True)
        if NOT_FINITE not in labels
    )
    assert {NOT_FINITE, 0, 2} <= set(expected)  # the comparison has seen every case
    assert any(len(set(labels)) > 1 for labels in cast)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [ENGINE, CLASSIFIER])
def test_engine_with_weights_that_are_not_finite_is_refused(shipped_copy: Path, name: str, value: float) -> None:
    path = shipped_copy.with_name(name)
    replace_file(path, spoiled(path, value))
    with pytest.raises(CheckFailed, match="NaN or Inf on ordinary input"):
        open_device(open_bundle(shipped_copy), batch=2, threads=1)


def test_engine_that_calls_its_own_nan_finite_is_refused(shipped_copy: Path) -> None:
    lying = STEP_GRAPH.replace("LIMIT", "1e30").replace("Mul(a, x0)", "Mul(root, x0)")
    lying = lying.replace("    part0 =", "    root = Sqrt(low)\n    part0 =")  # of -1000
    small_bundle(shipped_copy)
    replace_file(shipped_copy, parser.parse_model(lying).SerializeToString(), image=SHAPE)
    with pytest.raises(CheckFailed, match="NaN or Inf on ordinary input"):
        open_device(open_bundle(shipped_copy), batch=2, threads=1)


@pytest.mark.parametrize("name", [ENGINE, CLASSIFIER])
def test_rewriting_an_engine_alone_does_not_make_it_fail(shipped_copy: Path, name: str) -> None:
    """What the tests above change is the weights, not the file's form."""
    path = shipped_copy.with_name(name)
    replace_file(path, bytes(onnx.load(path).SerializeToString()))
    open_device(open_bundle(shipped_copy), batch=2, threads=1).close()


@pytest.mark.parametrize(("name", "takes"), [(ENGINE, "mean and gives logits"), (CLASSIFIER, "mean, std, noise")])
def test_graph_of_the_other_kind_is_refused(shipped_copy: Path, name: str, takes: str) -> None:
    other = {ENGINE: CLASSIFIER, CLASSIFIER: ENGINE}[name]
    replace_file(shipped_copy.with_name(name), shipped_engine().with_name(other).read_bytes())
    with pytest.raises(CheckFailed, match=f"{name} takes {takes}"):
        open_device(open_bundle(shipped_copy), batch=2, threads=1)


@pytest.mark.parametrize("content", [b"", b"garbage", bytes(range(256)) * 100], ids=["empty", "word", "bytes"])
@pytest.mark.parametrize("name", [ENGINE, CLASSIFIER])
def test_garbage_with_the_right_hash_is_refused(shipped_copy: Path, name: str, content: bytes) -> None:
    replace_file(shipped_copy.with_name(name), content)
    with pytest.raises(CheckFailed, match=f"cannot load {name}"):
        open_device(open_bundle(shipped_copy), batch=2, threads=1)


def test_graph_whose_items_see_their_batch_mates_is_refused_unless_alone(shipped_copy: Path) -> None:
    bundle = small_bundle(shipped_copy, classifier=BATCH_MEAN_GRAPH)
    with pytest.raises(CheckFailed, match="depends on the others in its batch of 4.*`batch` 1"):
        open_device(bundle, batch=4, threads=1)
    open_device(bundle, batch=1, threads=1).close()


def test_engines_of_another_image_size_than_their_sidecars_say_are_refused(shipped_copy: Path) -> None:
    for name in (ENGINE, CLASSIFIER):
        path = shipped_copy.with_name(name)
        replace_file(path, path.read_bytes(), image=[3, 32, 32])
    with pytest.raises(CheckFailed):
        open_device(open_bundle(shipped_copy), batch=2, threads=1)


@pytest.mark.parametrize("threads", [1, 3])
def test_error_inside_a_batch_arrives_as_itself_and_leaves_the_device_idle(threads: int) -> None:
    bundle = open_bundle(shipped_engine())
    chain = make_chain(bundle.unet.schedule, bundle.unet.variance, SIGMA, 0)
    with opened(bundle, 2, threads) as device:
        right = device.open_image(picture(bundle.unet.image), KEY, SIGMA, chain.scale)
        wrong = device.open_image(np.zeros((3, 5, 5), np.uint8), KEY, SIGMA, chain.scale)
        work = [(wrong if i == 9 else right, i) for i in range(40)]
        with pytest.raises(ValueError, match="broadcast"):
            list(decide(device, chain, work, lambda: Ballot(1)))
        again = list(decide(device, chain, [(right, i) for i in range(9)], lambda: Ballot(1)))
        assert [outcome.sample for outcome in again] == list(range(9))


def test_slots_are_kept_when_fewer_are_asked_for() -> None:
    bundle = open_bundle(shipped_engine())
    with opened(bundle, 2) as device:
        device.reserve(9)
        device.reserve(3)
        assert device.read(range(9))[0].shape == (9, *bundle.unet.image)


def test_what_is_read_is_a_copy() -> None:
    bundle = open_bundle(shipped_engine())
    with opened(bundle, 2) as device:
        device.reserve(2)
        mean, std = device.read([0, 1])
        mean += 1
        std += 1
        assert not device.read([0, 1])[0].any()
        assert not device.read([0, 1])[1].any()


def test_closing_twice_is_safe() -> None:
    device = open_device(open_bundle(shipped_engine()), batch=1, threads=1)
    device.close()
    device.close()


def test_record_names_what_ran() -> None:
    import onnxruntime

    with opened(open_bundle(shipped_engine()), 3, 2) as device:
        described = device.describe()
        assert (device.batch, device.in_flight) == (3, 2)
    assert described["onnxruntime"] == onnxruntime.__version__
    assert (described["batch"], described["threads"]) == (3, 2)


def test_opening_an_engine_reports_nothing_to_the_maker_of_onnxruntime(tmp_path: Path) -> None:
    """ONNX Runtime that reports keeps an identity of the machine and a queue in the user's cache folder."""

    def left_behind(code: str) -> list[Path]:
        home = tmp_path / str(len(list(tmp_path.iterdir())))
        home.mkdir()
        quiet = {"CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"}  # what silences it, or sends it elsewhere
        env = {name: value for name, value in os.environ.items() if name not in quiet} | {"HOME": str(home)}
        subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, check=True, timeout=120)
        return list(home.rglob("*"))

    if not left_behind("import onnxruntime"):
        pytest.skip("this ONNX Runtime reports nothing")
    assert left_behind("import densepure_rt\nwith densepure_rt.load(batch=1, threads=1): pass") == []


# Logits as in CLASSIFY_GRAPH; for a dark image, or for any, they are never come by.
ENDLESS_GRAPH = """
<ir_version: 8, opset_import: ["" : 18]>
classify (float[B,1,4,4] mean) => (float[B,3] logits)
<int64[2] flat = {0, -1}, float[3] edge = {0.0, -1.2, -1.0}, float[1,3] slope = {0.0, 1.0, 2.0}, int64[1] pixels = {1},
 float dark = {DARK}>
{
    flattened = Reshape(mean, flat)
    total = ReduceSum <keepdims = 1> (flattened, pixels)
    scaled = Mul(total, slope)
    least = ReduceMin <keepdims = 0> (total)
    go = Less(least, dark)
    result = Loop <body = round (int64 i, bool going, float[B,3] carried)
        => (bool on, float[B,3] next) { on = Identity(going) next = Sin(carried) }> (, go, scaled)
    logits = Add(result, edge)
}
"""
ANY, DARKEST = "1e30", "-14.0"  # the sum over the 16 pixels of a black image is about -16


def endless_bundle(engine: Path, dark: str) -> Bundle:
    return small_bundle(engine, classifier=ENDLESS_GRAPH.replace("DARK", dark))


CTRL_C = """
import os, signal, sys, threading, time
import numpy as np
from densepure_rt import load
from densepure_rt.runtime.onnx_device import open_session, run_session

threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
started = time.monotonic()
try:
    {work}
except KeyboardInterrupt:
    print(f"{{time.monotonic() - started:.3f}}")
"""
ENDLESS_WORK = {
    "opening the engines": "load({engine!r}, threads=2)",
    "a run by itself": """
    session = open_session(open({classifier!r}, "rb").read(), "classifier", ["mean"], ["logits"])
    run_session(session, None, {{"mean": np.full((1, 1, 4, 4), -1, np.float32)}})
""",
}


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is sent in another way there")
@pytest.mark.parametrize("work", ENDLESS_WORK)
def test_ctrl_c_ends_a_network_that_never_ends_by_itself(shipped_copy: Path, work: str) -> None:
    endless_bundle(shipped_copy, ANY)
    code = ENDLESS_WORK[work].format(engine=str(shipped_copy), classifier=str(shipped_copy.with_name(CLASSIFIER)))
    done = subprocess.run(
        [sys.executable, "-c", CTRL_C.format(work=code.strip())], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # ONNX Runtime would log what it was told
    assert 0.9 < float(done.stdout) < 4


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is sent in another way there")
def test_ctrl_c_ends_a_certify_whose_batches_never_end(shipped_copy: Path, tmp_path: Path) -> None:
    endless_bundle(shipped_copy, DARKEST)
    np.savez(tmp_path / "black.npz", x=np.zeros((1, 4, 4, 1), np.uint8))
    out = tmp_path / "run"
    options = ["--sigma", "0.05", "--steps", "0", "--method", "fixed", "--n0", "10", "--n", "100", "--max", "1"]
    command = ["certify", "--engine", shipped_copy, "--images", tmp_path / "black.npz", "--out", out, *options]
    with subprocess.Popen(
        [sys.executable, "-c", "from densepure_rt.cli import main; main()", *map(str, command)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            while not out.exists():
                assert running.poll() is None, running.communicate()
                time.sleep(0.02)
            time.sleep(1)
            told = time.monotonic()
            running.send_signal(signal.SIGINT)
            stderr = running.communicate(timeout=60)[1]
            took = time.monotonic() - told
        finally:
            running.kill()
    assert running.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert took < 4


def test_a_batch_that_is_given_up_ends_and_the_device_gives_the_same_bits_afterwards(shipped_copy: Path) -> None:
    bundle = endless_bundle(shipped_copy, DARKEST)
    chain = make_chain(bundle.unet.schedule, bundle.unet.variance, 0.05, 1)
    bright, black = np.full(SHAPE, 200, np.uint8), np.zeros(SHAPE, np.uint8)
    with opened(bundle, 4, 2) as device:
        device.reserve(8)
        before = trajectory(device, chain, [0, 1], [0, 1], bright)
        handle = device.open_image(black, KEY, 0.05, chain.scale)
        finish(device, items("smooth", chain, handle, [0], [0]))
        device.submit(items("classify", chain, handle, [0], [0]))
        started = time.monotonic()
        device.drain()
        assert time.monotonic() - started < 4
        assert trajectory(device, chain, [0, 1], [0, 1], bright) == before
        finish(device, items("smooth", chain, handle, [0], [0]))
        device.submit(items("classify", chain, handle, [0], [0]))  # and `close` ends this one


# What a foreign graph may try. Its hash is that of its sidecar, so that nothing else stops it.

CUSTOM_GRAPH = """
<ir_version: 8, opset_import: ["" : 18, "mine" : 1]>
classify (float[B,1,4,4] mean) => (float[B,3] logits)
{
    logits = mine.Swish(mean)
}
"""
HUGE_GRAPH = """
<ir_version: 8, opset_import: ["" : 18]>
classify (float[B,1,4,4] mean) => (float[B,3] logits)
<int64[2] size = {100000, 1000000}, int64[2] flat = {0, -1}, int64[1] begin = {0}, int64[1] end = {3},
 int64[1] axis = {1}>
{
    flattened = Reshape(mean, flat)
    first = Slice(flattened, begin, end, axis)
    huge = ConstantOfShape(size)
    most = ReduceMax <keepdims = 0> (huge)
    logits = Add(first, most)
}
"""


@pytest.mark.parametrize(("graph", "message"), [(CUSTOM_GRAPH, "cannot load"), (HUGE_GRAPH, "classifier.onnx|cannot")])
def test_a_graph_of_unknown_operators_or_of_400_gigabytes_is_one_error(
    shipped_copy: Path, graph: str, message: str
) -> None:
    bundle = small_bundle(shipped_copy, classifier=graph)
    with pytest.raises(CheckFailed, match=message):
        open_device(bundle, 4, 1)


@pytest.mark.parametrize("location", ["/etc/hostname", "../outside.data", "sub/../../outside.data", "w.data", "linked"])
def test_weights_that_the_sidecar_does_not_name_are_not_read(
    shipped_copy: Path, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shipped_copy.parent / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    values = np.array([0.0, -1.2, -1.0], np.float32).tobytes()
    for place in (folder / "w.data", folder.parent / "outside.data", folder.parent / "w.data"):
        place.write_bytes(values)
    for place in (folder / "linked", folder.parent / "linked"):
        place.symlink_to(folder / "w.data")
    model = parser.parse_model(CLASSIFY_GRAPH)
    (edge,) = (tensor for tensor in model.graph.initializer if tensor.name == "edge")
    edge.CopyFrom(numpy_helper.from_array(np.frombuffer(values, np.float32), "edge"))
    onnx.external_data_helper.set_external_data(edge, location, 0, len(values))
    small_bundle(shipped_copy)
    names = ["low", "middle", "high"]
    replace_file(shipped_copy.with_name(CLASSIFIER), model.SerializeToString(), image=SHAPE, class_names=names)
    with pytest.raises(CheckFailed, match="classifier.onnx"):
        open_device(open_bundle(shipped_copy), 4, 1)
