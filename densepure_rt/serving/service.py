"""A classifier that answers many at once: one thread owns its device, and requests share its batches. No HTTP in here.

Predictions come before certificates, but for one look in four; certificates go on a look at a time, so that a long one
keeps nobody waiting. An answer is the one that `SmoothedClassifier` would give of an image without a label under the
same secret, bit for bit, unless its deadline cuts it short.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from densepure_rt import logs
from densepure_rt.errors import DensePureError, EnvironmentFault, UsageError
from densepure_rt.images.datasets import LabelledImage
from densepure_rt.runtime.bundle import Bundle
from densepure_rt.runtime.device import NOT_FINITE, Device
from densepure_rt.runtime.metered_device import MeteredDevice
from densepure_rt.runtime.noise import image_key
from densepure_rt.runtime.reverse import Outcome, decide
from densepure_rt.serving.fair_share import FairShare, QueuedImage
from densepure_rt.smoothing.classifier import Certified, Predicted, SmoothedClassifier, prediction_of
from densepure_rt.smoothing.decider import Decider, Phases
from densepure_rt.smoothing.scheduling import MOST_OPEN
from densepure_rt.smoothing.settings import PREDICT_N, RULES, Settings

END_SECONDS = 4.0  # in which the batch under way has to end, when all is answered
ModelName = Literal["predict", "certify"]
Pixels = NDArray[np.uint8]  # [C, H, W]


class Full(DensePureError):
    """As many requests wait as may; it is worth trying again in a while."""


class Draining(DensePureError):
    """The service is about to end and takes no more requests."""


class DeviceFailed(EnvironmentFault):
    """The device raised an error: nothing is answered any more."""


@dataclass(frozen=True)
class Served:
    """The part of a classifier being served that a page or a protocol may use.

    settings: of certificates; a prediction takes PREDICT_N samples at most. secret: what noise is keyed with now; it
    must never leave the process. predict, certify: coroutines (image, deadline) for uint8 [C, H, W]; deadline: the
    `time.monotonic()` at which whatever the samples so far bear out is the answer (`stopped`), None to wait for the
    whole one. They raise UsageError for an image of another shape, Full, Draining and DeviceFailed; cancelling one
    gives its work up.
    """

    bundle: Bundle
    settings: Settings
    class_names: tuple[str, ...]
    secret: Callable[[], bytes] = field(repr=False)
    predict: Callable[[Pixels, float | None], Coroutine[Any, Any, Predicted]]
    certify: Callable[[Pixels, float | None], Coroutine[Any, Any, Certified]]


@dataclass(frozen=True)
class ServiceMeter:
    """The work of a service so far. open: requests without an answer yet. batches, items: of the device, by kind.

    device_seconds: in which the device had work. batch: items that one holds.
    """

    open: Mapping[ModelName, int]
    samples: int
    unet_calls: int
    classifier_calls: int
    not_finite: int
    device_seconds: float
    batch: int
    batches: Mapping[str, int]
    items: Mapping[str, int]


class PendingAnswer(QueuedImage[Decider]):
    """An image of a request, and the answer that it waits for."""

    def __init__(self, model: ModelName, image: LabelledImage, decider: Decider, open_handles: Any) -> None:
        super().__init__(image, decider, model == "predict", open_handles)
        self.model, self.answer = model, Future[Any]()
        self.answer.set_running_or_notify_cancel()  # it is given up by `Service.give_up` alone
        self.came = time.monotonic()


class Service(AbstractContextManager["Service"]):
    """A classifier at work for many: a context manager, whose thread alone touches the device.

    settings: of certificates; of an anytime method, since a deadline may come. secret: called for each request; what
    comes of it keys the request's noise. most: requests without an answer, images counted each; more are refused.
    """

    def __init__(
        self,
        classifier: SmoothedClassifier,
        settings: Settings,
        secret: Callable[[], bytes],
        most: int = MOST_OPEN,
    ) -> None:
        if not RULES[settings.method].anytime:
            raise UsageError("`method` fixed has no answer before its last sample: serve sequential or radius")
        if most < 1:
            raise UsageError(f"a queue holds one request or more, got {most}")
        bundle, pixels = classifier.bundle, math.prod(classifier.bundle.unet.image)
        self.served = Served(
            bundle, settings, bundle.classifier.class_names, secret, self._predict_one, self._certify_one
        )
        self.most = most
        self._meter = MeteredDevice(classifier.device)
        self._device, self._chain = cast(Device, self._meter), classifier.chain(settings)
        self._predicts = dataclasses.replace(settings, n=PREDICT_N).prediction_rule(pixels)
        settings.check_reach(pixels, labelled=False)
        self._certifies = settings.rule(pixels, labelled=False)
        self._changed = threading.Condition()  # held for whatever stands below
        self._share = FairShare[Decider](ahead=classifier.device.batch)
        self._draining = self._ended = False
        self._failed: BaseException | None = None
        self._done = Counter[str]()
        self._came = 0
        self._thread = threading.Thread(target=self._run, name="densepure-rt device", daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self.drain(0)

    @property
    def ready(self) -> bool:
        """Return whether a request would be taken, or refused for being one too many."""
        return not self.broken and not self._draining

    @property
    def broken(self) -> bool:
        """Return whether the device has failed."""
        return self._failed is not None

    @property
    def stuck(self) -> bool:
        """Return whether a batch has not ended with `drain`: the device is in use and must not be closed."""
        return self._ended and self._thread.is_alive()

    def describe(self) -> Mapping[str, str | int | bool]:
        """Return the device's description of itself."""
        return self._device.describe()

    def meter(self) -> ServiceMeter:
        items = dict(self._meter.items)  # before the batches that hold them: no batch is found to be more than full
        with self._changed:
            waiting = Counter(cast(PendingAnswer, each).model for each in self._share.undecided)
            return ServiceMeter(
                open={"predict": waiting["predict"], "certify": waiting["certify"]},
                samples=self._done["samples"],
                unet_calls=self._done["unet calls"],
                classifier_calls=self._done["classifier calls"],
                not_finite=self._done["not finite"],
                device_seconds=self._meter.seconds,
                batch=self._device.batch,
                batches=dict(self._meter.batches),
                items=items,
            )

    # what is asked, from any thread

    async def _predict_one(self, image: Pixels, deadline: float | None) -> Predicted:
        return cast(Predicted, (await self.answers("predict", [image], deadline))[0])

    async def _certify_one(self, image: Pixels, deadline: float | None) -> Certified:
        return cast(Certified, (await self.answers("certify", [image], deadline))[0])

    async def answers(
        self, model: ModelName, images: Sequence[Pixels], deadline: float | None
    ) -> list[Predicted] | list[Certified]:
        """The answers to `images`, all of which are taken or none; see `Served`."""
        asked = self.ask(model, images)
        try:
            answers = [asyncio.wrap_future(each.answer) for each in asked]
            if deadline is not None:
                await asyncio.wait(answers, timeout=max(0.0, deadline - time.monotonic()))
                self.stop(asked)
            return list(await asyncio.gather(*answers))
        finally:
            self.give_up(asked)  # where this is cancelled

    def ask(self, model: ModelName, images: Sequence[Pixels]) -> list[PendingAnswer]:
        """Take up `images`, all of them or none. The answer of each is in its future."""
        for image in images:
            if image.dtype != np.uint8 or image.shape != self.served.bundle.unet.image:
                raise UsageError(
                    f"an image must be uint8 {list(self.served.bundle.unet.image)} (channels, height, width), "
                    f"got {image.dtype} {list(image.shape)}"
                )
        secret = self.served.secret()
        with self._changed:
            if self._failed is not None:
                raise self._failure()
            if self._draining:
                raise Draining("the server is about to end and takes no more requests: ask another one")
            if (waiting := len(self._share.undecided)) + len(images) > self.most:
                raise Full(
                    f"{waiting} images are waiting and {self.most} may be, so that {len(images)} more are not taken: "
                    f"try again later"
                )
            asked = [self._pending(model, image, secret) for image in images]
            for each in asked:
                self._share.put(each)
            self._changed.notify_all()
        return asked

    def _pending(self, model: ModelName, pixels: Pixels, secret: bytes) -> PendingAnswer:
        self._came += 1
        image, sigma = LabelledImage(self._came, pixels, None), self.served.settings.sigma
        decider = (self._predicts if model == "predict" else self._certifies).start()

        def open_handles(phases: Phases) -> list[int]:
            keys = [image_key(secret, purpose, sigma, pixels) for purpose, _ in phases]
            return [self._device.open_image(pixels, key, sigma, self._chain.scale) for key in keys]

        return PendingAnswer(model, image, decider, open_handles)

    def stop(self, asked: Sequence[PendingAnswer]) -> None:
        """Answer those that have no answer yet by what their samples bear out."""
        with self._changed:
            for each in self._unanswered(asked):
                self._share.stop(each)
                self._answer(each)
            self._changed.notify_all()

    def give_up(self, asked: Sequence[PendingAnswer]) -> None:
        """Spend nothing more on those that have no answer yet."""
        with self._changed:
            for each in self._unanswered(asked):
                self._share.stop(each)
            self._changed.notify_all()

    def _unanswered(self, asked: Sequence[PendingAnswer]) -> list[PendingAnswer]:
        return [each for each in asked if each in self._share.undecided]

    def drain(self, seconds: float) -> None:
        """Take no more requests, answer those that there are, by `seconds` from now at the latest, and end.

        A batch that is under way even then has END_SECONDS more; see `stuck`.
        """
        self.answer_all(seconds)
        self.end()

    def answer_all(self, seconds: float) -> None:
        """Take no more requests, and answer those that there are, by `seconds` from now at the latest."""
        with self._changed:
            self._draining = True
            self._changed.wait_for(lambda: not self._share.undecided, min(seconds, threading.TIMEOUT_MAX))
            self.stop_all()
            self._ended = True
            self._changed.notify_all()

    def end(self) -> None:
        """Wait for the batch that is under way, END_SECONDS at most; see `stuck`."""
        self._thread.join(END_SECONDS)
        if self.stuck:
            logs.say(f"a batch has not ended in {END_SECONDS:g} s, when all was answered: it is left", logging.ERROR)

    def stop_all(self) -> None:
        """Answer every request by what its samples bear out."""
        self.stop([cast(PendingAnswer, each) for each in self._share.undecided])

    # the thread that owns the device

    def _run(self) -> None:
        try:
            while self._awaited():
                with closing(decide(self._device, self._chain, self._work(), self.served.settings.ballot)) as outcomes:
                    for outcome in outcomes:
                        self._take(outcome)
                        if self._ended:
                            break
        except Exception as error:
            self._fail(error)
        finally:
            for handle in self._share.handles:
                with suppress(Exception):  # of a device that has failed already
                    self._device.close_image(handle)

    def _awaited(self) -> bool:
        """Wait for something to do; False when there will be nothing any more."""
        with self._changed:
            self._close_settled()
            self._changed.wait_for(lambda: self._ended or self._share.undecided)
            return not self._ended

    def _work(self) -> Iterator[tuple[int, int] | None]:
        while True:
            with self._changed:
                drawn = self._share.draw()
                if drawn is None and not self._share.under_way:
                    return
            yield drawn

    def _take(self, outcome: Outcome) -> None:
        with self._changed:
            self._done.update({"samples": 1, "unet calls": outcome.unet_calls, "classifier calls": outcome.votes})
            self._done["not finite"] += outcome.label == NOT_FINITE
            decided = self._share.add(outcome)
            if decided is not None:
                self._answer(cast(PendingAnswer, decided))
            self._close_settled()

    def _answer(self, pending: PendingAnswer) -> None:
        """Answer one that is no longer undecided; errors go to its own future only."""
        try:
            pending.answer.set_result(self._answer_of(pending))
        except Exception as error:
            pending.answer.set_exception(error)
        self._changed.notify_all()

    def _answer_of(self, pending: PendingAnswer) -> Predicted | Certified:
        pending.cost.seconds = time.monotonic() - pending.came
        image, decider, cost, stopped = pending.image, pending.decider, pending.cost, pending.stopped
        if pending.model == "predict":
            charge, classes = self._predicts.charge, len(self.served.class_names)
            return prediction_of(image, decider, charge, classes, cost, stopped)
        return Certified(image, decider.certificate(stopped), cost)

    def _close_settled(self) -> None:
        for handle in self._share.settled():
            self._device.close_image(handle)

    def _fail(self, error: Exception) -> None:
        logs.say(f"the device failed: {error}", logging.ERROR, error=type(error).__name__)
        with self._changed:
            self._failed = error
            for each in list(self._share.undecided):
                self._share.stop(each)
                cast(PendingAnswer, each).answer.set_exception(self._failure())
            self._changed.notify_all()

    def _failure(self) -> DeviceFailed:
        return DeviceFailed(f"the device failed ({type(self._failed).__name__}): the server has to be started again")
