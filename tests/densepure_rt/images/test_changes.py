"""Pictures that are not as an engine takes them, brought to it where that was asked for, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from densepure_rt.errors import UsageError
from densepure_rt.images.changes import Preparation
from densepure_rt.images.datasets import open_images
from densepure_rt.images.formats import Pixels

NAMES = ("cat", "dog")
COLOUR, GREY = (3, 8, 8), (1, 8, 8)
SMALL = np.random.default_rng(3).integers(0, 256, (8, 8, 3), np.uint8)
WIDE = np.random.default_rng(4).integers(0, 256, (8, 16, 3), np.uint8)


def one(folder: Path, picture: Image.Image, shape: tuple[int, int, int], how: Preparation, end: str = "png") -> Pixels:
    picture.save(folder / f"a.{end}")
    (image,) = open_images(folder, shape, NAMES, how)
    return image.pixels


def test_a_part_in_the_middle_is_cut_out(tmp_path: Path) -> None:
    found = one(tmp_path, Image.fromarray(WIDE), COLOUR, Preparation("crop"))
    np.testing.assert_array_equal(found, WIDE[:, 4:12].transpose(2, 0, 1))


def test_a_picture_is_scaled_as_pillow_does(tmp_path: Path) -> None:
    found = one(tmp_path, Image.fromarray(WIDE), COLOUR, Preparation("resize"))
    expected = np.asarray(Image.fromarray(WIDE).resize((8, 8), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(found, expected.transpose(2, 0, 1))


@pytest.mark.parametrize(("shape", "mode"), [(COLOUR, "RGB"), (GREY, "L")])
def test_what_is_left_is_filled_with_the_background(tmp_path: Path, shape: Any, mode: str) -> None:
    found = one(tmp_path, Image.new(mode, (16, 8), "black"), shape, Preparation("pad", background="#808080"))
    assert (found[:, :2] == 128).all()
    assert (found[:, 6:] == 128).all()
    assert (found[:, 2:6] == 0).all()


def test_transparent_pixels_show_the_background(tmp_path: Path) -> None:
    picture = Image.fromarray(np.dstack([SMALL, np.full((8, 8), 255, np.uint8)]))
    picture.putpixel((0, 0), (9, 9, 9, 0))
    found = one(tmp_path, picture, COLOUR, Preparation(convert=True, background="red"))
    assert found[:, 0, 0].tolist() == [255, 0, 0]
    np.testing.assert_array_equal(found[:, 1:], SMALL[1:].transpose(2, 0, 1))


def test_grey_becomes_colour_and_colour_grey(tmp_path: Path) -> None:
    grey = Image.fromarray(SMALL[..., 0])
    np.testing.assert_array_equal(one(tmp_path, grey, COLOUR, Preparation(convert=True)), [SMALL[..., 0]] * 3)
    found = one(tmp_path, Image.fromarray(SMALL), GREY, Preparation(convert=True))
    np.testing.assert_array_equal(found[0], np.asarray(Image.fromarray(SMALL).convert("L")))


@pytest.mark.parametrize("end", ["png", "tif"])
def test_sixteen_bits_become_the_high_eight(tmp_path: Path, end: str) -> None:
    deep = SMALL[..., 0].astype(np.uint16) * 256 + 77
    found = one(tmp_path, Image.fromarray(deep), GREY, Preparation(convert=True), end)
    np.testing.assert_array_equal(found[0], SMALL[..., 0])


def test_nothing_is_changed_unless_it_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="have `fit` do so"):
        one(tmp_path, Image.fromarray(WIDE), COLOUR, Preparation(convert=True))
    with pytest.raises(UsageError, match="have `convert` do so"):
        one(tmp_path, Image.new("RGBA", (16, 8)), COLOUR, Preparation("crop"))
    assert one(tmp_path, Image.fromarray(SMALL), COLOUR, Preparation()).tolist() == SMALL.transpose(2, 0, 1).tolist()


@pytest.mark.parametrize(
    ("options", "word"), [({"fit": "stretch"}, "crop, resize, pad"), ({"background": "blurple"}, "no colour")]
)
def test_what_is_no_preparation_is_refused(options: Any, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Preparation(**options)


def test_arrays_and_bombs_are_not_prepared(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=SMALL[None])
    with pytest.raises(UsageError, match="for files, leave them out"):
        open_images(tmp_path / "a.npz", COLOUR, NAMES, Preparation("crop"))
    Image.new("1", (10_000, 10_000)).save(tmp_path / "b.png")
    with pytest.raises(UsageError, match="make it smaller"):
        open_images(tmp_path / "b.png", GREY, NAMES, Preparation("crop"))
