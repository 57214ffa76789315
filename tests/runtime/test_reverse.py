"""The reverse loop on a toy device, against a separately written float64 procedure that shares and stops nothing."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from densepure_rt.export.compare.host_cost import Idle
from densepure_rt.runtime.device import NOT_FINITE, Batch, Device
from densepure_rt.runtime.noise import Key, first_state, smoothing_law, smoothing_noise, vote_noise
from densepure_rt.runtime.reverse import Outcome, decide, slots_of, walk, walk_graph
from densepure_rt.runtime.schedule import Schedule, Variance, make_chain
from densepure_rt.smoothing.voting import Ballot

Floats = NDArray[np.float64]
Denoiser = Callable[[Floats, float, float], Floats]  # (x [C, H, W], signal, sigma) -> E[x0 | x]
Classifier = Callable[[Floats], int]

SCHEDULE = Schedule("linear", 1000)
SIGMA = 0.5
KEYS: list[Key] = [(11, 12), (21, 22)]
BATCHES = [(batch, in_flight) for batch in (1, 7, 64) for in_flight in (1, 2, 3)]

# A prior of four classes around one grey: Gaussians of std WIDTH at CENTRES. The images lie between the classes.
WIDTH = 0.1
CENTRES = 0.35 * np.array([[1, 1, -1, -1], [1, -1, 1, -1], [-1, 1, 1, -1], [-1, -1, 1, 1]], float).reshape(4, 1, 2, 2)
IMAGES = [np.array(pixels, np.uint8).reshape(1, 2, 2) for pixels in ([128, 130, 131, 120], [150, 120, 140, 100])]


def mixture_mean(x: Floats, signal: float, sigma: float) -> Floats:
    spread = (signal * WIDTH) ** 2 + sigma**2
    apart = x - signal * CENTRES
    log_weights = -(apart**2).sum(axis=(1, 2, 3)) / 2 / spread
    weights = np.exp(log_weights - log_weights.max())
    means = CENTRES + signal * WIDTH**2 / spread * apart
    return np.asarray(np.tensordot(weights / weights.sum(), means, 1))


def nearest_centre(x: Floats) -> int:
    return int(((x - CENTRES) ** 2).sum(axis=(1, 2, 3)).argmin())


class ToyDevice:
    """A device of float64 slots that checks what it is asked for, and finishes its batches in shuffled order.

    A batch runs when it is submitted or when it is collected, by chance: a slot that is written while it is still to
    be read would change results, and is reported besides. broken: the (sample, vote, step) that give NaN.
    """

    def __init__(
        self,
        batch: int,
        in_flight: int,
        denoise: Denoiser = mixture_mean,
        classify: Classifier = nearest_centre,
        broken: frozenset[tuple[int, int, int]] = frozenset(),
        seed: int = 0,
    ) -> None:
        self.batch, self.in_flight = batch, in_flight
        self.denoise, self.label_of, self.broken = denoise, classify, broken
        self.chance = random.Random(seed)
        self.images: dict[int, tuple[NDArray[np.uint8], Key, float, float]] = {}
        self.slots: list[tuple[Floats, Floats, bool] | None] = []
        self.outstanding: dict[int, Batch] = {}
        self.labels: dict[int, NDArray[np.int64] | None] = {}
        self.submitted: list[tuple[str, int]] = []
        self.denoised = 0

    def open_image(self, pixels: NDArray[np.uint8], key: Key, sigma: float, scale: float) -> int:
        self.images[len(self.images)] = pixels, key, sigma, scale
        return len(self.images) - 1

    def close_image(self, handle: int) -> None:
        del self.images[handle]

    def reserve(self, slots: int) -> None:
        assert not self.outstanding
        self.slots = [None] * slots

    def drain(self) -> None:
        self.outstanding.clear()

    def submit(self, batch: Batch) -> int:
        n = len(batch.image)
        assert 1 <= n <= self.batch
        assert len(self.outstanding) < self.in_flight
        per_item = [batch.image, batch.sample, batch.vote, batch.step, batch.source, batch.target]
        assert all(column.shape == (n,) and column.dtype == np.int64 for column in per_item)
        if batch.kind == "step":
            assert (batch.t.shape, batch.coef.shape) == ((n,), (n, 6))
        reads, writes = self.touched(batch)
        assert len(set(writes)) == len(writes), "two items of a batch write one slot"
        for other in self.outstanding.values():
            other_reads, other_writes = self.touched(other)
            assert not set(writes) & {*other_reads, *other_writes}, "writes a slot that an outstanding batch uses"
            assert not set(reads) & set(other_writes), "reads a slot that an outstanding batch has yet to write"
        ticket = len(self.submitted)
        self.submitted.append((batch.kind, n))
        self.outstanding[ticket] = batch
        if self.chance.random() < 0.5:
            self.labels[ticket] = self.run(batch)
        return ticket

    def collect(self) -> tuple[int, NDArray[np.int64] | None]:
        ticket = self.chance.choice(sorted(self.outstanding))
        if ticket not in self.labels:
            self.labels[ticket] = self.run(self.outstanding[ticket])
        del self.outstanding[ticket]
        return ticket, self.labels.pop(ticket)

    def read(self, slots: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        raise AssertionError("the loop reads no states")

    def describe(self) -> Mapping[str, str | int | bool]:
        return {}

    def close(self) -> None: ...

    @staticmethod
    def touched(batch: Batch) -> tuple[list[int], list[int]]:
        """The slots that a batch reads and writes."""
        reads = [] if batch.kind == "smooth" else batch.source.tolist()
        return reads, [] if batch.kind == "classify" else batch.target.tolist()

    def state(self, slot: np.int64) -> tuple[Floats, Floats, bool]:
        state = self.slots[int(slot)]
        assert state is not None, "reads a slot that was never written"
        return state

    def run(self, batch: Batch) -> NDArray[np.int64] | None:
        if batch.kind == "classify":
            states = [self.state(slot) for slot in batch.source]
            return np.array([self.label_of(mean) if finite else NOT_FINITE for mean, _, finite in states])
        results = [self.run_item(batch, i) for i in range(len(batch.image))]  # all are read before any is written
        for slot, result in zip(batch.target, results, strict=True):
            self.slots[int(slot)] = result
        return None

    def run_item(self, batch: Batch, i: int) -> tuple[Floats, Floats, bool]:
        pixels, key, sigma, scale = self.images[int(batch.image[i])]
        sample, vote, step = int(batch.sample[i]), int(batch.vote[i]), int(batch.step[i])
        if batch.kind == "smooth":
            levels = pixels + smoothing_noise(smoothing_law(sigma), key, sample, pixels.shape)
            return first_state(levels, scale).astype(float), np.zeros(pixels.shape), True
        mean, std, finite = self.state(batch.source[i])
        x = mean + std * vote_noise(key, sample, vote, step, pixels.shape) if step else mean
        sigma_t, signal, weight_x0, weight_xt, logvar, _ = batch.coef[i].astype(float)
        self.denoised += 1
        x0 = self.denoise(x, signal, sigma_t)
        finite = finite and (sample, vote, step) not in self.broken
        return weight_x0 * x0 + weight_xt * x, np.full(pixels.shape, np.exp(logvar / 2)), finite


def alpha_bars(sigma: float, steps: int) -> list[float]:
    """Where each reverse step starts: the image's own level, then levels of the linear schedule in equal strides."""
    products, product = [], 1.0
    for i in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        products.append(product)
    own = 1 / (1 + 4 * sigma**2)
    start = min(range(1000), key=lambda t: abs(products[t] - own))
    return [own, *(products[round(start - i * start / steps)] for i in range(1, steps))][:steps]


