"""`densepure-rt bench`: an engine against PyTorch, eager and compiled, in one run on one machine, stage by stage.

What is compared is one whole reverse step of equal states: the same images, noised alike, at the same timesteps. The
engine runs as `certify` runs it: in batches, on a CPU one caller of one thread for each of `threads`. PyTorch gets as
many batches, one after another, each on `threads` threads. A round calls every route once, and each round begins with
another; ratios are taken within a round, since on a shared machine seconds of different rounds do not compare. With
one thread seconds are CPU time, which other programs hardly stretch; with more they are the wall's, on an idle machine.

This module is long because it is one measurement: every route and its clock stand beside each other.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import math
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from densepure_rt.errors import UsageError
from densepure_rt.export.compare.engine_run import EngineRun, Subject
from densepure_rt.export.compare.host_cost import Idle, looped
from densepure_rt.export.compare.machine import (
    STOPWATCHES,
    Clock,
    Load,
    Machine,
    OtherLoad,
    Stopwatch,
    by_the_core,
    by_the_wall,
    gpu_state,
    load_average,
    measured_peak,
)
from densepure_rt.export.convert.step_graph import StepGraph
from densepure_rt.export.convert.to_onnx import step_onnx
from densepure_rt.export.models.programs import first_line
from densepure_rt.export.models.sources import Models, refuse_other_models
from densepure_rt.export.models.unets import DiffusionModel
from densepure_rt.runtime.bundle import Bundle, FileRef
from densepure_rt.runtime.device import STEP_INPUTS, STEP_OUTPUTS, Batch, Device, Kind
from densepure_rt.runtime.noise import Key
from densepure_rt.runtime.open_device import open_device
from densepure_rt.runtime.reverse import UNCAST, walk
from densepure_rt.runtime.schedule import Chain
from densepure_rt.smoothing.voting import Ballot

ROUNDS = 20
WARM_UP = 2  # calls of each that are not counted
PAUSE = 0.01  # seconds before each call, in which the threads of the one before stop spinning
STEPS, VOTES = 2, 5  # of the work, as sigma is: the defaults of `densepure-rt certify`
KEY: Key = (0, 0)  # public: nothing is certified with it
GPU_CALLS = 8  # batches in one timed call: enough for the next to be issued while one runs
STEADY, MOST_CALLS = 0.02, 1000  # seconds that a timing of a stage lasts, for which it calls it more than once
LOOP_SAMPLES = 256
ENGINE, EAGER, COMPILED = "engine", "PyTorch eager", "torch.compile"
NETWORK = "eager, UNet alone"

Timing = Callable[[], float]  # does its work and says how many seconds it took
Seconds = NDArray[np.float64]  # [rounds]
Feed = Sequence[Tensor]  # of a step graph


@dataclass(frozen=True)
class StepWork:
    """The step to be timed: after noise `sigma`, round by round, `compile`: by torch.compile too."""

    sigma: float = 0.5
    rounds: int = ROUNDS
    compile: bool = True


DEFAULT = StepWork()


@dataclass(frozen=True)
class Spread:
    median: float
    lower: float  # quartiles
    upper: float


@dataclass(frozen=True)
class Route:
    """A way to take a step. rounds: seconds per image, round by round.

    engine_speedup: how many times as fast the engine is, round by round. gflops: a second, of the UNet. of_peak: their
    share of the measured float32 peak. absent: why there is nothing of all that.
    """

    name: str
    rounds: tuple[float, ...] = ()
    seconds: Spread | None = None
    engine_speedup: Spread | None = None
    gflops: float | None = None
    of_peak: float | None = None
    absent: str | None = None


@dataclass(frozen=True)
class Stage:
    """A part of one vote of one step: seconds an image with a single caller, and its share of their sum."""

    name: str
    seconds: Spread
    share: float


@dataclass(frozen=True)
class Benchmark:
    """The result of a benchmark. An image is one item of a batch; a route is timed over `calls` batches at once.

    gflop: of one image, two operations a multiply-add; None where PyTorch does not run the model itself. peak: GFLOP/s
    in float32 by what reached it, on the same threads in the same run. relative_l2: of the engine's next means, against
    PyTorch's.
    """

    subject: Subject
    machine: Machine
    batch: int
    calls: int
    threads: int
    rounds: int
    clock: Clock
    sigma: float
    routes: tuple[Route, ...]
    stages: tuple[Stage, ...]
    gflop: Mapping[str, float | None]
    peak: Mapping[str, float]
    relative_l2: float
    load: Load


def bench(
    models: Models,
    engine: EngineRun,
    pixels: NDArray[np.uint8],
    work: StepWork = DEFAULT,
    say: Callable[[str], None] = lambda line: None,
) -> Benchmark:
    """Time the engines against the PyTorch models that they were exported from.

    pixels: uint8 [n, C, H, W], what is noised and denoised.

    Raises UsageError when the engines are of other models, EnvironmentFault when they or PyTorch cannot run here.
    """
    unet, classifier = models
    engine.refuse_impossible()
    if work.rounds < 1:
        raise UsageError(f"`rounds` {work.rounds}: one is the least, {ROUNDS} give a median with quartiles")
    refuse_other_models(*models, engine.bundle)
    on_gpu = engine.on_gpu()
    clock: Clock = "events" if on_gpu else "core" if engine.cores == 1 else "wall"
    chain = unet.chain(work.sigma, STEPS)
    before, average = gpu_state() if on_gpu else {}, load_average()
    with engine.opened(say) as device:
        worker = Worker(device, chain, pixels)
        calls = GPU_CALLS if on_gpu else device.in_flight
        feeds = [[part.to("cuda") for part in feed] if on_gpu else feed for feed in worker.feeds()]
        say("measuring the peak")
        peak = measured_peak(clock)
        timings, absent, relative_l2 = routes(unet, worker, feeds, calls, work.compile, clock, say)
        say(f"timing {work.rounds} rounds of {', '.join(timings)}")
        others = OtherLoad()
        seconds = {name: found / (calls * device.batch) for name, found in interleaved(timings, work.rounds).items()}
        other_load, after = others.cores(), gpu_state() if on_gpu else {}
        peak = {name: max(found, peak[name]) for name, found in measured_peak(clock).items()}
        say("timing the stages")
        stages = staged(unet, engine, worker, pixels, work.rounds, clock)
        gflop = {
            "UNet": giga_operations(unet.network, torch.zeros(1, *unet.image), torch.ones(1)),
            "classifier": None
            if classifier.onnx
            else giga_operations(classifier.network, torch.zeros(1, *classifier.image)),
        }
        return Benchmark(
            subject=Subject.of(engine.bundle, device),
            machine=Machine.this(on_gpu),
            batch=device.batch,
            calls=calls,
            threads=engine.cores,
            rounds=work.rounds,
            clock=clock,
            sigma=work.sigma,
            routes=(*compared(seconds, gflop["UNet"], max(peak.values())), *absent),
            stages=stages,
            gflop=gflop,
            peak=peak,
            relative_l2=relative_l2,
            load=Load((average, load_average()), other_load, (before, after)),
        )


class Worker:
    """Batches for every caller of a device, on slots that hold the states of a real run.

    Half the items of a batch are at the first step of the chain, half at the second, where the engine itself has taken
    them. Steps write to slots of their own, so that every call finds what the first one found.
    """

    def __init__(self, device: Device, chain: Chain, pixels: NDArray[np.uint8]) -> None:
        self.device, self.chain = device, chain
        self.total = device.batch * device.in_flight
        self.at = np.arange(device.batch) % len(chain)
        device.reserve(2 * self.total)
        self.handles = np.array([device.open_image(image, KEY, chain.sigma, chain.scale) for image in pixels])
        own, at = np.arange(self.total), np.tile(self.at, device.in_flight)
        for done in np.unique(at):
            items = own[at == done]
            walked = walk(device, chain, self.handles[items % len(self.handles)], items, slots=items)
            deque(itertools.islice(walked, 1 + done), 0)

    def batch(self, kind: Kind, caller: int = 0, step: int = 0) -> Batch:
        """Return a full batch. step: 0 to draw no vote noise, whatever timestep the items are at."""
        own = caller * self.device.batch + np.arange(self.device.batch)
        target, image = own + (self.total if kind == "step" else 0), self.handles[own % len(self.handles)]
        batch = Batch.of(self.chain, kind, own, target, image=image, sample=own, step=step)
        return dataclasses.replace(batch, t=self.chain.t[self.at], coef=self.chain.coef[self.at])

    def run(self, batches: Sequence[Batch], calls: int | None = None) -> None:
        """Run the batches in turn, `calls` of them, as many outstanding as the device takes."""
        outstanding = 0
        for call in range(len(batches) if calls is None else calls):
            if outstanding == self.device.in_flight:
                self.device.collect()
                outstanding -= 1
            self.device.submit(batches[call % len(batches)])
            outstanding += 1
        for _ in range(outstanding):
            self.device.collect()

    def feeds(self) -> list[Feed]:
        """The same batches of steps as PyTorch takes them: mean, std, noise, t, coef."""
        t, coef = torch.from_numpy(self.chain.t[self.at]), torch.from_numpy(self.chain.coef[self.at])
        found: list[Feed] = []
        for caller in range(self.device.in_flight):
            mean, std = map(torch.from_numpy, self.device.read(self.batch("step", caller).source.tolist()))
            found.append((mean, std, torch.zeros_like(mean), t, coef))
        return found

    def relative_l2(self, graph: nn.Module, feeds: Sequence[Feed]) -> float:
        """Return how far the engine's next means are from those of `graph`."""
        expected = torch.cat([graph(*feed)[0].cpu() for feed in feeds]).numpy()
        found, _ = self.device.read(range(self.total, 2 * self.total))
        return float(np.linalg.norm((found - expected).astype(np.float64)) / np.linalg.norm(expected))


