"""What the engines of a bundle compute on fixed items: a fingerprint of the arithmetic, and on what a result depends.

A certificate is about one function. Two machines, libraries or batch sizes may round otherwise, and then they run two.
Nothing but the results tells them apart for sure, so that the results of `ITEMS` fixed items are hashed whenever a
bundle is opened.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from densepure_rt.errors import CheckFailed, DensePureError
from densepure_rt.runtime.bundle import Bundle
from densepure_rt.runtime.schedule import Chain, make_chain

ITEMS = 16  # that the fingerprint is taken of
AGAIN = 4  # of them are run at another batch too
DEPTH, STEPS = 4, 3  # the chain starts at a quarter of the schedule and takes up to three steps
SIGMA = 0.5  # where a continuous schedule's chain begins

Floats = NDArray[np.float32]
Feed = Mapping[str, Floats]  # the inputs of the step engine by name, [B, ...] each
Run = Callable[[dict[str, Floats]], Sequence[Floats]]  # a feed -> mean_next, std_next, finite, logits of its mean


@dataclass(frozen=True)
class Probed:
    """The result of a probe.

    Attributes:
        fingerprint: SHA-256, hex, of what the fixed items give at the batch that runs.
        independent_of_batch: Whether they give the same bits at batch 1, or at batch 2 where 1 runs. False also where
            the engines take no other batch: then nothing shows it.
    """

    fingerprint: str
    independent_of_batch: bool


def probe(bundle: Bundle, batch: int, run: Run, any_batch: bool) -> Probed:
    """Run fixed items through both engines, with other mates and at another batch, and compare the bits.

    Args:
        bundle: The engines' sidecars.
        batch: Items of one call.
        run: Calls the engines with a feed of `batch` items; with another number too where `any_batch`.
        any_batch: Whether the engines take another batch than `batch`.

    Raises:
        CheckFailed: A result is NaN or Inf, has a wrong shape, or depends on who shares the batch.
    """
    draw = np.random.Generator(np.random.Philox(0))
    chain = probe_chain(bundle)
    fixed, others = new_items(draw, ITEMS, bundle, chain), new_items(draw, batch, bundle, chain)
    first = min(ITEMS, batch)  # items of the first batch, which are run again
    mates = {name: value.copy() for name, value in others.items()}
    for item in range(0, first, 2):
        for name, value in fixed.items():
            mates[name][batch - 1 - item] = value[item]  # at another place, beside others
    try:
        found = in_batches(run, fixed, batch)
        beside_others = run(mates)
        again = in_batches(run, some(fixed, 0, AGAIN), 2 if batch == 1 else 1) if any_batch else None
    except (MemoryError, DensePureError):
        raise
    except Exception as error:  # ONNX Runtime's errors have no common base but this
        raise CheckFailed(
            f"{bundle.unet_path.name} or {bundle.classifier_path.name} cannot run batches of {batch} images "
            f"{list(bundle.unet.image)}, as its sidecar says ({error}): export the bundle again, or use a smaller "
            f"`batch` if the memory is short"
        ) from error
    refuse_unsound(bundle, found)
    kept = range(0, first, 2)
    if any(not same(a[item], b[batch - 1 - item]) for a, b in zip(found, beside_others, strict=True) for item in kept):
        raise CheckFailed(
            f"on this machine an item's result depends on the others in its batch of {batch}, which would "
            f"void the certificates: use `batch` 1"
        )
    independent = again is not None and all(map(same, (part[:AGAIN] for part in found), again))
    return Probed(fingerprint_of(found), independent)


def probe_chain(bundle: Bundle) -> Chain:
    """Return the steps that the fixed items take, of a noise that is common in the network's schedule."""
    schedule = bundle.unet.schedule
    if schedule.continuous:
        return make_chain(schedule, bundle.unet.variance, SIGMA, STEPS)
    quarter = schedule.steps // DEPTH
    sigma = math.sqrt(1 / schedule.alpha_bar()[quarter] - 1) / 2
    return make_chain(schedule, bundle.unet.variance, sigma, max(1, min(STEPS, quarter)))


def new_items(draw: np.random.Generator, count: int, bundle: Bundle, chain: Chain) -> dict[str, Floats]:
    """Draw a feed of `count` items at mixed steps of the chain; those of its first step have no spread."""
    step = np.arange(count) % len(chain)
    mean, noise = draw.standard_normal((2, count, *bundle.unet.image), np.float32)
    std = np.zeros_like(mean) + (step > 0)[:, None, None, None].astype(np.float32) / 4
    return {"mean": mean, "std": std, "noise": noise, "t": chain.t[step], "coef": chain.coef[step]}


def some(feed: Feed, first: int, last: int) -> dict[str, Floats]:
    return {name: value[first:last] for name, value in feed.items()}


def in_batches(run: Run, feed: Feed, batch: int) -> list[Floats]:
    """Run a feed in batches and join the outputs; the last batch is filled up with copies of its first item."""
    count = len(feed["t"])
    outputs = []
    for start in range(0, count, batch):
        place = np.arange(start, start + batch)
        place[place >= count] = start
        results = run({name: value[place] for name, value in feed.items()})
        outputs.append([result[: count - start] for result in results])
    return [np.concatenate(parts) for parts in zip(*outputs, strict=True)]


def same(one: Floats, other: Floats) -> bool:
    """Compare two arrays bit by bit: NaN equals itself, and 0 is not -0."""
    return one.shape == other.shape and one.tobytes() == other.tobytes()


def refuse_unsound(bundle: Bundle, found: Sequence[Floats]) -> None:
    """Raise CheckFailed for logits of another number of classes, or for NaN or Inf."""
    mean, _, finite, logits = found
    classes = len(bundle.classifier.class_names)
    if logits.shape != (ITEMS, classes):
        raise CheckFailed(
            f"{bundle.classifier_path.name} gives logits of {list(logits.shape[1:])} for the {classes} classes that "
            f"its sidecar names: export the bundle again"
        )
    if not (np.isfinite(mean).all() and (finite > 0).all() and np.isfinite(logits).all()):
        raise CheckFailed(
            f"{bundle.unet_path.name} or {bundle.classifier_path.name} gives NaN or Inf on ordinary input: "
            f"its weights are damaged; export it again from a sound checkpoint"
        )


def fingerprint_of(outputs: Sequence[Floats]) -> str:
    """Return the SHA-256, hex, of arrays as little-endian float32, each after its shape."""
    digest = hashlib.sha256()
    for output in outputs:
        digest.update(repr(output.shape).encode())
        digest.update(np.ascontiguousarray(output, "<f4").tobytes())
    return digest.hexdigest()
