"""Joins the loop, the ballot and the rule: an image in, a `Certificate` out. It is what the command line calls."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from densepure_rt import logs
from densepure_rt.errors import EnvironmentFault, UsageError
from densepure_rt.images.datasets import LabelledImage
from densepure_rt.images.formats import size_text
from densepure_rt.images.given import ImageLike, Images, Layout, Watch, labelled, pixels_of, unwatched
from densepure_rt.keys import SECRET_BYTES, new_secret, seeded_secret, shared_key
from densepure_rt.runtime.bundle import Bundle, open_bundle, shipped_engine
from densepure_rt.runtime.device import CLOSED, MAX_BATCH, MAX_THREADS, Device
from densepure_rt.runtime.noise import image_key
from densepure_rt.runtime.open_device import default_threads, open_device, provider_of
from densepure_rt.runtime.schedule import Chain
from densepure_rt.smoothing.answers import Certified as Certified
from densepure_rt.smoothing.answers import Predicted as Predicted
from densepure_rt.smoothing.answers import prediction_of as prediction_of
from densepure_rt.smoothing.certificate import Certificate, Method
from densepure_rt.smoothing.decider import Decider, Phases
from densepure_rt.smoothing.fastest_batch import fastest_batch
from densepure_rt.smoothing.samplers import OnDevice, Sampler
from densepure_rt.smoothing.scheduling import ImageProgress, Journal, Scheduler
from densepure_rt.smoothing.settings import PREDICT_N, UNLIMITED, Budget, Settings

D = TypeVar("D", bound=Decider)
DEFAULT = Settings()


def chain_of(bundle: Bundle, settings: Settings) -> Chain:
    """The reverse steps of a bundle. Raises UsageError for steps without a network, or a sigma beyond its schedule."""
    unet = bundle.unet
    if unet.prediction == "none" and settings.steps:
        raise UsageError(
            f"{bundle.unet_path.name} holds no diffusion network, so there is nothing to take "
            f"{settings.steps} steps with: ask for 0 steps, plain randomized smoothing"
        )
    return unet.chain(settings.sigma, settings.steps, settings.timestep_rule)


class SmoothedClassifier(AbstractContextManager["SmoothedClassifier"]):
    """A bundle and what draws its samples, ready to certify: a context manager.

    secret: what all noise is keyed with. Noise belongs to (secret, image, sigma): the same image under the same secret
    gets the same certificate. failed: `idx` of the images of the last iteration that could not be sampled, and of which
    nothing was said; see `scheduling.LostSample`. scheduler: of the last iteration, None before the first.
    """

    def __init__(self, bundle: Bundle, sampler: Sampler, secret: bytes | None = None) -> None:
        self.bundle, self.sampler = bundle, sampler
        self.failed: list[int] = []
        self.scheduler: Scheduler[Any] | None = None
        if secret is not None and len(secret) < SECRET_BYTES:
            raise UsageError(f"a secret is {SECRET_BYTES} bytes or more, got {len(secret)}")
        self.secret = new_secret() if secret is None else secret
        self.closed = False
        self._busy_in: int | None = None  # the process that iterates: two iterations of one would share slots

    def __repr__(self) -> str:
        shape, classes = size_text(self.bundle.unet.image), len(self.class_names)
        return f"SmoothedClassifier({self.bundle.unet_path.name}, images {shape}, {classes} classes)"

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the engines. Safe to call twice; nothing can be asked of the classifier any more."""
        self.closed = True
        self.sampler.close()

    @property
    def device(self) -> Device:
        """That of this process. Raises UsageError where others draw the samples, or after `close`."""
        self._refuse_closed()
        if not isinstance(self.sampler, OnDevice):
            raise UsageError(
                "this needs an engine in this process, and a cluster draws the samples: open the classifier with load"
            )
        return self.sampler.device

    @property
    def busy(self) -> bool:
        """Say whether an iteration is under way in this process."""
        return self._busy_in == os.getpid()

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.bundle.classifier.class_names

    def name_classes(self, names: Sequence[str]) -> None:
        """Take other names for the classes, in their order. Raises UsageError for another number of them."""
        if len(names) != len(self.class_names):
            raise UsageError(f"{len(names)} class names were given, the classifier has {len(self.class_names)} classes")
        self.bundle = replace(self.bundle, classifier=replace(self.bundle.classifier, class_names=tuple(names)))

    def chain(self, settings: Settings) -> Chain:
        return chain_of(self.bundle, settings)

    def certify(
        self,
        image: ImageLike,
        *,
        layout: Layout = "CHW",
        sigma: float = Settings.sigma,
        steps: int = Settings.steps,
        votes: int = Settings.votes,
        method: Method = Settings.method,
        radii: Sequence[float] | None = None,
        n0: int = Settings.n0,
        n: int = Settings.n,
        alpha: float = Settings.alpha,
        budget: float = math.inf,
    ) -> Certificate:
        """Certify one image, every class being tested. budget: wall seconds.

        image: uint8 array or torch tensor of this `layout`, Pillow image, or the path of one.

        It has so many parameters because each is one of `Settings`, which a first call should not need to know.

        Raises EnvironmentFault when no worker of a cluster can draw its samples.
        """
        settings = Settings(
            sigma, steps, votes, n0, n, alpha, method=method, radii=None if radii is None else tuple(radii)
        )
        images = [LabelledImage(0, pixels_of(image, self.bundle.unet.image, layout), None)]
        settings.check_reach(images[0].pixels.size, labelled=False)
        for certified in self.certify_each(images, settings, Budget(image=budget)):
            return certified.certificate
        raise EnvironmentFault("the image has failed: nothing can draw its samples")

    def certify_batch(
        self,
        images: Images,
        labels: Iterable[int | None] | None = None,
        settings: Settings = DEFAULT,
        *,
        layout: Layout = "CHW",
        budget: Budget = UNLIMITED,
        watch: Watch = unwatched,
    ) -> list[Certified]:
        """Certify images: all that `certify_iter` yields.

        Raises EnvironmentFault when no worker of a cluster can draw an image's samples.
        """
        found = list(self.certify_iter(images, labels, settings, layout=layout, budget=budget, watch=watch))
        if self.failed:
            failed = ", ".join(map(str, self.failed))
            raise EnvironmentFault(f"images {failed} have failed: nothing can draw their samples")
        return found

    def certify_iter(
        self,
        images: Images,
        labels: Iterable[int | None] | None = None,
        settings: Settings = DEFAULT,
        *,
        layout: Layout = "CHW",
        budget: Budget = UNLIMITED,
        watch: Watch = unwatched,
    ) -> Iterator[Certified]:
        """Yield the certificate of each image as it is decided, in their order.

        Args:
            images: Arrays or torch tensors on the CPU, uint8; Pillow images; paths of image files. Also one array or
                tensor of several, an `ImageSet`, or the path of all that `open_images` reads. They are read one at a
                time.
            labels: One for each image, None where it is not known. An anytime method asks about this class alone, and
                it must not come from a run with the same secret.
            settings: What is certified.
            layout: Of arrays and tensors: "CHW" or "HWC".
            budget: Wall seconds; an image that it cuts short has what its samples bear out.
            watch: Shows how far it is, such as `tqdm.tqdm` or `rich.progress.track`.

        Raises:
            UsageError: For what is no image or no label of this model.
        """
        given, total = labelled(images, self.bundle.unet.image, self.class_names, labels, layout)
        yield from watch(self.certify_each(given, settings, budget), total=total)

    def predict(
        self,
        images: Images,
        *,
        layout: Layout = "CHW",
        sigma: float = Settings.sigma,
        steps: int = Settings.steps,
        votes: int = Settings.votes,
        n: int = PREDICT_N,
        alpha: float = Settings.alpha,
    ) -> list[int | None]:
        """The smoothed classifier's label of each image, or None where n samples leave it open.

        images: as `certify_iter` takes them.
        Each label is right, or None, with probability at least 1 - alpha for images chosen without knowing the secret.
        """
        settings = Settings(sigma, steps, votes, n=n, alpha=alpha)
        given, _ = labelled(images, self.bundle.unet.image, self.class_names, None, layout)
        return [found.label for found in self.predict_each(given, settings)]

    def certify_each(
        self,
        images: Iterable[LabelledImage],
        settings: Settings,
        budget: Budget = UNLIMITED,
        journal: Journal | None = None,
    ) -> Iterator[Certified]:
        """The certificates of `images`, in their order. Memory does not grow with n or with the number of images.

        With an anytime method the label of an image, where it has one, is the class that is asked about: it must not
        come from a run with the same secret. With a budget the images that a run came to before its end are answered:
        by the best radius of an anytime method, which holds whenever it is stopped, and by an abstention with "fixed".
        With a journal each image goes on from the labels that it already has there.

        Raises UsageError when every radius of a grid is beyond the reach of n samples.
        """
        pixels = math.prod(self.bundle.unet.image)
        settings.check_reach(pixels, labelled=True)
        rules = {labelled: settings.rule(pixels, labelled) for labelled in (False, True)}

        def decider(image: LabelledImage) -> Decider:
            return rules[image.label is not None].start(image.label)

        for decided in self._judged(images, settings, decider, budget, journal):
            yield Certified(decided.image, decided.decider.certificate(decided.stopped), decided.cost)

    def predict_each(
        self, images: Iterable[LabelledImage], settings: Settings, budget: Budget = UNLIMITED
    ) -> Iterator[Predicted]:
        """The labels of `images`, in their order, from n samples each at most (see `prediction_rule`).

        With a budget: of the images that were come to before its end, and by what its samples bear out.
        """
        rule = settings.prediction_rule(math.prod(self.bundle.unet.image))
        for found in self._judged(images, settings, lambda _: rule.start(), budget):
            yield prediction_of(
                found.image, found.decider, rule.charge, len(self.class_names), found.cost, found.stopped
            )

    def _refuse_closed(self) -> None:
        if self.closed:
            raise UsageError(CLOSED)

    def _judged(
        self,
        images: Iterable[LabelledImage],
        settings: Settings,
        new_decider: Callable[[LabelledImage], D],
        budget: Budget = UNLIMITED,
        journal: Journal | None = None,
    ) -> Iterator[ImageProgress[D]]:
        """Each image, when its decider has all that it needs or its time is up."""
        self._refuse_closed()
        chain = self.chain(settings)
        started = answered = time.perf_counter()
        end = started + budget.run

        def opened() -> Iterator[ImageProgress[D]]:
            for image in images:
                if (now := time.perf_counter()) >= end:
                    return
                open_handles, deadline = partial(self._open, image, settings.sigma, chain), min(end, now + budget.image)
                yield ImageProgress(image, new_decider(image), open_handles, deadline, journal, len(self.class_names))

        if self.busy:
            raise UsageError("this classifier is already at work: finish or close that iteration, or load another one")
        self._busy_in, self.failed = os.getpid(), []
        self.scheduler = scheduler = Scheduler(opened())
        try:
            while not scheduler.done:
                with closing(self.sampler.decide(chain, scheduler, settings.ballot)) as outcomes:
                    for outcome in outcomes:
                        settled = () if outcome is None else scheduler.add(outcome)
                        for closed in (*settled, *scheduler.stop_late(time.perf_counter())):
                            self._close(closed)
                        for ready in scheduler.finished():
                            if ready.failed:
                                logs.say(f"image {ready.image} has failed: none can draw it", logging.WARNING)
                                self.failed.append(ready.image.idx)
                                continue
                            ready.cost.seconds, answered = time.perf_counter() - answered, time.perf_counter()
                            yield ready
                        if scheduler.done:
                            return
                for ready in scheduler.finished():  # images that needed no sample
                    yield ready
        finally:
            for unfinished in scheduler.open:
                self._close(unfinished)
            self._busy_in = None

    def _open(self, image: LabelledImage, sigma: float, chain: Chain, phases: Phases) -> list[int]:
        keys = [image_key(self.secret, purpose, sigma, image.pixels) for purpose, _ in phases]
        return [self.sampler.open_image(image.pixels, key, sigma, chain.scale) for key in keys]

    def _close(self, image: ImageProgress[D]) -> None:
        for handle in image.handles:
            self.sampler.close_image(handle)


