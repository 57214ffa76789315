"""`densepure-rt bench --procedure`: a whole certification as it was published, and as it is here, in one run.

The published procedure (Xiao et al. 2023 and its code) sends each of n0 + n noisy copies of an image through K reverse
runs of b steps, which have the noise in common and share no work, classifies what comes out, takes the plurality of the
K labels and certifies the counts as Cohen et al. 2019 do. At its own size that is 40 million UNet calls an image. So it
is run whole at a small size, and at its own size it is priced by the seconds that its calls took there.

Ours is run for real, on the same images and weights. Both are asked whether the radius sigma holds, of whatever class:
labels only tell afterwards who was right. The published procedure could name a larger radius too, ours then could not.

With one thread seconds are CPU time, which other programs hardly stretch; with more they are the wall's, on an idle
machine.

This module is long because both procedures and what prices them are read against each other.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from densepure_rt.errors import UsageError
from densepure_rt.export.compare.engine_run import EngineRun, Subject
from densepure_rt.export.compare.machine import Clock, Load, Machine, OtherLoad, gpu_state, load_average
from densepure_rt.export.models.classifiers import ClassifierModel
from densepure_rt.export.models.reference import reverse_step
from densepure_rt.export.models.sources import Models, refuse_other_models
from densepure_rt.export.models.unets import DiffusionModel
from densepure_rt.images.datasets import LabelledImage
from densepure_rt.keys import seeded_secret
from densepure_rt.rounding import exact
from densepure_rt.runtime.bundle import Bundle
from densepure_rt.runtime.device import Device, Kind
from densepure_rt.runtime.metered_device import MeteredDevice
from densepure_rt.runtime.schedule import Chain, Coefficients
from densepure_rt.smoothing.certificate import Certificate, certified_accuracy
from densepure_rt.smoothing.classifier import SmoothedClassifier
from densepure_rt.smoothing.fixed import FixedRule
from densepure_rt.smoothing.samplers import OnDevice
from densepure_rt.smoothing.settings import PAPER, Settings

SIGMA = 0.25  # the smallest of Xiao et al. 2023
SEED = 0
OURS = dataclasses.replace(PAPER, sigma=SIGMA, n=10_000, method="sequential")
# 64 samples are two full batches, and enough to certify the radius sigma when they all agree; of the default model that
# is 2.4 s an image on one core (`densepure-rt bench --procedure --threads 1`).
SMALL = Settings(sigma=SIGMA, steps=2, votes=3, n0=8, n=56, method="fixed")
CALLS: tuple[Kind, Kind] = ("step", "classify")
M = TypeVar("M", DiffusionModel, ClassifierModel)
T = TypeVar("T")
Now = Callable[[], float]  # reads a clock, in seconds
Labels = NDArray[np.int64]


class Watch(Protocol):
    """Shows how far `work` is, item by item."""

    def __call__(self, work: Iterable[T], total: int) -> Iterable[T]: ...


def unwatched(work: Iterable[T], total: int) -> Iterable[T]:
    return work


@dataclass(frozen=True)
class Procedure:
    """The mean cost of one image by a procedure.

    samples: noisy copies that were drawn, those in vain among them. unet_calls, classifier_calls: for one noisy copy
    each, however many share a batch. seconds: of the wall, or of one core, see above. certified: the share of images
    certified for their own label at the radius sigma; None where that was not run, where the labels are not known, or
    where n cannot reach that radius.
    """

    settings: Settings
    samples: float
    unet_calls: float
    classifier_calls: float
    seconds: float
    certified: float | None = None


@dataclass(frozen=True)
class CallSeconds:
    """Seconds of one image in a batch. unet: of a reverse step, with its draw; classifier: of a label."""

    unet: float
    classifier: float

    def priced(self, settings: Settings) -> Procedure:
        """The published procedure at these settings, by its calls alone: K runs of b steps and a label for each sample.

        What else it does (drawing smoothing noise, merging, certifying) is not charged.
        """
        samples = settings.n0 + settings.n
        runs = samples * settings.votes
        steps = runs * settings.steps
        return Procedure(settings, samples, steps, runs, steps * self.unet + runs * self.classifier)


@dataclass(frozen=True)
class Factors:
    """The factors of the ratio of the published procedure to ours.

    The first three multiply to the ratio of UNet calls, all four to that of time. Samples are counted as they are
    drawn, so that those drawn in vain count against us.

    statistics: samples of an image. shared_step: UNet calls of a sample whose K votes share nothing, by those of one
    whose votes share the first step: K b / (1 + K (b - 1)). ballots: the latter, by the calls that a sample took, as
    votes end when the winner is certain. engine: seconds by UNet call, with all else that goes with one: draws and
    labels; of ours also smoothing noise, batches that are not full, scheduling and statistics.
    """

    statistics: float
    shared_step: float
    ballots: float
    engine: float


@dataclass(frozen=True)
class ProcedureBenchmark:
    """The result of comparing whole procedures.

    unet_call_ratio, time_ratio: `published` by `ours`, an image. small: the published procedure as it was run.
    published: priced by `call_seconds`. predicted_seconds: what the same pricing gives for an image of `small`, to hold
    against what it took. samples_judged: of an image of ours, those that its certificate rests on. fill: the share of
    the engine's batch slots that held work, by kind of batch. main_thread: its share of the process's CPU time while
    ours ran; it schedules and does the statistics, and the device has threads of its own. load: while `small` ran, and
    while ours did.
    """

    unet_call_ratio: float
    time_ratio: float
    factors: Factors
    small: Procedure
    published: Procedure
    ours: Procedure
    call_seconds: CallSeconds
    predicted_seconds: float
    samples_judged: float
    fill: Mapping[str, float]
    main_thread: float
    images: int
    sigma: float
    seed: int
    subject: Subject
    batch: int
    threads: int
    clock: Clock
    machine: Machine
    load: tuple[Load, Load]


def compare(
    models: Models,
    engine: EngineRun,
    images: Sequence[LabelledImage],
    settings: Settings = OURS,
    *,
    small: Settings = SMALL,
    seed: int = SEED,
    say: Callable[[str], None] = lambda line: None,
    watch: Watch = unwatched,
) -> ProcedureBenchmark:
    """Certify the images by the published procedure, small, then by ours, and price the published one at its own size.

    settings: ours, of which sigma is the radius that is asked about; sigma, steps and votes are those of the priced one
    too. seed: of both, public.

    Raises UsageError when that is impossible or the engines are of other models, EnvironmentFault when they or PyTorch
    cannot run here.
    """
    engine.refuse_impossible()
    if models.unet.prediction == "none" or settings.steps < 1:
        raise UsageError(
            "`procedure` compares how often the UNet is called: it needs a diffusion network and `steps` 1 or more"
        )
    refuse_other_models(*models, engine.bundle)
    sigma, steps, votes = settings.sigma, settings.steps, settings.votes
    small = dataclasses.replace(small, sigma=sigma)
    published = dataclasses.replace(PAPER, sigma=sigma, steps=steps, votes=votes)
    settings = deciding_sigma(models.unet, settings)
    on_gpu = engine.on_gpu()
    clock: Clock = "core" if engine.cores == 1 and not on_gpu else "wall"
    now = reading(clock, on_gpu)
    with engine.opened(say) as device:
        say(f"the published procedure in PyTorch, small: {size_of(small)}")
        there = Models(on_the_gpu(models.unet), on_the_gpu(models.classifier)) if on_gpu else models
        (run, calls), load = with_load(
            on_gpu, lambda: run_published(there, images, small, device.batch, seed, now, watch)
        )
        say(f"ours on the engine: n {settings.n:,} at most, K {votes}, b {steps}")
        ours, our_load = with_load(on_gpu, lambda: run_ours(engine.bundle, device, images, settings, seed, now, watch))
        priced = calls.priced(published)
        return ProcedureBenchmark(
            unet_call_ratio=priced.unet_calls / ours.procedure.unet_calls,
            time_ratio=priced.seconds / ours.procedure.seconds,
            factors=factors_of(priced, ours.procedure),
            small=run,
            published=priced,
            ours=ours.procedure,
            call_seconds=calls,
            predicted_seconds=calls.priced(small).seconds,
            samples_judged=ours.samples_judged,
            fill=ours.fill,
            main_thread=ours.main_thread,
            images=len(images),
            sigma=sigma,
            seed=seed,
            subject=Subject.of(engine.bundle, device),
            batch=device.batch,
            threads=engine.cores,
            clock=clock,
            machine=Machine.this(on_gpu),
            load=(load, our_load),
        )


def with_load(on_gpu: bool, run: Callable[[], T]) -> tuple[T, Load]:
    """Call `run`; return its result, and how busy the machine was meanwhile."""

    def gpu() -> dict[str, str | None]:
        return gpu_state() if on_gpu else {}

    average, state, others = load_average(), gpu(), OtherLoad()
    found = run()
    busy = others.cores()
    return found, Load((average, load_average()), busy, (state, gpu()))


def size_of(settings: Settings) -> str:
    """Return how large a run of the published procedure is."""
    return f"n0 {settings.n0:,}, n {settings.n:,}, K {settings.votes}, b {settings.steps}"


def deciding_sigma(unet: DiffusionModel, settings: Settings) -> Settings:
    """Ours, deciding the one radius sigma. Raises UsageError when n agreeing samples do not certify it."""
    settings = dataclasses.replace(settings, radii=(settings.sigma,))

    def enough(samples: int) -> bool:
        rule = dataclasses.replace(settings, n=samples).rule(math.prod(unet.image), labelled=False)
        return (rule.reach() or 0.0) >= settings.sigma

    unet.chain(settings.sigma, settings.steps)  # refuses a sigma that no table should be made for
    if not enough(settings.n):
        least = next(samples for samples in itertools.count(settings.n + 1) if enough(samples))
        raise UsageError(
            f"`n` {settings.n}: that many samples cannot certify the radius {exact(settings.sigma)}, even when all "
            f"agree: ask for `n` {least} at least"
        )
    return settings


def factors_of(published: Procedure, ours: Procedure) -> Factors:
    steps, votes = ours.settings.steps, ours.settings.votes
    sharing = 1 + votes * (steps - 1)  # UNet calls of a sample that casts all its votes
    return Factors(
        statistics=published.samples / ours.samples,
        shared_step=votes * steps / sharing,
        ballots=sharing / (ours.unet_calls / ours.samples),
        engine=(published.seconds / published.unet_calls) / (ours.seconds / ours.unet_calls),
    )


def reading(clock: Clock, on_gpu: bool) -> Now:
    """Reads the clock, in seconds; on a GPU once that has done all that it was given."""

    def after_the_gpu() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return after_the_gpu if on_gpu else time.process_time if clock == "core" else time.perf_counter


class Meter:
    """Images and seconds by the kind of call."""

    def __init__(self, now: Now) -> None:
        self.now = now
        self.images: dict[Kind, int] = defaultdict(int)
        self.seconds: dict[Kind, float] = defaultdict(float)

    @contextmanager
    def call(self, kind: Kind, images: int) -> Iterator[None]:
        started = self.now()
        yield
        self.seconds[kind] += self.now() - started
        self.images[kind] += images

    @property
    def each(self) -> CallSeconds:
        unet, classifier = (self.seconds[kind] / self.images[kind] for kind in CALLS)
        return CallSeconds(unet, classifier)


def on_the_gpu(model: M) -> M:
    """A copy of the model whose network is there. Not run on a GPU yet."""
    return dataclasses.replace(model, network=copy.deepcopy(model.network).to("cuda"))


class PublishedProcedure:
    """The published procedure in PyTorch, an operation at a time, and in `meter` what its calls take.

    Each of the K runs has a generator of smoothing noise, all seeded alike, so that all runs see the same noisy images,
    and a generator of reverse noise, seeded with the run's number. Neither is seeded anew for an image or a batch. As
    published, run 0 with seed 0 draws both from equal streams.
    """

    def __init__(self, models: Models, settings: Settings, batch: int, seed: int, now: Now) -> None:
        (self.unet, self.classifier), self.settings, self.batch = models, settings, batch
        self.chain = self.unet.chain(settings.sigma, settings.steps)
        self.rule = FixedRule(n0=settings.n0, n=settings.n, alpha=settings.alpha, sigma=settings.sigma)
        self.meter = Meter(now)
        self.where = next((weights.device for weights in self.unet.network.parameters()), torch.device("cpu"))
        self.runs = [(self.seeded(seed), self.seeded(run)) for run in range(settings.votes)]

    def seeded(self, seed: int) -> Generator:
        return Generator(self.where).manual_seed(seed)

    def certify(self, image: LabelledImage) -> Certificate:
        """Cohen's certificate of the plurality labels; the first n0 samples select the class."""
        voted, n0 = (
            plurality([self.run_labels(image.pixels, *generators) for generators in self.runs]),
            self.settings.n0,
        )
        selection, estimation = (
            np.bincount(part, minlength=len(self.classifier.class_names)) for part in (voted[:n0], voted[n0:])
        )
        return self.rule.certify(selection, estimation)

    def run_labels(self, pixels: NDArray[np.uint8], noise: Generator, reverse: Generator) -> list[int]:
        """The label of each of n0 + n samples by one whole run, in batches as full as can be."""
        clean = torch.tensor(pixels, device=self.where)
        labels: list[int] = []
        while left := self.settings.n0 + self.settings.n - len(labels):
            x = noisy(clean, self.chain, min(self.batch, left), noise)
            labels += self.purified_labels(x, reverse).tolist()
        return labels

    def purified_labels(self, x: Tensor, reverse: Generator) -> Tensor:
        """The labels, int64 [B], of states x [B, C, H, W] after all steps of the chain."""
        for t, coefficients in zip(self.chain.t.tolist(), self.chain.coef.tolist(), strict=True):
            with self.meter.call("step", len(x)):
                told = torch.full((len(x),), t, device=x.device)
                mean, std = reverse_step(self.unet, x, told, Coefficients(*coefficients))
                x = mean + std * torch.randn(x.shape, generator=reverse, device=x.device)  # std is 0 at the last step
        with self.meter.call("classify", len(x)):
            labels: Tensor = self.classifier.network(x).argmax(1)
        return labels