def bayes_step(ab: float, ab_next: float) -> tuple[float, float, float, float]:
    """x_next | x, x0 ~ N(a x0 + b x, small): a, b, the posterior variance, and beta."""
    ratio = ab / ab_next
    precision = 1 / (1 - ab_next) + ratio / (1 - ratio)
    weight_x0, weight_x = math.sqrt(ab_next) / (1 - ab_next), math.sqrt(ratio) / (1 - ratio)
    return weight_x0 / precision, weight_x / precision, 1 / precision, 1 - ratio


@cache
def every_vote(image: int, sample: int, steps: int, votes: int) -> list[int]:
    """The labels of all votes, each from the noisy image on."""
    pixels, key = IMAGES[image], KEYS[image]
    noisy = pixels.astype(float) + smoothing_noise(smoothing_law(SIGMA), key, sample, pixels.shape)
    labels = []
    for vote in range(votes):
        x = 2 * noisy / 255 - 1
        levels = alpha_bars(SIGMA, steps)
        if steps:
            x = x / math.sqrt(1 + (2 * SIGMA) ** 2)
        for i, ab in enumerate(levels):
            x0 = mixture_mean(x, math.sqrt(ab), math.sqrt(1 - ab))
            if i + 1 == steps:
                x = x0
            else:
                weight_x0, weight_x, variance, _ = bayes_step(ab, levels[i + 1])
                draw = vote_noise(key, sample, vote, i + 1, pixels.shape)
                x = weight_x0 * x0 + weight_x * x + math.sqrt(variance) * draw
        labels.append(nearest_centre(x))
    return labels


