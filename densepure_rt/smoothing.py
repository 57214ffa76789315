"""Joins the loop, the ballot and the rule: an image in, a `Certificate` out. It is what the command line calls."""

from __future__ import annotations

import hashlib
import math
import secrets
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, cast, get_args

import numpy as np
from numpy.typing import NDArray

from densepure_rt.certification import Certificate, FixedRule, check_sampling, predicted
from densepure_rt.datasets import LabelledImage
from densepure_rt.errors import UsageError
from densepure_rt.runtime.bundle import Bundle, open_bundle
from densepure_rt.runtime.device import (
    MAX_BATCH,
    MAX_THREADS,
    NOT_FINITE,
    Device,
    Provider,
    available_cores,
    open_device,
)
from densepure_rt.runtime.noise import Purpose, image_key, smoothing_law
from densepure_rt.runtime.reverse import Outcome, decide
from densepure_rt.runtime.schedule import Chain, TimestepRule, make_chain
from densepure_rt.voting import Ballot

SECRET_BYTES = 32
MAX_VOTES = 1000  # published work uses up to 40


@dataclass(frozen=True)
class Settings:
    """What is certified, apart from the engines.

    sigma: std of the smoothing noise in [0, 1] pixel units. timestep_rule: see `make_chain`; None for the one that the
    engine's sidecar names.
    """

    sigma: float = 0.5
    steps: int = 2
    votes: int = 5
    n0: int = 100
    n: int = 1000
    alpha: float = 0.001
    timestep_rule: TimestepRule | None = None

    def __post_init__(self) -> None:
        check_sampling(self.n0, self.n, self.alpha)
        if not 1 <= self.votes <= MAX_VOTES:
            raise UsageError(f"votes is a count from 1 to {MAX_VOTES}, got {self.votes}")
        if self.steps < 0:
            raise UsageError(f"steps is a count of reverse steps, got {self.steps}")
        if self.timestep_rule not in (None, *get_args(TimestepRule)):
            raise UsageError(f"--timestep-rule {self.timestep_rule} is not known: {', '.join(get_args(TimestepRule))}")

    @property
    def effective(self) -> Settings:
        """With fewer than two steps nothing is random after the smoothing noise: all votes would be the same one."""
        return replace(self, votes=1) if self.steps < 2 else self

    def rule(self, pixels: int) -> FixedRule:
        """Cohen's rule, its alpha charged for the finite precision of the noise on images of so many pixels."""
        return FixedRule(self.n0, self.n, self.alpha, self.n * pixels * smoothing_law(self.sigma).total_variation)

    def ballot(self) -> Ballot:
        return Ballot(self.effective.votes)


PAPER = Settings(steps=10, votes=40, n0=100, n=100_000)  # Xiao et al. 2023: K = 40, b = 10, N = 100,000


@dataclass
class Cost:
    """What an image took."""

    unet_calls: int = 0
    classifier_calls: int = 0
    not_finite: int = 0
    seconds: float = 0.0


class Certified(NamedTuple):
    image: LabelledImage
    certificate: Certificate
    cost: Cost


class Predicted(NamedTuple):
    """label: None when the vote among the n samples is too close. votes: how many samples chose each class."""

    image: LabelledImage
    label: int | None
    votes: NDArray[np.int64]
    cost: Cost


def seeded_secret(seed: int) -> bytes:
    """The secret of a public seed: for reproduction, not against an adversary."""
    return hashlib.sha256(f"densepure-rt public seed {seed}".encode()).digest()


def new_secret() -> bytes:
    return secrets.token_bytes(SECRET_BYTES)


def commitment(secret: bytes) -> str:
    """What may be published before the first sample: SHA-256 of the secret."""
    return hashlib.sha256(secret).hexdigest()


