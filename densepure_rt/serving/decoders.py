"""A server's children that decode pictures: as many at a time as it was given, and none for who is gone."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from densepure_rt.errors import UsageError
from densepure_rt.images.decoder import Decoder
from densepure_rt.images.formats import Shape
from densepure_rt.images.uploads import Fitted
from densepure_rt.serving.service import Draining

DECODE_SECONDS = 30.0  # in which a picture has to be decoded; its decoder is niced, and may wait for a processor


class Decoders:
    """Children that are started when they are needed. Its threads wait for them, a thread a child.

    Args:
        decoders: At a time; more callers wait for their turn.
    """

    def __init__(self, decoders: int = 1) -> None:
        if decoders < 1:
            raise UsageError(f"`decoders` is 1 or more, got {decoders}")
        self.most, self.closed = decoders, False
        self._threads = ThreadPoolExecutor(decoders, "densepure-rt decoder")
        self._idle: list[Decoder] = []
        self._working: set[Decoder] = set()

    async def fitted(self, content: bytes, shape: Shape) -> Fitted:
        """Return what `uploads.fitted` does. Cancelling it kills the child.

        Raises:
            UsageError: As `uploads.fitted` does, and for a picture that takes too long or too much memory.
            Draining: After `close`, and when that comes while the picture is being decoded.
            EnvironmentFault: When no child can be started.
        """
        if self.closed:
            raise Draining("the server is about to end and takes no more pictures: ask another one")
        decoder = self._idle.pop() if self._idle else Decoder()
        self._working.add(decoder)
        found = self._threads.submit(decoder.fitted, content, shape)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(found), DECODE_SECONDS)
        except asyncio.TimeoutError:
            raise UsageError(f"the picture takes more than {DECODE_SECONDS:g} s to decode: save it smaller") from None
        except UsageError:
            if self.closed:
                raise Draining("the server is about to end: ask another one") from None
            raise
        finally:
            self._working.discard(decoder)
            if not found.done() or self.closed:
                decoder.kill()
            if decoder.usable:
                self._idle.append(decoder)

    def close(self) -> None:
        """Kill all children, and take no more pictures."""
        self.closed = True
        for decoder in self._working:
            decoder.kill()
        for decoder in self._idle:
            decoder.end()
        self._threads.shutdown(wait=False)
