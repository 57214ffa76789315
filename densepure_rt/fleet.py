"""Workers with the same engines, as one sampler: what is handed to them, what comes back, what is lost on the way.

The unit of work is a `Strip`: consecutive samples of one image, as many as its next look needs. Its task says all that
their labels depend on, so that any worker with the same engines gives the same ones, and what was lost with a worker is
simply drawn again. Workers hold nothing of a run: with one of them the time of two tasks is lost.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray

from densepure_rt import logs
from densepure_rt.console import plural
from densepure_rt.errors import EnvironmentFault
from densepure_rt.records import canonical
from densepure_rt.runtime.bundle import Bundle
from densepure_rt.runtime.device import Kind
from densepure_rt.runtime.noise import Key
from densepure_rt.runtime.reverse import Outcome
from densepure_rt.runtime.schedule import Chain
from densepure_rt.scheduling import LOST
from densepure_rt.voting import Ballot

QUEUED = 2  # tasks at a worker: the next one is there when it ends one
BATCHES_A_TASK = 4  # full batches of noisy images: the few that are not full at its end cost little
DEATHS = 3  # of workers in a row that drew an image, before it has failed
FAILURES = 3  # images in a row that fail, before the fault is thought to be the machines'
POLL = 0.5  # seconds
WAIT = 300.0  # seconds without any worker before a run gives up


@dataclass(frozen=True)
class Engines:
    """What a worker draws with, and where it is."""

    bundle: Bundle
    description: Mapping[str, str | int | bool]
    version: str
    batch: int
    node: str
    pid: int

    @property
    def sha256(self) -> str:
        """Of all that a label depends on but the noise and the settings: workers of equal hash are interchangeable."""
        own = {name: value for name, value in self.description.items() if name not in ("batch", "threads")}
        files = (self.bundle.unet.file.sha256, self.bundle.classifier.file.sha256, *self.bundle.sidecars)
        return hashlib.sha256(canonical({"files": files, "device": own, "version": self.version})).hexdigest()


@dataclass(frozen=True, eq=False)
class OpenImage:
    """What `Sampler.open_image` was given."""

    pixels: NDArray[np.uint8]
    key: Key
    sigma: float
    scale: float


class Strip(NamedTuple):
    """Samples first, first + 1, ... of an image; handle: the driver's."""

    handle: int
    first: int
    samples: int


class Task(NamedTuple):
    """Strips for one worker, with all that their labels depend on. engines: the hash that the worker's must have."""

    strips: tuple[Strip, ...]
    images: Mapping[int, OpenImage]
    chain: Chain
    votes: int
    engines: str


class Drawn(NamedTuple):
    """A sample each, in the order of the task: int32 [n]."""

    labels: NDArray[np.int32]
    votes: NDArray[np.int32]
    unet_calls: NDArray[np.int32]


@dataclass(eq=False)
class Member:
    """A worker as the driver sees it.

    opening: what will be its engines; None once they are there. tasks: by their references, the one that it works on
    first. refused: how often in a row it could not open its engines.
    """

    number: int
    actor: Any
    opening: Any
    engines: Engines | None = None
    tasks: dict[Any, Task] = field(default_factory=dict)
    lost: int = 0
    refused: int = 0
    samples: int = 0


class Fleet:
    """Workers with the same engines, as one `Sampler`.

    A worker that dies is replaced, and what it was drawing is drawn again. An image that DEATHS workers in a row died
    of, each alone with it, has failed: its samples are LOST. A worker that has other engines draws nothing.
    """

    def __init__(self, members: Sequence[Member], engines: Engines, spawn: Callable[[Member], None]) -> None:
        self.members, self.engines, self.spawn = list(members), engines, spawn
        self.images: dict[int, OpenImage] = {}
        self.started: float | None = None
        self._handles = itertools.count()

    def open_image(self, pixels: NDArray[np.uint8], key: Key, sigma: float, scale: float) -> int:
        handle = next(self._handles)
        self.images[handle] = OpenImage(pixels.copy(), key, sigma, scale)
        return handle

    def close_image(self, handle: int) -> None:
        self.images.pop(handle, None)

    def seconds_per_item(self, chain: Chain, kind: Kind) -> float:
        """As the workers measure it while all are at work; together they take so much less."""
        asked = [member.actor.seconds_per_item.remote(chain, kind) for member in self.there]
        found: list[float] = ray.get(asked)
        return 1 / sum(1 / seconds for seconds in found)

    def describe(self) -> Mapping[str, str | int | bool]:
        return dict(self.engines.description) | {"workers": len(self.members)}

    def close(self) -> None:
        ray.shutdown()

    @property
    def there(self) -> list[Member]:
        """The members that can be given work."""
        return [member for member in self.members if self.fits(member)]

    def fits(self, member: Member) -> bool:
        return member.engines is not None and member.engines.sha256 == self.engines.sha256

    def status(self) -> str:
        """How the workers are: how many are there, what each of them does, how often one was lost."""
        there, lost = self.there, sum(member.lost for member in self.members)
        said = f"{len(there)} of {plural(len(self.members), 'worker')}"
        if there and self.started is not None:
            rates = [member.samples / (time.monotonic() - self.started) for member in there]
            said += f", {' to '.join(dict.fromkeys(f'{rate:.1f}' for rate in (min(rates), max(rates))))} samples/s each"
        return said + (f", {lost} lost so far" if lost else "")

    def decide(
        self, chain: Chain, work: Iterable[tuple[int, int] | None], new_ballot: Callable[[], Ballot]
    ) -> Generator[Outcome, None, None]:
        """The outcomes of `work`, those of a handle in its order; see `Sampler`."""
        return _Driver(self, chain, new_ballot().remaining, iter(work)).run()


