"""`densepure-rt serve` as a process of its own, for tests that talk to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families
from tritonclient.http import InferenceServerClient

ROOT = Path(__file__).resolve().parents[2]
# The classifier alone and few samples: a test is about the server.
QUICK = "--sigma 0.5 --steps 0 --n 160 --alpha 0.05 --batch 8 --threads 2".split()


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class ServerProcess:
    """A server that is ready. host, port: where."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        assert process.stderr is not None
        self.ready_line = process.stdout.readline()
        found = re.search(r"http://([0-9.]+):([0-9]+)", self.ready_line)
        assert found, f"it did not start: {process.stderr.read()}"
        self.host, self.port = found[1], int(found[2])

    def client(self, **options: Any) -> InferenceServerClient:
        return InferenceServerClient(f"{self.host}:{self.port}", **options)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """One request on a connection of its own. headers: their names with underscores."""
        with closing(http.client.HTTPConnection(self.host, self.port, timeout=30)) as connection:
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, names)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def metrics(self) -> dict[str, float]:
        """By name and labels as they are written, such as `densepure_rt_requests_total{model="predict"}`."""
        text = self.ask("GET", "/metrics").body.decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {f"{name}{labels(values)}": value for name, values, value, *_ in samples}

    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))

    def end(self, signal_number: int = signal.SIGTERM, timeout: float = 30) -> tuple[int, str]:
        """Its exit code and what it said on stderr."""
        self.process.send_signal(signal_number)
        _, said = self.process.communicate(timeout=timeout)
        return self.process.returncode, said


def labels(values: dict[str, str]) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in sorted(values.items())) + "}" if values else ""


@contextmanager
def serving(*options: object, cwd: Path | None = None, fault: str = "") -> Iterator[ServerProcess]:
    """A server at a free port, which is killed at the end unless it has ended; it must not have said a traceback.

    fault: Python that is run before it, to break something.
    """
    code = "from densepure_rt.cli import main; main()"
    command = [sys.executable, "-c", f"{fault}\n{code}", "serve", "--port", "0", *map(str, options)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=cwd
    )
    try:
        yield ServerProcess(process)
    finally:
        process.kill()
        _, said = process.communicate()
    assert "Traceback" not in said, said


def decoders(of: int | None = None) -> list[int]:
    """List the decoders that a process has started and that run, by their ids; of this one where none is given."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            program = stat.with_name("cmdline").read_bytes()
            if int(parent) == (of or os.getpid()) and state != "Z" and b"densepure_rt.images.decoder" in program:
                found.append(int(stat.parent.name))
    return found


def until(holds: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)