def load(
    engine: Path | str | None = None,
    classifier: Path | str | None = None,
    *,
    secret: bytes | None = None,
    seed: int | None = None,
    key: Path | str | None = None,
    batch: int | Literal["auto"] | None = None,
    threads: int | None = None,
    provider: str = "cpu",
    engine_sha256: str | None = None,
    trust: bool = False,
) -> SmoothedClassifier:
    """The engine at `engine`, or the one that ships with the package, and its classifier, ready to certify.

    The one that ships is float32 on the CPU and fp16 on a GPU; `engine` is taken as it is.

    classifier: instead of the one that the engine's sidecar names. What keys all noise, one of these: secret: 32
    bytes; seed: public, for reproduction; key: a file with the secret, made where there is none; else 32 new bytes
    from the system. batch: images per call of the engine; "auto" for the fastest, timed once; else what suits it.
    threads: callers of the engine, else one for each core, two on a GPU. provider: of ONNX Runtime, "cpu", "cuda" or
    "tensorrt". engine_sha256: what the engine must hash to. trust: take plans that have no sidecar.

    It has so many parameters because each is an option of the command line, and none follows from another.

    Raises UsageError, CheckFailed or EnvironmentFault; each says what to do next.
    """
    if sum(given is not None for given in (secret, seed, key)) > 1:
        raise UsageError("`secret`, `seed` and `key` are three ways to say what keys the noise: give one")
    known = provider_of(provider)
    threads = default_threads(known) if threads is None else threads
    asked = batch if isinstance(batch, int) else 1
    for name, count, most in (("batch", asked, MAX_BATCH), ("threads", threads, MAX_THREADS)):
        if not 1 <= count <= most:
            raise UsageError(f"`{name}` is a count from 1 up to {most}, got {count}")
    bundle = open_bundle(
        shipped_engine(on_gpu=known != "cpu") if engine is None else Path(engine),
        None if classifier is None else Path(classifier),
        engine_sha256,
        trust,
    )
    if batch == "auto":
        batch = fastest_batch(bundle, threads, known)
    if seed is not None:
        secret = seeded_secret(seed)
    elif key is not None:
        secret = shared_key(Path(key))
    return SmoothedClassifier(bundle, OnDevice(open_device(bundle, batch, threads, known)), secret)