def plurality(labels: list[int]) -> int:
    return max(labels, key=labels.count)  # the first of equals is the one that was seen first


def run(
    device: ToyDevice, steps: int, votes: int, samples: int, variance: Variance = "fixed_small"
) -> tuple[list[tuple[int, int]], list[Outcome]]:
    """Decide `samples` samples of each image; with fewer than two steps by a single vote."""
    chain = make_chain(SCHEDULE, variance, SIGMA, steps)
    handles = [device.open_image(image, key, SIGMA, chain.scale) for image, key in zip(IMAGES, KEYS, strict=True)]
    work = [(handle, sample) for handle in handles for sample in range(samples)]
    outcomes = list(decide(device, chain, work, lambda: Ballot(votes if steps > 1 else 1)))
    assert not device.outstanding
    return work, outcomes


@pytest.mark.parametrize(("batch", "in_flight"), BATCHES)
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_labels_are_those_of_casting_every_vote_alone(steps: int, batch: int, in_flight: int) -> None:
    for votes in (1, 2, 5, 8):
        device = ToyDevice(batch, in_flight, seed=votes)
        work, outcomes = run(device, steps, votes, samples=15)
        assert [(outcome.image, outcome.sample) for outcome in outcomes] == work
        expected = [plurality(every_vote(image, sample, steps, 8)[:votes]) for image, sample in work]
        assert [outcome.label for outcome in outcomes] == expected
        for outcome in outcomes:
            assert outcome.unet_calls == (1 + outcome.votes * (steps - 1) if steps else 0)
            assert outcome.unet_calls <= 1 + votes * (steps - 1) if steps else True
            assert 1 <= outcome.votes <= (votes if steps > 1 else 1)
        assert sum(outcome.unet_calls for outcome in outcomes) == device.denoised


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_walk_takes_every_item_alone_to_its_label(steps: int, batch: int) -> None:
    chain, device = make_chain(SCHEDULE, "fixed_small", SIGMA, steps), ToyDevice(batch, 1)
    handles = [device.open_image(image, key, SIGMA, chain.scale) for image, key in zip(IMAGES, KEYS, strict=True)]
    items = [(image, sample, vote) for image in (0, 1) for sample in range(4) for vote in range(3 if steps > 1 else 1)]
    image, sample, vote = np.array(items).T
    *on_the_way, (slots, labels) = walk(
        device, chain, np.array(handles)[image], sample, vote, 5 + 2 * np.arange(len(items))
    )
    assert [found for _, found in on_the_way] == [[]] * (1 + steps)
    assert device.denoised == 8 * min(1, steps) + len(items) * max(0, steps - 1)
    assert labels == [every_vote(i, s, steps, 8)[v] for i, s, v in items]
    assert [device.label_of(device.state(slot)[0]) for slot in slots] == labels


def test_a_graph_is_fed_what_it_gave_and_the_noise_of_its_step() -> None:
    chain, noise = make_chain(SCHEDULE, "fixed_small", SIGMA, 3), np.full((2, 1, 2, 2), 0.5, np.float32)
    fed, given = zip(
        *walk_graph(
            lambda feed: [feed["mean"] + 1, feed["std"] + 2, np.ones(2, np.float32)],
            chain,
            0 * noise,
            lambda i: i * noise,
        ),
        strict=True,
    )
    for name, expected in (("mean", [0, 1, 2]), ("std", [0, 2, 4]), ("noise", [0, 0.5, 1])):
        assert [float(feed[name].mean()) for feed in fed] == expected
    for i, feed in enumerate(fed):
        assert feed["t"].tolist() == [chain.t[i]] * 2
        assert feed["coef"].tolist() == [chain.coef[i].tolist()] * 2
    assert float(given[-1][0].mean()) == 3


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_the_comparison_above_sees_split_votes_and_ties(steps: int) -> None:
    ballots = [every_vote(image, sample, steps, 8) for image in (0, 1) for sample in range(15)]
    assert sum(len(set(ballot)) > 1 for ballot in ballots) >= 10
    assert len({plurality(ballot) for ballot in ballots}) == 4
    tops = [sorted((ballot.count(label) for label in set(ballot)), reverse=True) for ballot in ballots]
    assert any(len(top) > 1 and top[0] == top[1] for top in tops)


