"""The reverse loop: work items of many samples, votes and steps, put into full batches. It owns order, nothing else.

A sample's life: one smooth item; one step item from the noisy image, shared by all its votes; then, vote by vote, a
draw from that Gaussian, the remaining steps, and a classify item. Votes are launched in rounds, each the fewest that
can decide the ballot, and are cast in vote order. Outcomes leave in the order in which the work came in, never as they
complete: unanimous samples finish first and would bias the count.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from densepure_rt.runtime.device import NOT_FINITE, Batch, Device, Kind
from densepure_rt.runtime.schedule import Chain

LATEST_FIRST: tuple[Kind, ...] = ("classify", "step", "smooth")  # finish what is begun, so that few slots are held


class Ballot(Protocol):
    """What the loop asks of a ballot; see `densepure_rt.voting.Ballot`."""

    @property
    def needed(self) -> int: ...
    @property
    def winner(self) -> int: ...
    def cast(self, label: int) -> None: ...


class Outcome(NamedTuple):
    """One decided sample: its label or NOT_FINITE, and what it cost."""

    image: int
    sample: int
    label: int
    votes: int
    unet_calls: int


@dataclass
class Sample:
    """A sample under way. `root` is the slot that its votes branch from; `round` the votes that are under way."""

    place: int
    image: int
    index: int
    ballot: Ballot
    root: int
    launched: int = 0
    round: dict[int, int | None] = field(default_factory=dict)
    unet_calls: int = 0


class Item(NamedTuple):
    """One item of work. `step` is the reverse step it takes: -1 to smooth, the chain's length to classify."""

    sample: Sample
    vote: int
    step: int
    source: int
    target: int


def decide(
    device: Device, chain: Chain, work: Iterable[tuple[int, int] | None], new_ballot: Callable[[], Ballot]
) -> Generator[Outcome, None, None]:
    """The outcome of each (image handle, sample index) of `work`, in that order.

    `work` is drawn from as room becomes free, so it may open images as it goes. None from it means "nothing before the
    next outcome", and must not come when all outcomes are out. With fewer than two steps nothing is
    random after the smoothing noise: `new_ballot` must then need a single vote.
    """
    return _Loop(device, chain, work, new_ballot).run()