class _Driver:
    """One `decide` of a fleet: hands tasks out, takes what comes back, puts it in order."""

    def __init__(self, fleet: Fleet, chain: Chain, votes: int, work: Iterator[tuple[int, int] | None]) -> None:
        self.fleet, self.chain, self.votes, self.work = fleet, chain, votes, work
        self.exhausted = False
        self.again: deque[tuple[Strip, ...]] = deque()  # what was lost, and is drawn again
        self.suspects: dict[int, int] = {}  # images that a worker may have died of; how many were alone with it
        self.failed: set[int] = set()
        self.failures = 0  # of images, since a task was last done
        self.order = InOrder()
        self.last_there = time.monotonic()

    def run(self) -> Generator[Outcome, None, None]:
        self.fleet.started = self.fleet.started or time.monotonic()
        try:
            while self.hand_out():
                for member, ref in self.ready():
                    yield from self.finished(member, ref)
                self.give_up_waiting()
        finally:
            for member in self.fleet.members:
                member.tasks.clear()  # what nobody waits for comes to its end unheard

    def hand_out(self) -> bool:
        """Give each worker up to QUEUED tasks. Whether anything is under way, or could be with a worker."""
        there = self.fleet.there
        for queued in range(QUEUED):  # each its first before any its second
            for member in there:
                if len(member.tasks) <= queued and (strips := self.next_strips(member)):
                    images = {strip.handle: self.fleet.images[strip.handle] for strip in strips}
                    task = Task(strips, images, self.chain, self.votes, self.fleet.engines.sha256)
                    member.tasks[member.actor.draw.remote(task)] = task
        under_way = any(member.tasks for member in self.fleet.members)
        return under_way or bool(self.again) or not (there or self.exhausted)

    def next_strips(self, member: Member) -> tuple[Strip, ...]:
        """What was lost comes first. A suspect is alone with its worker."""
        assert member.engines is not None
        if any(self.suspected(task.strips) for task in member.tasks.values()):
            return ()
        for place, strips in enumerate(self.again):
            if not (self.suspected(strips) and member.tasks):
                del self.again[place]
                return strips
        return self.new_strips(BATCHES_A_TASK * member.engines.batch)

    def suspected(self, strips: tuple[Strip, ...]) -> bool:
        return strips[0].handle in self.suspects

    def new_strips(self, most: int) -> tuple[Strip, ...]:
        """The next samples of the work, at most so many."""
        strips: list[Strip] = []
        while not self.exhausted and sum(strip.samples for strip in strips) < most:
            try:
                drawn = next(self.work)
            except StopIteration:
                self.exhausted = True
                break
            if drawn is None:
                break
            handle, sample = drawn
            self.order.expect(handle, sample)
            if strips and (strips[-1].handle, strips[-1].first + strips[-1].samples) == drawn:
                strips[-1] = strips[-1]._replace(samples=strips[-1].samples + 1)
            else:
                strips.append(Strip(handle, sample, 1))
        return tuple(strips)

    def ready(self) -> list[tuple[Member, Any]]:
        """Wait a moment: the tasks that came back, with their workers. Notes the workers that did."""
        opening = {member.opening: member for member in self.fleet.members if member.opening is not None}
        working = {ref: member for member in self.fleet.members for ref in member.tasks}
        waiting = [*working, *opening]
        if not waiting:
            time.sleep(POLL)
            return []
        ray.wait(waiting, timeout=POLL)
        ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        for ref in ready:
            if ref in opening:
                self.arrived(opening[ref])
        return [(working[ref], ref) for ref in ready if ref in working]

    def arrived(self, member: Member) -> None:
        """A worker that was started again has opened its engines, or has not."""
        try:
            member.engines, member.opening = ray.get(member.opening), None
        except ray.exceptions.RayError as error:
            member.refused += 1
            self.replace(member, cause_of(error))
            return
        member.refused = 0
        if self.fleet.fits(member):
            logs.say(f"worker {member.number} is back, on {member.engines.node}", logging.WARNING, worker=member.number)
        else:
            warn_of_others([member])

    def finished(self, member: Member, ref: Any) -> Iterator[Outcome]:
        """A task came back: its outcomes and those that waited for them; or it is lost."""
        if ref not in member.tasks:  # its worker was lost with another task a moment ago
            return
        try:
            drawn: Drawn = ray.get(ref)
        except ray.exceptions.RayError as error:
            yield from self.lost(member, ref, error)
            return
        task = member.tasks.pop(ref)
        member.samples += len(drawn.labels)
        self.failures = 0
        columns = zip(*(column.tolist() for column in drawn), strict=True)
        for handle, first, samples in task.strips:
            self.suspects.pop(handle, None)
            outcomes = [
                Outcome(handle, first + i, *columns_of_one) for i, columns_of_one in enumerate(islice(columns, samples))
            ]
            yield from outcomes if handle in self.failed else self.order.add(handle, first, outcomes)

    def lost(self, member: Member, ref: Any, error: Exception) -> Iterator[Outcome]:
        """A task did not come back, nor what was queued behind it where the worker itself is gone."""
        died = isinstance(error, ray.exceptions.RayActorError)
        if died:
            ref = next(iter(member.tasks))  # the one that it was at
        task, behind = member.tasks.pop(ref), [*member.tasks.values()] if died else []
        if died:
            member.tasks.clear()
            self.replace(member, cause_of(error))
        self.again += [other.strips for other in behind]
        strips = {handle: tuple(s for s in task.strips if s.handle == handle) for handle in task.images}
        for handle, own in strips.items():
            self.suspects[handle] = self.suspects.get(handle, 0) + (len(strips) == 1)
            if handle in self.failed or self.suspects[handle] >= DEATHS:
                yield from self.fail(handle, own, error)
            else:
                self.again.append(own)

    def fail(self, handle: int, strips: tuple[Strip, ...], error: Exception) -> Iterator[Outcome]:
        """The image has failed: all its samples that are out are LOST. Those under way follow as they come back."""
        del self.suspects[handle]
        if handle not in self.failed:
            self.failed.add(handle)
            self.failures += 1
            what = f"{DEATHS} workers in a row died of an image or refused it, which has failed ({cause_of(error)})"
            logs.say(what, logging.WARNING)
        if self.failures >= FAILURES:
            raise EnvironmentFault(
                f"{FAILURES} images in a row failed on {DEATHS} workers each, so that the fault is more likely the "
                f"engine's or the machines' ({cause_of(error)}): what is done is kept; go on once that is mended"
            )
        waiting = [strip for other in self.again for strip in other if strip.handle == handle]
        kept = (tuple(strip for strip in other if strip.handle != handle) for other in self.again)
        self.again = deque(strips for strips in kept if strips)
        for _, first, samples in (*strips, *waiting):
            yield from (Outcome(handle, first + i, LOST, 0, 0) for i in range(samples))
        yield from self.order.flush(handle)

    def replace(self, member: Member, cause: str) -> None:
        """Start another worker in its place, unless it failed to open its engines too often."""
        member.lost += 1
        member.engines = member.opening = None
        if member.refused >= DEATHS:
            logs.say(f"worker {member.number} is given up ({cause})", logging.WARNING, worker=member.number)
            self.fleet.members.remove(member)
            return
        lost = f"worker {member.number} is lost ({cause}): another is started, and what it was drawing is drawn again"
        logs.say(lost, logging.WARNING, worker=member.number, lost=member.lost)
        self.fleet.spawn(member)

    def give_up_waiting(self) -> None:
        """Raise EnvironmentFault when there has been no worker for too long, or there will be none."""
        now = time.monotonic()
        if self.fleet.there:
            self.last_there = now
        elif now - self.last_there > WAIT or not self.fleet.members:
            raise EnvironmentFault("no worker is left: what is done is kept; go on once the cluster has some")


