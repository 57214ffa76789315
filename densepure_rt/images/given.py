"""Images as a program hands them over, made the `LabelledImage`s that are certified; nothing is resized or rescaled."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from densepure_rt.errors import UsageError
from densepure_rt.images.datasets import LabelledImage, open_images
from densepure_rt.images.formats import Pixels, Shape, picture_pixels, read_image, size_text

T = TypeVar("T")


class Tensor(Protocol):
    """The part of a torch tensor that is used; torch itself is imported by whoever has one."""

    def detach(self) -> Tensor: ...
    def numpy(self) -> NDArray[Any]: ...


class Watch(Protocol):
    """Pass `work` on, item by item, and show how far it is, of `total`: `tqdm.tqdm` or `rich.progress.track`."""

    def __call__(self, work: Iterable[T], /, *, total: int | None) -> Iterable[T]: ...


Layout = Literal["CHW", "HWC"]
PathName = str | os.PathLike[str]  # the name of a file
ImageLike: TypeAlias = "NDArray[np.uint8] | Image.Image | Tensor | LabelledImage | PathName"
Images: TypeAlias = "Iterable[ImageLike] | PathName"  # a path: of all that `open_images` reads


def unwatched(work: Iterable[T], /, *, total: int | None) -> Iterable[T]:
    return work


def pixels_of(given: ImageLike, shape: Shape, layout: Layout = "CHW") -> Pixels:
    """Return an image as uint8 [C, H, W] of this shape. layout: of arrays and tensors; HWC has grey as [H, W] too.

    Raises UsageError that says what was given, and how that becomes one.
    """
    if layout not in get_args(Layout):
        raise UsageError(f"`layout` {layout!r} is not known: {', '.join(get_args(Layout))}")
    if isinstance(given, LabelledImage):
        return require_pixels(given.pixels, shape)
    if isinstance(given, Image.Image):
        return picture_pixels(given, shape)
    if isinstance(given, str | os.PathLike):
        return read_image(Path(given), shape)
    array: object = given if isinstance(given, np.ndarray) else array_of(given)
    if layout == "CHW" or not isinstance(array, np.ndarray):
        return require_pixels(array, shape)
    channels, *size = shape
    if channels == 1 and array.shape == tuple(size):
        array = array[..., None]
    if array.shape != (*size, channels):
        raise UsageError(
            f"an image of `layout` HWC must be an array, uint8 {[*size, channels]} (height, width, channels), got "
            f"{array.dtype} {list(array.shape)}: nothing is resized, repeated or turned here"
        )
    return require_pixels(np.ascontiguousarray(array.transpose(2, 0, 1)), shape)


def array_of(given: object) -> object:
    """Return a torch tensor as the array that shares its memory, and anything else as it is."""
    if type(given).__module__.partition(".")[0] != "torch":
        return given
    try:
        return given.detach().numpy()  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError, TypeError) as error:  # of another device, or a kind that numpy has not
        raise UsageError(f"the torch tensor is no array ({error}): give image.cpu() of a dense tensor") from error


def labelled(
    images: Images,
    shape: Shape,
    class_names: Sequence[str],
    labels: Iterable[int | None] | None = None,
    layout: Layout = "CHW",
) -> tuple[Iterator[LabelledImage], int | None]:
    """Return images with their labels, read as they are asked for, and how many there are, where that is known.

    labels: one for each image, None where it is not known; in place of what `images` say of themselves.

    Raises UsageError for one image in place of several; the images do so for what is none, and for labels that the
    model does not know or that are too few or too many.
    """
    if isinstance(images, str | os.PathLike):
        images = open_images(Path(images), shape, class_names)
    elif isinstance(images, Image.Image | LabelledImage) or getattr(images, "shape", None) == shape:
        raise UsageError("images are several, and one was given: give [image], and take the one answer that comes")
    elif isinstance(images, bytes) or not isinstance(images, Iterable) or getattr(images, "ndim", 1) == 0:
        require_pixels(images, shape)
    total = len(images) if isinstance(images, Sized) else None
    if isinstance(labels, Sized) and total is not None and len(labels) != total:
        raise miscounted(f"{total} images and {len(labels)} labels")
    each = (made(idx, given, shape, layout) for idx, given in enumerate(images))
    return each if labels is None else with_labels(each, labels, len(class_names)), total


def made(idx: int, given: ImageLike, shape: Shape, layout: Layout) -> LabelledImage:
    if isinstance(given, LabelledImage):
        return given
    name = os.fsdecode(given) if isinstance(given, str | os.PathLike) else None
    return LabelledImage(idx, pixels_of(given, shape, layout), None, name)


def with_labels(images: Iterator[LabelledImage], labels: Iterable[int | None], classes: int) -> Iterator[LabelledImage]:
    given, count = iter(labels), 0
    for count, image in enumerate(images, start=1):
        try:
            label = next(given)
        except StopIteration:
            raise miscounted(f"more than {count - 1} images and {count - 1} labels") from None
        yield replace(image, label=None if label is None else known(label, classes))
    if next(given, given) is not given:
        raise miscounted(f"{count} images and more labels")


def known(label: int, classes: int) -> int:
    """Return a label as Python's own int. Raises UsageError for one that the model does not know."""
    try:
        number = operator.index(label)
    except TypeError:
        raise UsageError(f"a label is a whole number or None, got {label!r}") from None
    if not 0 <= number < classes:
        raise UsageError(f"label {number} is none of the model's: 0..{classes - 1}")
    return number


def miscounted(found: str) -> UsageError:
    return UsageError(f"there are {found}: give one label for each image, None where it is not known")


def require_pixels(given: object, shape: Shape) -> Pixels:
    """Return `given` if it is a uint8 array [C, H, W] of this shape already: nothing is converted.

    Raises UsageError that says what was given, and how that becomes one.
    """
    if isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.shape == shape:
        return given
    if isinstance(given, np.ndarray):
        found, moves = f"{given.dtype} {list(given.shape)}", [*_dtype_moves(given), *_shape_moves(given.shape, shape)]
    else:
        found = f"an object of type {type(given).__qualname__}"
        moves = ["np.array(image, dtype=np.uint8) of whole levels from 0 to 255"]
    raise UsageError(
        f"an image must be an array, uint8 {list(shape)} (channels, height, width), got {found}: "
        f"give {'; '.join(moves)}"
    )


def _dtype_moves(given: NDArray[Any]) -> list[str]:
    if given.dtype == np.uint8:
        return []
    if given.dtype.kind == "f":
        return ["the original levels from 0 to 255, of floats in [0, 1] np.rint(255 * image).astype(np.uint8)"]
    return ["image.astype(np.uint8), where all its levels are whole and from 0 to 255"]


def _shape_moves(found: tuple[int, ...], shape: Shape) -> list[str]:
    channels, *size = shape
    if found == shape:
        return []
    if found == (*size, channels):
        return ["image.transpose(2, 0, 1)"]
    if found == tuple(size) and channels == 1:
        return ["image[None], or a list of images where several are taken"]
    if found[1:] == shape:
        return ["one image of the batch, such as image[0]"]
    return [f"one of {size_text(shape)}: nothing is resized or repeated here"]