class _Loop:
    def __init__(
        self, device: Device, chain: Chain, work: Iterable[tuple[int, int] | None], new_ballot: Callable[[], Ballot]
    ) -> None:
        self.device, self.chain, self.new_ballot = device, chain, new_ballot
        self.work, self.places = iter(work), itertools.count()
        self.exhausted = False
        self.queues: dict[Kind, deque[Item]] = {kind: deque() for kind in LATEST_FIRST}
        self.outstanding: dict[int, list[Item]] = {}
        # With a batch of each kind waiting and a batch on every caller, some batch is full whenever work is left.
        self.room = device.batch * (len(LATEST_FIRST) + device.in_flight)
        slots = self.room * (1 + (new_ballot().needed if len(chain) > 1 else 0))  # a later round is never larger
        self.free = list(range(slots))
        device.reserve(slots)

    def run(self) -> Generator[Outcome, None, None]:
        decided: dict[int, Outcome] = {}
        place = 0
        try:
            while self.fill_device() or self.outstanding:
                ticket, labels = self.device.collect()
                for outcome_place, outcome in self.advance(self.outstanding.pop(ticket), labels):
                    decided[outcome_place] = outcome
                while place in decided:
                    yield decided.pop(place)
                    place += 1
        finally:
            self.device.drain()  # after an error or Ctrl-C: leave the device idle

    def fill_device(self) -> bool:
        """Submit full batches while the device takes them; a partial one only when nothing else can happen."""
        while len(self.outstanding) < self.device.in_flight:
            kind = self.full_kind()
            if kind is None and not self.outstanding:
                kind = next((kind for kind in LATEST_FIRST if self.queues[kind]), None)
            if kind is None:
                break
            items = [self.queues[kind].popleft() for _ in range(min(self.device.batch, len(self.queues[kind])))]
            self.outstanding[self.device.submit(self.to_batch(kind, items))] = items
        return bool(self.outstanding)

    def full_kind(self) -> Kind | None:
        """A kind that has a whole batch waiting; new samples are let in only when none of the others has."""
        for kind in LATEST_FIRST:
            if kind == "smooth":
                self.let_in()
            if len(self.queues[kind]) >= self.device.batch:
                return kind
        return None

    def let_in(self) -> None:
        while not self.exhausted and self.room and len(self.queues["smooth"]) < self.device.batch:
            try:
                drawn = next(self.work)
            except StopIteration:
                self.exhausted = True
                return
            if drawn is None:
                return
            self.room -= 1
            root = self.free.pop()
            sample = Sample(next(self.places), *drawn, self.new_ballot(), root)
            self.queues["smooth"].append(Item(sample, vote=0, step=-1, source=root, target=root))

    def to_batch(self, kind: Kind, items: list[Item]) -> Batch:
        def column(values: Iterable[int]) -> NDArray[np.int64]:
            return np.fromiter(values, np.int64, len(items))

        steps = column(item.step for item in items)
        return Batch(
            kind=kind,
            image=column(item.sample.image for item in items),
            sample=column(item.sample.index for item in items),
            vote=column(item.vote for item in items),
            step=steps,
            source=column(item.source for item in items),
            target=column(item.target for item in items),
            t=self.chain.t[steps] if kind == "step" else np.empty(0, np.float32),
            coef=self.chain.coef[steps] if kind == "step" else np.empty((0, 6), np.float32),
        )

    def advance(self, items: list[Item], labels: NDArray[np.int64] | None) -> Iterator[tuple[int, Outcome]]:
        """Queue what follows each finished item; yield the samples that are decided by it."""
        for i, item in enumerate(items):
            if labels is not None:
                yield from self.count_vote(item, int(labels[i]))
            else:
                self.follow(item.sample, item.vote, item.target, item.step + 1)

    def follow(self, sample: Sample, vote: int, slot: int, done: int) -> None:
        """Queue what a state with `done` steps behind it needs next."""
        if done == len(self.chain):
            sample.round.setdefault(vote)
            self.queues["classify"].append(Item(sample, vote, done, slot, slot))
        elif done == 1:
            self.launch_round(sample)
        else:
            self.queues["step"].append(Item(sample, vote, done, slot, slot))
            sample.unet_calls += 1

    def launch_round(self, sample: Sample) -> None:
        """Branch the fewest votes that can decide the ballot from the state that all votes share."""
        sample.round = dict.fromkeys(range(sample.launched, sample.launched + sample.ballot.needed))
        sample.launched += len(sample.round)
        sample.unet_calls += len(sample.round)
        for vote in sample.round:
            self.queues["step"].append(Item(sample, vote, 1, sample.root, self.free.pop()))

    def count_vote(self, item: Item, found: int) -> Iterator[tuple[int, Outcome]]:
        """Note one label; when its round is complete, cast the round in vote order."""
        sample = item.sample
        sample.round[item.vote] = found
        if item.source != sample.root:
            self.free.append(item.source)
        labels = [label for label in sample.round.values() if label is not None]
        if len(labels) < len(sample.round):
            return
        if NOT_FINITE in labels:  # such a sample is never a success, and never dropped
            yield self.close(sample, NOT_FINITE)
            return
        for label in labels:
            sample.ballot.cast(label)
        if sample.ballot.needed == 0:
            yield self.close(sample, sample.ballot.winner)
        else:
            self.launch_round(sample)

    def close(self, sample: Sample, label: int) -> tuple[int, Outcome]:
        self.free.append(sample.root)
        self.room += 1
        return sample.place, Outcome(sample.image, sample.index, label, max(sample.round) + 1, sample.unet_calls)