class SmoothedClassifier:
    """A bundle on a device, ready to certify: a context manager.

    secret: what all noise is keyed with. Noise belongs to (secret, image, sigma): the same image under the same secret
    gets the same certificate.
    """

    def __init__(self, bundle: Bundle, device: Device, secret: bytes | None = None) -> None:
        self.bundle, self.device = bundle, device
        if secret is not None and len(secret) < SECRET_BYTES:
            raise UsageError(f"a secret is {SECRET_BYTES} bytes or more, got {len(secret)}")
        self.secret = new_secret() if secret is None else secret
        self._busy = False  # two iterations would share slots

    def __enter__(self) -> SmoothedClassifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.device.close()

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.bundle.classifier.class_names

    def chain(self, settings: Settings) -> Chain:
        unet = self.bundle.unet
        if unet.prediction == "none" and settings.steps:
            raise UsageError(
                f"{self.bundle.unet_path.name} holds no diffusion network, so there is nothing to take "
                f"{settings.steps} steps with: ask for --steps 0, plain randomized smoothing"
            )
        rule = settings.timestep_rule or unet.timestep_rule
        return make_chain(unet.schedule, unet.variance, settings.sigma, settings.steps, rule)

    def certify(
        self,
        image: NDArray[np.uint8],
        *,
        sigma: float = Settings.sigma,
        steps: int = Settings.steps,
        votes: int = Settings.votes,
        n0: int = Settings.n0,
        n: int = Settings.n,
        alpha: float = Settings.alpha,
    ) -> Certificate:
        """The certificate of one image, uint8 [C, H, W]."""
        settings = Settings(sigma, steps, votes, n0, n, alpha)
        return next(iter(self.certify_each([self._checked(image, 0)], settings))).certificate

    def predict(
        self,
        images: Iterable[NDArray[np.uint8]],
        *,
        sigma: float = Settings.sigma,
        steps: int = Settings.steps,
        votes: int = Settings.votes,
        n: int = Settings.n0,
        alpha: float = Settings.alpha,
    ) -> list[int | None]:
        """The smoothed classifier's label of each image, uint8 [C, H, W], or None where n samples leave it open.

        Each label is right, or None, with probability at least 1 - alpha for images chosen without knowing the secret.
        """
        settings = Settings(sigma, steps, votes, n=n, alpha=alpha)
        labelled = (self._checked(image, idx) for idx, image in enumerate(images))
        return [found.label for found in self.predict_each(labelled, settings)]

    def certify_each(self, images: Iterable[LabelledImage], settings: Settings) -> Iterator[Certified]:
        """The certificates of `images`, in their order. Memory does not grow with n or with the number of images."""
        rule = settings.rule(math.prod(self.bundle.unet.image))
        phases: tuple[tuple[Purpose, int], ...] = (("select", settings.n0), ("certify", settings.n))
        for image, (selection, estimation), cost in self._count(images, settings, phases):
            yield Certified(image, rule.certify(selection, estimation, settings.sigma), cost)

    def predict_each(self, images: Iterable[LabelledImage], settings: Settings) -> Iterator[Predicted]:
        """The labels of `images` from n samples each, in their order (Cohen et al. 2019, PREDICT)."""
        level = settings.rule(math.prod(self.bundle.unet.image)).test_level
        for image, (votes,), cost in self._count(images, settings, (("predict", settings.n),)):
            label = predicted(np.append(votes, cost.not_finite), level)  # what was not finite is a rival, not dropped
            yield Predicted(image, None if label == len(votes) else label, votes, cost)

    def _checked(self, image: NDArray[np.uint8], idx: int) -> LabelledImage:
        if image.dtype != np.uint8 or image.shape != self.bundle.unet.image:
            raise UsageError(
                f"an image must be uint8 {list(self.bundle.unet.image)} (channels, height, width), "
                f"got {image.dtype} {list(image.shape)}"
            )
        return LabelledImage(idx, image, None)

    def _count(
        self, images: Iterable[LabelledImage], settings: Settings, phases: tuple[tuple[Purpose, int], ...]
    ) -> Iterator[tuple[LabelledImage, list[NDArray[np.int64]], Cost]]:
        """For each image, how many of each phase's samples were voted into each class."""
        chain = self.chain(settings)
        under_way: deque[_UnderWay] = deque()  # oldest first

        def work() -> Iterator[tuple[int, int]]:
            for image in images:
                handles = [self._open(image, purpose, settings.sigma, chain) for purpose, _ in phases]
                samples = [samples for _, samples in phases]
                under_way.append(_UnderWay(image, handles, sum(samples), len(self.class_names)))
                for handle, count in zip(handles, samples, strict=True):
                    yield from ((handle, sample) for sample in range(count))

        if self._busy:
            raise UsageError("this classifier is already at work: finish or close that iteration, or load another one")
        self._busy = True
        started = time.perf_counter()
        try:
            with closing(decide(self.device, chain, work(), settings.ballot)) as outcomes:
                for outcome in outcomes:
                    oldest = under_way[0]
                    oldest.add(outcome)
                    if oldest.missing == 0:
                        self._close(under_way.popleft())
                        oldest.cost.seconds, started = time.perf_counter() - started, time.perf_counter()
                        yield oldest.image, oldest.counts, oldest.cost
        finally:
            for unfinished in under_way:
                self._close(unfinished)
            self._busy = False

    def _open(self, image: LabelledImage, purpose: Purpose, sigma: float, chain: Chain) -> int:
        key = image_key(self.secret, purpose, sigma, image.pixels)
        return self.device.open_image(image.pixels, key, sigma, chain.scale)

    def _close(self, image: _UnderWay) -> None:
        for handle in image.handles:
            self.device.close_image(handle)