def test_outcomes_do_not_depend_on_batch_in_flight_or_completion_order() -> None:
    seen = set()
    for seed, (batch, in_flight) in enumerate(BATCHES):
        _, outcomes = run(ToyDevice(batch, in_flight, seed=seed), steps=3, votes=8, samples=15)
        seen.add(tuple(outcomes))
    assert len(seen) == 1


def is_certain(cast: list[int], left: int) -> bool:
    """Whether the first of the leaders wins even if all votes that are left go to one rival, seen or not."""
    leader = plurality(cast)
    lead = {rival: cast.count(leader) - cast.count(rival) - left for rival in {*cast, -9} - {leader}}
    return all(
        ahead > 0 or (ahead == 0 and (rival not in cast or cast.index(leader) < cast.index(rival)))
        for rival, ahead in lead.items()
    )


@pytest.mark.parametrize("votes", [5, 8])
def test_voting_stops_at_the_first_vote_that_makes_the_winner_certain(votes: int) -> None:
    _, outcomes = run(ToyDevice(7, 2), steps=3, votes=votes, samples=15)
    for outcome in outcomes:
        labels = every_vote(outcome.image, outcome.sample, 3, 8)
        assert outcome.votes == next(m for m in range(1, votes + 1) if is_certain(labels[:m], votes - m))
    assert len({outcome.votes for outcome in outcomes}) > 2


def test_five_unanimous_votes_take_exactly_three() -> None:
    device = ToyDevice(7, 2, classify=lambda x: 1)
    _, outcomes = run(device, steps=4, votes=5, samples=20)
    assert {(outcome.label, outcome.votes, outcome.unet_calls) for outcome in outcomes} == {(1, 3, 1 + 3 * 3)}


def test_first_step_is_denoised_once_for_all_votes() -> None:
    _, outcomes = run(ToyDevice(4, 1, classify=lambda x: 0), steps=2, votes=39, samples=3)
    assert [outcome.unet_calls for outcome in outcomes] == [21] * 6


def gaussian_mean(mu: float, std: float) -> Denoiser:
    def denoise(x: Floats, signal: float, sigma: float) -> Floats:
        return mu + signal * std**2 / ((signal * std) ** 2 + sigma**2) * (x - signal * mu)

    return denoise


def final_states(
    denoise: Denoiser, steps: int, samples: int, shape: tuple[int, int, int], variance: Variance
) -> Floats:
    """What the classifier is shown for samples of one grey image, [samples, C, H, W]."""
    shown: list[Floats] = []

    def keep(x: Floats) -> int:
        shown.append(x)
        return 0

    device = ToyDevice(16, 1, denoise, keep)
    chain = make_chain(SCHEDULE, variance, SIGMA, steps)
    handle = device.open_image(np.full(shape, 100, np.uint8), KEYS[0], SIGMA, chain.scale)
    outcomes = list(decide(device, chain, [(handle, i) for i in range(samples)], lambda: Ballot(1)))
    assert len(outcomes) == len(shown) == samples
    return np.stack(shown)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_mean_and_variance_of_the_result_follow_from_a_gaussian_prior(steps: int, variance: Variance) -> None:
    """With a Gaussian prior every step is affine: its moments are carried along by hand."""
    mu, width = 0.2, 0.4
    mean = 2 * 100 / 255 - 1
    spread = (2 / 255) ** 2 * ((255 * SIGMA) ** 2 + 1 / 12)
    levels = alpha_bars(SIGMA, steps)
    if steps:
        mean, spread = mean * math.sqrt(levels[0]), spread * levels[0]
    for i, ab in enumerate(levels):
        gain = math.sqrt(ab) * width**2 / (ab * width**2 + 1 - ab)
        offset = mu - gain * math.sqrt(ab) * mu  # x0 = offset + gain x
        last = i + 1 == steps
        weight_x0, weight_x, small, large = (1.0, 0.0, 0.0, 0.0) if last else bayes_step(ab, levels[i + 1])
        slope = weight_x0 * gain + weight_x
        mean = weight_x0 * offset + slope * mean
        spread = slope**2 * spread + (small if variance == "fixed_small" else large)
    shown = final_states(gaussian_mean(mu, width), steps, 150, (1, 16, 16), variance)
    assert abs(shown.mean() - mean) < 4 * math.sqrt(spread / shown.size)
    assert shown.var() == pytest.approx(spread, rel=4 * math.sqrt(2 / shown.size))