def steady(stopwatch: Stopwatch, run: Callable[[], object]) -> Timing:
    """Seconds of one run, each time of so many that they take about STEADY."""
    run()
    calls = max(1, math.ceil(STEADY / max(stopwatch(run), STEADY / MOST_CALLS)))

    def repeated() -> None:
        for _ in range(calls):
            run()

    return lambda: stopwatch(repeated) / calls


def routes(
    unet: DiffusionModel,
    worker: Worker,
    feeds: Sequence[Feed],
    calls: int,
    compile: bool,
    clock: Clock,
    say: Callable[[str], None],
) -> tuple[dict[str, Timing], list[Route], float]:
    """Return the routes to be timed, those that cannot be, and how far the engine is from PyTorch."""
    network = copy.deepcopy(unet.network).to("cuda") if clock == "events" else unet.network
    graph = StepGraph(network, unet.clip, unet.learned_variance, unet.prediction).eval()
    stopwatch = STOPWATCHES[clock]
    batches = [worker.batch("step", caller) for caller in range(worker.device.in_flight)]

    def torch_timing(module: Callable[..., object], inputs: Sequence[Feed]) -> Timing:
        def run() -> None:
            for call in range(calls):
                module(*inputs[call % len(inputs)])

        return partial(stopwatch, run)

    worker.run(batches)
    relative_l2 = worker.relative_l2(graph, feeds)
    timings: dict[str, Timing] = {
        ENGINE: partial(by_the_wall if clock == "events" else stopwatch, partial(worker.run, batches, calls)),
        EAGER: torch_timing(graph, feeds),
        NETWORK: torch_timing(network, [network_inputs(unet, feed) for feed in feeds]),
    }
    absent = []
    if compile:
        say(f"compiling with {COMPILED}, which can take minutes")
        fast = compiled(graph, feeds[0])
        if isinstance(fast, str):
            absent.append(Route(COMPILED, absent=fast))
        else:
            timings[COMPILED] = torch_timing(fast, feeds)
    else:
        absent.append(Route(COMPILED, absent="left out"))
    return timings, absent, relative_l2


