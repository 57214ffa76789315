"""Images in: whatever the user points at becomes an `ImageSet`, one image at a time.

Everything that can be refused without decoding pixels (sizes, modes, labels, missing files) is refused by
`open_images`, so that a long run does not end at its last image.
"""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import resources
from io import TextIOWrapper
from pathlib import Path, PurePath, PurePosixPath

import numpy as np

from densepure_rt.errors import UsageError
from densepure_rt.files import opened
from densepure_rt.images.changes import AS_IS, Preparation
from densepure_rt.images.formats import (
    GZIP,
    IDX_IMAGES,
    IMAGE_SUFFIXES,
    PICKLE,
    Pixels,
    Shape,
    Unreadable,
    check_image,
    read_cifar,
    read_idx,
    read_image,
    read_npz,
    reading,
    size_text,
)
from densepure_rt.images.sets import ImageSet as ImageSet
from densepure_rt.images.sets import LabelledImage as LabelledImage
from densepure_rt.images.sets import LeftOut as LeftOut
from densepure_rt.text import plural, printable

SHIPPED, SHIPPED_SHAPE = "fashion_mnist_test.npz", (1, 28, 28)
FORMATS = (
    "a folder of class folders, a folder with labels.csv, a folder of images, an image (PNG, JPEG, BMP, WEBP, "
    "PPM, TIFF), .npz, IDX (gz or not) or CIFAR-10 .bin"
)
SPLITS = {  # words in the names of folders that hold a part of a data set
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
NO_FORMAT, HIDDEN, LINKED = "no images by their names", "hidden", "links to folders"
UNLISTED, BARE = "images that labels.csv does not list", "class folders without an image"
UNPICKLED = (
    "of CIFAR-10 fetch the binary version (cifar-10-binary.tar.gz) and name its test_batch.bin; save other data as .npz"
)
NAMED = 3  # of what is left out for one reason


def open_images(
    path: Path | Sequence[Path] | None,
    shape: Shape,
    class_names: Sequence[str],
    prepared: Preparation = AS_IS,
    labels_csv: Path | None = None,
) -> ImageSet:
    """The images at `path`, None for those that ship with the package; `shape` is the engine's [C, H, W].

    path: several are image files. prepared: what to do to image files. labels_csv: a table file,label of them, its
    files relative to the folder, or to the one here where several files are named.
    """
    if isinstance(path, Sequence) and len(path) == 1 and labels_csv is None:
        path = path[0]
    found = _found(path, shape, class_names) if labels_csv is None else _listed_in(labels_csv, path, class_names)
    if found.files is not None:
        return _checked(found, found.files, shape, prepared)
    if prepared:
        raise UsageError(
            f"{found.name} holds arrays, not image files: `fit` and `convert` are for files, leave them out"
        )
    return found


def _found(path: Path | Sequence[Path] | None, shape: Shape, class_names: Sequence[str]) -> ImageSet:
    if isinstance(path, Sequence):
        if folders := [one for one in path if one.is_dir()]:
            raise UsageError(f"{folders[0]} is a folder, among {len(path)} paths: name it alone, or image files alone")
        return _from_files(f"{len(path)} files", path, None)
    if path is None:
        if shape != SHIPPED_SHAPE:
            sizes = f"the images that ship are {size_text(SHIPPED_SHAPE)}, the engine takes {size_text(shape)}"
            raise UsageError(f"{sizes}; name images of that size with `images`")
        with resources.as_file(resources.files("densepure_rt") / "data" / SHIPPED) as shipped:
            images = _from_npz(shipped, shape, class_names)
            named = _places_in(Path(SHIPPED))
            return replace(images, name="Fashion-MNIST test images (shipped)", name_at=named)
    with reading(path, "images"):
        if path.is_dir():
            return _from_folder(path, shape, class_names)
        with opened(path, "data set") as file:
            start = file.read(2)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _from_npz(path, shape, class_names)
    if suffix == ".bin":
        return _from_cifar([path], str(path), shape, class_names)
    if start == GZIP or start == IDX_IMAGES[:2] or "idx3" in path.name:
        pixels, labels = read_idx(path, shape)
        return replace(_from_array(str(path), pixels, labels, class_names), name_at=_places_in(path))
    if suffix in IMAGE_SUFFIXES:
        return _from_files(str(path), [path], None, path.parent)
    if start[:1] == PICKLE:
        raise UsageError(f"{path} is a pickle, which can run any code and is never opened; {UNPICKLED}")
    raise UsageError(f"{path} is none of the formats that can be read; give {FORMATS}")


def _from_npz(path: Path, shape: Shape, class_names: Sequence[str]) -> ImageSet:
    pixels, labels, indices = read_npz(path, shape)
    if indices is not None and (len(set(indices)) < len(indices) or any(not 0 <= i < 2**63 for i in indices)):
        raise UsageError(f"index in {path} has negative, huge or repeated values; number the images from 0 up")
    images = replace(_from_array(str(path), pixels, labels, class_names), name_at=_places_in(path))
    return images if indices is None else replace(images, indices=indices)


def _from_cifar(paths: Sequence[Path], name: str, shape: Shape, class_names: Sequence[str]) -> ImageSet:
    parts = [read_cifar(path, shape) for path in paths]
    labels = [label for _, part in parts for label in part]
    names = [f"{path.name}:{i}" for path, (_, part) in zip(paths, parts, strict=True) for i in range(len(part))]
    images = _from_array(name, np.concatenate([pixels for pixels, _ in parts]), labels, class_names)
    return replace(images, name_at=names.__getitem__)


def _places_in(path: Path) -> Callable[[int], str]:
    """Name the images of one file by their positions in it."""
    return partial("{}:{}".format, path.name)


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


def _from_files(name: str, files: Sequence[Path], labels: Sequence[int] | None, folder: Path | None = None) -> ImageSet:
    """folder: what they are named relative to; None: as they were given. `_checked` makes them readable."""
    names = [(file if folder is None else file.relative_to(folder)).as_posix() for file in files]
    count = range(len(files))
    return ImageSet(name, count, labels, _unchecked, count, name_at=names.__getitem__, files=files)


def _unchecked(i: int) -> Pixels:
    raise AssertionError(f"file {i} was not checked")


def _checked(images: ImageSet, files: Sequence[Path], shape: Shape, how: Preparation) -> ImageSet:
    """Refuse files that are missing, or no images that an engine takes; some may be unreadable, if not all are."""
    grey, faults = set[int](), dict[int, Unreadable]()
    for i, file in enumerate(files):
        try:
            if check_image(file, shape, how):
                grey.add(i)
        except Unreadable as fault:
            if isinstance(fault.__cause__, FileNotFoundError):
                raise
            faults[i] = fault
    if len(faults) == len(files):
        raise faults[0]
    return replace(images, read=partial(_read_nth, files, shape, how), grey=frozenset(grey), prepared=how)


def _read_nth(files: Sequence[Path], shape: Shape, how: Preparation, i: int) -> Pixels:
    return read_image(files[i], shape, how)


def _from_folder(folder: Path, shape: Shape, class_names: Sequence[str]) -> ImageSet:
    if (folder / "labels.csv").exists():
        return _from_labels_csv(folder, folder / "labels.csv", class_names)
    entries = sorted(folder.iterdir())
    hidden = [entry for entry in entries if entry.name.startswith(".")]
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    files = [entry for entry in entries if not entry.name.startswith(".") and not entry.is_dir()]
    images = [file for file in files if _is_image(file)]
    cifar = [file for file in files if file.suffix.lower() == ".bin"]
    if folders and (images or cifar):
        what = f"{len(images)} images" if images else f"{len(cifar)} .bin files"
        found = f"{what} and the folders {_listed([f.name for f in folders])}"
        raise UsageError(f"{folder} holds {found}; give class folders alone, images alone, or add a labels.csv")
    taken = set(images or cifar)
    beside = {NO_FORMAT: [file.name for file in files if file not in taken], HIDDEN: [h.name for h in hidden]}
    if images:
        return replace(_from_files(str(folder), images, None, folder), left_out=_left_out(beside))
    if cifar:
        return replace(_from_cifar_folder(folder, cifar, shape, class_names), left_out=_left_out(beside))
    if folders:
        return _from_class_folders(folder, folders, beside, class_names)
    _refuse_files(folder, files)
    raise UsageError(f"{folder} holds no images; give {FORMATS}")


def _from_cifar_folder(folder: Path, files: Sequence[Path], shape: Shape, class_names: Sequence[str]) -> ImageSet:
    """Join the parts of one split, such as data_batch_1.bin to data_batch_5.bin; refuse several splits."""
    if len({re.sub(r"[-_.]?[0-9]+$", "", file.stem.lower()) for file in files}) > 1:
        raise UsageError(f"{folder} holds .bin files of several splits, which are not joined; {_name_one(files)}")
    joined = "" if len(files) == 1 else f" to {files[-1].name}, {len(files)} files joined"
    return _from_cifar(files, f"{folder} ({files[0].name}{joined})", shape, class_names)


def _refuse_files(folder: Path, files: Sequence[Path]) -> None:
    """Raise UsageError where a folder holds files that each are a data set, or pickles."""
    if sets := [file for file in files if file.suffix.lower() == ".npz" or re.search("images[-.]idx3", file.name)]:
        raise UsageError(f"{folder} holds files that are a set of images each; {_name_one(sets)}")
    for file in files:
        with reading(file, "a file"), opened(file, "data set") as start:
            if start.read(1) == PICKLE:
                raise UsageError(
                    f"{folder} holds pickles ({file.name}), which can run any code and are never opened; {UNPICKLED}"
                )


def _name_one(paths: Sequence[Path]) -> str:
    return f"name one: {_listed([str(path) for path in paths])}"


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def _left_out(names: Mapping[str, Sequence[str]]) -> tuple[LeftOut, ...]:
    """names: by the reason why they are left out; a path may be no Unicode."""
    return tuple(
        LeftOut(why, len(those), tuple(map(printable, those[:NAMED]))) for why, those in names.items() if those
    )


def _split_of(name: str) -> str | None:
    """Return the split that a folder's name stands for: test for test, Testing or test2017; None for none."""
    return next((SPLITS[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLITS), None)


def _refuse_splits(where: str, files: Iterable[PurePath], class_names: Sequence[str]) -> None:
    """Raise UsageError where files lie in folders of several splits, which are none of classes (bullet train).

    files: relative to what the user named.
    """
    folders = {part for file in files for part in file.parts[:-1]}
    splits = {part: split for part in sorted(folders) if (split := _split_of(part)) is not None}
    named = [part for part in splits if _known_labels([part], class_names) == [None]]
    if len({splits[part] for part in named}) > 1:
        raise UsageError(
            f"{where} several splits, {_listed(named)}, which are not joined; put one into a folder of its own"
        )


def _from_class_folders(
    folder: Path,
    folders: Sequence[Path],
    beside: Mapping[str, Sequence[str]],
    class_names: Sequence[str],
) -> ImageSet:
    """beside: the names of what lies beside the class folders, by the reason why it is left out."""
    names = [entry.name for entry in folders]
    known = dict(zip(names, _known_labels(names, class_names), strict=True))
    splits = [entry for entry in folders if _split_of(entry.name) is not None]
    if any(known[entry.name] is None or any(inside.is_dir() for inside in entry.iterdir()) for entry in splits):
        raise UsageError(f"{folder} holds splits of a data set, not classes; {_name_one(splits)}")
    labels = _labels_of(names, class_names, f"the folders of {folder}")
    others = defaultdict[str, list[str]](list, {why: list(those) for why, those in beside.items()})
    found: list[tuple[int, Path]] = []
    unread: list[str] = []
    for entry, label in zip(folders, labels, strict=True):
        before = len(found), len(others[NO_FORMAT])
        for file in sorted(entry.rglob("*")):
            name = file.relative_to(folder)
            if file.is_dir():
                if file.is_symlink():
                    others[LINKED].append(str(name))
            elif any(part.startswith(".") for part in name.parts[1:]):
                others[HIDDEN].append(str(name))
            elif _is_image(file):
                found.append((label, file))
            else:
                others[NO_FORMAT].append(str(name))
        if len(found) == before[0]:
            if len(others[NO_FORMAT]) > before[1]:
                unread.append(others[NO_FORMAT][before[1]])
            else:
                others[BARE].append(entry.name)
    if unread:
        raise UsageError(
            f"{plural(len(unread), 'class folder')} of {folder} hold files and none that can be read, such as "
            f"{_listed(unread, NAMED)}; convert them to PNG, or move the folders away"
        )
    if not found:
        raise UsageError(
            f"the class folders of {folder} hold no images (PNG, JPEG, BMP, WEBP, PPM, TIFF); check the path"
        )
    inside = (file.relative_to(folder) for _, file in found)
    _refuse_splits(f"the class folders of {folder} hold", inside, class_names)
    found.sort()
    images = _from_files(str(folder), [file for _, file in found], [label for label, _ in found], folder)
    return replace(images, left_out=_left_out(others))


def _listed_in(table: Path, path: Path | Sequence[Path] | None, class_names: Sequence[str]) -> ImageSet:
    """Return the image files of a folder that a table lists, or the named files with their labels from it."""
    if isinstance(path, Path) and path.is_dir():
        return _from_labels_csv(path, table, class_names)
    if path is None:
        raise UsageError("`labels_csv` labels image files: name them, or their folder with `images`")
    files = [path] if isinstance(path, Path) else path
    labelled = _from_labels_csv(Path(), table, class_names)
    listed = dict(zip(labelled.files or (), labelled.labels or (), strict=True))
    if missing := [file for file in files if Path(file.as_posix()) not in listed]:
        raise UsageError(f"{missing[0]} is not in {table}: list every file that is named, as it is named")
    return _from_files(f"{len(files)} files", files, [listed[file] for file in files])


def _from_labels_csv(folder: Path, table: Path, class_names: Sequence[str]) -> ImageSet:
    with reading(table, "a CSV file"), TextIOWrapper(opened(table, "table"), "utf-8-sig", newline="") as lines:
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
    _refuse_splits(f"{table} lists files of", (file.relative_to(folder) for file in files), class_names)
    distinct = list(dict.fromkeys(values))
    label_of = dict(zip(distinct, _labels_of(distinct, class_names, f"the labels in {table}"), strict=True))
    images = _from_files(str(folder), files, [label_of[value] for value in values], folder)
    return replace(images, left_out=_left_out(_unlisted(folder, {table, *files})))


def _unlisted(folder: Path, listed: set[Path]) -> dict[str, list[str]]:
    """List the files of a folder that its labels.csv does not name, by the reason."""
    others = defaultdict[str, list[str]](list)
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file in listed or (file.is_dir() and not file.is_symlink()):
            continue
        hidden = any(part.startswith(".") for part in name.parts)
        why = HIDDEN if hidden else LINKED if file.is_dir() else UNLISTED if _is_image(file) else NO_FORMAT
        others[why].append(str(name))
    return others


def _labels_of(found: Sequence[str], class_names: Sequence[str], where: str) -> list[int]:
    """The label each name stands for: all are class names, or all are integers; never a guess by sort order."""
    slugs = [_slug(name) for name in class_names]
    labels = _known_labels(found, class_names)
    unknown = [name for name, label in zip(found, labels, strict=True) if label is None]
    if unknown:
        raise UsageError(
            f"{where} are {_listed(found)}, of which the model does not know {_listed(unknown)}; name them all "
            f"by class ({_listed([slug or name for slug, name in zip(slugs, class_names, strict=True)])}) or all by "
            f"number (0..{len(class_names) - 1}); or name the model's classes, one a line, in the file `labels`"
        )
    return [label for label in labels if label is not None]


def _known_labels(found: Sequence[str], class_names: Sequence[str]) -> list[int | None]:
    """Return the label of each name; None where the model does not know it. Both are compared as a sidecar has them."""
    found, class_names = list(map(printable, found)), list(map(printable, class_names))
    exact, by_slug = _unambiguous(class_names), _unambiguous([_slug(name) for name in class_names])
    labels = [exact.get(name, by_slug.get(_slug(name))) for name in found]
    if None in labels and all(re.fullmatch(r"[0-9]{1,9}", name) for name in found):
        labels = [int(name) if int(name) < len(class_names) else None for name in found]
    return labels


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
