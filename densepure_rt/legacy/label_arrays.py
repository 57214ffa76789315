"""DensePure's label arrays, voted and certified again.

The official code runs once for each vote, and a run (`--save_predictions --reverse_seed SEED`) keeps, of each image,
the labels of its n0 selection samples and of its n estimation samples:

    {sigma}-{idx}-{seed}-n0_predictions.npy     integers [n0]
    {sigma}-{idx}-{seed}-n_predictions.npy      integers [n]

Label i of every run is taken for a vote on sample i: that holds only if the runs drew equal smoothing noise, which
nothing there checks. Here the vote is taken as results/merge_results.py (1ed105d) takes it, plurality in the order of
the seeds with ties to the label seen first, and the certificate is rounded outward.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.legacy.logs import ALPHA, bounded_bytes
from densepure_rt.smoothing.certificate import Certificate
from densepure_rt.smoothing.fixed import FixedRule

Labels = NDArray[np.int64]
ArrayPart = Literal["n0", "n"]
PARTS: tuple[ArrayPart, ArrayPart] = ("n0", "n")  # selection and estimation
FILE = re.compile(
    r"(?P<sigma>[0-9]{1,4}(?:\.[0-9]{1,9})?)-(?P<idx>[0-9]{1,9})-(?P<seed>[0-9]{1,9})-(?P<part>n0?)_predictions\.npy"
)
EXPECTED = (
    "{sigma}-{idx}-{seed}-n0_predictions.npy and ...-n_predictions.npy, as DensePure's --save_predictions writes them"
)
HEADER = re.compile(  # of `numpy.save` for one dimension of integers; matched, so that nothing in it is evaluated
    rb"\x93NUMPY\x01\x00(?P<length>..)"
    rb"\{'descr': '(?P<type>\|[iu]1|[<>][iu][248])', 'fortran_order': (?:False|True), "
    rb"'shape': \((?P<count>[0-9]{1,9}),\), \} *\n",
    re.DOTALL,
)
MAX_LABELS = 2**25  # of an image, by all its runs: what is made of them takes 32 bytes each; published, 40 x 100,000
MAX_CLASSES = 100_000
STANDS_OUT = 4.0  # standard deviations of agreement above chance, of runs with equal noise
TELLING = 0.1  # of the agreement beyond chance that is possible: equal noise gives more


@dataclass(frozen=True)
class LabelFolder:
    """files: by image, seed and part. seeds: of all images, in the order of the vote."""

    path: Path
    sigma: float
    images: tuple[int, ...]
    seeds: tuple[int, ...]
    files: Mapping[tuple[int, int, ArrayPart], Path]


class Vote(NamedTuple):
    """The vote of K runs on n samples. leads [K, n]: whether a run's label has the most votes. tied [n]: of several."""

    winners: Labels
    leads: NDArray[np.bool_]
    tied: NDArray[np.bool_]


class Retaken(NamedTuple):
    """An image voted again. by_tie_rule: whether another rule for ties could give another certificate."""

    certificate: Certificate
    as_merged: Certificate
    ties: int
    by_tie_rule: bool


@dataclass
class SeedAgreement:
    """The share of samples with equal labels in two runs, over images; chance: with one run's samples in random order.

    most: how often they could agree, given how many samples of each label they have. variance: of `equal` by chance.
    """

    equal: int = 0
    chance: float = 0.0
    variance: float = 0.0
    most: int = 0
    differing: int = 0

    def add(self, one: Labels, other: Labels) -> None:
        """The labels [n] of an image's samples by two runs."""
        n, classes = len(one), int(max(one.max(), other.max())) + 1
        ours, theirs = (np.bincount(labels, minlength=classes).astype(float) for labels in (one, other))
        both = ours * theirs
        agreeing = int((one == other).sum())
        self.equal += agreeing
        self.differing += n - agreeing
        self.chance += float(both.sum()) / n
        self.most += int(np.minimum(ours, theirs).sum())
        if n > 1:  # the number of matches of two sequences with fixed margins, one of them shuffled
            each = both * (n - ours) * (n - theirs)
            self.variance += float(each.sum() + both.sum() ** 2 - (both**2).sum()) / (n * n * (n - 1))

    @property
    def verdict(self) -> Literal["equal noise", "other noise", "unknown"]:
        """Other noise is told from too few labels by whether equal noise would have stood out."""
        deviation = math.sqrt(self.variance)
        if self.equal - self.chance >= STANDS_OUT * deviation > 0:
            return "equal noise"
        would_stand_out = TELLING * (self.most - self.chance) >= 2 * STANDS_OUT * deviation > 0
        return "other noise" if would_stand_out else "unknown"