def network_inputs(unet: DiffusionModel, feed: Feed) -> Feed:
    """Return the network's inputs for such a feed of the step graph, in which nothing is drawn."""
    mean, _, _, t, coef = feed
    if unet.prediction == "denoiser":
        sigma, signal = coef[:, 0], coef[:, 1]
        return mean / signal[:, None, None, None], sigma / signal
    return mean, t


def compiled(graph: nn.Module, feed: Feed) -> Callable[..., object] | str:
    """The graph under torch.compile, called once so that it is compiled; or why it cannot be."""
    torch.compiler.reset()  # after some compilations of one class it would run eagerly, and say nothing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecations inside the compiler itself
            fast: Callable[..., object] = torch.compile(graph)
            fast(*feed)
    except Exception as error:  # no compiler, or a network that it cannot take; its errors have no common base
        return first_line(error)
    return fast


def interleaved(timings: Mapping[str, Timing], rounds: int) -> dict[str, Seconds]:
    """Call each once a round, and begin each round with another; after a warm-up."""
    for timing in timings.values():
        for _ in range(WARM_UP):
            timing()
    found: dict[str, list[float]] = {name: [] for name in timings}
    names = list(timings)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(PAUSE)
            found[name].append(timings[name]())
    return {name: np.array(seconds) for name, seconds in found.items()}


def spread(values: Seconds) -> Spread:
    lower, median, upper = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return Spread(median, lower, upper)


def compared(seconds: Mapping[str, Seconds], gflop: float | None, peak: float) -> list[Route]:
    """The routes, from seconds an image round by round. gflop: of one image. peak: GFLOP/s."""
    found = []
    for name, each in seconds.items():
        gflops = None if gflop is None else gflop / float(np.median(each))
        found.append(
            Route(
                name=name,
                rounds=tuple(each.tolist()),
                seconds=spread(each),
                engine_speedup=None if name == ENGINE else spread(each / seconds[ENGINE]),
                gflops=gflops,
                of_peak=None if gflops is None else gflops / peak,
            )
        )
    return found


