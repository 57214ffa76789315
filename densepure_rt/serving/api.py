"""The HTTP of `densepure-rt serve`: the Open Inference Protocol, metrics, and how a server starts and ends.

Clients are untrusted: a body is bounded while it is read, a slow one is given up, and who hangs up takes the work that
was begun for it along.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from densepure_rt import logs
from densepure_rt._version import __version__
from densepure_rt.errors import UsageError
from densepure_rt.runtime.device import Provider
from densepure_rt.serving import demo
from densepure_rt.serving.clients import body_of, unless_gone
from densepure_rt.serving.decoders import Decoders
from densepure_rt.serving.metrics import Metrics, RequestOutcome
from densepure_rt.serving.models import models_of, values_of
from densepure_rt.serving.origins import SameOrigin
from densepure_rt.serving.pictures import Busy, Pictures, media_type
from densepure_rt.serving.protocol import (
    EXTENSIONS,
    HEADER_LENGTH,
    VERSION,
    InferRequest,
    Model,
    ProtocolError,
    encode_error,
    encode_response,
    metadata,
    parse_address,
    parse_request,
)
from densepure_rt.serving.service import DeviceFailed, Draining, Full, ModelName, Service
from densepure_rt.smoothing.classifier import Certified, Predicted

BODY_SECONDS = 10.0  # in which a body has to come
LARGE_BODY = 2**16  # bytes, beyond which the event loop does not wait while a body is parsed
JSON_BYTES = 6  # of a value: 255, a comma, a space, and a bracket now and then
HEAD_BYTES = 2**16  # of a request beside its values
RETRY_SECONDS = {"full": 1, "draining": 10}  # after which it is worth asking again
FAILED = "the server failed at this request; its log says how"
CLIENT_CLOSED = 499  # nginx's status for a client that is gone: for logs, nobody reads it
# Not a form's, for it would not be meant for this server. tritonclient names none.
CONTENT_TYPES = ("", "application/json", "application/octet-stream")


@dataclass(frozen=True)
class Deadlines:
    """Seconds that a request may take: where it names none, and at most."""

    default: float = 30.0
    most: float = 300.0

    def __post_init__(self) -> None:
        if not 0 < self.default <= self.most:
            raise UsageError(
                f"`default` {self.default:g} s is the time of a request that names none, and `most` "
                f"{self.most:g} s is not less"
            )

    def of(self, asked: InferRequest) -> float:
        """Raises ProtocolError for more than may be."""
        if asked.deadline_ms is None:
            return self.default
        if asked.deadline_ms > 1000 * self.most:
            raise ProtocolError(
                f"deadline_ms is at most {1000 * self.most:g} on this server, got {asked.deadline_ms:g}"
            )
        return asked.deadline_ms / 1000


class Api:
    """The routes of the protocol, for one service."""

    def __init__(self, service: Service, deadlines: Deadlines, pictures: Pictures) -> None:
        self.service, self.deadlines, self.metrics = service, deadlines, Metrics(service)
        self.pictures = pictures
        self.models = models_of(service.served, service.describe(), service.most)
        (self.input,) = {model.input for model in self.models.values()}

    def routes(self) -> list[BaseRoute]:
        model = "/v2/models/{model}"
        return [
            Route("/v2", self.about),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.ready),
            Route("/metrics", self.measured),
            *(
                route
                for path in (model, f"{model}/versions/{{version}}")
                for route in (
                    Route(path, self.about_model),
                    Route(f"{path}/ready", self.model_ready),
                    Route(f"{path}/infer", self.infer, methods=["POST"]),
                )
            ),
        ]

    async def about(self, request: Request) -> Response:
        return JSONResponse({"name": "densepure-rt", "version": __version__, "extensions": EXTENSIONS})

    async def live(self, request: Request) -> Response:
        return told({"live": not self.service.broken}, not self.service.broken)

    async def ready(self, request: Request) -> Response:
        return told({"ready": self.service.ready}, self.service.ready)

    async def about_model(self, request: Request) -> Response:
        return JSONResponse(metadata(self.model(request)))

    async def model_ready(self, request: Request) -> Response:
        return told({"name": self.model(request).name, "ready": self.service.ready}, self.service.ready)

    async def measured(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def infer(self, request: Request) -> Response:
        came, model = time.monotonic(), self.model(request)
        response, outcome = await self.answered(request, model, came)
        seconds = time.monotonic() - came
        self.metrics.count(model.name, outcome, seconds)
        said: dict[str, Any] = {"model": model.name, "outcome": outcome, "status": response.status_code}
        logs.say(f"{model.name}: {outcome}", **said, seconds=round(seconds, 4))
        return response

    async def answered(self, request: Request, model: Model, came: float) -> tuple[Response, RequestOutcome]:
        """A response and what it is, whatever happens."""
        try:
            asked = await self.asked(request, model)
            deadline = came + self.deadlines.of(asked)
            if not len(asked.images):
                asked = await self.with_picture(request, asked)
            work = self.service.answers(cast(ModelName, model.name), list(asked.images), deadline)
            answers = await unless_gone(request, work)
            body, headers = encode_response(model, asked, values_of(answers))
            return Response(body, headers=headers), outcome_of(answers)
        except ProtocolError as error:
            return refusal(400, str(error)), "refused"
        except HTTPException as error:
            return refusal(error.status_code, error.detail, error.headers), "refused"
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED), "gone"
        except (Full, Busy) as error:
            return busy(str(error), "full"), "full"
        except Draining as error:
            return busy(str(error), "draining"), "draining"
        except DeviceFailed as error:
            return refusal(500, str(error)), "failed"
        except Exception as error:  # ours: the client is told no more, and the log has it
            logs.say(f"{model.name}: {error!r}", logging.ERROR, model=model.name, error=type(error).__name__)
            return refusal(500, FAILED), "failed"

    def model(self, request: Request) -> Model:
        name, version = request.path_params["model"], request.path_params.get("version", VERSION)
        if name not in self.models or version != VERSION:
            known = ", ".join(self.models)
            raise HTTPException(404, f"there is no such model: {known} are served, of which the version is {VERSION}")
        return self.models[name]

    async def asked(self, request: Request, model: Model) -> InferRequest:
        """Parse a request; one whose body is a picture, which is not read yet, has no images.

        Raises HTTPException for a body that is too large, too slow or of another type.
        """
        kind = media_type(request)
        picture = kind.startswith("image/")
        if not picture and kind not in CONTENT_TYPES:
            known = "application/json or application/octet-stream, or a picture, image/..."
            raise HTTPException(415, f"a request is {known}; got {kind[:40]!r}")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise HTTPException(415, "a compressed body is not taken: send it as it is")
        if picture:
            return parse_address(model, request.query_params)
        return await parsed(model, await self.body(request), request.headers.get(HEADER_LENGTH))

    async def with_picture(self, request: Request, asked: InferRequest) -> InferRequest:
        """A request with the picture in its body as the engine takes it, and what was done to get there.

        Raises ProtocolError for what is no picture, or takes too much to decode.
        """
        content = await self.pictures.content(request)
        try:
            found = await unless_gone(request, self.pictures.decoded(content))
        except UsageError as error:
            raise ProtocolError(str(error)) from error
        told = {**asked.told, "changes": list(found.changes)}
        return dataclasses.replace(asked, images=found.pixels[None], told=told)

    async def body(self, request: Request) -> bytes:
        """All of a request's body. Raises HTTPException for one that is too large or too slow."""
        return await body_of(request, "a body", self.most_bytes, BODY_SECONDS)

    @functools.cached_property
    def most_bytes(self) -> int:
        """The most bytes of a body: as many images as a request may have, in JSON."""
        most_images = max(model.most_images for model in self.models.values())
        return HEAD_BYTES + JSON_BYTES * most_images * math.prod(self.input.shape[1:])