class Reader:
    """Reads a folder image by image. sizes: the n0 and n that all arrays must have. digests: SHA-256 of each file."""

    def __init__(self, folder: LabelFolder, classes: int | None = None) -> None:
        self.folder, self.classes = folder, classes or MAX_CLASSES
        self.sizes: dict[ArrayPart, int] = {}
        self.digests: dict[str, str] = {}

    def labels(self, idx: int, part: ArrayPart) -> Labels:
        """The labels [K, n] that the runs gave an image's samples, in the order of the seeds."""
        return np.stack([self._of_run(self.folder.files[idx, seed, part], part) for seed in self.folder.seeds])

    def _of_run(self, path: Path, part: ArrayPart) -> Labels:
        content = bounded_bytes(path, "array")
        self.digests[path.name] = hashlib.sha256(content).hexdigest()
        labels = parsed_labels(content, str(path), self.classes, MAX_LABELS // len(self.folder.seeds))
        expected = self.sizes.setdefault(part, len(labels))
        if len(labels) != expected:
            raise CheckFailed(
                f"{path} holds {len(labels):,} labels where others hold {expected:,}: the runs do not align"
            )
        return labels


def open_folder(path: Path, sigma: float | None, votes: int | None) -> LabelFolder:
    """The label files of a folder. sigma: which, where there are several. votes: so many seeds, None for all."""
    chosen, files = files_of(path, sigma)
    images, seeds = sorted({idx for idx, _, _ in files}), sorted({seed for _, seed, _ in files})
    if votes is not None and not 1 <= votes <= len(seeds):
        raise UsageError(f"`votes` is from 1 to the {len(seeds)} seeds in {path}, got {votes}")
    seeds = seeds[:votes]
    missing = [key for key in product(images, seeds, PARTS) if key not in files]
    if missing:
        idx, seed, part = missing[0]
        others = f" (and {len(missing) - 1} files more)" if len(missing) > 1 else ""
        raise UsageError(
            f"{path} lacks the {part} labels of image {idx}, seed {seed}{others}: every seed must have every image; "
            f"move what is incomplete away"
        )
    return LabelFolder(path, chosen, tuple(images), tuple(seeds), files)


def files_of(path: Path, sigma: float | None) -> tuple[float, dict[tuple[int, int, ArrayPart], Path]]:
    """The only sigma, or the one that is asked for, and its files by image, seed and part."""
    try:
        matches = [match for match in map(FILE.fullmatch, sorted(os.listdir(path))) if match]
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path} ({error.strerror})") from error
    if not matches:
        raise UsageError(f"{path} holds no label arrays: expected {EXPECTED}")
    sigmas = sorted({float(match["sigma"]) for match in matches})
    if len(sigmas) > 1 if sigma is None else sigma not in sigmas:
        there = ", ".join(f"{value:g}" for value in sigmas)
        raise UsageError(f"{path} holds label arrays of sigma {there}: choose one with `sigma`")
    chosen = sigmas[0] if sigma is None else sigma
    found: dict[tuple[int, int, ArrayPart], Path] = {}
    for match in matches:
        if float(match["sigma"]) == chosen:
            part: ArrayPart = "n0" if match["part"] == "n0" else "n"
            key = int(match["idx"]), int(match["seed"]), part
            if key in found:
                raise UsageError(f"{path} holds {found[key].name} and {match[0]}, which mean the same: keep one")
            found[key] = path / match[0]
    return chosen, found


def parsed_labels(content: bytes, what: str, classes: int = MAX_CLASSES, most: int = MAX_LABELS) -> Labels:
    """Parse the labels [n] of an .npy file. Raises UsageError when it is none, CheckFailed for other labels.

    most: labels that are taken.
    """
    header = HEADER.match(content)
    if header is None or header.end() != 10 + int.from_bytes(header["length"], "little"):
        raise UsageError(f"{what} is no array of labels: expected integers of one dimension, as numpy.save writes them")
    dtype, count = np.dtype(header["type"].decode()), int(header["count"])
    if count > most:
        raise UsageError(
            f"{what} holds {count:,} labels, and {most:,} of a run can be voted here: no such run is known"
        )
    if len(content) - header.end() != count * dtype.itemsize:
        raise UsageError(f"{what} is cut short or damaged: it should hold {count:,} labels of {dtype.itemsize} bytes")
    if count == 0:
        raise CheckFailed(f"{what} holds no labels (DensePure's in-batch voting saves none): nothing can be voted")
    labels = np.frombuffer(content, dtype, offset=header.end())
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise CheckFailed(f"{what} holds label {low if low < 0 else high}: labels are from 0 to {classes - 1}")
    return labels.astype(np.int64)


def take_vote(labels: Labels) -> Vote:
    """labels [K, n], in the order of the seeds: the plurality of each sample, a tie going to the label seen first."""
    support = np.stack([(labels == of_run).sum(axis=0) for of_run in labels])  # [K, n]: votes for the run's own label
    leads = support == support.max(axis=0)
    winners = np.take_along_axis(labels, leads.argmax(axis=0)[None], axis=0)[0]  # argmax is the first of equals
    return Vote(winners, leads, (leads & (labels != winners)).any(axis=0))


def retake(selection: Labels, estimation: Labels, sigma: float, alpha: float) -> Retaken:
    """The certificate of an image from the labels [K, n0] and [K, n] of its runs."""
    classes = int(max(selection.max(), estimation.max())) + 1
    selected, estimated = take_vote(selection), take_vote(estimation)
    counts = [np.bincount(vote.winners, minlength=classes) for vote in (selected, estimated)]
    n0, n = selection.shape[1], estimation.shape[1]
    candidate = int(counts[0].argmax())
    others = [label for label in np.unique(selection) if label != candidate]
    surely = int(((selected.winners == candidate) & ~selected.tied).sum())
    by_selection = bool(selected.tied.any()) and any(
        could_win(selected, selection, label) >= surely for label in others
    )
    by_estimation = bool((estimated.tied & (estimated.leads & (estimation == candidate)).any(axis=0)).any())
    return Retaken(
        certificate=FixedRule(n0=n0, n=n, alpha=alpha, sigma=sigma).certify(*counts),
        as_merged=FixedRule(n0=n0, n=n, alpha=ALPHA, sigma=sigma).certify(*counts),
        ties=int(selected.tied.sum() + estimated.tied.sum()),
        by_tie_rule=by_selection or by_estimation,
    )


def could_win(vote: Vote, labels: Labels, label: int) -> int:
    """The samples that `label` wins, or would with a tie going its way."""
    return int((vote.leads & (labels == label)).any(axis=0).sum())
