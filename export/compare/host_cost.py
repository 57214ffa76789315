"""`densepure-rt bench --host`: what the host does for a batch, which bounds a GPU that is faster than that.

It is the reverse loop itself, on a device that takes no time, which fills the buffer that a GPU is told of a batch by.
Left out are the driver's calls, and what judges an image by its samples. All votes agree, every batch is full, and
seconds are CPU time of one core, which other programs hardly stretch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from densepure_rt.errors import UsageError
from densepure_rt.runtime.control import control_layout, fill_control
from densepure_rt.runtime.device import MAX_BATCH, Batch, Device
from densepure_rt.runtime.machine import processor
from densepure_rt.runtime.reverse import Outcome, decide
from densepure_rt.runtime.schedule import Chain, Schedule, make_chain
from densepure_rt.smoothing.voting import Ballot

BATCHES = (64, 512)
PROCEDURES = ((2, 5), (10, 40))  # steps and votes: the defaults of `certify`; Xiao et al. 2023
ROUNDS = 20
IN_FLIGHT = 2  # of a device on a GPU
SAMPLES_A_BATCH = 8  # so many batches of samples in a round, so that few are partial
IMAGES = 64  # open at a time
SIGMA = 0.5


@dataclass(frozen=True)
class HostCost:
    """The host's time for one batch, in microseconds: the median and the quartiles of the rounds.

    unet_calls: a second, that the host can keep a GPU supplied with at most. slots: that hold states at a time.
    """

    batch: int
    steps: int
    votes: int
    median: float
    lower: float
    upper: float
    unet_calls: float
    slots: int


@dataclass(frozen=True)
class HostCosts:
    processor: str
    rounds: int
    costs: tuple[HostCost, ...]


class Idle:
    """A device that takes no time, and whose votes all agree."""

    in_flight = IN_FLIGHT

    def __init__(self, batch: int) -> None:
        self.batch, self.slots, self.batches = batch, 0, 0
        self.outstanding = deque[Batch]()

    def reserve(self, slots: int) -> None:
        self.slots = slots

    def drain(self) -> None:
        self.outstanding.clear()

    def submit(self, batch: Batch) -> int:
        self.batches += 1
        self.outstanding.append(batch)
        return self.batches

    def collect(self) -> tuple[int, NDArray[np.int64] | None]:
        ticket, batch = self.batches - len(self.outstanding) + 1, self.outstanding.popleft()
        return ticket, np.zeros(len(batch.source), np.int64) if batch.kind == "classify" else None


@dataclass(frozen=True)
class IdleImage:
    index: int


class Filling(Idle):
    """An idle device that fills the control buffer of each batch, as one on a GPU does."""

    def __init__(self, batch: int) -> None:
        super().__init__(batch)
        self.images = {image: IdleImage(IMAGES - 1 - image) for image in range(IMAGES)}
        self.control = [np.zeros(control_layout(batch)[1], np.uint8) for _ in range(IN_FLIGHT)]

    def submit(self, batch: Batch) -> int:
        fill_control(self.control[self.batches % IN_FLIGHT], self.batch, batch, self.images)
        return super().submit(batch)


def looped(device: Idle, chain: Chain, votes: int, samples: int) -> list[Outcome]:
    """Run the reverse loop on nothing."""
    work = ((sample % IMAGES, sample) for sample in range(samples))
    return list(decide(cast(Device, device), chain, work, lambda: Ballot(votes)))


def host_cost(batch: int, steps: int, votes: int, rounds: int = ROUNDS) -> HostCost:
    """Time the host. Raises UsageError for a batch or rounds that cannot be."""
    if not 1 <= batch <= MAX_BATCH or rounds < 1:
        raise UsageError(f"`batch` is from 1 to {MAX_BATCH} and `rounds` from 1 up, got {batch} and {rounds}")
    chain = make_chain(Schedule("linear", 1000), "fixed_small", SIGMA, steps)
    seconds, device = [], Filling(batch)
    for _ in range(1 + rounds):  # the first warms up
        device.batches, started = 0, time.process_time()
        outcomes = looped(device, chain, votes, batch * SAMPLES_A_BATCH)
        seconds.append((time.process_time() - started) / device.batches)
    lower, median, upper = (float(value) for value in np.quantile(seconds[1:], (0.25, 0.5, 0.75)))
    unet_calls = sum(outcome.unet_calls for outcome in outcomes) / device.batches / median
    return HostCost(batch, steps, votes, 1e6 * median, 1e6 * lower, 1e6 * upper, unet_calls, device.slots)


def host_costs(batches: Sequence[int] = BATCHES, rounds: int = ROUNDS) -> HostCosts:
    """The host's cost of each batch size, of the default procedure and of the published one."""
    found = tuple(host_cost(batch, *procedure, rounds) for batch in batches for procedure in PROCEDURES)
    return HostCosts(processor(), rounds, found)
