"""A server under mixed load for minutes: good clients beside attackers, secrets that rotate, one stop: `make soak`.

Every answer of a good client is kept with the secrets of its time, and compared in the end with what the classifier
itself says under one of them. Memory, descriptors and threads are read each second; at rest, after the first
part and in the end, they have to be the same but for MOST_GROWTH. Ends in a table, a line a part of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np

from densepure_rt.images.datasets import LabelledImage, open_images
from densepure_rt.keys import stored_key
from densepure_rt.serving.protocol import HEADER_LENGTH
from densepure_rt.smoothing.settings import Settings
from tests.attackers import Target, attack
from tests.load import MODELS, Expected, body_of, differences, read
from tests.support.server import ServerProcess, decoders, serving

SETTINGS = Settings(sigma=0.5, steps=0, votes=1, n=128, alpha=0.05)  # the classifier alone: this is about the server
PICTURES = 4
GOOD = 4  # connections of clients that mean well
ATTACKS = ("chunks", "chunks", "bombs", "aborts", "aborts", "slow_readers", "idle")
STOPPED_SECONDS = 5.0  # by SIGSTOP
REST_SECONDS = 4.0  # after which what a load has taken is given back
MOST_GROWTH = 0.05  # of memory, between the two rests
MOST_MORE = 4  # descriptors, and threads, between the two rests: an executor makes its threads as they are needed
PARTS = 10


class Answer(NamedTuple):
    """secrets: the server's, from before it was asked until it had answered."""

    model: str
    image: int
    found: dict[str, list[Any]]
    secrets: list[bytes]


class State(NamedTuple):
    """Of the server's process. memory: resident bytes."""

    memory: int
    descriptors: int
    threads: int


@dataclass
class Part:
    """Count what happened in a part of the time. health: seconds that it took."""

    answers: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    health: list[float] = field(default_factory=list)
    states: list[State] = field(default_factory=list)

    def line(self, number: int) -> str:
        most = State(*(max(column) for column in zip(*self.states, strict=True)))
        other = ", ".join(f"{count} x {status}" for status, count in sorted(self.statuses.items()) if status != 200)
        return (
            f"{number:>4}  {self.answers:>7}  {1000 * float(np.percentile(self.health, 99)):>10.0f}  "
            f"{most.memory / 2**20:>10.1f}  {most.descriptors:>11}  {most.threads:>7}  {other or '-'}"
        )


@dataclass
class Report:
    parts: list[Part]
    answers: list[Answer] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    secrets: int = 0
    rests: list[State] = field(default_factory=list)
    begun: Counter[str] = field(default_factory=Counter)
    slow_turns: float = 0.0
    exit_code: int = 0
    said: str = ""

    def lines(self) -> list[str]:
        first, last = self.rests
        return [
            "part  answers  health p99  memory MiB  descriptors  threads  other answers",
            *(part.line(number) for number, part in enumerate(self.parts, 1)),
            f"at rest: memory {first.memory / 2**20:.1f} then {last.memory / 2**20:.1f} MiB, descriptors "
            f"{first.descriptors} then {last.descriptors}, threads {first.threads} then {last.threads}",
            f"{len(self.answers)} answers under {self.secrets} secrets, {len(self.wrong)} wrong; turns of the event "
            f"loop beyond 50 ms: {self.slow_turns:.0f}; attacks begun: "
            + ", ".join(f"{count} {kind}" for kind, count in sorted(self.begun.items())),
        ]

    def faults(self) -> list[str]:
        """Return what does not hold."""
        first, last = self.rests
        more = max(last.descriptors - first.descriptors, last.threads - first.threads)
        found = {
            f"{len(self.wrong)} wrong answers: {self.wrong[:3]}": bool(self.wrong),
            "memory has grown": last.memory > (1 + MOST_GROWTH) * first.memory,
            "descriptors or threads are left": more > MOST_MORE,
            f"exit code {self.exit_code}: {self.said}": self.exit_code != 0 or bool(self.said),
            "a part has no answer": not all(part.answers for part in self.parts),
        }
        return [fault for fault, holds in found.items() if holds]


def state_of(server: ServerProcess) -> State:
    process = Path(f"/proc/{server.process.pid}")
    threads = next(line for line in (process / "status").read_text().splitlines() if line.startswith("Threads:"))
    return State(server.memory(), len(os.listdir(process / "fd")), int(threads.split()[1]))


