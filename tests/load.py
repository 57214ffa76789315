"""Many connections held at a real server for a while, every answer compared: `make load`.

Each connection asks again as soon as it is answered, three predictions to one certificate. An answer is right when it
is the one that the classifier itself gives under the same seed; of one that its deadline cut short, when it is what the
first so many of the same labels bear out. A 503 that says when to come again is right too.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from numpy.typing import NDArray
from tritonclient.http import InferenceServerClient, InferInput, InferResult

from densepure_rt.images.datasets import LabelledImage, open_images
from densepure_rt.keys import seeded_secret
from densepure_rt.serving.models import values_of
from densepure_rt.serving.protocol import HEADER_LENGTH
from densepure_rt.smoothing.classifier import Certified, load
from densepure_rt.smoothing.scheduling import Cost
from densepure_rt.smoothing.settings import PREDICT_N, Settings
from tests.support.journals import Notebook
from tests.support.server import ServerProcess, serving

SEED = 1
MODELS = ("predict", "predict", "predict", "certify")
KINDS = ("smooth", "step", "classify")
DEADLINE_MS = 60_000


@dataclass
class Report:
    """seconds: of each right answer, by model. wrong: those that are not. stopped: by their deadline.

    busy: those that were told to come again, by model. memory: of the server, bytes, each second.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    wrong: list[str] = field(default_factory=list)
    stopped: int = 0
    busy: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def growth(self) -> float:
        """Of memory, from the end of the first third on: the most that it has been over what it was then."""
        warm = self.memory[len(self.memory) // 3 :]
        return max(warm) / warm[0] - 1

    def lines(self) -> list[str]:
        kinds = {kind: self.metrics.get(f'densepure_rt_batch_fill{{kind="{kind}"}}') for kind in KINDS}
        return [
            *(timed(model, seconds) for model, seconds in sorted(self.seconds.items())),
            f"wrong answers: {len(self.wrong)}; stopped by their deadline: {self.stopped}; "
            f"told to come again: {self.busy.total()}",
            f"memory: {self.memory[0] / 2**20:.0f} MiB at the start, {self.memory[-1] / 2**20:.0f} MiB at the end, "
            f"{100 * self.growth:+.1f} % after the first third",
            "held work: " + ", ".join(f"{100 * fill:.0f} % of {kind} batches" for kind, fill in kinds.items() if fill),
        ]


def timed(model: str, seconds: Sequence[float]) -> str:
    half, most = np.percentile(seconds, [50, 99])
    return f"{model}: {len(seconds)} answers, p50 {half:.2f} s, p99 {most:.2f} s"


class Expected:
    """What the classifier itself says of each image, and of as many samples of it as there was time for."""

    def __init__(self, images: Sequence[LabelledImage], settings: Settings, secret: bytes | None = None) -> None:
        predict = Settings(settings.sigma, settings.steps, settings.votes, n=PREDICT_N, alpha=settings.alpha)
        self._images, self._settings, self._notebook = images, settings, Notebook()
        with load(secret=secret or seeded_secret(SEED)) as classifier:
            self._predicted = list(classifier.predict_each(images, predict))
            self._certified = list(classifier.certify_each(images, settings, journal=self._notebook))

    def values(self, model: str, image: int, n: int, stopped: bool) -> Mapping[str, Any]:
        if model == "predict":
            return {"label": [-1], "confidence": [0.0]} if stopped else values_of([self._predicted[image]])
        if not stopped:
            return values_of([self._certified[image]])
        shown = self._images[image]
        decider = self._settings.rule(shown.pixels.size, labelled=False).start()
        for label in self._notebook.labels[shown.idx][:n]:
            decider.add(label)
        return values_of([Certified(shown, decider.certificate(stopped=True), Cost())])


def body_of(image: NDArray[np.uint8]) -> tuple[bytes, dict[str, str]]:
    tensor = InferInput("image", [1, *image.shape], "UINT8")
    tensor.set_data_from_numpy(image[None])
    body, length = InferenceServerClient.generate_request_body([tensor], parameters={"deadline_ms": DEADLINE_MS})
    return body, {HEADER_LENGTH: str(length), "Content-Type": "application/octet-stream"}


def read(content: bytes, length: str | None) -> dict[str, list[Any]]:
    """The outputs, as tritonclient reads them."""
    result = InferResult.from_response_body(content, header_length=None if length is None else int(length))
    names = [output["name"] for output in result.get_response()["outputs"]]
    found = {name: result.as_numpy(name).tolist() for name in names}
    return {name: [v.decode() if isinstance(v, bytes) else v for v in values] for name, values in found.items()}


def differences(found: dict[str, list[Any]], expected: Expected, model: str, image: int) -> list[str]:
    """List the outputs of an answer that are not those that are expected."""
    wanted = expected.values(model, image, found["n"][0], found["stopped"][0])
    return [f"{name} {found[name]}" for name, value in wanted.items() if found[name] != np.asarray(value).tolist()]


def check(found: dict[str, list[Any]], expected: Expected, model: str, image: int, report: Report) -> bool:
    if wrong := differences(found, expected, model, image):
        report.wrong.append(f"{model} of image {image}: {', '.join(wrong)}")
    report.stopped += found["stopped"][0]
    return not wrong


async def ask_until(
    end: float, server: ServerProcess, expected: Expected, bodies: Any, number: int, report: Report
) -> None:
    """One connection's requests, one after another."""
    chance = random.Random(number)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        while time.monotonic() < end:
            model, image = chance.choice(MODELS), chance.randrange(len(bodies))
            (body, headers), started = bodies[image], time.monotonic()
            url = f"http://{server.host}:{server.port}/v2/models/{model}/infer"
            async with session.post(url, data=body, headers=headers) as response:
                content = await response.read()
            if response.status == 503 and "Retry-After" in response.headers:
                report.busy[model] += 1
                await asyncio.sleep(float(response.headers["Retry-After"]))
            elif response.status != 200:
                report.wrong.append(f"{model} of image {image}: {response.status} {content[:200]!r}")
            else:
                found = read(content, response.headers.get(HEADER_LENGTH))
                if check(found, expected, model, image, report):
                    report.seconds[model].append(time.monotonic() - started)


async def watch(server: ServerProcess, report: Report) -> None:
    while True:
        report.memory.append(server.memory())
        await asyncio.sleep(1)


async def asked(server: ServerProcess, connections: int, seconds: float, expected: Expected, images: Any) -> Report:
    report, bodies = Report(), [body_of(image.pixels) for image in images]
    watching = asyncio.create_task(watch(server, report))
    end = time.monotonic() + seconds
    await asyncio.gather(*(ask_until(end, server, expected, bodies, number, report) for number in range(connections)))
    watching.cancel()
    report.metrics = server.metrics()
    return report


def run(connections: int, seconds: float, settings: Settings, queue: int, pictures: int = 20) -> Report:
    """Hold so many connections for so long at a server of these settings."""
    shipped = open_images(None, (1, 28, 28), [str(label) for label in range(10)]).select(500 // pictures, pictures)
    images = [LabelledImage(image.idx, image.pixels, None) for image in shipped]
    expected = Expected(images, settings)
    options = {"sigma": settings.sigma, "steps": settings.steps, "votes": settings.votes, "n": settings.n}
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    with serving(*given, "--seed", SEED, "--queue", queue, "--max-deadline", "10min", "--no-demo") as server:
        report = asyncio.run(asked(server, connections, seconds, expected, images))
        code, _ = server.end()
    assert code == 0
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=200, help="held at a time")
    parser.add_argument("--seconds", type=float, default=60.0, help="in which they ask")
    parser.add_argument(
        "--queue",
        type=int,
        default=180,
        help="images that the server holds; below --connections, some are told to come again",
    )
    parser.add_argument("--steps", type=int, default=1, help="reverse steps of the server")
    given = parser.parse_args()
    report = run(
        given.connections, given.seconds, Settings(sigma=0.25, steps=given.steps, votes=5, n=1000), given.queue
    )
    print(*report.lines(), *report.wrong[:5], sep="\n")
    raise SystemExit(bool(report.wrong))
