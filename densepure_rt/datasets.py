"""Images in: whatever the user points at becomes an `ImageSet`, one image at a time.

Everything that can be refused without decoding pixels (sizes, modes, labels, missing files) is refused by
`open_images`, so that a long run does not end at its last image.
"""

from __future__ import annotations

import csv
import hashlib
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path, PurePosixPath

import numpy as np

from densepure_rt.errors import UsageError
from densepure_rt.image_files import (
    GZIP,
    IDX_IMAGES,
    IMAGE_SUFFIXES,
    Pixels,
    Shape,
    check_image,
    read_cifar,
    read_idx,
    read_image,
    read_npz,
    reading,
    size_text,
)

SHIPPED, SHIPPED_SHAPE = "fashion_mnist_test.npz", (1, 28, 28)
FORMATS = (
    "a folder of class folders, a folder with labels.csv, a folder of images, an image (PNG, JPEG, BMP, WEBP), "
    ".npz, IDX (gz or not) or CIFAR-10 .bin"
)


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """One image: `idx` names it in results, `pixels` is uint8 [C, H, W], `label` is None where it is not known."""

    idx: int
    pixels: Pixels
    label: int | None


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in a fixed order, read one at a time. `name` is what to print."""

    name: str
    indices: Sequence[int]
    labels: Sequence[int] | None
    read: Callable[[int], Pixels]  # position among all images of the source -> [C, H, W]
    positions: Sequence[int]  # those that belong to this set, into `indices`, `labels` and `read`

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[LabelledImage]:
        for i in self.positions:
            pixels = np.ascontiguousarray(self.read(i))
            yield LabelledImage(self.indices[i], pixels, None if self.labels is None else self.labels[i])

    @property
    def order(self) -> list[int]:
        """The `idx` of each image."""
        return [self.indices[i] for i in self.positions]

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    def select(self, skip: int = 1, limit: int | None = None) -> ImageSet:
        """Every `skip`-th image by position, at most `limit` of them."""
        if skip < 1 or (limit is not None and limit < 1):
            raise UsageError(f"--skip {skip} and --max {limit} select no image: both must be 1 or more")
        return replace(self, positions=self.positions[::skip][:limit])

    def sha256(self) -> str:
        """Hash over idx, label (-1 where unknown), shape and pixels of each image, in order."""
        digest = hashlib.sha256()
        for image in self:
            label = -1 if image.label is None else image.label
            digest.update(struct.pack("<5q", image.idx, label, *image.pixels.shape))
            digest.update(image.pixels.tobytes())
        return digest.hexdigest()


def open_images(path: Path | None, shape: Shape, class_names: Sequence[str]) -> ImageSet:
    """The images at `path`, None for those that ship with the package; `shape` is the engine's [C, H, W]."""
    if path is None:
        if shape != SHIPPED_SHAPE:
            sizes = f"the images that ship are {size_text(SHIPPED_SHAPE)}, the engine takes {size_text(shape)}"
            raise UsageError(f"{sizes}; name images of that size with --images")
        with resources.as_file(resources.files("densepure_rt") / "data" / SHIPPED) as shipped:
            return replace(_from_npz(shipped, shape, class_names), name="Fashion-MNIST test images (shipped)")
    with reading(path, "images"):
        if path.is_dir():
            return _from_folder(path, shape, class_names)
        with path.open("rb") as file:
            start = file.read(2)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _from_npz(path, shape, class_names)
    if suffix == ".bin":
        return _from_cifar([path], str(path), shape, class_names)
    if start == GZIP or start == IDX_IMAGES[:2] or "idx3" in path.name:
        pixels, labels = read_idx(path, shape)
        return _from_array(str(path), pixels, labels, class_names)
    if suffix in IMAGE_SUFFIXES:
        return _from_files(str(path), [path], None, shape)
    raise UsageError(f"{path} is none of the formats that can be read; give {FORMATS}")


def _from_npz(path: Path, shape: Shape, class_names: Sequence[str]) -> ImageSet:
    pixels, labels, indices = read_npz(path, shape)
    if indices is not None and (len(set(indices)) < len(indices) or any(not 0 <= i < 2**63 for i in indices)):
        raise UsageError(f"index in {path} has negative, huge or repeated values; number the images from 0 up")
    images = _from_array(str(path), pixels, labels, class_names)
    return images if indices is None else replace(images, indices=indices)


def _from_cifar(paths: Sequence[Path], name: str, shape: Shape, class_names: Sequence[str]) -> ImageSet:
    parts = [read_cifar(path, shape) for path in paths]
    labels = [label for _, part in parts for label in part]
    return _from_array(name, np.concatenate([pixels for pixels, _ in parts]), labels, class_names)