class Echo(nn.Module):
    """In a UNet's place: gives back what it is given, twice where the UNet learns its variance."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies = copies

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([x] * self.copies, 1) if self.copies > 1 else x


def without_network(unet: DiffusionModel, bundle: Bundle, folder: Path) -> Bundle:
    """The bundle with a step engine, written into `folder`, that has no network: float32, as every engine's update."""
    content = step_onnx(dataclasses.replace(unet, network=Echo(2 if unet.learned_variance else 1)))
    path = folder / "update.onnx"
    path.write_bytes(content)
    file = FileRef(path.name, hashlib.sha256(content).hexdigest())
    sidecar = dataclasses.replace(bundle.unet, file=file, data=None, precision="fp32", accuracy=None)
    return Bundle(sidecar, bundle.classifier, path, bundle.classifier_path)


def staged(
    unet: DiffusionModel, engine: EngineRun, worker: Worker, pixels: NDArray[np.uint8], rounds: int, clock: Clock
) -> tuple[Stage, ...]:
    """The stages of one vote of one step, by a single caller: on a CPU in seconds of its core.

    Of ONNX engines the parts around the network are timed on the same device with a step graph that has no network, so
    that no small part is the difference of two large times. A plan has all of a step in one graph, and there the update
    and the slots are counted to the UNet. "slots and padding" is gather, pad, scatter and the hand-over to the caller;
    "loop" is what puts work items into batches.
    """
    with ExitStack() as stack:
        around, update = None, None
        if engine.bundle.unet.plan is None:
            from densepure_rt.runtime.onnx_device import CPU, Network, Place  # with plans ONNX Runtime need not be here

            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            empty = without_network(unet, engine.bundle, folder)
            device = stack.enter_context(closing(open_device(empty, worker.device.batch, 1, engine.provider)))
            around = Worker(device, worker.chain, pixels)
            place = CPU if engine.provider == "cpu" else Place(engine.provider, device.batch)
            graph = Network(empty.unet_path, empty.unet, STEP_INPUTS, STEP_OUTPUTS, place)
            feed = {name: part.numpy() for name, part in zip(STEP_INPUTS, around.feeds()[0], strict=True)}
            update = partial(graph, feed)
        return stages_of(worker, around, update, rounds, by_the_core if clock != "events" else by_the_wall)


def stages_of(
    worker: Worker, around: Worker | None, update: Callable[[], object] | None, rounds: int, stopwatch: Stopwatch
) -> tuple[Stage, ...]:
    """around: a worker whose step graph has no network. update: that graph alone."""

    def one(by: Worker, kind: Kind, step: int = 0) -> Callable[[], object]:
        return partial(by.run, [by.batch(kind, 0, step)])

    batch, small = worker.device.batch, around or worker
    runs: dict[str, Callable[[], object]] = {
        "smooth": one(worker, "smooth"),
        "step": one(worker, "step"),
        "classify": one(worker, "classify"),
        "undrawn": one(small, "step"),
        "drawn": one(small, "step", 1),
        "vote": partial(counted, batch),
        "loop": partial(looped, Idle(batch), worker.chain, VOTES, LOOP_SAMPLES),
    }
    if update is not None:
        runs["update"] = update
    timings = {name: steady(stopwatch, run) for name, run in runs.items()}
    found = interleaved(timings, rounds)
    parts = {"smoothing noise": found["smooth"] / batch, "vote noise": (found["drawn"] - found["undrawn"]) / batch}
    if around is None:
        parts["UNet, update, slots"] = found["step"] / batch
    else:
        parts["UNet"] = (found["step"] - found["undrawn"]) / batch
        parts["update"] = found["update"] / batch
        parts["slots and padding"] = (found["undrawn"] - found["update"]) / batch
    parts["classifier"] = found["classify"] / batch
    parts["vote"] = found["vote"] / counted(batch)
    votes = sum(outcome.votes for outcome in looped(Idle(batch), worker.chain, VOTES, LOOP_SAMPLES))
    parts["loop"] = found["loop"] / votes - parts["vote"]
    spreads = {name: spread(seconds) for name, seconds in parts.items()}
    total = sum(max(0.0, part.median) for part in spreads.values())  # below 0 is a difference lost in the noise
    return tuple(Stage(name, part, max(0.0, part.median) / total) for name, part in spreads.items())


def counted(batch: int) -> int:
    """Count the ballots that a batch completes when all votes agree; how many were cast."""
    ballot = Ballot(VOTES)
    labels = np.full((VOTES, max(1, batch // ballot.needed)), UNCAST, np.int32)
    labels[: ballot.needed] = 0
    ballot.count(labels)
    return ballot.needed * labels.shape[1]


def giga_operations(network: nn.Module, *example: Tensor) -> float | None:
    """GFLOP of one call, two for each multiply-add of its convolutions and matrix products, attention's too."""
    # On a CPU attention's fused kernel is not counted (torch 2.13); the plain one is.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network.eval()(*example)
    return counter.get_total_flops() / 1e9 or None  # of a network that another library runs nothing is counted
