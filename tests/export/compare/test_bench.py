from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._inductor.config as inductor
from numpy.typing import NDArray
from torch import Tensor, nn

from densepure_rt.errors import EnvironmentFault, UsageError
from densepure_rt.export.compare import bench as module
from densepure_rt.export.compare import machine
from densepure_rt.export.compare.bench import (
    COMPILED,
    EAGER,
    ENGINE,
    KEY,
    NETWORK,
    Benchmark,
    Seconds,
    StepWork,
    Worker,
    bench,
    compared,
    giga_operations,
    interleaved,
    routes,
    spread,
    stages_of,
    steady,
    without_network,
)
from densepure_rt.export.compare.engine_run import EngineRun, flat, torch_settings
from densepure_rt.export.models import reference
from densepure_rt.export.models.check_images import made_up
from densepure_rt.export.models.classifiers import zoo_classifier
from densepure_rt.export.models.sources import Models
from densepure_rt.export.models.unets import zoo_unet
from densepure_rt.runtime.bundle import Bundle, open_bundle, shipped_engine
from densepure_rt.runtime.device import STEP_INPUTS, Batch
from densepure_rt.runtime.noise import Key, first_state, smoothing_law, smoothing_noise
from densepure_rt.runtime.onnx_device import Network, OnnxDevice
from densepure_rt.runtime.schedule import Coefficients
from tests.support.toys import IMAGE, toy_bundle, toy_classifier, toy_models, toy_unet

STAGES = ["smoothing noise", "vote noise", "UNet", "update", "slots and padding", "classifier", "vote", "loop"]


