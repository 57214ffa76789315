"""An uploaded picture as the pixels that an engine takes, and in words what was done to get there.

For looking at one picture, not for measuring on a data set: `formats` resizes nothing, and refuses what this
crops, scales and turns. A picture of these formats that it would take has the same pixels here. What comes in is
untrusted: its header is read, and its size judged, before any pixel is decoded. A server decodes in a child process:
see `decoder`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, ImageOps

from densepure_rt.errors import UsageError
from densepure_rt.images.changes import Changed, cropped, eight_bits, grey, opaque, rgb, scaled
from densepure_rt.images.formats import IMAGE_FORMATS, Pixels, Shape, reading, require_few_scans

MOST_BYTES = 16 * 2**20  # of a file; a photograph from a phone is 3 to 8 MiB
MOST_PIXELS = 25_000_000  # 100 MB while they are decoded, as RGBA

EXIF_ORIENTATION, TURNED = 0x0112, range(2, 9)  # CIPA DC-008, Exif 2.32, 4.6.5; 1 is upright


@dataclass(frozen=True, eq=False)
class Fitted:
    """pixels: uint8 [C, H, W]. changes: what was done, in order; none when the picture was as the engine takes it."""

    pixels: Pixels
    changes: tuple[str, ...]


def fitted(content: bytes, shape: Shape) -> Fitted:
    """The picture in `content`, the bytes of an image file, for an engine of `shape` [C, H, W], C being 1 or 3.

    Raises UsageError for what is no picture, is too large or is cut short.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise UsageError(
            f"the engine takes {channels} channels, a picture has 1 or 3: send a tensor to the API instead"
        )
    changes = []
    with reading("the picture", "an image"):
        image = opened(content)
        for change in (
            one_of_many,
            upright,
            eight_bits,
            opaque,
            grey if channels == 1 else rgb,
            partial(cropped, width, height),
            partial(scaled, width, height),
        ):
            image, said = change(image)
            changes += [said] if said else []
        pixels = np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)
    return Fitted(np.ascontiguousarray(pixels), tuple(changes))


def opened(content: bytes) -> Image.Image:
    """The image, its pixels not decoded yet."""
    if len(content) > MOST_BYTES:
        raise UsageError(f"the picture has {len(content):,} bytes, at most {MOST_BYTES:,} are read: save it smaller")
    require_few_scans(content, "the picture")
    image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
    if image.width * image.height > MOST_PIXELS:
        raise UsageError(
            f"the picture is {image.width:,} x {image.height:,}, at most {MOST_PIXELS:,} pixels are read: scale it down"
        )
    return image


def one_of_many(image: Image.Image) -> Changed:
    pictures = getattr(image, "n_frames", 1)  # the first is the one that is open
    return Changed(image, f"the first of its {pictures} pictures" if pictures > 1 else None)


def upright(image: Image.Image) -> Changed:
    """As the camera that took it was held."""
    if image.getexif().get(EXIF_ORIENTATION) not in TURNED:
        return Changed(image)
    return Changed(ImageOps.exif_transpose(image), "turned as its EXIF says")