def test_many_steps_sample_the_posterior_of_the_clean_image() -> None:
    """As steps grow, the result given the noisy image tends to p(x0 | noisy), which for a Gaussian prior is known."""
    mu, width, samples, shape = 0.2, 0.4, 8, (1, 32, 32)
    shown = final_states(gaussian_mean(mu, width), 100, samples, shape, "fixed_small")
    law = smoothing_law(SIGMA)
    noisy = np.stack([2 * (100 + smoothing_noise(law, KEYS[0], i, shape)) / 255 - 1 for i in range(samples)])
    gain = width**2 / (width**2 + 4 * SIGMA**2)
    residual = shown - (mu + gain * (noisy - mu))
    posterior_variance = gain * 4 * SIGMA**2
    assert residual.var() == pytest.approx(posterior_variance, rel=0.05)
    assert abs(residual.mean()) < 0.02
    assert abs(np.corrcoef(residual.ravel(), noisy.ravel())[0, 1]) < 0.05
    one_step = final_states(gaussian_mean(mu, width), 1, samples, shape, "fixed_small")
    np.testing.assert_allclose(one_step, mu + gain * (noisy - mu), rtol=0, atol=1e-6)  # the posterior mean itself


@pytest.mark.parametrize(("batch", "in_flight"), [(1, 1), (7, 3), (64, 2)])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_sample_that_is_not_finite_is_labelled_so_and_disturbs_no_other(
    step: int, batch: int, in_flight: int
) -> None:
    broken = frozenset((sample, 0, step) for sample in (0, 3, 4, 14))
    work, outcomes = run(ToyDevice(batch, in_flight, broken=broken), steps=3, votes=5, samples=15)
    expected = [
        NOT_FINITE if sample in (0, 3, 4, 14) else plurality(every_vote(image, sample, 3, 8)[:5])
        for image, sample in work
    ]
    assert [(outcome.image, outcome.sample) for outcome in outcomes] == work
    assert [outcome.label for outcome in outcomes] == expected


def test_a_vote_that_is_never_cast_cannot_make_a_sample_not_finite() -> None:
    broken = frozenset((sample, vote, 1) for sample in range(10) for vote in (3, 4))
    device = ToyDevice(7, 3, classify=lambda x: 2, broken=broken)
    assert {outcome.label for outcome in run(device, steps=2, votes=5, samples=10)[1]} == {2}


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize(("batch", "in_flight"), [(1, 1), (2, 3), (5, 2)])
def test_every_slot_comes_back(steps: int, batch: int, in_flight: int) -> None:
    """A slot that is lost with a sample, or with one that is not finite, would run out long before the work does."""
    broken = frozenset((sample, sample % 3, steps - 1) for sample in range(0, 400, 7))
    device = ToyDevice(batch, in_flight, broken=broken)
    _, outcomes = run(device, steps, votes=8, samples=200)
    assert len(outcomes) == 400
    assert len(device.slots) < 400


@pytest.mark.parametrize(("steps", "votes"), [(1, 1), (2, 5), (3, 8), (10, 40), (4, 1000)])
def test_slots_are_those_of_a_few_batches_whatever_the_votes_and_steps(steps: int, votes: int) -> None:
    device = ToyDevice(4, 2, classify=lambda x: 0)
    run(device, steps, votes, samples=15)
    assert len(device.slots) <= 4 * (4 + 2 * 2)