def hasten(patch: pytest.MonkeyPatch) -> None:
    for name, value in {"PAUSE": 0.0, "STEADY": 1e-3, "WARM_UP": 1}.items():
        patch.setattr(module, name, value)
    patch.setattr(machine, "PEAK_REPEATS", 1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return toy_bundle(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def default() -> Bundle:
    return open_bundle(shipped_engine())


@pytest.fixture(scope="module")
def found(toy: Bundle) -> Benchmark:
    """The toy on two threads."""
    with pytest.MonkeyPatch.context() as patch:
        hasten(patch)
        return bench(toy_models(), EngineRun(toy, 3, 2), made_up(IMAGE, 16), StepWork(rounds=3, compile=False))


@pytest.fixture
def worker(toy: Bundle) -> Iterator[Worker]:
    unet = toy_unet()
    with closing(OnnxDevice(toy, batch=4, threads=2)) as device, torch.inference_mode():
        yield Worker(device, unet.chain(0.5, 2), made_up(IMAGE, 16))


def sound(found: Benchmark) -> None:
    """What every result must be, whatever the machine."""
    assert json.loads(json.dumps(flat(found)))["engine_sha256"] == found.subject.engine_sha256
    assert found.relative_l2 < 1e-5
    assert sum(stage.share for stage in found.stages) == pytest.approx(1)
    for route in found.routes:
        if route.absent is None:
            assert len(route.rounds) == found.rounds
            assert min(route.rounds) > 0
            assert route.seconds is not None
            assert route.seconds.median == pytest.approx(np.median(route.rounds))
            assert route.of_peak is not None
            assert 0 < route.of_peak < 1.5
    engine, eager = found.routes[:2]
    assert eager.engine_speedup is not None
    expected = np.median(np.array(eager.rounds) / np.array(engine.rounds))
    assert eager.engine_speedup.median == pytest.approx(float(expected))


def test_the_operations_of_a_convolution_are_two_a_multiply_add() -> None:
    pixels, taps = 8 * 5 * 7, 3 * 3 * 3
    found = giga_operations(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 5, 7))
    assert found == pytest.approx(2 * pixels * taps / 1e9)


def test_the_operations_of_the_default_unet_are_those_of_its_layers() -> None:
    unet, total = zoo_unet(), 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            assert isinstance(layer.weight, Tensor)
            total += 2 * output.numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            total += 2 * output.numel() * layer.in_features
        elif type(layer).__name__ == "Attention":  # of diffusers: scores and weighted sum, all heads together
            channels, tokens = inputs[0].shape[1], math.prod(inputs[0].shape[2:])
            total += 2 * 2 * tokens * tokens * channels

    hooks = [layer.register_forward_hook(count) for layer in unet.network.modules()]
    with torch.inference_mode():
        unet.network(torch.zeros(1, *unet.image), torch.ones(1))
    for hook in hooks:
        hook.remove()
    assert giga_operations(unet.network, torch.zeros(1, *unet.image), torch.ones(1)) == pytest.approx(total / 1e9)


def test_a_network_that_another_library_runs_has_an_unknown_number_of_operations() -> None:
    assert giga_operations(nn.Identity(), torch.zeros(1)) is None


def test_every_round_calls_each_once_and_begins_with_another() -> None:
    order: list[str] = []

    def timing(name: str) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return float(len(order))

        return run

    found = interleaved({name: timing(name) for name in "abc"}, 4)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"  # the warm-up first, which is not counted
    assert {name: seconds.tolist() for name, seconds in found.items()} == {
        "a": [4, 9, 11, 13],
        "b": [5, 7, 12, 14],
        "c": [6, 8, 10, 15],
    }


def test_ratios_are_taken_within_a_round_so_that_a_slow_round_does_not_count() -> None:
    slowness = np.array([1.0, 1.0, 7.0, 2.0, 1.0])
    seconds: Mapping[str, Seconds] = {ENGINE: 0.01 * slowness, EAGER: 0.03 * slowness, NETWORK: 0.005 * slowness}
    engine, eager, network = compared(seconds, gflop=0.5, peak=100.0)
    assert engine.engine_speedup is None
    assert eager.engine_speedup is not None
    assert network.engine_speedup is not None
    assert dataclasses.astuple(eager.engine_speedup) == pytest.approx((3, 3, 3))
    assert dataclasses.astuple(network.engine_speedup) == pytest.approx((0.5, 0.5, 0.5))
    assert engine.gflops == pytest.approx(50)
    assert engine.of_peak == pytest.approx(0.5)
    assert compared(seconds, gflop=None, peak=100.0)[0].of_peak is None


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert dataclasses.astuple(spread(np.array([5.0, 1.0, 2.0, 4.0, 3.0]))) == (3, 2, 4)


def test_short_work_is_repeated_until_it_can_be_timed() -> None:
    now = 0.0

    def work() -> None:
        nonlocal now
        now += 1e-4

    def stopwatch(run: Callable[[], object]) -> float:
        begun = now
        run()
        return now - begun

    timing = steady(stopwatch, work)
    before = now
    assert timing() == pytest.approx(1e-4)
    assert now - before == pytest.approx(1e-3, rel=0.11)


def test_the_states_are_those_of_a_real_run(worker: Worker) -> None:
    unet, chain, pixels = toy_unet(), worker.chain, made_up(IMAGE, 16)
    assert len(worker.feeds()) == 2
    for caller, (mean, std, noise, t, coef) in enumerate(worker.feeds()):
        for item in range(4):
            sample = 4 * caller + item
            image = pixels[sample % len(pixels)]
            levels = image + smoothing_noise(smoothing_law(0.5), KEY, sample, IMAGE)
            x = torch.from_numpy(first_state(levels, chain.scale))[None]
            step = item % 2
            expected = x, torch.zeros_like(x)
            if step:
                first = Coefficients(*chain.coef[0].tolist())
                expected = reference.reverse_step(unet, x, torch.from_numpy(chain.t[:1]), first)
                assert std[item].min() > 0
            assert float(t[item]) == chain.t[step]
            assert coef[item].tolist() == chain.coef[step].tolist()
            torch.testing.assert_close((mean[item], std[item]), (expected[0][0], expected[1][0]))
            assert not noise[item].any()


def test_steps_leave_their_sources_as_they_are(worker: Worker) -> None:
    before = worker.feeds()
    worker.run([worker.batch("step", caller, step=1) for caller in range(2)], calls=6)
    for feed, again in zip(before, worker.feeds(), strict=True):
        assert all(torch.equal(some, other) for some, other in zip(feed, again, strict=True))


def test_the_engine_without_a_network_is_the_update_alone(toy: Bundle, tmp_path: Path) -> None:
    unet = toy_unet()
    empty = without_network(unet, toy, tmp_path)
    chain = unet.chain(0.5, 2)
    mean, std, noise = np.random.default_rng(0).standard_normal((3, 1, *IMAGE), np.float32)
    feed = dict(zip(STEP_INPUTS, (mean, std, noise, chain.t[:1], chain.coef[:1]), strict=True))
    found = Network(empty.unet_path, empty.unet, STEP_INPUTS, ("mean_next", "std_next", "finite"))(feed)
    echo = nn.Module()
    echo.forward = lambda x, t: torch.cat([x, x], 1)
    expected = reference.reverse_step(
        dataclasses.replace(unet, network=echo),
        torch.from_numpy(mean + std * noise),
        torch.from_numpy(chain.t[:1]),
        Coefficients(*chain.coef[0].tolist()),
    )
    for ours, theirs in zip(found, expected, strict=False):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-6)