async def parsed(model: Model, body: bytes, header_length: str | None) -> InferRequest:
    if len(body) > LARGE_BODY:
        return await asyncio.to_thread(parse_request, model, body, header_length)
    return parse_request(model, body, header_length)


def outcome_of(answers: list[Predicted] | list[Certified]) -> RequestOutcome:
    """Return the outcome of a request of several images: that of any of them, the worst first."""
    found = [answer.certificate if isinstance(answer, Certified) else answer for answer in answers]
    if any(each.stopped for each in found):
        return "stopped"
    abstains = any((each.label if isinstance(each, Predicted) else each.predict) is None for each in found)
    return "abstained" if abstains else "answered"


def told(value: dict[str, Any], holds: bool) -> Response:
    """The protocol says yes by 200 and no by a status of 4xx."""
    return JSONResponse(value, 200 if holds else 400)


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode_error(message), status, headers, "application/json")


def busy(message: str, why: str) -> Response:
    return refusal(503, message, {"Retry-After": str(RETRY_SECONDS[why])})


async def http_error(request: Request, error: Exception) -> Response:
    """Put an error of Starlette, such as a path that is not there, into the protocol's form."""
    assert isinstance(error, HTTPException)
    return refusal(error.status_code, error.detail, error.headers)


async def our_error(request: Request, error: Exception) -> Response:
    """Answer for a route that failed without words of its own."""
    path: str = request.scope["path"]
    logs.say(f"{path!r}: {error!r}", logging.ERROR, path=path, error=type(error).__name__)
    return refusal(500, FAILED)


def make_app(
    service: Service,
    deadlines: Deadlines,
    with_demo: bool,
    provider: Provider = "cpu",
    names: Collection[str] | None = None,
    decoders: Decoders | None = None,
) -> Starlette:
    """Make the application. names: that the server goes by; see `origins`.

    provider: Of the demo's own device, see `demo.routes`; decoders: of pictures, one where none are given.
    """
    pictures = Pictures(service.served.bundle.unet.image, decoders or Decoders())
    routes = Api(service, deadlines, pictures).routes()
    if with_demo:
        routes += demo.routes(service.served, provider, pictures)
    return Starlette(
        routes=routes,
        middleware=[Middleware(SameOrigin, names=names)],
        exception_handlers={HTTPException: http_error, Exception: our_error},
    )
