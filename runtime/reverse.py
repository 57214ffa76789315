"""The reverse loop: work items of many samples, votes and steps, put into full batches. It owns order, nothing else.

A sample's life: one smooth item; one step item from the noisy image, shared by all its votes; then, vote by vote, a
draw from that Gaussian, the remaining steps, and a classify item. Votes are launched in rounds, each the fewest that
can decide the ballot, and are cast in vote order. Outcomes leave in the order in which the work came in, never as they
complete: unanimous samples finish first and would bias the count.

What is known of samples and of items lies in arrays, a column each: a line here serves a whole batch.

`walk` and `walk_graph` take a few items down a chain in lockstep, for what looks at the states on the way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from densepure_rt.runtime.device import NOT_FINITE, Batch, Device, Floats, Kind
from densepure_rt.runtime.schedule import Chain

RunStep = Callable[[dict[str, Floats]], Sequence[Floats]]  # a step graph: a feed of its inputs -> mean, std, finite
Integers = NDArray[np.int64]
LATEST_FIRST: tuple[Kind, ...] = ("classify", "step", "smooth")  # finish what is begun, so that few slots are held
UNCAST = -2  # in place of a vote that is not cast yet
SAMPLE, VOTE, STEP, SLOT = range(4)  # the columns of a `Queue`
NO_SLOT = -1  # of a vote that has still to leave its sample's


class Ballot(Protocol):
    """The part of an empty ballot that the loop uses; see `densepure_rt.smoothing.voting.Ballot`."""

    remaining: int  # votes at most

    @property
    def needed(self) -> int:
        """The fewest votes that can decide it."""

    def count(self, labels: NDArray[np.int32]) -> tuple[Integers, NDArray[np.int32]]:
        """Return the votes that each ballot still needs, and who leads. labels: [votes, n] in order, UNCAST behind."""


class Outcome(NamedTuple):
    """A decided sample: its label or NOT_FINITE, and its cost."""

    image: int
    sample: int
    label: int
    votes: int
    unet_calls: int


class Queue:
    """Items of work, first in, first out, int64 [n, 4]: sample, vote, step, slot.

    sample: its place in the loop's arrays, which is the slot that its votes branch from. step: the reverse step that
    the item takes, -1 to smooth, the chain's length to classify. slot: where its state is put.
    """

    def __init__(self) -> None:
        self.parts, self.length = deque[Integers](), 0

    def __len__(self) -> int:
        return self.length

    def put(self, items: Integers) -> None:
        if len(items):
            self.parts.append(items)
            self.length += len(items)

    def take(self, most: int) -> Integers:
        taken, wanted = [NO_ITEMS], min(most, self.length)
        self.length -= wanted
        while wanted:
            part = self.parts.popleft()
            if len(part) > wanted:
                self.parts.appendleft(part[wanted:])
            taken.append(part[:wanted])
            wanted -= len(taken[-1])
        items: Integers = np.concatenate(taken)
        return items


NO_ITEMS = np.empty((0, 4), np.int64)


class Free:
    """Slots that hold nothing."""

    def __init__(self, slots: range) -> None:
        self.slots, self.left = np.array(slots, np.int64), len(slots)

    def take(self, n: int) -> Integers:
        self.left -= n
        taken: Integers = self.slots[self.left : self.left + n].copy()
        return taken

    def give(self, slots: Integers) -> None:
        self.slots[self.left : self.left + len(slots)] = slots
        self.left += len(slots)


def decide(
    device: Device, chain: Chain, work: Iterable[tuple[int, int] | None], new_ballot: Callable[[], Ballot]
) -> Generator[Outcome, None, None]:
    """The outcome of each (image handle, sample index) of `work`, in that order.

    `work` is drawn from as room becomes free, so it may open images as it goes. None from it means "nothing before the
    next outcome", and must not come when all outcomes are out. With fewer than two steps nothing is
    random after the smoothing noise: `new_ballot` must then need a single vote.
    """
    return _Loop(device, chain, work, new_ballot()).run()


def slots_of(batch: int, in_flight: int) -> tuple[int, int]:
    """Return how many samples may be under way, a slot each, and how many slots their votes take at a time.

    With a batch of each kind waiting and a batch on every caller, some batch is full whenever work is left. A vote gets
    its slot with its first draw; as votes that have one go first, no more hold one than wait to be classified, which is
    less than a batch, and than are with the callers: whatever the chain and the votes.
    """
    return batch * (len(LATEST_FIRST) + in_flight), batch * (1 + in_flight)


class _Loop:
    def __init__(self, device: Device, chain: Chain, work: Iterable[tuple[int, int] | None], ballot: Ballot) -> None:
        self.device, self.chain, self.work, self.ballot = device, chain, iter(work), ballot
        self.queues = {kind: Queue() for kind in LATEST_FIRST}
        self.draws = Queue()  # steps that a sample's own slot is the source of: the first of all, and of each vote
        self.outstanding: dict[int, tuple[Kind, Integers]] = {}
        samples, votes = slots_of(device.batch, device.in_flight)
        self.free, self.free_votes = Free(range(samples)), Free(range(samples, samples + votes))
        device.reserve(samples + (votes if len(chain) > 1 else 0))
        # Of each sample: its place in the work, its image and index, the votes launched, those of them still to come.
        self.place, self.image, self.index, self.launched, self.awaited = np.zeros((5, samples), np.int64)
        self.labels, self.first_round = np.empty((ballot.remaining, samples), np.int32), ballot.needed
        self.drawn, self.decided = 0, dict[int, Outcome]()

    def run(self) -> Generator[Outcome, None, None]:
        place = 0
        try:
            while self.fill_device() or self.outstanding:
                ticket, labels = self.device.collect()
                kind, items = self.outstanding.pop(ticket)
                if labels is None:
                    self.follow(items)
                else:
                    self.count_votes(items, labels)
                while place in self.decided:
                    yield self.decided.pop(place)
                    place += 1
        finally:
            self.device.drain()  # after an error or Ctrl-C: leave the device idle

    def fill_device(self) -> bool:
        """Submit full batches while the device takes them; a partial one only when nothing else can happen."""
        while len(self.outstanding) < self.device.in_flight:
            kind = self.full_kind()
            if kind is None and not self.outstanding:
                kind = next((kind for kind in LATEST_FIRST if self.waiting(kind)), None)
            if kind is None:
                break
            items = self.take(kind)
            self.outstanding[self.device.submit(self.to_batch(kind, items))] = kind, items
        return bool(self.outstanding)

    def full_kind(self) -> Kind | None:
        """A kind that has a whole batch waiting; new samples are let in only when none of the others has."""
        for kind in LATEST_FIRST:
            if kind == "smooth":
                self.let_in()
            if self.waiting(kind) >= self.device.batch:
                return kind
        return None

    def waiting(self, kind: Kind) -> int:
        return len(self.queues[kind]) + (len(self.draws) if kind == "step" else 0)

    def take(self, kind: Kind) -> Integers:
        """A batch of items. Votes that have a slot go before those that get theirs here."""
        items = self.queues[kind].take(self.device.batch)
        if kind != "step":
            return items
        draws = self.draws.take(self.device.batch - len(items))
        first = draws[:, SLOT] == NO_SLOT
        draws[first, SLOT] = self.free_votes.take(int(first.sum()))
        return np.concatenate([items, draws])

    def let_in(self) -> None:
        """Begin samples of the work, until a batch of them waits, or the work has nothing before the next outcome."""
        room = min(self.free.left, self.device.batch - len(self.queues["smooth"]))
        drawn = list(islice(iter(self.work.__next__, None), room))
        if not drawn:
            return
        sample = self.free.take(len(drawn))
        self.place[sample] = self.drawn + np.arange(len(drawn))
        self.drawn += len(drawn)
        self.image[sample], self.index[sample] = zip(*drawn, strict=False)  # as in `close`
        self.labels[:, sample] = UNCAST
        self.launched[sample] = self.awaited[sample] = 1 if len(self.chain) < 2 else 0
        self.queues["smooth"].put(items_of(sample, vote=0, step=-1, slot=sample))

    def to_batch(self, kind: Kind, items: Integers) -> Batch:
        sample, vote, step, slot = items.T
        source = np.where(step == 1, sample, slot)
        columns = {"image": self.image[sample], "sample": self.index[sample], "vote": vote, "step": step}
        return Batch.of(self.chain, kind, source, slot, **columns)

    def follow(self, items: Integers) -> None:
        """Queue what the states that these items made need next."""
        items[:, STEP] += 1
        step, end = items[:, STEP], len(self.chain)
        self.queues["classify"].put(where(step == end, items))
        self.queues["step"].put(where((step > 1) & (step < end), items))
        self.draws.put(where((step == 0) & (step < end), items))
        if end > 1:
            branching = where(step == 1, items)[:, SAMPLE]
            self.launch_round(branching, np.full(len(branching), self.first_round))

    def launch_round(self, sample: Integers, votes: Integers) -> None:
        """Branch so many votes of each sample from the state that they share: the fewest that can decide its ballot."""
        if not len(sample):
            return
        each = np.repeat(sample, votes)
        order = np.arange(len(each)) - np.repeat(votes.cumsum() - votes, votes)  # 0, 1, ... of each sample
        self.draws.put(items_of(each, self.launched[each] + order, step=1, slot=NO_SLOT))
        self.launched[sample] += votes
        self.awaited[sample] = votes

    def count_votes(self, items: Integers, labels: Integers) -> None:
        """Note labels; of samples whose round is complete, cast it in vote order."""
        sample, vote, _, slot = items.T
        self.labels[vote, sample] = labels
        self.free_votes.give(slot[slot != sample])
        returned = np.bincount(sample, minlength=len(self.awaited))
        self.awaited -= returned
        complete = np.flatnonzero((returned > 0) & (self.awaited == 0))
        if not len(complete):
            return
        needed, label = self.ballot.count(self.labels[:, complete])
        lost = (self.labels[:, complete] == NOT_FINITE).any(axis=0)  # never a success, and never dropped
        label[lost] = NOT_FINITE
        decided = lost | (needed == 0)
        self.close(complete[decided], label[decided])
        self.launch_round(complete[~decided], needed[~decided])

    def close(self, sample: Integers, label: NDArray[np.int32]) -> None:
        votes, steps = self.launched[sample], len(self.chain)
        unet_calls = min(1, steps) + votes * max(0, steps - 1)  # the first step is shared
        columns = (self.image[sample], self.index[sample], label, votes, unet_calls)
        outcomes = map(Outcome, *(column.tolist() for column in columns))
        self.decided.update(zip(self.place[sample].tolist(), outcomes, strict=False))  # CPython 3.11's strict one leaks
        self.free.give(sample)


def where(which: NDArray[np.bool_], items: Integers) -> Integers:
    """`items[which]`, several times as fast."""
    return items.take(which.nonzero()[0], axis=0)


def items_of(sample: Integers, vote: ArrayLike, step: int, slot: ArrayLike) -> Integers:
    """Items as a `Queue` holds them."""
    items = np.empty((len(sample), 4), np.int64)
    items[:, SAMPLE], items[:, VOTE], items[:, STEP], items[:, SLOT] = sample, vote, step, slot
    return items


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
