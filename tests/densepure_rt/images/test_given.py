"""Images as programs hand them over: every form of one picture is the same pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from densepure_rt.errors import UsageError
from densepure_rt.images.datasets import LabelledImage
from densepure_rt.images.given import labelled, pixels_of

COLOUR = np.random.default_rng(18).integers(0, 256, (3, 5, 4), np.uint8)
GREY = COLOUR[:1]
NAMES = ("cat", "dog")


@pytest.mark.parametrize("pixels", [COLOUR, GREY], ids=["colour", "grey"])
def test_every_form_of_a_picture_is_the_same_pixels(tmp_path: Path, pixels: Any) -> None:
    torch = pytest.importorskip("torch")
    shape, upright = pixels.shape, np.ascontiguousarray(pixels.transpose(1, 2, 0))
    picture = Image.fromarray(upright if len(pixels) == 3 else upright[..., 0])
    picture.save(tmp_path / "one.png")
    forms: list[Any] = [pixels, torch.tensor(pixels), picture, tmp_path / "one.png", str(tmp_path / "one.png")]
    forms.append(LabelledImage(7, pixels, None))
    for form in forms:
        np.testing.assert_array_equal(pixels_of(form, shape), pixels)
    for form in (upright, torch.tensor(upright), picture, tmp_path / "one.png"):
        found = pixels_of(form, shape, "HWC")
        np.testing.assert_array_equal(found, pixels)
        assert found.flags.c_contiguous


def test_a_grey_array_and_a_grey_picture_have_no_third_axis_in_height_first() -> None:
    np.testing.assert_array_equal(pixels_of(GREY[0], GREY.shape, "HWC"), GREY)
    np.testing.assert_array_equal(pixels_of(Image.fromarray(GREY[0]), COLOUR.shape), np.repeat(GREY, 3, 0))


@pytest.mark.parametrize(
    ("given", "layout", "words"),
    [
        (COLOUR, "HWC", ["`layout` HWC", "[5, 4, 3]", "got uint8 [3, 5, 4]"]),
        (COLOUR.transpose(1, 2, 0), "CHW", ["got uint8 [5, 4, 3]", "transpose(2, 0, 1)"]),
        (COLOUR.transpose(1, 2, 0) / 255, "HWC", ["float64", "from 0 to 255"]),
        (COLOUR, "NHWC", ["`layout` 'NHWC'", "CHW, HWC"]),
        (Image.new("RGBA", (4, 5)), "CHW", ["the Pillow image has pixels of mode RGBA"]),
        (Image.new("RGB", (5, 4)), "CHW", ["the Pillow image is 3x4x5, the engine takes 3x5x4"]),
        ("none.png", "CHW", ["none.png: no such file"]),
    ],
)
def test_what_is_no_image_is_refused(given: Any, layout: Any, words: list[str]) -> None:
    with pytest.raises(UsageError) as refused:
        pixels_of(given, COLOUR.shape, layout)
    assert all(word in str(refused.value) for word in words)


def test_tensors_that_are_no_arrays_here_are_refused() -> None:
    torch = pytest.importorskip("torch")
    np.testing.assert_array_equal(
        pixels_of(torch.tensor(COLOUR).flip(2), COLOUR.shape), np.flip(COLOUR, 2)
    )  # which is not contiguous
    for tensor, word in ((torch.zeros(COLOUR.shape), "float32"), (torch.zeros(COLOUR.shape, device="meta"), "cpu()")):
        with pytest.raises(UsageError) as refused:
            pixels_of(tensor, COLOUR.shape)
        assert word in str(refused.value)


def read(images: Any, labels: Any = None, **options: Any) -> tuple[list[LabelledImage], int | None]:
    found, total = labelled(images, COLOUR.shape, NAMES, labels, **options)
    return list(found), total


def test_several_images_are_numbered_named_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(COLOUR.transpose(1, 2, 0)).save(file)
    found, total = read([COLOUR, file, str(file)], [1, None, np.int64(0)])
    assert [(image.idx, image.label, image.name) for image in found] == [
        (0, 1, None),
        (1, None, str(file)),
        (2, 0, str(file)),
    ]
    assert total == 3
    assert read(iter([COLOUR]))[1] is None
    assert [image.idx for image in read(np.stack([COLOUR, COLOUR]))[0]] == [0, 1]
    for folder in (tmp_path, str(tmp_path)):
        (image,), count = read(folder)
        assert count == 1
        np.testing.assert_array_equal(image.pixels, COLOUR)


def test_labels_take_the_place_of_those_that_images_have() -> None:
    given = [LabelledImage(4, COLOUR, 1), LabelledImage(9, COLOUR, 1)]
    assert [(image.idx, image.label) for image in read(given)[0]] == [(4, 1), (9, 1)]
    assert [(image.idx, image.label) for image in read(given, [0, None])[0]] == [(4, 0), (9, None)]


@pytest.mark.parametrize(
    ("images", "labels", "word"),
    [
        ([COLOUR], [0, 1], "1 images and 2 labels"),
        (iter([COLOUR]), [0, 1], "1 images and more labels"),
        (iter([COLOUR, COLOUR]), [0], "more than 1 images and 1 labels"),
        ([COLOUR], [2], "label 2 is none of the model's: 0..1"),
        ([COLOUR], ["cat"], "got 'cat'"),
        (COLOUR, None, "give [image]"),
        (Image.new("RGB", (4, 5)), None, "give [image]"),
        (5, None, "type int"),
        (b"a.png", None, "type bytes"),
    ],
)
def test_one_image_in_place_of_several_and_labels_that_do_not_fit_are_refused(
    images: Any, labels: Any, word: str
) -> None:
    with pytest.raises(UsageError) as refused:
        read(images, labels)
    assert word in str(refused.value)
