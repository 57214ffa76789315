"""Pictures that come over HTTP, for the API and for the demo alike: few at a time, bounded, decoded by children."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.exceptions import HTTPException
from starlette.requests import Request

from densepure_rt.errors import DensePureError
from densepure_rt.images.formats import Shape
from densepure_rt.images.uploads import MOST_BYTES, Fitted
from densepure_rt.serving.clients import body_of
from densepure_rt.serving.decoders import Decoders

MOST_READING = 32  # pictures that come at a time, MOST_BYTES each
MOST_WAITING = 8  # requests of a kind, the one at work among them
BODY_SECONDS = 30.0  # in which a picture has to come


class Busy(DensePureError):
    """As many requests wait as may."""


class Pictures:
    """The pictures that are sent to a server: their limits and decoders. shape: [C, H, W] of its engine."""

    def __init__(self, shape: Shape, decoders: Decoders) -> None:
        self.shape, self.decoders = shape, decoders
        self.decoding = Turns(decoders.most)
        self.reading = 0

    async def content(self, request: Request) -> bytes:
        """The picture file that was sent. Raises Busy before any of it is read."""
        if self.reading >= MOST_READING:
            raise Busy(f"{self.reading} pictures are on their way here, no more are taken: try again in a while")
        self.reading += 1
        try:
            return await body(request)
        finally:
            self.reading -= 1

    async def decoded(self, content: bytes) -> Fitted:
        """Return what `Decoders.fitted` does, in its turn. Raises Busy."""
        async with self.decoding.mine():
            return await self.decoders.fitted(content, self.shape)


class Turns:
    """Few requests at a time, in the order in which they came; one that would have to wait too long is refused."""

    def __init__(self, at_a_time: int = 1) -> None:
        self._room, self._here = asyncio.Semaphore(at_a_time), 0

    @asynccontextmanager
    async def mine(self) -> AsyncIterator[None]:
        if self._here >= MOST_WAITING:
            raise Busy(f"{self._here} requests for pictures are waiting, no more are taken: try again in a while")
        self._here += 1
        try:
            async with self._room:
                yield
        finally:
            self._here -= 1


def media_type(request: Request) -> str:
    """The media type of a request's body, without its parameters."""
    kind: str = request.headers.get("content-type", "")
    return kind.partition(";")[0].strip().lower()


async def body(request: Request) -> bytes:
    """Read the body. Raises HTTPException for more than MOST_BYTES, for a slow one, and for a form."""
    kind = media_type(request)
    if not kind.startswith("image/") and kind not in ("", "application/octet-stream"):
        raise HTTPException(415, f"a picture is sent as image/... or application/octet-stream, got {kind[:40]!r}")
    return await body_of(request, "a picture", MOST_BYTES, BODY_SECONDS)
