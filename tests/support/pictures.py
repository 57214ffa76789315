"""Pictures made to measure, as files, and the pixels of one in a page."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GREY, COLOUR = (1, 28, 28), (3, 28, 28)
SCAN = b"\xff\xda"


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def file_of(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


GOOD = file_of(Image.fromarray(noise(28, 28)))


def scan_bomb(size: int, scans: int) -> bytes:
    """A grey progressive JPEG of size x size pixels, its last scan repeated until there are so many."""
    content = file_of(Image.new("L", (size, size), 128), "JPEG", progressive=True)
    last = content[content.rindex(SCAN) : -2]
    return content[:-2] + last * (scans - content.count(SCAN)) + content[-2:]


def decoded(source: str) -> np.ndarray:
    head, _, text = source.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
