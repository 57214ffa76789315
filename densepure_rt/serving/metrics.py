"""What a server tells Prometheus: requests by model and outcome, how long they took, and what the device did."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from densepure_rt.serving.service import Service

# "stopped": by its deadline or the server's end; "gone": its client hung up; "refused": it was no request that this
# server takes.
RequestOutcome = Literal["answered", "abstained", "stopped", "gone", "full", "draining", "refused", "failed"]
REFUSED_CONNECTIONS = Counter(  # of the process: they have come to no service yet
    "densepure_rt_refused_connections", "Connections refused because too many were open.", registry=None
)
ACCEPT_ERRORS = Counter("densepure_rt_accept_errors", "Times that a connection could not be accepted.", registry=None)
SLOW_TURNS = Counter(
    "densepure_rt_slow_turns", "Turns of the event loop that took more than 50 ms of a processor.", registry=None
)
SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)  # of the histogram


class Metrics:
    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "densepure_rt_requests", "Requests by model and outcome.", ["model", "outcome"], registry=self._registry
        )
        self._seconds = Histogram(
            "densepure_rt_request_seconds",
            "From the head of a request to its answer, of those that have one.",
            ["model"],
            buckets=SECONDS,
            registry=self._registry,
        )
        for counter in (REFUSED_CONNECTIONS, ACCEPT_ERRORS, SLOW_TURNS):
            self._registry.register(counter)
        self._registry.register(ServiceCollector(service))

    def count(self, model: str, outcome: RequestOutcome, seconds: float) -> None:
        self._requests.labels(model, outcome).inc()
        if outcome in ("answered", "abstained", "stopped"):
            self._seconds.labels(model).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class ServiceCollector(Collector):
    """The counts of the service itself, read when they are asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        meter = self._service.meter()
        yield GaugeMetricFamily("densepure_rt_ready", "Whether requests are taken.", float(self._service.ready))
        waiting = GaugeMetricFamily("densepure_rt_open_images", "Images without an answer yet.", labels=["model"])
        for model, count in meter.open.items():
            waiting.add_metric([model], count)
        yield waiting
        yield GaugeMetricFamily("densepure_rt_most_open_images", "Images that may be open.", self._service.most)
        totals = {
            "samples": ("Samples that came back from the device.", meter.samples),
            "unet_calls": ("UNet calls of those samples, an image each.", meter.unet_calls),
            "classifier_calls": ("Classifier calls of those samples, an image each.", meter.classifier_calls),
            "not_finite_samples": ("Samples whose output was NaN or Inf.", meter.not_finite),
            "device_seconds": ("Seconds in which the device had work.", meter.device_seconds),
        }
        for name, (said, total) in totals.items():
            yield CounterMetricFamily(f"densepure_rt_{name}", said, total)
        batches = CounterMetricFamily("densepure_rt_batches", "Batches of the device.", labels=["kind"])
        items = CounterMetricFamily("densepure_rt_batch_items", "Items in those batches.", labels=["kind"])
        fill = GaugeMetricFamily("densepure_rt_batch_fill", "The share of batches that held work.", labels=["kind"])
        for kind, count in meter.batches.items():
            batches.add_metric([kind], count)
            held = meter.items.get(kind, 0)
            items.add_metric([kind], held)
            fill.add_metric([kind], held / (count * meter.batch))
        yield from (batches, items, fill)
