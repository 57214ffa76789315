"""Pictures of every kind as an engine's pixels, against what Pillow, numpy and `image_files` make of them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from densepure_rt.errors import UsageError
from densepure_rt.images.formats import read_image
from densepure_rt.images.uploads import EXIF_ORIENTATION, MOST_BYTES, fitted
from tests.support.pictures import COLOUR, GREY, file_of, noise


def png_of_size(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be so large."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("image", "shape"),
    [
        (Image.fromarray(noise(28, 28)), GREY),
        (Image.fromarray(np.repeat(noise(28, 28, 1), 3, axis=2)), GREY),
        (Image.fromarray(noise(28, 28)).convert("1"), GREY),
        (Image.fromarray(noise(28, 28, 3)), COLOUR),
        (Image.fromarray(noise(28, 28, 3)).quantize(16), COLOUR),
    ],
    ids=["grey", "grey as RGB", "one bit", "colour", "palette"],
)
def test_a_picture_that_the_command_line_reads_has_the_same_pixels(
    image: Image.Image, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    content = file_of(image)
    (tmp_path / "x.png").write_bytes(content)
    found = fitted(content, shape)
    assert found.changes == ()
    assert found.pixels.dtype == np.uint8
    np.testing.assert_array_equal(found.pixels, read_image(tmp_path / "x.png", shape))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "WEBP"])
def test_every_format_is_read(format: str) -> None:
    smooth = np.add.outer(np.arange(28) * 4, np.arange(28) * 4).astype(np.uint8)  # survives JPEG
    found = fitted(file_of(Image.fromarray(smooth).convert("RGB"), format, quality=95), GREY)
    assert np.abs(found.pixels[0].astype(int) - smooth).max() <= 6


def test_a_larger_picture_is_cropped_around_its_middle_and_scaled() -> None:
    stripes = np.zeros((280, 480), np.uint8)
    stripes[:, 100:380] = 200  # all that remains
    found = fitted(file_of(Image.fromarray(stripes)), GREY)
    assert found.changes == ("cropped around its middle to 280 x 280", "scaled from 280 x 280 to 28 x 28")
    assert (found.pixels == 200).all()


def test_scaling_down_takes_the_mean_and_not_every_tenth_pixel() -> None:
    found = fitted(file_of(Image.fromarray(noise(280, 280))), GREY)
    assert abs(found.pixels.mean() - 127.5) < 3
    assert found.pixels.std() < 255 / np.sqrt(12) / 4  # of independent pixels it would be 74; their means have 1/10


@pytest.mark.parametrize("shape", [(1, 8, 32), (3, 32, 8)])
@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (31, 33), (500, 3)])
def test_any_proportions_come_out_as_the_engine_takes_them(shape: tuple[int, int, int], size: tuple[int, int]) -> None:
    assert fitted(file_of(Image.new("RGB", size, (9, 9, 9))), shape).pixels.tolist() == np.full(shape, 9).tolist()


def test_colour_becomes_the_luma_of_itu_r_601() -> None:
    colours = noise(28, 28, 3)
    found = fitted(file_of(Image.fromarray(colours)), GREY)
    assert found.changes == ("made grey",)
    assert np.abs(found.pixels[0] - colours @ np.array([0.299, 0.587, 0.114])).max() < 1


def test_a_photograph_is_turned_as_its_camera_was_held() -> None:
    pixels = noise(28, 28)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # to be turned clockwise by a quarter
    found = fitted(file_of(Image.fromarray(pixels), exif=exif), GREY)
    assert found.changes == ("turned as its EXIF says",)
    np.testing.assert_array_equal(found.pixels[0], np.rot90(pixels, -1))


def test_what_is_transparent_is_white() -> None:
    half = np.zeros((28, 28, 2), np.uint8)  # black, and its right half opaque
    half[:, 14:, 1] = 255
    found = fitted(file_of(Image.fromarray(half)), GREY)
    assert found.changes == ("laid on white where it is transparent",)
    assert found.pixels[0, :, :14].min() == 255
    assert found.pixels[0, :, 14:].max() == 0


def test_sixteen_bits_keep_their_high_bytes() -> None:
    levels = np.random.default_rng(0).integers(0, 2**16, (28, 28), np.uint16)
    found = fitted(file_of(Image.fromarray(levels)), GREY)
    assert found.changes == ("16 bits a pixel cut to 8",)
    np.testing.assert_array_equal(found.pixels[0], levels >> 8)


def test_of_an_animation_the_first_picture_is_taken() -> None:
    pictures = [Image.new("RGB", (28, 28), (shade, shade, shade)) for shade in (10, 250)]
    content = file_of(pictures[0], "WEBP", save_all=True, append_images=pictures[1:], lossless=True)
    found = fitted(content, GREY)
    assert found.changes == ("the first of its 2 pictures",)
    assert (found.pixels == 10).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not PNG, JPEG, BMP, WEBP"),
        (b"<svg onload=alert(1)>", "is not PNG, JPEG, BMP, WEBP"),
        (b"GIF89a" + bytes(40), "is not PNG, JPEG, BMP, WEBP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "is not PNG, JPEG, BMP, WEBP"),
        (png_of_size(5001, 5000), "5,001 x 5,000, at most 25,000,000 pixels"),
        (png_of_size(2**31 - 1, 2**31 - 1), "the picture cannot be read as an image"),
        (bytes(MOST_BYTES + 1), "16,777,217 bytes"),
        (file_of(Image.fromarray(noise(28, 28)))[:-200], "the picture cannot be read as an image"),
        (file_of(Image.fromarray(noise(28, 28, 3)), "JPEG")[:300], "the picture cannot be read as an image"),
    ],
    ids=["nothing", "SVG", "GIF", "PostScript", "large", "bomb", "heavy", "cut PNG", "cut JPEG"],
)
def test_what_cannot_be_read_is_one_clear_error(content: bytes, message: str) -> None:
    with pytest.raises(UsageError, match="the picture") as caught:
        fitted(content, GREY)
    assert message in str(caught.value)


def test_a_picture_has_one_channel_or_three() -> None:
    with pytest.raises(UsageError, match="takes 4 channels"):
        fitted(file_of(Image.fromarray(noise(28, 28))), (4, 28, 28))
