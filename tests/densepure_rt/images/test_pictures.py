from __future__ import annotations

import numpy as np
import pytest

from densepure_rt.images.pictures import as_picture, data_address, pixels_of
from tests.support.pictures import decoded


@pytest.mark.parametrize("shape", [(1, 3, 5), (3, 4, 2)])
def test_a_picture_has_the_pixels(shape: tuple[int, int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    expected = pixels[0] if shape[0] == 1 else np.moveaxis(pixels, 0, -1)
    assert np.array_equal(decoded(data_address(pixels)), expected)
    assert np.array_equal(np.asarray(as_picture(pixels)), expected)


def test_a_state_is_shown_by_its_nearest_levels() -> None:
    levels = np.arange(256, dtype=np.uint8)
    assert np.array_equal(pixels_of((levels / 127.5 - 1).astype(np.float32)), levels)
    assert pixels_of(np.array([-1.5, 1.01], np.float32)).tolist() == [0, 255]
