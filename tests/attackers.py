"""Clients that mean no good, for `tests.soak` and the tests of the server.

python -m tests.attackers HOST PORT SECONDS KIND...

Each goes on until its time is up, whatever the server does to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, NamedTuple

from tests.support.pictures import scan_bomb

PATHS = ("/demo/image", "/v2/models/predict/infer", "/v2/models/certify/infer", "/nowhere")
TENSOR = {"name": "image", "datatype": "UINT8", "shape": [1, 1, 28, 28], "data": [7] * 784}
BODY = json.dumps({"inputs": [TENSOR]}).encode()
ONE_BYTE_CHUNKS = b"1\r\nx\r\n" * 5000
LOST = (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError)


class Target(NamedTuple):
    """A server, and the `time.monotonic` until which it is attacked."""

    host: str
    port: int
    end: float

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection that is hung up at the end of the block, what it has not sent included."""
        reader, writer = await asyncio.wait_for(asyncio.open_connection(self.host, self.port, limit=2**12), 10)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    def head(self, path: str, length: int | None) -> bytes:
        framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        return f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n".encode()


async def chunks(target: Target) -> None:
    """Send a body in chunks of one byte without end."""
    async with target.connected() as (_, writer):
        writer.write(target.head(random.choice(PATHS), None))
        while time.monotonic() < target.end:
            writer.write(ONE_BYTE_CHUNKS)
            await asyncio.wait_for(writer.drain(), 10)


@functools.cache
def bomb(scans: int) -> bytes:
    return scan_bomb(5000, scans)


async def bombs(target: Target, scans: int = 100) -> None:
    """Send a picture that takes seconds to decode, and wait for its answer, or for half a second."""
    content = bomb(scans)
    async with target.connected() as (reader, writer):
        writer.write(target.head("/demo/image", len(content)) + content)
        patience = min(random.choice((0.5, 20.0)), max(0.1, target.end - time.monotonic()))
        await asyncio.wait_for(reader.read(100), patience)


async def aborts(target: Target) -> None:
    """Ask, and hang up before the answer: at once, a little later, or in the midst of the body."""
    async with target.connected() as (_, writer):
        writer.write(target.head(random.choice(PATHS[1:3]), len(BODY)) + BODY[: random.choice((len(BODY), 400))])
        await asyncio.sleep(random.choice((0.0, 0.01, 0.1)))


async def slow_readers(target: Target) -> None:
    """Ask for page after page, and read a little of them."""
    async with target.connected() as (reader, writer):
        while time.monotonic() < target.end:
            writer.write(b"GET /demo/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
            for _ in range(5):
                await asyncio.wait_for(reader.read(200), 10)
                await asyncio.sleep(0.1)


async def idle(target: Target) -> None:
    """Hold thirty connections for a while, and ask nothing."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(30):
            await stack.enter_async_context(target.connected())
        await asyncio.sleep(min(3.0, max(0.0, target.end - time.monotonic())))


KINDS: dict[str, Callable[[Target], Coroutine[Any, Any, None]]] = {
    attack.__name__: attack for attack in (chunks, bombs, aborts, slow_readers, idle)
}


async def attack(kind: str, target: Target) -> int:
    """Do so until the time is up. Returns how often it was begun."""
    begun = 0
    while time.monotonic() < target.end:
        begun += 1
        with contextlib.suppress(*LOST):
            await KINDS[kind](target)
    return begun


async def main(host: str, port: str, seconds: str, *kinds: str) -> None:
    target = Target(host, int(port), time.monotonic() + float(seconds))
    begun = await asyncio.gather(*(attack(kind, target) for kind in kinds))
    print(*(f"{kind}: {count}" for kind, count in zip(kinds, begun, strict=True)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
