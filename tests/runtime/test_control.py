"""The buffer that tells a GPU of a batch, read back as the kernels and the step engine read it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from densepure_rt.runtime.control import COLUMNS, ITEM, PADDING, control_layout, fill_control, layout, table_rows
from densepure_rt.runtime.device import Batch, Kind
from densepure_rt.runtime.schedule import Schedule, make_chain

CHAIN = make_chain(Schedule("linear", 1000), "fixed_small", 0.5, 3)


@dataclass(frozen=True)
class Open:
    index: int


IMAGES = {3: Open(7), 4: Open(0), 9: Open(4095)}


def test_regions_start_where_tensorrt_wants_addresses() -> None:
    assert layout(48 * 3, 4 * 3, 24 * 3) == ([0, 256, 512], 768)
    assert layout(256, 1) == ([0, 256], 512)


@pytest.mark.parametrize("size", [2, 3, 200])
@pytest.mark.parametrize("kind", ["smooth", "step", "classify"])
def test_a_batch_is_written_item_by_item_and_padded_by_its_first(kind: Kind, size: int) -> None:
    offsets, length = control_layout(size)
    content = np.full(length, 0xFF, np.uint8)
    batch = Batch.of(CHAIN, kind, [5, 6], [8, 6], image=[9, 3], sample=[2**40, 1], vote=[0, 4], step=[2, 1])
    fill_control(content, size, batch, IMAGES)
    items = content[: ITEM.itemsize * size].view(np.int64).reshape(size, len(COLUMNS))
    first, second, padding = [4095, 2**40, 0, 2, 5, 8], [7, 1, 4, 1, 6, 6], [4095, 2**40, 0, 2, 5, PADDING]
    assert items.tolist() == [first, second, *[padding] * (size - 2)]
    if kind == "step":
        t = content[offsets[1] :][: 4 * size].view(np.float32)
        coef = content[offsets[2] :][: 24 * size].view(np.float32).reshape(size, 6)
        steps = [2, 1, *[2] * (size - 2)]
        assert t.tolist() == CHAIN.t[steps].tolist()
        assert coef.tolist() == CHAIN.coef[steps].tolist()
    else:
        assert (content[offsets[1] :] == 0xFF).all()


@pytest.mark.parametrize("handle", [-1, 0, 5, 10, 2**62])
def test_an_image_that_is_not_open_is_no_row(handle: int) -> None:
    for images in (IMAGES, {}):
        with pytest.raises(KeyError, match=str(handle)):
            table_rows(np.array([handle, *images]), images)


def test_rows_are_found_by_handle_in_any_order() -> None:
    assert table_rows(np.array([9, 3, 3, 4, 9]), IMAGES).tolist() == [4095, 7, 7, 0, 4095]
