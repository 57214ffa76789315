"""Batches that are drawn."""

from __future__ import annotations

import numpy as np

from densepure_rt.runtime.device import Batch, Kind


def random_batch(draw: np.random.Generator, size: int, images: int, slots: int) -> Batch:
    """Up to `size` items of one kind. No item's target is another's source."""
    kind: Kind = draw.choice(np.array(["smooth", "step", "step", "step", "classify"]))
    n = int(draw.integers(1, size + 1))
    shuffled = draw.permutation(slots)
    target, others = shuffled[:n], shuffled[n:]
    in_place = draw.random(n) < 0.4
    return Batch(
        kind=kind,
        image=draw.integers(0, images, n),
        sample=draw.integers(0, 1 << 40, n),
        vote=draw.integers(0, 40, n),
        step=draw.integers(0, 4, n),
        source=np.where(in_place, target, draw.choice(others[: 1 + n // 2], n)),  # few, so that branches share one
        target=target,
        t=draw.random(n, np.float32),
        coef=draw.standard_normal((n, 6), np.float32),
    )
