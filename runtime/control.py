"""What a device on a GPU is told of a batch: one buffer of items, t and coef, which the host fills and copies once."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from densepure_rt.runtime.device import Batch

ALIGNMENT = 256  # bytes; what TensorRT asks of a tensor's address
PADDING = -1  # a target slot that nothing is written to
LAST_HANDLE = 2**63 - 1  # of no image
COLUMNS = ("image", "sample", "vote", "step", "source", "target")
ITEM = np.dtype([(name, np.int64) for name in COLUMNS])  # the struct of kernels.cu


class Listed(Protocol):
    """An open image. index: its row in the table of images that the kernels read."""

    @property
    def index(self) -> int: ...


def layout(*sizes: int) -> tuple[list[int], int]:
    """Return where regions of these sizes start when each is aligned, and how long they are together."""
    padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    return [0, *accumulate(padded)][:-1], sum(padded)


def control_layout(batch: int) -> tuple[list[int], int]:
    """Return where the items, t and coef of a batch start, and the bytes of all."""
    return layout(ITEM.itemsize * batch, 4 * batch, 24 * batch)


def fill_control(content: NDArray[np.uint8], size: int, batch: Batch, images: Mapping[int, Listed]) -> None:
    """Write a batch into the buffer of `control_layout(size)`; padding repeats the first item.

    images: those that are open, by ascending handle. Raises KeyError for a handle of none.
    """
    n, offsets = len(batch.image), control_layout(size)[0]
    items = content[: ITEM.itemsize * size].view(ITEM)
    items["image"][:n] = table_rows(batch.image, images)
    for name in COLUMNS[1:]:
        items[name][:n] = getattr(batch, name)
    items[n:] = items[0]
    items["target"][n:] = PADDING
    if batch.kind == "step":
        for values, offset in ((batch.t, offsets[1]), (batch.coef, offsets[2])):
            rows = content[offset : offset + size * values[:1].nbytes].view(np.float32)
            rows = rows.reshape(size, *values.shape[1:])
            rows[:n], rows[n:] = values, values[0]


def table_rows(handles: NDArray[np.int64], images: Mapping[int, Listed]) -> NDArray[np.int64]:
    """The rows of images in the kernels' table, by their handles."""
    known = np.array([*images, LAST_HANDLE])
    places = known.searchsorted(handles)
    for unknown in handles[known[places] != handles].tolist():
        raise KeyError(unknown)
    rows: NDArray[np.int64] = np.array([image.index for image in images.values()])[places]
    return rows