class Clockwork:
    """A device that takes known times by a clock of its own."""

    now = 0.0

    def __init__(self, step: float) -> None:
        self.batch, self.in_flight, self.last = 2, 1, "smooth"
        self.takes = {"smooth": 1.0, "step": step, "classify": 5.0}

    def open_image(self, pixels: NDArray[np.uint8], key: Key, sigma: float, scale: float) -> int:
        return 0

    def close_image(self, handle: int) -> None: ...
    def reserve(self, slots: int) -> None: ...
    def drain(self) -> None: ...
    def close(self) -> None: ...

    def submit(self, batch: Batch) -> int:
        Clockwork.now += self.takes[batch.kind] + (3.0 if batch.kind == "step" and batch.step.any() else 0.0)
        return 0

    def collect(self) -> tuple[int, None]:
        return 0, None

    def read(self, slots: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        raise AssertionError("stages are timed, not looked at")

    def describe(self) -> Mapping[str, str | int | bool]:
        return {}

    @classmethod
    def stopwatch(cls, run: Callable[[], object]) -> float:
        begun = cls.now
        run()
        return cls.now - begun

    @classmethod
    def update(cls) -> None:
        cls.now += 0.5


def test_stages_get_the_time_that_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CALLS", 1)
    unet = toy_unet()
    chain = unet.chain(0.5, 2)
    whole, around = (Worker(Clockwork(step), chain, made_up(IMAGE, 16)) for step in (10.0, 2.0))
    found = stages_of(whole, around, Clockwork.update, 3, Clockwork.stopwatch)
    assert [stage.name for stage in found] == STAGES
    assert [stage.seconds.median * 2 for stage in found] == pytest.approx([1, 3, 8, 0.5, 1.5, 5, 0, 0])
    assert [stage.share * 19 for stage in found] == pytest.approx([1, 3, 8, 0.5, 1.5, 5, 0, 0])
    plan = stages_of(whole, None, None, 3, Clockwork.stopwatch)
    assert {stage.name: stage.seconds.median * 2 for stage in plan} == pytest.approx(
        {"smoothing noise": 1, "vote noise": 3, "UNet, update, slots": 10, "classifier": 5, "vote": 0, "loop": 0}
    )


def test_a_toy_is_timed_on_several_threads(found: Benchmark) -> None:
    sound(found)
    assert (found.clock, found.batch, found.threads, found.calls) == ("wall", 3, 2, 2)
    assert [route.name for route in found.routes] == [ENGINE, EAGER, NETWORK, COMPILED]
    assert found.routes[-1].absent == "left out"
    assert found.gflop == {"UNet": pytest.approx(2 * 72 * 9 / 1e9), "classifier": pytest.approx(2 * 36 * 3 / 1e9)}


def test_torch_is_left_as_it_was_also_after_an_error() -> None:
    def state() -> tuple[int, bool, bool, bool]:
        cudnn = torch.backends.cudnn
        return torch.get_num_threads(), cudnn.benchmark, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    def fail(threads: int) -> None:
        with torch_settings(threads):
            assert state() == (threads, True, False, False)
            raise ZeroDivisionError

    before = state()
    with pytest.raises(ZeroDivisionError):
        fail(before[0] + 1)
    assert state() == before


def test_the_shipped_engines_are_timed(default: Bundle) -> None:
    found = bench(
        Models(zoo_unet(), zoo_classifier()),
        EngineRun(default, 2, 1),
        made_up((1, 28, 28), 4),
        StepWork(rounds=2, compile=False),
    )
    sound(found)
    assert found.clock == "core"
    assert [stage.name for stage in found.stages] == STAGES
    assert max(found.stages, key=lambda stage: stage.share).name == "UNet"


def test_a_missing_compiler_is_reported_and_nothing_crashes(worker: Worker, found: Benchmark) -> None:
    said: list[str] = []
    with inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        timings, absent, relative_l2 = routes(toy_unet(), worker, worker.feeds(), 1, True, "core", said.append)
    assert list(timings) == [ENGINE, EAGER, NETWORK]
    assert relative_l2 < 1e-5
    assert [route.name for route in absent] == [COMPILED]
    assert absent[0].seconds is None
    assert "no-such-compiler" in str(absent[0].absent)
    assert said[0].startswith("compiling")


@pytest.mark.slow
def test_the_compiled_step_is_timed(toy: Bundle) -> None:
    found = bench(toy_models(), EngineRun(toy, 2, 1), made_up(IMAGE, 16), StepWork(rounds=2))
    sound(found)
    assert found.routes[-1].name == COMPILED
    assert found.routes[-1].absent is None


def test_an_engine_of_another_model_is_refused(toy: Bundle) -> None:
    unet, classifier = toy_unet(), toy_classifier()
    other = dataclasses.replace(unet, weights_sha256="c" * 64)
    with pytest.raises(UsageError, match=r"unet\.onnx was exported from weights a{16}\.{3}.*c{16}.*give `unet`"):
        bench(Models(other, classifier), EngineRun(toy), made_up(IMAGE, 16))
    other_classifier = dataclasses.replace(classifier, weights_sha256="d" * 64)
    with pytest.raises(UsageError, match=r"classifier\.onnx was exported from weights b{16}.*give `classifier`"):
        bench(Models(unet, other_classifier), EngineRun(toy), made_up(IMAGE, 16))
    with pytest.raises(
        UsageError, match=r"exported with image \(1, 6, 6\), .* given with \(1, 8, 8\): repeat the options"
    ):
        bench(Models(dataclasses.replace(unet, image=(1, 8, 8)), classifier), EngineRun(toy), made_up(IMAGE, 16))


@pytest.mark.parametrize(
    ("batch", "rounds", "threads", "option"),
    [(0, 1, 1, "`batch` 0"), (1, 0, 1, "`rounds` 0"), (1, 1, 0, "`threads` 0")],
)
def test_impossible_numbers_are_refused(toy: Bundle, batch: int, rounds: int, threads: int, option: str) -> None:
    with pytest.raises(UsageError, match=option):
        bench(toy_models(), EngineRun(toy, batch, threads), made_up(IMAGE, 16), StepWork(rounds=rounds))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this PyTorch can use a GPU")
def test_an_engine_on_the_gpu_is_not_compared_with_pytorch_on_the_cpu(toy: Bundle) -> None:
    with pytest.raises(EnvironmentFault, match="cannot use one"):
        bench(toy_models(), EngineRun(toy, provider="cuda"), made_up(IMAGE, 16))
