"""The reverse loop: work items of many samples, votes and steps, put into full batches. It owns order, nothing else.

A sample's life: one smooth item; one step item from the noisy image, shared by all its votes; then, vote by vote, a
draw from that Gaussian, the remaining steps, and a classify item. Votes are launched in rounds, each the fewest that
can decide the ballot, and are cast in vote order. Outcomes leave in the order in which the work came in, never as they
complete: unanimous samples finish first and would bias the count.

`walk` and `walk_graph` take a few items down a chain in lockstep, for what looks at the states on the way.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from densepure_rt.runtime.device import NOT_FINITE, Batch, Device, Floats, Kind
from densepure_rt.runtime.schedule import Chain

RunStep = Callable[[dict[str, Floats]], Sequence[Floats]]  # a step graph: a feed of its inputs -> mean, std, finite
LATEST_FIRST: tuple[Kind, ...] = ("classify", "step", "smooth")  # finish what is begun, so that few slots are held


class Ballot(Protocol):
    """What the loop asks of a ballot; see `densepure_rt.smoothing.voting.Ballot`."""

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
        return Batch.of(
            self.chain,
            kind,
            [item.source for item in items],
            [item.target for item in items],
            image=[item.sample.image for item in items],
            sample=[item.sample.index for item in items],
            vote=[item.vote for item in items],
            step=[item.step for item in items],
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


def walk(
    device: Device,
    chain: Chain,
    image: ArrayLike,
    sample: NDArray[np.int64],
    vote: ArrayLike = 0,
    slots: NDArray[np.int64] | None = None,
) -> Iterator[tuple[NDArray[np.int64], list[int]]]:
    """Smooth the items, take each step of the chain, classify; pause behind each, while the states can be read.

    image: a handle, or one for each item. slots: an own one for each item, None for its place among the items. As in
    the loop, items of one sample share its first step, here in the slot of the first of them.

    Yields:
        The slots that hold the states of the items, and their labels, of which there are none before the end.
    """
    slots = np.arange(len(sample)) if slots is None else slots
    device.reserve(int(slots.max()) + 1)
    images, votes = (np.full(sample.shape, column) for column in (image, vote))
    firsts: dict[tuple[int, int], int] = {}
    shared = [firsts.setdefault(pair, i) for i, pair in enumerate(zip(images.tolist(), sample.tolist(), strict=True))]
    held, roots, every = slots[shared], np.array(list(firsts.values())), np.arange(len(sample))
    stages: list[tuple[Kind, int]] = [("smooth", -1), *(("step", i) for i in range(len(chain)))]
    for kind, step in (*stages, ("classify", len(chain))):
        items, labels = every if kind == "classify" or step > 0 else roots, list[int]()
        for place in reversed(range(0, len(items), device.batch)):  # so that a shared state is overwritten last
            own = items[place : place + device.batch]
            columns = {"image": images[own], "sample": sample[own], "vote": votes[own]}
            device.submit(Batch.of(chain, kind, held[own], slots[own], step=step, **columns))
            _, found = device.collect()
            labels = ([] if found is None else found.tolist()) + labels
        held = slots if step > 0 else held
        yield held, labels


def walk_graph(
    run: RunStep, chain: Chain, mean: Floats, draw: Callable[[int], Floats]
) -> Iterator[tuple[dict[str, Floats], Sequence[Floats]]]:
    """Take states [n, C, H, W] down the chain by a step graph.

    mean: where they begin, without spread. draw: the vote noise of a step, [n, C, H, W]; the first has none.

    Yields:
        What the graph is fed at each step, and what it gives.
    """
    std = np.zeros_like(mean)
    for step in range(len(chain)):
        feed = step_feed(chain, step, mean, std, draw(step) if step else np.zeros_like(mean))
        outputs = run(feed)
        yield feed, outputs
        mean, std, _ = outputs


def step_feed(chain: Chain, step: int, mean: Floats, std: Floats, noise: Floats) -> dict[str, Floats]:
    """Return what a step graph takes of states [n, C, H, W] at one step of the chain."""
    t, coef = (np.repeat(column[step : step + 1], len(mean), axis=0) for column in (chain.t, chain.coef))
    return {"mean": mean, "std": std, "noise": noise, "t": t, "coef": coef}