class InOrder:
    """Holds what comes early, so that the outcomes of each image leave in the order of its samples."""

    def __init__(self) -> None:
        self._next: dict[int, int] = {}
        self._early: dict[int, dict[int, list[Outcome]]] = {}

    def expect(self, handle: int, sample: int) -> None:
        """The samples of `handle` begin with this one, unless an earlier one was expected."""
        self._next.setdefault(handle, sample)

    def add(self, handle: int, first: int, outcomes: list[Outcome]) -> Iterator[Outcome]:
        """What may leave, now that these have come."""
        early = self._early.setdefault(handle, {})
        early[first] = outcomes
        while (ready := early.pop(self._next[handle], None)) is not None:
            self._next[handle] += len(ready)
            yield from ready

    def flush(self, handle: int) -> Iterator[Outcome]:
        """What is held of an image."""
        for outcomes in self._early.pop(handle, {}).values():
            yield from outcomes


def cause_of(error: Exception) -> str:
    """One line on why a task or a worker was lost."""
    if isinstance(error, ray.exceptions.RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "out of memory"
    return "its process or its machine is gone"


def warn_of_others(members: Sequence[Member]) -> None:
    """Of workers that draw nothing, since their labels would be those of another classifier."""
    groups = Counter((member.engines.sha256[:8], member.engines.node) for member in members if member.engines)
    found = ", ".join(f"{count} of group {group} on {node}" for (group, node), count in sorted(groups.items()))
    said = (
        "another engine, processor or version is there, and one kind draws all samples of a run; --group names a kind"
    )
    logs.say(f"workers that are not used: {found}; {said}", logging.WARNING)