def _from_array(name: str, pixels: Pixels, labels: Sequence[int] | None, class_names: Sequence[str]) -> ImageSet:
    n, known = len(pixels), len(class_names)
    if n == 0:
        raise UsageError(f"{name} holds no image; give {FORMATS}")
    if labels is not None and len(labels) != n:
        raise UsageError(f"{name} holds {n} images and {len(labels)} labels; give one label an image")
    for i, label in enumerate(labels or ()):
        if not 0 <= label < known:
            raise UsageError(f"image {i} of {name} has label {label}, the model knows 0..{known - 1}; use its own data")
    pixels.setflags(write=False)
    return ImageSet(name, range(n), labels, pixels.__getitem__, range(n))


def _from_files(name: str, files: Sequence[Path], labels: Sequence[int] | None, shape: Shape) -> ImageSet:
    for file in files:
        check_image(file, shape)
    return ImageSet(name, range(len(files)), labels, partial(_read_nth, files, shape), range(len(files)))


def _read_nth(files: Sequence[Path], shape: Shape, i: int) -> Pixels:
    return read_image(files[i], shape)


def _from_folder(folder: Path, shape: Shape, class_names: Sequence[str]) -> ImageSet:
    if (folder / "labels.csv").exists():
        return _from_labels_csv(folder, shape, class_names)
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    folders = [entry for entry in entries if entry.is_dir()]
    images = [entry for entry in entries if entry.suffix.lower() in IMAGE_SUFFIXES and entry not in folders]
    cifar = [entry for entry in entries if entry.suffix.lower() == ".bin" and entry not in folders]
    if images and folders:
        found = f"{len(images)} images and the folders {_listed([f.name for f in folders])}"
        raise UsageError(f"{folder} holds {found}; give class folders alone, images alone, or add a labels.csv")
    if images:
        return _from_files(str(folder), images, None, shape)
    if cifar:
        return _from_cifar(cifar, str(folder), shape, class_names)
    if folders:
        return _from_class_folders(folder, folders, shape, class_names)
    raise UsageError(f"{folder} holds no images; give {FORMATS}")


def _from_class_folders(folder: Path, folders: Sequence[Path], shape: Shape, class_names: Sequence[str]) -> ImageSet:
    labels = _labels_of([entry.name for entry in folders], class_names, f"the folders of {folder}")
    found = sorted(
        (label, file)
        for entry, label in zip(folders, labels, strict=True)
        for file in entry.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and not file.is_dir()
    )
    if not found:
        raise UsageError(f"the class folders of {folder} hold no images (PNG, JPEG, BMP, WEBP); check the path")
    return _from_files(str(folder), [file for _, file in found], [label for label, _ in found], shape)


def _from_labels_csv(folder: Path, shape: Shape, class_names: Sequence[str]) -> ImageSet:
    table = folder / "labels.csv"
    with reading(table, "a CSV file"), table.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.reader(lines, strict=True)
        header = [name.strip() for name in next(rows, [])]
        if header != ["file", "label"]:
            raise UsageError(f'{table} starts with "{",".join(header)}"; its first line must be file,label')
        files, values = [], []
        for row in filter(None, rows):
            where = f"line {rows.line_num} of {table}"
            if len(row) != 2:
                raise UsageError(f"{where} has {len(row)} fields; write file,label (quote names that hold a comma)")
            file = PurePosixPath(row[0].strip())
            if file.is_absolute() or ".." in file.parts or not file.parts:
                raise UsageError(f'{where} names "{file}"; name files inside {folder}, relative to it and without ".."')
            files.append(folder / file)
            values.append(row[1].strip())
    if not files:
        raise UsageError(f"{table} lists no image; add a line file,label for each")
    distinct = list(dict.fromkeys(values))
    label_of = dict(zip(distinct, _labels_of(distinct, class_names, f"the labels in {table}"), strict=True))
    return _from_files(str(folder), files, [label_of[value] for value in values], shape)


def _labels_of(found: Sequence[str], class_names: Sequence[str], where: str) -> list[int]:
    """The label each name stands for: all are class names, or all are integers; never a guess by sort order."""
    slugs = [_slug(name) for name in class_names]
    exact, by_slug = _unambiguous(class_names), _unambiguous(slugs)
    labels = [exact.get(name, by_slug.get(_slug(name))) for name in found]
    if None in labels and all(re.fullmatch(r"[0-9]{1,9}", name) for name in found):
        labels = [int(name) if int(name) < len(class_names) else None for name in found]
    unknown = [name for name, label in zip(found, labels, strict=True) if label is None]
    if unknown:
        raise UsageError(
            f"{where} are {_listed(found)}, of which the model does not know {_listed(unknown)}; name them all "
            f"by class ({_listed([slug or name for slug, name in zip(slugs, class_names, strict=True)])}) or all by "
            f"number (0..{len(class_names) - 1})"
        )
    return [label for label in labels if label is not None]


def _unambiguous(names: Sequence[str]) -> dict[str, int]:
    """Position of each name that occurs once (ImageNet has two classes named crane)."""
    count = Counter(names)
    return {name: label for label, name in enumerate(names) if name and count[name] == 1}


def _slug(name: str) -> str:
    """A class name as a folder can carry it: T-shirt/top -> t-shirt-top."""
    return re.sub(r"[\W_]+", "-", name.lower()).strip("-")


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
