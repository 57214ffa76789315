"""A service against the classifier that it serves, and against everything that may happen to it meanwhile."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from densepure_rt.errors import UsageError
from densepure_rt.images.datasets import LabelledImage, open_images
from densepure_rt.keys import seeded_secret
from densepure_rt.serving.service import DeviceFailed, Draining, Full, ModelName, Service
from densepure_rt.smoothing.classifier import Certified, Predicted, SmoothedClassifier, load
from densepure_rt.smoothing.samplers import OnDevice
from densepure_rt.smoothing.settings import PREDICT_N, Settings
from tests.support.journals import Notebook

SECRET = bytes(range(32))
CHEAP = Settings(sigma=0.5, steps=0, votes=1, n=160, alpha=0.05)  # the classifier alone
LONG = dataclasses.replace(CHEAP, n=100_000, method="radius", radius_loss=0.0)  # goes on until it is told to stop
WHOLE = Settings(sigma=0.7, steps=2, votes=3, n=32, alpha=0.3)
Answer = Predicted | Certified


@pytest.fixture(scope="module")
def images() -> list[LabelledImage]:
    """The last one is near the boundary; LONG goes on for thousands of samples with each of the others."""
    chosen = open_images(None, (1, 28, 28), [str(label) for label in range(10)]).select(37, 8)
    first, *others = (dataclasses.replace(image, label=None) for image in chosen)
    return [*others, first]


@pytest.fixture(scope="module")
def classifier() -> Iterator[SmoothedClassifier]:
    with load(secret=SECRET, batch=8, threads=2) as opened:
        yield opened


def service_of(classifier: SmoothedClassifier, settings: Settings, most: int = 256) -> Service:
    return Service(classifier, settings, lambda: SECRET, most)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def said(answer: Answer) -> Any:
    """An answer, without what it cost and the number of its image."""
    if isinstance(answer, Certified):
        return answer.certificate
    return answer.label, answer.n, answer.votes.tolist(), answer.error_bound, answer.stopped


def expected(
    classifier: SmoothedClassifier, images: Sequence[LabelledImage], settings: Settings
) -> dict[tuple[ModelName, int], Any]:
    predict = Settings(settings.sigma, settings.steps, settings.votes, n=PREDICT_N, alpha=settings.alpha)
    certified, predicted = classifier.certify_each(images, settings), classifier.predict_each(images, predict)
    found: dict[tuple[ModelName, int], Any] = {("certify", each.image.idx): said(each) for each in certified}
    return found | {("predict", each.image.idx): said(each) for each in predicted}


@pytest.mark.parametrize(
    ("settings", "batch", "count"),
    [
        (CHEAP, 3, 6),
        (dataclasses.replace(CHEAP, method="radius"), 16, 6),
        (WHOLE, 5, 3),
    ],
    ids=["small batches", "radius, large batches", "two steps"],
)
def test_many_at_once_get_the_answers_that_each_would_get_alone(
    classifier: SmoothedClassifier, images: list[LabelledImage], settings: Settings, batch: int, count: int
) -> None:
    wanted, chance = expected(classifier, images[:count], settings), random.Random(batch)
    assert len({str(value) for value in wanted.values()}) > count  # they differ
    work: list[tuple[ModelName, LabelledImage]] = [
        (model, image) for image in images[:count] for model in ("predict", "certify")
    ]
    chance.shuffle(work)

    async def ask(service: Service, model: ModelName, image: LabelledImage) -> tuple[tuple[ModelName, int], Any]:
        await asyncio.sleep(chance.random() / 2)
        ask_one = service.served.predict if model == "predict" else service.served.certify
        return (model, image.idx), said(await ask_one(image.pixels, None))

    async def ask_all(service: Service) -> dict[tuple[ModelName, int], Any]:
        return dict(await asyncio.gather(*(ask(service, model, image) for model, image in work)))

    with load(batch=batch, threads=2) as other, service_of(other, settings) as service:
        assert run(ask_all(service)) == wanted
        until(lambda: not other.device._images)  # type: ignore[attr-defined]  # nothing is left on the device


def test_requests_share_batches(classifier: SmoothedClassifier, images: list[LabelledImage]) -> None:
    pixels = [image.pixels for image in images]
    with service_of(classifier, CHEAP) as service:
        judged = sum(answer.n for answer in run(service.answers("predict", pixels, None)))
        together = service.meter()
    with service_of(classifier, CHEAP) as service:
        for each in pixels:
            run(service.answers("predict", [each], None))
        alone = service.meter()
    assert together.batches["classify"] < alone.batches["classify"]
    for meter in (together, alone):
        assert judged <= meter.samples == meter.classifier_calls <= meter.items["classify"]
        assert meter.items["classify"] <= meter.batch * meter.batches["classify"]
        assert meter.device_seconds > 0


@pytest.mark.parametrize("method", ["radius", "sequential"])
def test_at_its_deadline_a_certificate_is_what_its_samples_so_far_bear_out(
    classifier: SmoothedClassifier, images: list[LabelledImage], method: Any
) -> None:
    """They are the first so many of those that a run would draw, judged by the same rule."""
    settings = dataclasses.replace(LONG, method=method, radius_loss=None, radii=None, n=3000)
    settings = dataclasses.replace(settings, **({"radii": (1.0,)} if method == "sequential" else {"radius_loss": 0.0}))
    with service_of(classifier, settings) as service:
        until(lambda: service.ready)
        started = time.monotonic()
        found: Certified = run(service.served.certify(images[0].pixels, started + 0.4))
        late = time.monotonic() - started - 0.4
    certificate = found.certificate
    assert certificate.stopped
    assert 0 < certificate.n < settings.n
    assert late < 1
    labels = Notebook()
    next(classifier.certify_each(images[:1], settings, journal=labels))
    decider = settings.rule(784, labelled=False).start()
    for label in labels.labels[: certificate.n]:
        decider.add(label)
    assert certificate == decider.certificate(stopped=True)
    assert certificate.radius is not None  # there was something to say


@pytest.mark.parametrize("model", ["predict", "certify"])
def test_a_deadline_that_is_past_is_an_abstention_at_once(
    classifier: SmoothedClassifier, images: list[LabelledImage], model: ModelName
) -> None:
    with service_of(classifier, LONG) as service:
        (found,) = run(service.answers(model, [images[0].pixels], time.monotonic() - 1))
    if isinstance(found, Predicted):
        assert (found.label, found.stopped, found.error_bound) == (None, True, None)
    else:
        assert (found.certificate.predict, found.certificate.radius, found.certificate.stopped) == (None, None, True)


def test_a_long_certificate_keeps_no_prediction_waiting(
    classifier: SmoothedClassifier, images: list[LabelledImage]
) -> None:
    async def work(service: Service) -> None:
        long = [asyncio.ensure_future(service.served.certify(image.pixels, None)) for image in images[:4]]
        while service.meter().samples < 200:
            await asyncio.sleep(0.01)
        before = service.meter().samples
        await service.served.predict(images[5].pixels, None)
        # What was under way when it came, its own, and what stood in the loop's queues for a batch of each kind.
        assert service.meter().samples - before < 13 + 8 * (3 + 2) + 8
        assert not any(task.done() for task in long)
        for task in long:
            task.cancel()

    with service_of(classifier, LONG) as service:
        run(work(service))


def test_one_image_too_many_is_refused_at_once_and_nothing_of_its_request_is_taken(
    classifier: SmoothedClassifier, images: list[LabelledImage]
) -> None:
    with service_of(classifier, LONG, most=3) as service:
        two = service.ask("certify", [image.pixels for image in images[:2]])
        started = time.monotonic()
        with pytest.raises(Full, match="2 images are waiting and 3 may be, so that 2 more"):
            service.ask("predict", [image.pixels for image in images[:2]])
        assert time.monotonic() - started < 0.5
        assert service.meter().open == {"predict": 0, "certify": 2}
        assert service.ready
        service.stop(two[:1])
        assert len(service.ask("predict", [image.pixels for image in images[:2]])) == 2


def test_who_gives_up_costs_nothing_more(classifier: SmoothedClassifier, images: list[LabelledImage]) -> None:
    async def work(service: Service) -> None:
        task = asyncio.ensure_future(service.served.certify(images[0].pixels, None))
        while service.meter().samples < 50:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with service_of(classifier, LONG) as service:
        run(work(service))
        assert service.meter().open == {"predict": 0, "certify": 0}
        until(lambda: not classifier.device._images)  # type: ignore[attr-defined]
        before = service.meter()
        time.sleep(0.2)
        assert service.meter() == before
        assert service.ready


def test_a_drained_service_answers_what_it_has_and_takes_no_more(
    classifier: SmoothedClassifier, images: list[LabelledImage]
) -> None:
    service = service_of(classifier, CHEAP)
    asked = service.ask("certify", [image.pixels for image in images[:3]])
    service.drain(30)
    wanted = expected(classifier, images[:3], CHEAP)  # the device is free again
    answers = [request.answer.result(timeout=0) for request in asked]
    assert [said(answer) for answer in answers] == [wanted["certify", image.idx] for image in images[:3]]
    assert not service.ready
    with pytest.raises(Draining, match="ask another one"):
        service.ask("predict", [images[0].pixels])
    service.drain(30)  # again: nothing happens


def test_what_is_not_done_when_draining_has_to_end_is_answered_by_what_it_has(
    classifier: SmoothedClassifier, images: list[LabelledImage]
) -> None:
    with service_of(classifier, LONG) as service:
        asked = service.ask("certify", [images[0].pixels])
        until(lambda: service.meter().samples > 50)
        service.drain(0.1)
        found = asked[0].answer.result(timeout=0).certificate
        assert (found.stopped, found.n > 0) == (True, True)
    assert not classifier.device._images  # type: ignore[attr-defined]


class Failing:
    """A device that breaks at a batch."""

    def __init__(self, device: Any, at: int) -> None:
        self._device, self._left = device, at

    def collect(self) -> Any:
        self._left -= 1
        if not self._left:
            raise RuntimeError("CUDA error 719 at 0xdeadbeef")
        return self._device.collect()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)


def test_a_device_that_fails_fails_what_is_open_and_all_that_comes_after(
    classifier: SmoothedClassifier, images: list[LabelledImage]
) -> None:
    failing: Any = Failing(classifier.device, at=5)
    broken = SmoothedClassifier(classifier.bundle, OnDevice(failing), SECRET)
    with service_of(broken, LONG) as service:
        with pytest.raises(DeviceFailed, match="RuntimeError.*started again") as raised:
            run(service.answers("certify", [image.pixels for image in images], None))
        assert "0xdeadbeef" not in str(raised.value)  # that is for the log
        assert (service.ready, service.broken, service.meter().open) == (False, True, {"predict": 0, "certify": 0})
        with pytest.raises(DeviceFailed):
            service.ask("predict", [images[0].pixels])
    assert not classifier.device._images  # type: ignore[attr-defined]


def test_a_fault_in_one_answer_is_told_to_whoever_asked_and_to_no_other(
    classifier: SmoothedClassifier, images: list[LabelledImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def certificate(*_: object) -> None:
        raise ZeroDivisionError

    with service_of(classifier, CHEAP) as service:
        monkeypatch.setattr("densepure_rt.serving.service.Certified", certificate)
        for deadline in (None, time.monotonic()):
            with pytest.raises(ZeroDivisionError):
                run(service.answers("certify", [images[0].pixels], deadline))
        assert run(service.answers("predict", [images[1].pixels], None))[0].label is not None
        assert service.ready


class Hanging(Failing):
    """A device that neither ends a batch nor lets go of an image."""

    released = False

    def collect(self) -> Any:
        while not self.released:
            time.sleep(0.01)
        return self._device.collect()


def test_a_batch_that_hangs_keeps_no_service_from_its_end(
    classifier: SmoothedClassifier,
    images: list[LabelledImage],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("densepure_rt.serving.service.END_SECONDS", 0.2)
    hanging: Any = Hanging(classifier.device, at=-1)
    service = service_of(SmoothedClassifier(classifier.bundle, OnDevice(hanging), SECRET), CHEAP)
    (asked,) = service.ask("certify", [images[0].pixels])
    service.drain(0.1)
    assert asked.answer.result(timeout=0).certificate.stopped
    assert service.stuck
    assert "a batch has not ended in 0.2 s" in caplog.text
    hanging.released = True
    until(lambda: not service.stuck)
    assert not classifier.device._images  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "wrong", [np.zeros((1, 28, 27), np.uint8), np.zeros((1, 28, 28), np.float32), np.zeros((28, 28), np.uint8)]
)
def test_an_image_of_another_shape_or_type_is_refused(classifier: SmoothedClassifier, wrong: NDArray[Any]) -> None:
    with service_of(classifier, CHEAP) as service, pytest.raises(UsageError, match=r"uint8 \[1, 28, 28\]"):
        run(service.served.predict(wrong, None))


def test_a_request_is_answered_under_the_secret_of_its_arrival(
    classifier: SmoothedClassifier, images: list[LabelledImage]
) -> None:
    secrets = [seeded_secret(1), seeded_secret(2)]
    given = iter(secrets)
    with Service(classifier, CHEAP, lambda: next(given)) as service:
        asked = [service.ask("certify", [images[-1].pixels])[0] for _ in secrets]
        found = [said(request.answer.result(timeout=30)) for request in asked]
    wanted = []
    for secret in secrets:
        own = SmoothedClassifier(classifier.bundle, OnDevice(classifier.device), secret)
        wanted.append(expected(own, images[-1:], CHEAP)["certify", images[-1].idx])
    assert found == wanted
    assert found[0] != found[1]


def test_the_secret_shows_nowhere(classifier: SmoothedClassifier, images: list[LabelledImage]) -> None:
    with service_of(classifier, CHEAP) as service:
        (request,) = service.ask("certify", [images[0].pixels])
        shown = repr((service, service.served, request, request.answer.result(timeout=30), service.meter()))
    assert repr(SECRET) not in shown
    assert SECRET.hex() not in shown


def test_the_fixed_method_and_a_queue_of_none_are_refused(classifier: SmoothedClassifier) -> None:
    with pytest.raises(UsageError, match="fixed has no answer before its last sample"):
        service_of(classifier, dataclasses.replace(CHEAP, method="fixed"))
    with pytest.raises(UsageError, match="one request or more, got 0"):
        service_of(classifier, CHEAP, most=0)
