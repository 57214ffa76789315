"""Workers with the same engines, as one sampler: what is handed to them, what comes back, what is lost on the way.

The unit of work is a `Strip`: consecutive samples of one image, as many as its next look needs. Its task says all that
their labels depend on, so that any worker with the same engines gives the same ones, and what was lost with a worker is
simply drawn again. Workers hold nothing of a run: with one of them the time of two tasks is lost.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from densepure_rt import logs
from densepure_rt.cluster.pace import LATES, Pace
from densepure_rt.cluster.tasks import Engines, Portion, Strip, Task, TaskImage, TaskResult
from densepure_rt.errors import EnvironmentFault
from densepure_rt.runtime.device import Kind, forked
from densepure_rt.runtime.noise import Key
from densepure_rt.runtime.reverse import Outcome
from densepure_rt.runtime.schedule import Chain
from densepure_rt.smoothing.scheduling import LostSample
from densepure_rt.smoothing.voting import Ballot
from densepure_rt.text import duration, plural

QUEUED = 2  # tasks at a worker: the next one is there when it ends one
BATCHES_A_TASK = 2  # of noisy images: more fill better at the end of a task, fewer keep a look from waiting
DEATHS = 3  # of workers that were alone with the same samples, before their image has failed
REFUSALS = 3  # in a row to open engines, before a worker is given up
FAILURES = 3  # images in a row that fail, before the fault is thought to be the machines'
ALONE = 2  # doublings of the time of a worker that is the only one: nobody else can take its work
POLL = 0.5  # seconds
HEAD_EVERY = 1.0  # seconds between looks at the cluster's head
HEAD_LOOKS = 5  # in vain, before a run gives up: Ray itself ends this process after a minute without its head
WAIT = 300.0  # seconds without any worker before a run gives up
KEPT = "what is done is kept; give the same command again once"


@dataclass(eq=False)
class Member:
    """A worker as the driver sees it.

    home: the machine that it was first on; another may be of another kind. opening: what will be its engines; None once
    they are there. tasks: by their references, the one that it works on first. since: when that began, or the opening,
    by the driver's clock. fresh: it has done no task. late: how many in a row it did not end in time. refused: how
    often in a row it could not open its engines.
    """

    number: int
    actor: Any
    opening: Any
    engines: Engines | None = None
    home: str | None = None
    tasks: dict[Any, Portion] = field(default_factory=dict)
    since: float = 0.0
    fresh: bool = True
    late: int = 0
    refused: int = 0
    samples: int = 0


class Fleet:
    """Workers with the same engines, as one `Sampler`.

    A worker that dies, raises an error or is late is replaced, and what it was drawing is drawn again. An image whose
    samples DEATHS workers died of, each alone with them, has failed: its samples are lost. So has one whose samples
    LATES workers did not end, each in twice the time of the one before, while other tasks were done.

    spawn: starts another worker in a member's place, on the same machine where that is still there. dismiss: ends one.
    heads: host and port of what the cluster ends with.
    """

    def __init__(
        self,
        members: Sequence[Member],
        engines: Engines,
        spawn: Callable[[Member], None],
        dismiss: Callable[[Member], None],
        heads: Sequence[tuple[str, int]] = (),
    ) -> None:
        self.members, self.engines, self.spawn, self.dismiss = list(members), engines, spawn, dismiss
        self.heads, self.size, self.process = heads, len(self.members), os.getpid()
        self.losses, self.lates = Counter[str](), Counter[str]()  # by the worker and its machine
        self.measured: dict[Kind, float] = {}
        self.paces: dict[tuple[int, int], Pace] = {}
        self.images: dict[int, TaskImage] = {}
        self.started: float | None = None
        self._handles = itertools.count()

    def open_image(self, pixels: NDArray[np.uint8], key: Key, sigma: float, scale: float) -> int:
        handle = next(self._handles)
        self.images[handle] = TaskImage(pixels.copy(), key, sigma, scale)
        return handle

    def close_image(self, handle: int) -> None:
        self.images.pop(handle, None)

    def seconds_per_item(self, chain: Chain, kind: Kind) -> float:
        """As the workers measure it while all are at work; together they take so much less."""
        asked = [member.actor.seconds_per_item.remote(chain, kind) for member in self.there]
        try:
            found: list[float] = ray.get(asked, timeout=WAIT)
        except (ray.exceptions.RayError, ConnectionError) as error:
            raise EnvironmentFault(
                f"a worker was lost before the first sample ({cause_of(error)}): start the command again"
            ) from error
        self.measured[kind] = max(found)
        return 1 / sum(1 / seconds for seconds in found)

    def pace(self, chain: Chain, votes: int) -> Pace:
        """Return the pace of tasks with this chain and these votes. It lasts as long as the fleet."""
        calls: dict[Kind, int] = {"smooth": 1, "step": 1 + votes * len(chain), "classify": votes}
        a_sample = sum(count * self.measured[kind] for kind, count in calls.items() if kind in self.measured)
        expected = BATCHES_A_TASK * self.engines.batch * a_sample if self.measured else None
        return self.paces.setdefault((len(chain), votes), Pace(expected))

    def describe(self) -> Mapping[str, str | int | bool]:
        return dict(self.engines.description) | {"workers": self.size}

    def close(self) -> None:
        for counted, what in ((self.losses, "lost"), (self.lates, "late")):
            if counted:
                each = ", ".join(f"{worker}: {count}" for worker, count in sorted(counted.items()))
                logs.say(f"workers that were {what}, and how often: {each}", logging.WARNING, **{what: dict(counted)})
            counted.clear()
        ray.shutdown()

    @property
    def lost(self) -> int:
        """Count how often a worker died, raised an error or could not open its engines."""
        return sum(self.losses.values())

    @property
    def late(self) -> int:
        """Count how often a worker did not end its task in time."""
        return sum(self.lates.values())

    @property
    def there(self) -> list[Member]:
        """The members that can be given work."""
        return [member for member in self.members if member.engines is not None]

    def status(self) -> str:
        """Say how the workers are: how many are there, what each of them does, how often one was lost."""
        there = self.there
        said = f"{len(there)} of {plural(self.size, 'worker')}"
        if there and self.started is not None:
            rates = [member.samples / (time.monotonic() - self.started) for member in there]
            said += f", {' to '.join(dict.fromkeys(f'{rate:.1f}' for rate in (min(rates), max(rates))))} samples/s each"
        said += f", {self.lost} lost so far" if self.lost else ""
        return said + (f", {self.late} late so far" if self.late else "")

    def await_heads(self) -> None:
        """Raise OSError when one of them does not answer."""
        for head in self.heads:
            socket.create_connection(head, timeout=HEAD_EVERY).close()

    def decide(
        self, chain: Chain, work: Iterable[tuple[int, int] | None], new_ballot: Callable[[], Ballot]
    ) -> Generator[Outcome | LostSample | None, None, None]:
        """The outcomes of `work`, as they come; see `Sampler`. Raises EnvironmentFault when there is no going on."""
        if self.process != os.getpid():
            raise forked("and its workers answer the parent alone")
        try:
            yield from _Driver(self, chain, new_ballot().remaining, iter(work)).run()
        except (ConnectionError, ray.exceptions.RaySystemError) as error:
            raise EnvironmentFault(f"the cluster's head is gone: {KEPT} it is back") from error


class _Driver:
    """A single `decide` of a fleet: hands tasks out, takes results back."""

    def __init__(self, fleet: Fleet, chain: Chain, votes: int, work: Iterator[tuple[int, int] | None]) -> None:
        self.fleet, self.chain, self.votes, self.work = fleet, chain, votes, work
        self.exhausted = False
        self.again: deque[Portion] = deque()  # what was lost, and is drawn again
        self.failed: set[int] = set()  # handles
        self.failures = 0  # of images, since a task was last done
        self.done = 0  # tasks
        self.pace = fleet.pace(chain, votes)
        self.head_missed = 0
        self.now = self.looked = self.head_looked = self.last_there = time.monotonic()

    def run(self) -> Generator[Outcome | LostSample | None, None, None]:
        self.fleet.started = self.fleet.started or time.monotonic()
        try:
            while self.hand_out():
                ready = self.ready()
                self.tick()
                for member, ref in ready:
                    yield from self.finished(member, ref)
                for member in list(self.fleet.members):
                    yield from self.give_up_late(member)
                if not ready:
                    yield None
                self.look_for_head()
                self.give_up_waiting()
        finally:
            for member in self.fleet.members:
                member.tasks.clear()  # what nobody waits for comes to its end unheard

    def tick(self) -> None:
        """Let the driver's clock go on, but not by a time in which this process was held up itself."""
        now = time.monotonic()
        self.now += min(now - self.looked, 2 * POLL)
        self.looked = now

    def hand_out(self) -> bool:
        """Give each worker up to QUEUED tasks. Whether anything is under way, or could be with a worker."""
        there = self.fleet.there
        for queued in range(QUEUED):  # each its first before any its second
            for member in there:
                if len(member.tasks) <= queued and (portion := self.next_portion(member)) is not None:
                    images = {handle: self.fleet.images[handle] for handle in portion.handles}
                    task = Task(portion.strips, images, self.chain, self.votes, self.fleet.engines.sha256)
                    if not member.tasks:
                        member.since = self.now
                    member.tasks[member.actor.draw.remote(task)] = portion
        under_way = any(member.tasks for member in self.fleet.members)
        return under_way or bool(self.again) or not (there or self.exhausted)

    def next_portion(self, member: Member) -> Portion | None:
        """Choose the next work: what was lost comes first. A suspect waits for a worker that it has to itself.

        One suspect of an image is tried at a time, so that no more workers die of it than it takes.
        """
        assert member.engines is not None
        if any(portion.suspect for portion in member.tasks.values()):
            return None
        tried = {
            handle for other in self.fleet.members for p in other.tasks.values() if p.suspect for handle in p.handles
        }
        for place, portion in enumerate(self.again):
            if not (portion.suspect and (member.tasks or tried.intersection(portion.handles))):
                del self.again[place]
                return portion
        return None if self.again else self.new_portion(BATCHES_A_TASK * member.engines.batch)

    def new_portion(self, most: int) -> Portion | None:
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
            if strips and (strips[-1].handle, strips[-1].first + strips[-1].samples) == drawn:
                strips[-1] = strips[-1]._replace(samples=strips[-1].samples + 1)
            else:
                strips.append(Strip(*drawn, 1))
        return Portion(tuple(strips)) if strips else None

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
            engines, member.opening = ray.get(member.opening), None
        except ray.exceptions.RayError as error:
            member.refused += 1
            self.replace(member, cause_of(error))
            return
        if engines.sha256 != self.fleet.engines.sha256:
            member.refused = REFUSALS
            self.replace(member, f"in its place there is only another kind, {engines.sha256[:8]} on {engines.node}")
            return
        member.engines, member.refused = engines, 0
        logs.say(f"worker {member.number} is back, on {engines.node}", logging.WARNING, worker=member.number)

    def finished(self, member: Member, ref: Any) -> Iterator[Outcome | LostSample]:
        """A task came back: its outcomes; or it is lost."""
        if ref not in member.tasks:  # its worker was lost with another task a moment ago
            return
        try:
            drawn: TaskResult = ray.get(ref)
        except ray.exceptions.RayError as error:
            yield from self.lost(member, error)
            return
        portion = member.tasks.pop(ref)
        took, member.since = self.now - member.since, self.now
        if took <= self.pace.limit(member.number, member.fresh):
            member.late = 0
        self.pace.note(member.number, took, member.fresh)
        member.fresh = False
        member.samples += len(drawn.labels)
        self.done += 1
        self.failures = 0
        columns = zip(*(column.tolist() for column in drawn), strict=True)
        for handle, first, samples in portion.strips:
            for place, of_one in enumerate(islice(columns, samples)):
                yield Outcome(handle, first + place, *of_one)

    def lost(self, member: Member, error: Exception) -> Iterator[LostSample]:
        """A worker died of its task or raised an error: another takes its place, and all that it had is drawn again."""
        (_, portion), *behind = member.tasks.items()
        member.tasks.clear()
        self.replace(member, cause_of(error))
        self.again += (other for _, other in behind)
        alone = len(portion.handles) == 1
        yield from self.draw_alone(portion._replace(deaths=portion.deaths + alone), cause_of(error))

    def give_up_late(self, member: Member) -> Iterator[LostSample]:
        """When it does not end its task in time another takes its place, and all that it had is drawn again.

        What it answers later is not heard. That it was slow is held against no image: only what no worker ends, while
        they end others, is.
        """
        took = self.now - member.since
        if not member.tasks:
            if member.opening is not None and took > WAIT:
                self.replace(member, f"it has not opened its engines in {duration(took)}", self.fleet.lates)
            return
        (ref, portion), *behind = member.tasks.items()
        alone = all(other is member for other in self.fleet.there)
        doublings = max(member.late, portion.late) + (ALONE if alone else 0)
        if took <= self.pace.limit(member.number, member.fresh, doublings) or ray.wait([ref], timeout=0)[0]:
            return
        longest = self.pace.longest(member.number, member.fresh)
        others = "none was done before" if longest is None else f"the longest before took {duration(longest)}"
        cause = f"no answer to a task in {duration(took)}, and {others}"
        member.tasks.clear()
        member.late += 1
        self.replace(member, cause, self.fleet.lates)
        self.again += (other for _, other in behind)
        tried = portion._replace(late=portion.late + 1, done_before=portion.done_before if portion.late else self.done)
        if tried.late >= LATES and tried.done_before == self.done:
            raise EnvironmentFault(f"no worker ends a task any more ({cause}): {KEPT} they do")
        if tried.late == 1:
            self.again.appendleft(tried)
        else:
            yield from self.draw_alone(tried, cause)

    def draw_alone(self, portion: Portion, cause: str) -> Iterator[LostSample]:
        """Draw its samples again, those of each image apart; or an image has failed."""
        handles = portion.handles
        for handle in handles:
            own = portion._replace(strips=portion.of(handle), suspect=True)
            if handle in self.failed:
                yield from lost_samples(own.strips)
            elif len(handles) == 1 and (own.deaths >= DEATHS or own.late >= LATES):
                yield from self.fail(handle, own.strips, cause)
            else:
                self.again.appendleft(own)

    def fail(self, handle: int, strips: tuple[Strip, ...], cause: str) -> Iterator[LostSample]:
        """The image has failed: all its samples that wait to be drawn again are lost, in each of its phases."""
        self.failures += 1
        if self.failures >= FAILURES:
            raise EnvironmentFault(
                f"{FAILURES} images in a row have failed, each with several workers, so that the fault is more likely "
                f"the engine's or the machines' ({cause}): {KEPT} that is mended"
            )
        pixels = self.fleet.images[handle].pixels
        phases = {other for other, image in self.fleet.images.items() if np.array_equal(image.pixels, pixels)}
        self.failed |= phases
        waiting = [strip for portion in self.again for strip in portion.strips if strip.handle in phases]
        kept = (portion.without(phases) for portion in self.again)
        self.again = deque(portion for portion in kept if portion.strips)
        yield from lost_samples((*strips, *waiting))

    def replace(self, member: Member, cause: str, counted: Counter[str] | None = None) -> None:
        """Start another worker in its place, unless it failed to open its engines too often.

        counted: among which it is; None for those that were lost.
        """
        counted = self.fleet.losses if counted is None else counted
        name = f"worker {member.number}" + ("" if member.engines is None else f" on {member.engines.node}")
        counted[name] += 1
        member.engines = member.opening = None
        member.fresh, member.since = True, self.now
        if member.refused >= REFUSALS:
            said = f"{name} is given up ({cause})"
            self.fleet.dismiss(member)
            self.fleet.members.remove(member)
        else:
            state = "lost" if counted is self.fleet.losses else "late"
            said = f"{name} is {state} ({cause}): another is started in its place"
            self.fleet.spawn(member)
        logs.say(said, logging.WARNING, worker=member.number, lost=self.fleet.lost, late=self.fleet.late)

    def look_for_head(self) -> None:
        """Raise EnvironmentFault when the cluster's head was not there for HEAD_LOOKS looks in a row."""
        if time.monotonic() - self.head_looked < HEAD_EVERY:
            return
        self.head_looked = time.monotonic()
        try:
            self.fleet.await_heads()
            self.head_missed = 0
        except OSError as error:
            self.head_missed += 1
            if self.head_missed >= HEAD_LOOKS:
                raise EnvironmentFault(f"the cluster's head is gone ({error}): {KEPT} it is back") from error

    def give_up_waiting(self) -> None:
        """Raise EnvironmentFault when there has been no worker for too long, or there will be none."""
        now = time.monotonic()
        if self.fleet.there:
            self.last_there = now
        elif now - self.last_there > WAIT or not self.fleet.members:
            raise EnvironmentFault(f"no worker is left: {KEPT} the cluster has some")


def lost_samples(strips: Iterable[Strip]) -> Iterator[LostSample]:
    for handle, first, samples in strips:
        yield from (LostSample(handle, first + place) for place in range(samples))


def cause_of(error: Exception) -> str:
    """Say in one line why a task or a worker was lost."""
    if isinstance(error, ray.exceptions.RayTaskError):
        return f"{type(error.cause).__name__}: {last_line(error.cause)}"
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "its machine was out of memory"
    if isinstance(error, ray.exceptions.RayActorError) and not error.actor_init_failed:
        return "its process or its machine is gone"
    return last_line(error) or type(error).__name__


def last_line(error: BaseException) -> str:
    """Return the last line of an error, which may be empty."""
    return next(reversed(str(error).strip().splitlines()), "")
