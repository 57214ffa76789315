"""The demo page of `densepure-rt serve`: a picture in; what the networks saw of it, its votes and its certificate out.

GET  /demo/          the page, one file
GET  /demo/model     the engine, its classes, the noise, and pictures to begin with
POST /demo/image     a picture file -> the tensor to send to the API, and what was done to the picture
POST /demo/samples   a picture file, ?first=0&count=4 -> these samples of it, vote by vote

The answer and the certificate come from the Open Inference Protocol, as for every other client. A sample is the one
that `predict` draws: of the same secret, image and number. Its noise is shown to whoever sent the image, which tells
nothing of the noise of any other image, nor of that of certificates.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import logging
import math
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from densepure_rt import logs
from densepure_rt.errors import DensePureError, UsageError
from densepure_rt.images.datasets import LabelledImage, open_images
from densepure_rt.images.formats import Pixels
from densepure_rt.images.pictures import data_address
from densepure_rt.images.uploads import MOST_BYTES, Fitted
from densepure_rt.rounding import raised
from densepure_rt.runtime.bundle import Bundle, open_bundle, shipped_engine
from densepure_rt.runtime.device import Device, Provider
from densepure_rt.runtime.open_device import open_device
from densepure_rt.serving.clients import unless_gone
from densepure_rt.serving.pictures import Busy, Pictures, Turns
from densepure_rt.serving.service import Draining, Served
from densepure_rt.smoothing.classifier import SmoothedClassifier
from densepure_rt.smoothing.forecast import reach_of
from densepure_rt.smoothing.replay import replay
from densepure_rt.smoothing.samplers import OnDevice
from densepure_rt.smoothing.settings import PREDICT_N

MOST_SAMPLES = 16  # a request
RETRY_SECONDS = 2
Handler = Callable[[Request], Awaitable[Response]]


def routes(served: Served, provider: Provider, pictures: Pictures) -> list[Route]:
    """Return the routes of the demo page. provider: what the server runs .onnx engines on; see `SecondDevice`."""
    demo = Demo(served, provider, pictures)
    return [
        Route("/demo/", page(), methods=["GET"]),
        Route("/demo/model", answered(demo.model), methods=["GET"]),
        Route("/demo/image", answered(demo.image), methods=["POST"]),
        Route("/demo/samples", answered(demo.samples), methods=["POST"]),
    ]


def page() -> Handler:
    """Serves the page. It may run its own script and style alone, and ask this server alone."""
    text = data("demo.html").replace("/* theme.css */", data("theme.css"))
    policy = (
        f"default-src 'none'; script-src {inline_hash(text, 'script')}; style-src {inline_hash(text, 'style')}; "
        "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
    }

    async def serve(_: Request) -> Response:
        return HTMLResponse(text, headers=headers)

    return serve


def data(name: str) -> str:
    """Read a text that ships with the package."""
    return (resources.files("densepure_rt") / "data" / name).read_text(encoding="utf-8")


def inline_hash(text: str, tag: str) -> str:
    """Return the name that a Content-Security-Policy has for the one inline `tag` of the page."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def answered(handler: Handler) -> Handler:
    """`handler`, its errors as JSON in the words and the form of the Open Inference Protocol."""

    @functools.wraps(handler)
    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except (Busy, Draining) as error:
            return JSONResponse({"error": str(error)}, 503, {"Retry-After": str(RETRY_SECONDS)})
        except HTTPException as error:
            return JSONResponse(
                {"error": error.detail}, error.status_code, {"Connection": "close"}
            )  # not read to its end
        except UsageError as error:
            return JSONResponse({"error": str(error)}, 400)
        except DensePureError as error:
            logs.say(f"{request.url.path}: {error}", logging.ERROR, error=type(error).__name__)
            return JSONResponse({"error": str(error)}, 500)
        except ClientDisconnect:
            return Response(status_code=400)  # which nobody reads

    return answer