class Soak:
    """seconds: of load, without the rests."""

    def __init__(self, server: ServerProcess, key: Path, images: list[LabelledImage], seconds: float) -> None:
        self.server, self.key, self.seconds = server, key, seconds
        self.bodies = [body_of(image.pixels) for image in images]
        self.report = Report([Part() for _ in range(PARTS)])
        self.part = self.report.parts[0]
        self.secrets: list[bytes] = []  # in the order in which they were seen in the server's file

    def seen(self) -> int:
        """How many secrets have been seen, the one that is in the file now among them."""
        secret = stored_key(self.key)
        if secret is not None and secret not in self.secrets[-1:]:
            self.secrets.append(secret)
        return len(self.secrets)

    async def run(self) -> Report:
        each = self.seconds / PARTS
        for number, part in enumerate(self.report.parts):
            self.part, end = part, time.monotonic() + each
            await self.loaded(end, stop=number == PARTS // 2)
            if number in (0, PARTS - 1):
                await asyncio.sleep(REST_SECONDS)
                self.report.rests.append(state_of(self.server))
        self.report.slow_turns = self.server.metrics()["densepure_rt_slow_turns_total"]
        return self.report

    async def loaded(self, end: float, stop: bool) -> None:
        target = Target(self.server.host, self.server.port, end)
        good = [self.ask_until(end, number) for number in range(GOOD)]
        bad = [self.attack(kind, target) for kind in ATTACKS]
        await asyncio.gather(*good, *bad, self.watch(end), *([self.stopped()] if stop else []))

    async def attack(self, kind: str, target: Target) -> None:
        self.report.begun[kind] += await attack(kind, target)

    async def stopped(self) -> None:
        self.server.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(min(STOPPED_SECONDS, self.seconds / PARTS / 2))
        self.server.process.send_signal(signal.SIGCONT)

    async def watch(self, end: float) -> None:
        url = f"http://{self.server.host}:{self.server.port}/v2/health/live"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            while time.monotonic() < end:
                began = time.monotonic()
                async with session.get(url, headers={"Connection": "close"}) as response:
                    assert response.status == 200
                    await response.read()
                self.part.health.append(time.monotonic() - began)
                self.part.states.append(state_of(self.server))
                self.seen()
                await asyncio.sleep(0.2)

    async def ask_until(self, end: float, number: int) -> None:
        chance = random.Random(number)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            while time.monotonic() < end:
                model, image = chance.choice(MODELS), chance.randrange(len(self.bodies))
                (body, headers), before = self.bodies[image], self.seen()
                url = f"http://{self.server.host}:{self.server.port}/v2/models/{model}/infer"
                try:
                    async with session.post(url, data=body, headers=headers) as response:
                        content = await response.read()
                except aiohttp.ClientConnectionError as error:  # an idle connection gives way
                    self.report.wrong.append(f"{model}: {error!r}")
                    continue
                self.part.statuses[response.status] += 1
                if response.status == 200:
                    found = read(content, response.headers.get(HEADER_LENGTH))
                    self.report.answers.append(Answer(model, image, found, self.secrets[before - 1 : self.seen()]))
                    self.part.answers += 1
                await asyncio.sleep(0.05)


def compare(report: Report, images: list[LabelledImage]) -> None:
    """Find the answers that the classifier itself gives under none of their secrets."""
    expected: dict[bytes, Expected] = {}
    for answer in report.answers:
        wrong: list[list[str]] = []
        for secret in answer.secrets:
            if secret not in expected:
                expected[secret] = Expected(images, SETTINGS, secret)
            wrong.append(differences(answer.found, expected[secret], answer.model, answer.image))
        if all(wrong):
            report.wrong.append(f"{answer.model} of image {answer.image}: {', '.join(wrong[0])}")
    report.secrets = len(expected)


def run(seconds: float, say: Callable[[str], None] = print) -> Report:
    shipped = open_images(None, (1, 28, 28), [str(label) for label in range(10)]).select(500 // PICTURES, PICTURES)
    images = [LabelledImage(image.idx, image.pixels, None) for image in shipped]
    options: dict[str, object] = {
        "sigma": SETTINGS.sigma,
        "steps": SETTINGS.steps,
        "votes": SETTINGS.votes,
        "n": SETTINGS.n,
    }
    options |= {"alpha": SETTINGS.alpha, "rotate": f"{max(5, round(seconds / 20))}s"}
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    with tempfile.TemporaryDirectory() as folder:
        key = Path(folder) / "secret.key"
        with serving(*given, "--key", key) as server:
            report = asyncio.run(Soak(server, key, images, seconds).run())
            children = decoders(server.process.pid)
            report.exit_code, report.said = server.end()
        if left := [pid for pid in children if Path(f"/proc/{pid}").exists()]:
            report.wrong.append(f"processes are left: {left}")
    compare(report, images)
    for line in report.lines():
        say(line)
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="of load")
    faults = run(parser.parse_args().seconds).faults()
    print(*(f"FAULT: {fault}" for fault in faults), sep="\n")
    raise SystemExit(bool(faults))
