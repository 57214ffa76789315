"""What Prometheus' own parser reads."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from densepure_rt.images.datasets import open_images
from densepure_rt.serving.metrics import REFUSED_CONNECTIONS, Metrics
from densepure_rt.serving.service import Service
from densepure_rt.smoothing.classifier import load
from densepure_rt.smoothing.settings import Settings

CHEAP = Settings(sigma=0.5, steps=1, votes=1, n=32, alpha=0.05)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with load(batch=8, threads=2) as classifier, Service(classifier, CHEAP, lambda: bytes(32), most=9) as running:
        yield running


def read(metrics: Metrics) -> dict[tuple[str, tuple[str, ...]], float]:
    families = list(text_string_to_metric_families(metrics.text().decode()))
    assert all(family.documentation for family in families)
    samples = [sample for family in families for sample in family.samples]
    return {(name, tuple(labels.values())): value for name, labels, value, *_ in samples}


def test_requests_are_counted_by_outcome_and_those_with_an_answer_are_timed(service: Service) -> None:
    metrics = Metrics(service)
    for outcome in ("answered", "abstained", "stopped", "gone", "full", "draining", "refused", "failed"):
        metrics.count("certify", outcome, 3.0)
    metrics.count("certify", "answered", 0.07)
    found = read(metrics)
    assert found["densepure_rt_requests_total", ("certify", "answered")] == 2
    assert found["densepure_rt_requests_total", ("certify", "gone")] == 1
    assert found["densepure_rt_request_seconds_count", ("certify",)] == 4
    assert found["densepure_rt_request_seconds_sum", ("certify",)] == pytest.approx(9.07)
    assert found["densepure_rt_request_seconds_bucket", ("0.1", "certify")] == 1


def test_connections_that_were_refused_are_counted(service: Service) -> None:
    metrics = Metrics(service)
    before = read(metrics)["densepure_rt_refused_connections_total", ()]
    REFUSED_CONNECTIONS.inc()
    assert read(metrics)["densepure_rt_refused_connections_total", ()] == before + 1


def test_the_device_and_the_queue_are_looked_at_when_they_are_asked_for(service: Service) -> None:
    metrics = Metrics(service)
    before = read(metrics)
    assert before["densepure_rt_ready", ()] == 1
    assert before["densepure_rt_most_open_images", ()] == 9
    assert before["densepure_rt_open_images", ("predict",)] == 0
    (image,) = open_images(None, (1, 28, 28), list(map(str, range(10)))).select(1, 1)
    answer = service.ask("predict", [image.pixels])[0].answer.result(timeout=30)
    meter = None
    while meter != (meter := service.meter()):  # what was drawn in vain comes back a little later
        time.sleep(0.2)
    after = read(metrics)
    assert after["densepure_rt_samples_total", ()] >= before["densepure_rt_samples_total", ()] + answer.n
    assert after["densepure_rt_unet_calls_total", ()] == after["densepure_rt_samples_total", ()]  # of one step
    assert after["densepure_rt_device_seconds_total", ()] > 0
    assert after["densepure_rt_batches_total", ("step",)] == meter.batches["step"]
    fill = meter.items["step"] / (8 * meter.batches["step"])
    assert after["densepure_rt_batch_fill", ("step",)] == pytest.approx(fill)
    assert 0 < fill <= 1
