"""Whether an engine agrees with PyTorch on the same noise: one step, the whole chain, labels, votes, certificates.

The engine runs on its own device, as in a certification. PyTorch runs the plain pipeline of reference.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from densepure_rt.errors import UsageError
from densepure_rt.export.convert.parity import ALPHA, LABELS, RELATIVE_L2, SECRET
from densepure_rt.export.models import reference
from densepure_rt.export.models.classifiers import ClassifierModel
from densepure_rt.export.models.sources import Models, refuse_other_models
from densepure_rt.export.models.unets import DiffusionModel
from densepure_rt.images.datasets import LabelledImage
from densepure_rt.optional import optional
from densepure_rt.rounding import exact, floored, raised, typed
from densepure_rt.runtime.device import Device, Floats
from densepure_rt.runtime.noise import Key, first_state, image_key, smoothing_law, smoothing_noise, vote_noise
from densepure_rt.runtime.reverse import decide, walk, walk_graph
from densepure_rt.runtime.schedule import Chain, Coefficients
from densepure_rt.smoothing.bounds import clopper_pearson_lower, l2_radius
from densepure_rt.smoothing.classifier import SmoothedClassifier
from densepure_rt.smoothing.settings import Settings
from densepure_rt.smoothing.voting import Ballot

# What may be lost over a whole chain, in relative L2 of the purified images, by what one step may lose: errors are
# carried through the next steps. `densepure-rt parity --steps 10 --max 4 --n 4 --votes 2` found 8.7e-8 by 4.7e-8 for
# fp32, and 1.4e-4 by 2.7e-5 for fp16.
CHAIN_FACTOR = 10
LABELS_FP32 = 0.005  # the share of labels that float32 may change, near-ties alone; `densepure-rt parity`: 0 of 250
SHOWN = 4  # images of the picture
FLOOR = 1e-12  # what a logarithmic axis can still show of no difference
Labels = NDArray[np.int64]
State = tuple[Floats, Floats]  # mean and std


@dataclass(frozen=True)
class StepGap:
    """The difference in one step, taken from the same state and noise by both. timestep: None where there is none.

    max_abs, relative_l2: of the mean and the std of the next state together.
    """

    step: int
    timestep: int | None
    noise: float
    max_abs: float
    relative_l2: float


@dataclass(frozen=True)
class Share:
    """The number that differ, of so many; `upper` bounds the share with probability 1 - ALPHA for these images."""

    differ: int
    total: int

    @property
    def upper(self) -> float:
        return 1 - clopper_pearson_lower(self.total - self.differ, self.total, ALPHA)

    @property
    def lower(self) -> float:
        return clopper_pearson_lower(self.differ, self.total, ALPHA)


@dataclass(frozen=True)
class Transfer:
    """The certificate of an image, carried over from PyTorch to the engine.

    votes_differ: of all its samples; differ: of the n that estimate, the others having selected the class. eta: P(the
    votes differ) is below it with probability 1 - alpha / 2. torch, engine: the radii that each would certify alone;
    transferred: what PyTorch's counts and eta certify of the engine, at the same alpha. Radii are l2 in [0, 1] pixel
    units, None where none is certified.
    """

    idx: int
    label: int | None
    predict: int
    votes_differ: int
    n: int
    differ: int
    eta: float
    torch: float | None
    engine: float | None
    transferred: float | None


@dataclass(frozen=True)
class Shown:
    """Images [C, H, W] for the picture: pixels in [-1, 1], the noisy one and what each made of it."""

    clean: Floats
    noisy: Floats
    torch: Floats
    engine: Floats


@dataclass(frozen=True)
class Agreement:
    """The agreement of an engine with PyTorch, level by level."""

    engine: str
    precision: str
    sigma: float
    steps: list[StepGap]
    chain_max_abs: float
    chain_relative_l2: float
    labels: Share
    votes: Share
    certificates: list[Transfer]
    shown: list[Shown] = field(repr=False)


def agree(
    smoothed: SmoothedClassifier, models: Models, images: Iterable[LabelledImage], settings: Settings
) -> Agreement:
    """Compare on settings.n samples of each image, all votes of each cast.

    Raises UsageError when the engines were exported from other weights, or n leaves nothing to estimate from.
    """
    if settings.n < 2:
        raise UsageError(f"`n` {settings.n}: the first samples select the class, so two are the least")
    refuse_other_models(*models, smoothed.bundle)
    unet, classifier = models
    chain, device, precision = smoothed.chain(settings), smoothed.device, smoothed.bundle.unet.precision
    n, votes = settings.n, settings.effective.votes
    pairs = list(itertools.product(range(n), range(votes)))
    steps, whole = [_Gap() for _ in range(len(chain))], _Gap()
    labels_differ, certificates = 0, []
    shown: list[Shown] = []
    for image in images:
        key = image_key(SECRET, "calibrate", settings.sigma, image.pixels)
        handle = device.open_image(image.pixels, key, settings.sigma, chain.scale)
        cast = []
        for start in range(0, len(pairs), device.batch):
            sample, vote = np.array(pairs[start : start + device.batch]).T
            theirs, their_labels = engine_chain(device, handle, chain, sample, vote)
            ours = torch_chain(unet, image.pixels, key, chain, sample, vote)
            our_labels = torch_labels(classifier, ours[-1][0])
            once = vote == 0  # one item of each sample is compared step by step
            for i, gap in enumerate(steps if once.any() else ()):
                mean, std = (part[once] for part in theirs[i])
                x = mean + std * draws(key, sample[once], vote[once], i, image.pixels.shape)
                for found, expected in zip(theirs[i + 1], torch_step(unet, chain, i, x), strict=True):
                    gap.add(found[once], expected)
            whole.add(theirs[-1][0], ours[-1][0])
            labels_differ += int((our_labels != their_labels)[once].sum())  # the votes of a sample hang together
            cast += our_labels.tolist()
            if not start and len(shown) < SHOWN:
                clean = first_state(image.pixels.astype(np.int32), 1.0)
                noisy = theirs[0][0][0] / np.float32(chain.scale)
                shown.append(Shown(clean, noisy, ours[-1][0][0], theirs[-1][0][0]))
        voted = np.array([winner(cast[first : first + votes]) for first in range(0, len(cast), votes)])
        work = [(handle, sample) for sample in range(n)]
        decided = np.array([outcome.label for outcome in decide(device, chain, work, settings.ballot)])
        device.close_image(handle)
        certificates.append(transfer(image, voted, decided, settings))
    votes_differ = sum(certificate.votes_differ for certificate in certificates)
    return Agreement(
        engine=str(smoothed.bundle.unet_path),
        precision=precision,
        sigma=settings.sigma,
        steps=[gap.step(i, chain) for i, gap in enumerate(steps)],
        chain_max_abs=whole.max_abs,
        chain_relative_l2=whole.relative_l2,
        labels=Share(labels_differ, n * len(certificates)),
        votes=Share(votes_differ, n * len(certificates)),
        certificates=certificates,
        shown=shown,
    )


class _Gap:
    """Largest difference and relative L2 distance of all pairs of arrays that were added."""

    def __init__(self) -> None:
        self.max_abs, self.squares, self.whole = 0.0, 0.0, 0.0

    def add(self, found: Floats, expected: Floats) -> None:
        gap = found.astype(np.float64) - expected
        self.max_abs = float(np.abs(gap).max(initial=self.max_abs))  # NaN stays, unlike in Python's max
        self.squares += float((gap**2).sum())
        self.whole += float((expected.astype(np.float64) ** 2).sum())

    @property
    def relative_l2(self) -> float:
        if not self.whole:
            return math.inf if self.squares else 0.0
        return math.sqrt(self.squares / self.whole)

    def step(self, step: int, chain: Chain) -> StepGap:
        sigma, signal = chain.coef[step, :2].tolist()
        timestep = chain.timesteps[step] if chain.timesteps else None
        return StepGap(step, timestep, sigma / signal, self.max_abs, self.relative_l2)


def engine_chain(device: Device, handle: int, chain: Chain, sample: Labels, vote: Labels) -> tuple[list[State], Labels]:
    """Return the states of (sample, vote) items on the device before and after each step, and their labels."""
    states: list[State] = []
    for slots, labels in walk(device, chain, handle, sample, vote):
        if not labels:
            states.append(device.read(slots.tolist()))
    return states, np.array(labels)


def draws(key: Key, sample: Labels, vote: Labels, step: int, shape: tuple[int, ...]) -> Floats:
    """The vote noise of items at a step, float32 [n, C, H, W]; none at the first."""
    if step == 0:
        return np.zeros((len(sample), *shape), np.float32)
    return np.stack([vote_noise(key, int(s), int(v), step, shape) for s, v in zip(sample, vote, strict=True)])


def torch_step(unet: DiffusionModel, chain: Chain, step: int, x: Floats) -> State:
    t, coef = torch.full((len(x),), float(chain.t[step])), Coefficients(*chain.coef[step].tolist())
    mean, std = reference.reverse_step(unet, torch.from_numpy(x), t, coef)
    return mean.numpy(), std.numpy()


def torch_chain(
    unet: DiffusionModel, pixels: NDArray[np.uint8], key: Key, chain: Chain, sample: Labels, vote: Labels
) -> list[State]:
    """Compute what `engine_chain` gives, by PyTorch. The first step is taken once for each sample."""
    law = smoothing_law(chain.sigma)
    different, first, place = np.unique(sample, return_index=True, return_inverse=True)
    levels = np.stack([pixels + smoothing_noise(law, key, int(s), pixels.shape) for s in different])
    mean, steps = first_state(levels, chain.scale)[place], itertools.count()

    def run(feed: Mapping[str, Floats]) -> tuple[Floats, Floats, Floats]:
        x, step = feed["mean"] + feed["std"] * feed["noise"], next(steps)
        mean, std = torch_step(unet, chain, step, x if step else x[first])
        mean, std = (mean, std) if step else (mean[place], std[place])
        return mean, std, np.asarray(np.isfinite(mean).all(axis=(1, 2, 3)), np.float32)

    walked = walk_graph(run, chain, mean, lambda step: draws(key, sample, vote, step, pixels.shape))
    return [(mean, np.zeros_like(mean)), *((mean, std) for _, (mean, std, _) in walked)]


@torch.inference_mode()
def torch_labels(classifier: ClassifierModel, mean: Floats) -> Labels:
    labels: Labels = classifier.network(torch.from_numpy(mean)).argmax(1).numpy()
    return labels


def winner(labels: Sequence[int]) -> int:
    ballot = Ballot(len(labels))
    for label in labels:
        ballot.cast(label)
    return ballot.winner


def transfer(image: LabelledImage, ours: Labels, theirs: Labels, settings: Settings) -> Transfer:
    """The certificate of one image by PyTorch's votes, the engine's, and PyTorch's with what the engine may differ.

    The first tenth of the samples selects the class. The engine is robust where PyTorch's votes have p > 1/2 + eta.
    """
    selecting = max(1, len(ours) // 10)
    a = int(np.bincount(ours[:selecting]).argmax())
    votes_differ = int((ours != theirs).sum())
    ours, theirs = ours[selecting:], theirs[selecting:]
    n, differ, alpha, sigma = len(ours), int((ours != theirs).sum()), settings.alpha, settings.sigma
    eta = math.nextafter(1 - clopper_pearson_lower(n - differ, n, alpha / 2), 2)
    by_torch, by_engine = (int((votes == a).sum()) for votes in (ours, theirs))
    lower = clopper_pearson_lower(by_torch, n, alpha / 2)
    return Transfer(
        idx=image.idx,
        label=image.label,
        predict=a,
        votes_differ=votes_differ,
        n=n,
        differ=differ,
        eta=eta,
        torch=l2_radius(clopper_pearson_lower(by_torch, n, alpha), sigma),
        engine=l2_radius(clopper_pearson_lower(by_engine, n, alpha), sigma),
        transferred=l2_radius(max(0.0, math.nextafter(lower - eta, -1)), sigma),
    )


def failures(found: Agreement) -> list[str]:
    """List what differs by more than the precision may lose, one per line."""
    limit, lines = RELATIVE_L2.get(found.precision, math.inf), []
    for gap in found.steps:
        if not gap.relative_l2 <= limit:
            lost = raised(gap.relative_l2, figures=2)
            lines.append(f"step {gap.step + 1}: relative L2 {lost}, {found.precision} allows {exact(limit)}")
    if not found.chain_relative_l2 <= CHAIN_FACTOR * limit:
        lost = raised(found.chain_relative_l2, figures=2)
        lines.append(f"the chain: relative L2 {lost}, allowed is {exact(CHAIN_FACTOR * limit)}")
    allowed = LABELS.get(found.precision, LABELS_FP32)
    for what, share in (("labels", found.labels), ("votes", found.votes)):
        if share.lower > allowed:
            lines.append(
                f"{what}: {share.differ} of {share.total} differ, so at least {floored(share.lower, 2, percent=True)}; "
                f"{floored(typed(allowed), 1, percent=True)} may"
            )
    return lines


def draw(found: Agreement, path: Path) -> None:
    """A picture: the error by step, and images as they are, noisy, and purified by each. Needs matplotlib."""
    with optional("the picture", "matplotlib", "run \"pip install 'densepure-rt[report]'\""):
        from matplotlib.figure import Figure
    titles = ("image", "noisy", "PyTorch", "engine", "difference")
    rows, columns = max(1, len(found.shown)), len(titles)
    figure = Figure(figsize=(4 + 1.5 * columns, 1.6 * max(2, rows) + 0.6), layout="constrained")
    grid = figure.add_gridspec(rows, columns + 3)
    axes = figure.add_subplot(grid[:, :3])
    noise = [gap.noise / 2 for gap in found.steps]  # of pixels in [0, 1]
    axes.semilogy(noise, [max(gap.relative_l2, FLOOR) for gap in found.steps], "o-")
    axes.set(xlabel="noise in the state, in [0, 1] units", ylabel="relative L2 of one step")
    axes.set_title(f"{found.precision}, sigma {found.sigma:g}")
    axes.margins(y=1)
    axes.invert_xaxis()
    for row, shown in enumerate(found.shown):
        gap = np.abs(shown.engine - shown.torch)
        largest = max(float(gap.max()), FLOOR)
        parts = (shown.clean, shown.noisy, shown.torch, shown.engine, 2 * gap / largest - 1)
        for column, (title, part) in enumerate(zip(titles, parts, strict=True)):
            place = figure.add_subplot(grid[row, 3 + column])
            place.imshow(as_picture(part), cmap="gray", vmin=0, vmax=1)
            place.set(xticks=[], yticks=[])
            place.set_title(title if row == 0 else "", fontsize=9)
            if title == "difference":
                place.set_xlabel(f"white is {raised(largest, figures=2)}", fontsize=7)
    figure.savefig(path, dpi=150)


def as_picture(image: Floats) -> Floats:
    """[C, H, W] in [-1, 1] -> [H, W, 3] or [H, W] in [0, 1], as matplotlib draws it."""
    scaled: Floats = np.clip((image + 1) / 2, 0, 1).astype(np.float32)
    return np.moveaxis(scaled, 0, -1) if len(scaled) == 3 else scaled[0]