def noisy(clean: Tensor, chain: Chain, copies: int, generator: Generator) -> Tensor:
    """Noisy copies of an image, uint8 [C, H, W], as states of the chain: float32 [copies, C, H, W]."""
    noise = torch.randn((copies, *clean.shape), generator=generator, device=clean.device)
    return chain.scale * (2 * (clean / 255 + chain.sigma * noise) - 1)


def plurality(runs: Sequence[Sequence[int]]) -> Labels:
    """The label of each sample that most runs gave it; of equals, the one that the earliest run gave. int64 [samples].

    As the published code merges its runs: max(labels, key=labels.count).
    """
    return np.array([max(labels, key=labels.count) for labels in zip(*runs, strict=True)], np.int64)


def run_published(
    models: Models,
    images: Sequence[LabelledImage],
    settings: Settings,
    batch: int,
    seed: int,
    now: Now = time.perf_counter,
    watch: Watch = unwatched,
) -> tuple[Procedure, CallSeconds]:
    """The published procedure on all images, whole, and what its calls took of that."""
    once = dataclasses.replace(settings, votes=1)
    PublishedProcedure(models, once, batch, seed, now).certify(images[0])  # warms PyTorch up
    procedure = PublishedProcedure(models, settings, batch, seed, now)
    started = now()
    certificates = [procedure.certify(image) for image in watch(images, len(images))]
    seconds, calls = now() - started, procedure.meter.images
    taken = Procedure(
        settings=settings,
        samples=settings.n0 + settings.n,
        unet_calls=calls["step"] / len(images),
        classifier_calls=calls["classify"] / len(images),
        seconds=seconds / len(images),
        certified=certified_at(settings.sigma, images, certificates, procedure.rule.reach()),
    )
    return taken, procedure.meter.each