class _UnderWay:
    """An image whose samples are being voted on: a handle and a tally of labels for each phase."""

    def __init__(self, image: LabelledImage, handles: list[int], samples: int, classes: int) -> None:
        self.image, self.handles, self.missing = image, handles, samples
        self.counts = [np.zeros(classes, np.int64) for _ in handles]
        self.cost = Cost()

    def add(self, outcome: Outcome) -> None:
        if outcome.label == NOT_FINITE:
            self.cost.not_finite += 1
        else:
            self.counts[self.handles.index(outcome.image)][outcome.label] += 1
        self.cost.unet_calls += outcome.unet_calls
        self.cost.classifier_calls += outcome.votes
        self.missing -= 1


def shipped_engine() -> Path:
    """The step engine that comes with the package."""
    return Path(str(files("densepure_rt"))) / "engines" / "unet.onnx"


def provider_of(name: str) -> Provider:
    """An ONNX Runtime provider by its name."""
    if name not in get_args(Provider):
        raise UsageError(f"--provider {name} is not known: {', '.join(get_args(Provider))}")
    return cast(Provider, name)


def load(
    engine: Path | str | None = None,
    classifier: Path | str | None = None,
    *,
    secret: bytes | None = None,
    batch: int | None = None,
    threads: int | None = None,
    provider: str = "cpu",
    engine_sha256: str | None = None,
    trust: bool = False,
) -> SmoothedClassifier:
    """The engine at `engine`, or the one that ships with the package, and its classifier, ready to certify.

    classifier: instead of the one that the engine's sidecar names. secret: 32 bytes, else new ones from the system.
    batch: items a call of the engine, else what suits it. threads: callers of the engine, else one for each core.
    provider: of ONNX Runtime, "cpu", "cuda" or "tensorrt". engine_sha256: what the engine must hash to. trust: take
    plans that have no sidecar.

    Raises UsageError, CheckFailed or EnvironmentFault; each says what to do next.
    """
    threads = available_cores() if threads is None else threads
    known = provider_of(provider)
    if not ((batch is None or 1 <= batch <= MAX_BATCH) and 1 <= threads <= MAX_THREADS):
        raise UsageError(
            f"batch and threads are counts from 1 up to {MAX_BATCH} and {MAX_THREADS}, got {batch} and {threads}: "
            f"change --batch or --threads"
        )
    bundle = open_bundle(
        shipped_engine() if engine is None else Path(engine),
        None if classifier is None else Path(classifier),
        engine_sha256,
        trust,
    )
    return SmoothedClassifier(bundle, open_device(bundle, batch, threads, known), secret)
