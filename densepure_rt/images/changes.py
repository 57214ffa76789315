"""Change a picture to the form that an engine takes, with Pillow: one function for each change.

A picture is changed only where the user asks for it. The certificate then holds for the changed picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image, ImageColor, ImageOps

from densepure_rt.errors import UsageError

Fit = Literal["crop", "resize", "pad"]


@dataclass(frozen=True)
class Preparation:
    """The changes made to image files before they are certified.

    Attributes:
        fit: "crop": the largest part in the middle that has the engine's proportions, scaled; "resize": scaled as it
            is, which may distort; "pad": scaled to fit in, with `background` beside it. None: files have the size.
        convert: Transparent pixels are laid on `background`, grey becomes colour and colour grey, 16 bits become 8.
        background: A colour that Pillow knows.
    """

    fit: Fit | None = None
    convert: bool = False
    background: str = "white"

    def __post_init__(self) -> None:
        if self.fit not in (None, *get_args(Fit)):
            raise UsageError(f"`fit` {self.fit} is not known: {', '.join(get_args(Fit))}")
        try:
            channels = len(ImageColor.getrgb(self.background))
        except ValueError:
            channels = 0
        if channels != 3:
            raise UsageError(f"`background` {self.background!r} is no colour, such as white or #808080")

    def __bool__(self) -> bool:
        return self.convert or self.fit is not None

    def converted(self, image: Image.Image, channels: int) -> Image.Image:
        """Return an image of 8-bit grey, or of colour. Only with `convert` may it be of another kind."""
        if self.convert:
            image = opaque(eight_bits(image).image, self.background).image
            return (grey if channels == 1 else rgb)(image).image
        return image.convert("L" if image.mode == "1" else "RGB" if image.mode == "P" else image.mode)

    def fitted(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """Return an image of this size; without `fit` it has it already."""
        if self.fit == "pad":
            size, lanczos = (width, height), Image.Resampling.LANCZOS
            return ImageOps.pad(image, size, lanczos, ImageColor.getcolor(self.background, image.mode))
        if self.fit == "crop":
            image = cropped(width, height, image).image
        return image if self.fit is None else scaled(width, height, image).image


AS_IS = Preparation()


class Changed(NamedTuple):
    """An image, and what was done to it; None for nothing."""

    image: Image.Image
    said: str | None = None


def eight_bits(image: Image.Image) -> Changed:
    """Grey of 16 bits as its high bytes, as Pillow reads colour; by itself it would clip them."""
    if not image.mode.startswith("I"):
        return Changed(image)
    levels = np.asarray(image) >> 8
    return Changed(Image.fromarray(levels.clip(0, 255, out=levels).astype(np.uint8)), "16 bits a pixel cut to 8")


def opaque(image: Image.Image, background: str = "white") -> Changed:
    if "A" not in image.getbands() and "transparency" not in image.info:
        return Changed(image)
    seen = image.convert("RGBA")
    behind = Image.new("RGBA", seen.size, background)
    through = seen.getchannel("A").getextrema() != (255, 255)
    return Changed(
        Image.alpha_composite(behind, seen), f"laid on {background} where it is transparent" if through else None
    )


def rgb(image: Image.Image) -> Changed:
    return Changed(image.convert("RGB"))


def grey(image: Image.Image) -> Changed:
    """By ITU-R 601-2 luma, which leaves equal channels as they are."""
    colours = np.asarray(image.convert("RGB"))
    coloured = bool((colours != colours[..., :1]).any())
    return Changed(Image.fromarray(colours).convert("L"), "made grey" if coloured else None)


def cropped(width: int, height: int, image: Image.Image) -> Changed:
    """The largest part in its middle that has the proportions of `width` x `height`."""
    wide = max(1, min(image.width, round(image.height * width / height)))
    high = max(1, min(image.height, round(image.width * height / width)))
    if (wide, high) == image.size:
        return Changed(image)
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    return Changed(image.crop((left, top, left + wide, top + high)), f"cropped around its middle to {wide} x {high}")


def scaled(width: int, height: int, image: Image.Image) -> Changed:
    if image.size == (width, height):
        return Changed(image)
    size = f"scaled from {image.width} x {image.height} to {width} x {height}"
    return Changed(image.resize((width, height), Image.Resampling.LANCZOS), size)