def certified_at(
    radius: float, images: Sequence[LabelledImage], certificates: Sequence[Certificate], reach: float | None
) -> float | None:
    """The share of images that are certified for their own label; None where one has none, or beyond reach."""
    if any(image.label is None for image in images):
        return None
    pairs = [(image.label, certificate) for image, certificate in zip(images, certificates, strict=True)]
    return certified_accuracy(pairs, [radius], reach)[0]


@dataclass(frozen=True)
class OurRun:
    """See ProcedureBenchmark."""

    procedure: Procedure
    samples_judged: float
    fill: dict[str, float]
    main_thread: float


def run_ours(
    bundle: Bundle,
    device: Device,
    images: Sequence[LabelledImage],
    settings: Settings,
    seed: int,
    now: Now = time.perf_counter,
    watch: Watch = unwatched,
) -> OurRun:
    """Our procedure on all images, and what it took, as counted at the device: with all that was drawn in vain."""
    metered = MeteredDevice(device)
    smoothed = SmoothedClassifier(bundle, OnDevice(cast(Device, metered)), seeded_secret(seed))
    unlabelled = [dataclasses.replace(image, label=None) for image in images]
    started, main, process = now(), time.thread_time(), time.process_time()
    certified = list(watch(smoothed.certify_each(unlabelled, settings), len(images)))
    seconds, main, process = now() - started, time.thread_time() - main, time.process_time() - process
    certificates, items = [found.certificate for found in certified], metered.items
    taken = Procedure(
        settings=settings,
        samples=items["smooth"] / len(images),
        unet_calls=items["step"] / len(images),
        classifier_calls=items["classify"] / len(images),
        seconds=seconds / len(images),
        certified=certified_at(settings.sigma, images, certificates, settings.sigma),  # which `deciding_sigma` saw to
    )
    return OurRun(
        procedure=taken,
        samples_judged=sum(found.cost.samples for found in certified) / len(images),
        fill={kind: items[kind] / (device.batch * batches) for kind, batches in metered.batches.items()},
        main_thread=main / process,
    )
