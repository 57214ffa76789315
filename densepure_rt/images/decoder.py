"""A child process that decodes the pictures of strangers: what they cost is bounded, and it can be killed.

`main` is its program; `Decoder` starts one and asks it. A task is TASK and the file; an answer is ANSWER, JSON and
pixels. What comes back is trusted no more than the picture: nothing is unpickled, and its size is known beforehand.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

import numpy as np

from densepure_rt.errors import EnvironmentFault, UsageError
from densepure_rt.images.formats import Shape
from densepure_rt.images.uploads import Fitted, fitted

CPU_SECONDS = 10  # a picture; 25 megapixels of any kind took 2.5 s at most
MEMORY = 768 * 2**20  # bytes beyond those of an idle child; a transparent WEBP of 25 megapixels takes 580 MiB
NICE = 10  # so that a server's answers come first
TASK = struct.Struct(">Q3I")  # bytes of the file; channels, height and width
ANSWER = struct.Struct(">cI")  # whether it is PIXELS or REFUSED; bytes of the JSON that follows: changes, or a message
PIXELS, REFUSED, READY = b"p", b"r", b"."
TOO_LARGE = f"the picture takes more than {MEMORY // 2**20} MiB of memory to decode: save it smaller"
MOST_JSON = 2**16
BOOT = "import sys; sys.path[:] = sys.argv[1:]; from densepure_rt.images.decoder import main; main()"
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # each reserves address space


class Decoder:
    """A child process, started by the first picture. One caller at a time, but for `kill`."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._killed = False
        self._lock = threading.Lock()  # of both

    @property
    def usable(self) -> bool:
        """Say whether it may be given another picture: it has not been killed, and did not die."""
        return not self._killed

    def fitted(self, content: bytes, shape: Shape) -> Fitted:
        """Return what `uploads.fitted` does.

        Raises:
            UsageError: As `uploads.fitted` does, and for a picture that takes too much time or memory.
            EnvironmentFault: When no child can be started.
        """
        try:
            child = self._child or self._started()
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(TASK.pack(len(content), *shape))
            child.stdin.write(content)
            child.stdin.flush()
            return received(child.stdout, shape)
        except UsageError:
            raise
        except (OSError, EOFError, ValueError) as error:  # ValueError: what came is no answer
            raise UsageError(died(self.end())) from error
        except BaseException:
            self.end()
            raise

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", BOOT, *filter(None, sys.path)]
        cure = "look at the memory, and at ulimit -a"
        with self._lock:
            if self._killed:
                raise EOFError
            try:
                self._child = child = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=os.environ | ONE_THREAD,
                    start_new_session=True,  # Ctrl-C is for the server
                )
            except OSError as error:
                raise EnvironmentFault(f"cannot start a process that decodes pictures ({error}): {cure}") from error
        assert child.stdout is not None
        if child.stdout.read(1) != READY and not self._killed:
            raise EnvironmentFault(f"the process that decodes pictures ended when it was started: {cure}")
        return child

    def kill(self) -> None:
        """Have the child end, and what it works at. Waits for nothing."""
        with self._lock:
            self._killed = True
            if self._child is not None:
                self._child.kill()

    def end(self) -> int:
        """Kill the child and wait until it has ended. Returns its exit status, 0 where there was none."""
        self.kill()
        if (child := self._child) is None:
            return 0
        status = child.wait()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was not sent
                pipe.close()
        return status


def received(answers: IO[bytes], shape: Shape) -> Fitted:
    """Read an answer. Raises UsageError where it is one, EOFError for one that is cut short or none."""
    kind, size = ANSWER.unpack(exactly(answers, ANSWER.size))
    if size > MOST_JSON:
        raise EOFError
    said = json.loads(exactly(answers, size))
    if kind == REFUSED:
        raise UsageError(str(said))
    pixels = np.frombuffer(exactly(answers, math.prod(shape)), np.uint8).reshape(shape)
    return Fitted(pixels, tuple(map(str, said)))


def exactly(stream: IO[bytes], size: int) -> bytes:
    found = stream.read(size)
    if len(found) < size:
        raise EOFError
    return found


def died(status: int) -> str:
    if -status == signal.SIGXCPU:
        return f"the picture takes more than {CPU_SECONDS} s of a processor to decode: save it anew, or smaller"
    return f"the picture cannot be decoded: its decoder ended (status {status}); save it anew"


# in the child


def main() -> None:
    """Decode what comes on stdin until it ends."""
    os.nice(NICE)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the server ends it, by SIGKILL or the end of stdin
    limit(resource.RLIMIT_CORE, 0)
    with contextlib.suppress(OSError):  # Linux alone says
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit(resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY)
    tasks, answers = sys.stdin.buffer, sys.stdout.buffer
    with contextlib.suppress(BrokenPipeError, EOFError):
        answers.write(READY)
        answers.flush()
        while True:
            size, *shape = TASK.unpack(exactly(tasks, TASK.size))
            limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + CPU_SECONDS)
            answers.write(answer(exactly(tasks, size), (shape[0], shape[1], shape[2])))
            answers.flush()


def limit(kind: int, most: int) -> None:
    """Set a soft limit, below the hard one."""
    _, hard = resource.getrlimit(kind)
    with contextlib.suppress(ValueError, OSError):  # a system that has this limit in name alone
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def answer(content: bytes, shape: Shape) -> bytes:
    try:
        found = fitted(content, shape)
    except UsageError as error:
        large = isinstance(error.__cause__, MemoryError)
        return packed(REFUSED, TOO_LARGE if large else str(error), b"")
    return packed(PIXELS, found.changes, found.pixels.tobytes())


def packed(kind: bytes, said: object, pixels: bytes) -> bytes:
    text = json.dumps(said).encode("ascii")
    return ANSWER.pack(kind, len(text)) + text + pixels