class Demo:
    """The handlers, and what they share."""

    def __init__(self, served: Served, provider: Provider, pictures: Pictures) -> None:
        self.served, self.device, self.pictures = served, SecondDevice(served.bundle, provider), pictures
        self.drawing = Turns()
        self.artist = ThreadPoolExecutor(1, "densepure-rt demo")  # a sample that is under way is never left to itself
        self.facts = facts(served)

    async def model(self, _: Request) -> Response:
        return JSONResponse(self.facts)

    async def image(self, request: Request) -> Response:
        content = await self.pictures.content(request)
        found = await unless_gone(request, self.pictures.decoded(content))
        return await asyncio.to_thread(tensor_of, found)

    async def samples(self, request: Request) -> Response:
        first = whole(request, "first", 0, 0, PREDICT_N - 1)
        count = whole(request, "count", 4, 1, MOST_SAMPLES)
        content = await self.pictures.content(request)
        drawn = await unless_gone(request, self.drawn(content, first, count))
        return await asyncio.to_thread(JSONResponse, {"samples": drawn})

    async def drawn(self, content: bytes, first: int, count: int) -> list[dict[str, Any]]:
        found = await self.pictures.decoded(content)
        async with self.drawing.mine():
            loop = asyncio.get_running_loop()
            return [
                await loop.run_in_executor(self.artist, self.draw, found.pixels, sample)
                for sample in range(first, first + count)
            ]

    def draw(self, pixels: Pixels, sample: int) -> dict[str, Any]:
        """Draw one sample of `predict`, its pictures as data: addresses. A label of -1: NaN or Inf came out."""
        classifier = SmoothedClassifier(self.served.bundle, OnDevice(self.device.opened()), self.served.secret())
        found = replay(classifier, LabelledImage(0, pixels, None), self.served.settings, sample, "predict")
        votes = enumerate(zip(found.purified, found.labels, strict=True))
        return {
            "sample": sample,
            "noisy": data_address(found.noisy),
            "votes": [
                {"picture": data_address(pixels), "label": label, "needed": vote < found.cast}
                for vote, (pixels, label) in votes
            ],
            "label": found.label,
        }


def tensor_of(found: Fitted) -> Response:
    """Answer with a picture as the tensor to send to the API, and with what was done to it."""
    shape = [1, *found.pixels.shape]
    tensor = {"name": "image", "datatype": "UINT8", "shape": shape, "data": found.pixels.ravel().tolist()}
    return JSONResponse({"input": tensor, "picture": data_address(found.pixels), "changes": found.changes})


class SecondDevice:
    """A device beside the server's, which is busy with its own loop and keeps no pictures. One caller at a time.

    It is opened for the first picture and kept. On the CPU it costs the memory of the engines' weights once more and of
    the work on one image (25 MiB for the engines that ship), on a GPU that of the plans at their smallest batch.
    """

    def __init__(self, bundle: Bundle, provider: Provider) -> None:
        self._bundle, self._provider = bundle, provider
        self._device: Device | None = None

    def opened(self) -> Device:
        if self._device is None:
            self._device = open_device(self._bundle, smallest_batch(self._bundle), 1, self._provider)
        return self._device


def smallest_batch(bundle: Bundle) -> int | None:
    """Return the batch that suits one sample, which fills no batch; None where plans do not say theirs.

    On the engines that ship `replay` takes 69 ms of a CPU at a batch of 1 and 156 ms at 8 (two steps, five votes).
    """
    plans = [sidecar.plan for sidecar in (bundle.unet, bundle.classifier) if sidecar.plan is not None]
    return min(set[int].intersection(*(set(plan.batches) for plan in plans)), default=None) if plans else 1


def facts(served: Served) -> dict[str, Any]:
    """Collect what the page says of the model at first. radii: those asked about, or 0 and the largest."""
    settings, unet = served.settings, served.bundle.unet
    reach = reach_of(settings, math.prod(unet.image))
    asked = [0.0, float(raised(reach or 0.0))] if settings.decided is None else settings.decided
    radii = [radius for radius in asked if settings.decided is None or radius <= (reach or 0.0)]
    return {
        "engine": served.bundle.unet_path.name,
        "precision": unet.precision,
        "image": unet.image,
        "classes": served.class_names,
        "sigma": settings.sigma,
        "steps": settings.steps,
        "votes": settings.effective.votes,
        "method": settings.method,
        "n": settings.n,
        "alpha": settings.alpha,
        "most_bytes": MOST_BYTES,
        "radii": radii,
        "examples": examples(served.bundle),
    }


def examples(bundle: Bundle) -> list[dict[str, str]]:
    """The first shipped image of each class, for a model of these images and classes; none for another model."""
    shipped = open_bundle(shipped_engine())
    classes = bundle.classifier.class_names
    if (shipped.unet.image, shipped.classifier.class_names) != (bundle.unet.image, classes):
        return []
    first: dict[int, LabelledImage] = {}
    for image in open_images(None, bundle.unet.image, classes):
        first.setdefault(-1 if image.label is None else image.label, image)
    return [
        {"name": f"{classes[label]} (test image {image.idx})", "picture": data_address(image.pixels)}
        for label, image in sorted(first.items())
    ]


def whole(request: Request, name: str, default: int, least: int, most: int) -> int:
    """A number in the address."""
    said = request.query_params.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", said) or not least <= int(said) <= most:
        raise UsageError(f"{name} is a number from {least} to {most}, got {said[:40]!r}")
    return int(said)