def test_slots_of_imagenet_at_batch_256_fit_a_gpu() -> None:
    """They took 42 GB with 40 votes, when each vote of a round held one from the beginning."""
    assert sum(slots_of(256, 2)) * 2 * 4 * 3 * 256 * 256 < 3.3e9  # mean and std, float32


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_memory_does_not_grow_with_the_work(steps: int) -> None:
    def peak(samples: int) -> int:
        device = Idle(32)
        chain, votes = make_chain(SCHEDULE, "fixed_small", SIGMA, steps), 5 if steps > 1 else 1
        tracemalloc.start()
        try:
            for _ in decide(cast(Device, device), chain, ((0, i) for i in range(samples)), lambda: Ballot(votes)):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(500)
    assert peak(8000) < peak(500) + 8192  # a byte a sample


def lookahead(length: int, seed: int) -> int:
    """The most work items that were drawn but not yet answered."""
    device = ToyDevice(4, 2, classify=lambda x: 0, seed=seed)
    chain = make_chain(SCHEDULE, "fixed_small", SIGMA, 2)
    handle = device.open_image(IMAGES[0], KEYS[0], SIGMA, chain.scale)
    drawn = answered = most = 0

    def work() -> Iterator[tuple[int, int]]:
        nonlocal drawn
        for i in range(length):
            drawn += 1
            yield handle, i

    for _ in decide(device, chain, work(), lambda: Ballot(3)):
        most = max(most, drawn - answered)
        answered += 1
    assert answered == drawn == length
    return most


def test_work_is_drawn_as_room_becomes_free() -> None:
    assert lookahead(100, seed=0) < 60
    assert max(lookahead(1000, seed) for seed in range(3)) < 60


def test_no_batch_is_partial_while_work_is_left() -> None:
    device = ToyDevice(5, 3)
    chain = make_chain(SCHEDULE, "fixed_small", SIGMA, 3)
    handle = device.open_image(IMAGES[0], KEYS[0], SIGMA, chain.scale)
    submitted_at_the_end = 0

    def work() -> Iterator[tuple[int, int]]:
        nonlocal submitted_at_the_end
        yield from ((handle, i) for i in range(200))
        submitted_at_the_end = len(device.submitted)

    assert len(list(decide(device, chain, work(), lambda: Ballot(8)))) == 200
    assert submitted_at_the_end > 100
    assert all(n == 5 for _, n in device.submitted[:submitted_at_the_end])


def test_work_may_open_images_as_it_goes() -> None:
    device = ToyDevice(3, 2)
    chain = make_chain(SCHEDULE, "fixed_small", SIGMA, 2)

    def work() -> Iterator[tuple[int, int]]:
        for image, key in zip(IMAGES, KEYS, strict=True):
            handle = device.open_image(image, key, SIGMA, chain.scale)
            yield from ((handle, i) for i in range(15))

    labels = [outcome.label for outcome in decide(device, chain, work(), lambda: Ballot(5))]
    assert labels == [plurality(every_vote(image, i, 2, 8)[:5]) for image in (0, 1) for i in range(15)]


@pytest.mark.parametrize("taken", [1, 17])
def test_closing_early_leaves_the_device_idle(taken: int) -> None:
    device = ToyDevice(3, 3)
    chain = make_chain(SCHEDULE, "fixed_small", SIGMA, 3)
    handle = device.open_image(IMAGES[0], KEYS[0], SIGMA, chain.scale)

    def outcomes() -> Iterator[Outcome]:
        yield from decide(device, chain, ((handle, i) for i in range(1000)), lambda: Ballot(5))

    early = outcomes()
    for _ in range(taken):
        next(early)
    early.close()  # type: ignore[attr-defined]
    assert not device.outstanding
    labels = [outcome.label for outcome in decide(device, chain, [(handle, i) for i in range(15)], lambda: Ballot(5))]
    assert labels == [plurality(every_vote(0, i, 3, 8)[:5]) for i in range(15)]  # and fit for other work


def test_an_error_in_the_work_arrives_as_itself_and_leaves_the_device_idle() -> None:
    device = ToyDevice(3, 3)
    chain = make_chain(SCHEDULE, "fixed_small", SIGMA, 2)
    handle = device.open_image(IMAGES[0], KEYS[0], SIGMA, chain.scale)

    def work() -> Iterator[tuple[int, int]]:
        yield from ((handle, i) for i in range(40))
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(decide(device, chain, work(), lambda: Ballot(5)))
    assert not device.outstanding


def test_no_work_gives_no_outcomes() -> None:
    device = ToyDevice(4, 2)
    assert list(decide(device, make_chain(SCHEDULE, "fixed_small", SIGMA, 2), [], lambda: Ballot(5))) == []
    assert device.submitted == []
