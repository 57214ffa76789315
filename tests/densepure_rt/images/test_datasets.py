from __future__ import annotations

import gzip
import io
import math
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from densepure_rt.errors import UsageError
from densepure_rt.images.datasets import ImageSet, open_images
from densepure_rt.runtime import machine
from densepure_rt.text import printable

ROOT = Path(__file__).resolve().parents[3]
GREY, COLOUR = (1, 6, 5), (3, 6, 5)
CLASSES = ("T-shirt/top", "Trouser", "Ankle boot")
TEN = tuple(f"class {i}" for i in range(10))
RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
DRAWING = RNG.integers(0, 256, (4, 6, 5), dtype=np.uint8)


def save(path: Path, pixels: NDArray[Any] | Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path)
    return path


def read_all(path: Path | None, shape: tuple[int, int, int] = GREY, classes: tuple[str, ...] = CLASSES) -> ImageSet:
    """Open and read every image once, so that what is wrong with any of them comes out."""
    images = open_images(path, shape, classes)
    for image in images:
        assert image.pixels.shape == shape
        assert image.pixels.dtype == np.uint8
        assert image.label is None or 0 <= image.label < len(classes)
    return images


def labels(images: ImageSet) -> list[int | None]:
    return [image.label for image in images]


def stack(images: ImageSet) -> NDArray[np.uint8]:
    return np.stack([image.pixels for image in images])


def npz_bytes(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def npz(folder: Path, **arrays: Any) -> Path:
    path = folder / "images.npz"
    path.write_bytes(npz_bytes(**arrays))
    return path


def idx_bytes(array: NDArray[np.uint8], *dims: int) -> bytes:
    declared = dims or array.shape
    return bytes([0, 0, 8, len(declared)]) + np.array(declared, ">u4").tobytes() + array.tobytes()


def cifar_bytes(n: int = 2) -> bytes:
    planes = np.arange(n * 3072, dtype=np.int64).reshape(n, 3072) % 251
    return np.concatenate([np.arange(n)[:, None], planes], axis=1).astype(np.uint8).tobytes()


def png_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(DRAWING[0]).save(buffer, "PNG")
    return buffer.getvalue()


# What ships


def test_shipped_test_images_are_every_twentieth_of_the_test_split() -> None:
    images = read_all(None, (1, 28, 28), TEN)
    assert len(images) == 500
    assert images.labelled
    assert "Fashion-MNIST" in images.name
    assert [image.idx for image in images] == list(range(0, 10_000, 20))
    counts = np.bincount([image.label for image in images if image.label is not None], minlength=10)
    assert counts.min() >= 30
    assert counts.max() <= 75
    assert 60 < stack(images).mean() < 85  # Fashion-MNIST's mean is 0.286 * 255 = 73


def test_shipped_calibration_images_are_spread_over_the_training_split() -> None:
    folder = Path(__file__).parents[3] / "densepure_rt" / "data"
    images = read_all(folder / "fashion_mnist_calibration.npz", (1, 28, 28), TEN)
    assert [image.idx for image in images] == [468 * i for i in range(128)]
    assert set(labels(images)) == set(range(10))
    assert "2017 Zalando SE" in (folder / "FASHION_MNIST_LICENSE.txt").read_text()


def test_shipped_images_are_refused_for_an_engine_of_another_size() -> None:
    with pytest.raises(UsageError, match=r"1x28x28, the engine takes 3x32x32; name .* `images`"):
        open_images(None, (3, 32, 32), TEN)


# Sets


def test_skip_and_limit_select_by_position_and_count(tmp_path: Path) -> None:
    x = np.repeat(DRAWING, 3, axis=0)
    images = open_images(npz(tmp_path, x=x, index=np.arange(12) * 10), GREY, CLASSES)
    assert [image.idx for image in images.select(5)] == [0, 50, 100]
    assert [image.idx for image in images.select(5, 2)] == [0, 50]
    assert [image.idx for image in images.select(2).select(2, 99)] == [0, 40, 80]
    assert len(images.select(limit=7)) == 7
    for skip, limit in [(0, None), (1, 0), (-1, 3)]:
        with pytest.raises(UsageError, match="1 or more"):
            images.select(skip, limit)


def test_images_are_named_by_their_files_and_by_their_positions_in_a_file_of_several(tmp_path: Path) -> None:
    for file in ("flat/b.png", "flat/\u00e4 a.png", "classes/trouser/deep/x.png", "classes/ankle-boot/x.png"):
        save(tmp_path / file, DRAWING[0])
    save(tmp_path / "listed/in/x.png", DRAWING[0])
    (tmp_path / "listed/labels.csv").write_text("file,label\nin/x.png,1\n")
    (tmp_path / "parts").mkdir()
    for part in (1, 2):
        (tmp_path / f"parts/data_batch_{part}.bin").write_bytes(cifar_bytes())
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(DRAWING))
    npz(tmp_path, x=DRAWING, index=np.arange(4) * 10)

    def names(path: Path | None, shape: tuple[int, int, int] = GREY) -> list[str | None]:
        images = open_images(path, shape, TEN if path is None or shape[0] == 3 else CLASSES)
        found = images.select(2)
        assert list(found.names.items()) == [(image.idx, image.name) for image in found]
        return [image.name for image in images]

    assert names(tmp_path / "flat") == ["b.png", "\u00e4 a.png"]
    assert names(tmp_path / "flat" / "b.png") == ["b.png"]
    assert names(tmp_path / "classes") == ["trouser/deep/x.png", "ankle-boot/x.png"]
    assert names(tmp_path / "listed") == ["in/x.png"]
    assert names(tmp_path / "images.npz") == [f"images.npz:{i}" for i in range(4)]
    assert names(tmp_path / "t10k-images-idx3-ubyte") == [f"t10k-images-idx3-ubyte:{i}" for i in range(4)]
    joined = [f"data_batch_{part}.bin:{i}" for part in (1, 2) for i in (0, 1)]
    assert names(tmp_path / "parts", (3, 32, 32)) == joined
    assert names(None, (1, 28, 28))[:2] == ["fashion_mnist_test.npz:0", "fashion_mnist_test.npz:1"]


def test_hash_covers_pixels_labels_indices_and_order(tmp_path: Path) -> None:
    def hashed(**arrays: Any) -> str:
        return open_images(npz(tmp_path, **arrays), GREY, CLASSES).sha256()

    other = DRAWING.copy()
    other[3, 5, 4] ^= 1
    y = np.array([0, 1, 2, 0])
    variants = [
        {"x": DRAWING},
        {"x": DRAWING, "y": y},
        {"x": other, "y": y},
        {"x": DRAWING, "y": y[::-1]},
        {"x": DRAWING[::-1], "y": y},
        {"x": DRAWING, "y": y, "index": y * 0 + np.arange(1, 5)},
    ]
    assert len({hashed(**variant) for variant in variants}) == len(variants)
    assert hashed(x=DRAWING, y=y) == hashed(x=DRAWING[..., None], y=y.astype(np.uint8))


def test_the_same_images_hash_alike_from_a_folder_and_from_npz(tmp_path: Path) -> None:
    for i, drawing in enumerate(DRAWING):
        save(tmp_path / "flat" / f"{i}.png", drawing)
    folder = read_all(tmp_path / "flat")
    assert folder.sha256() == read_all(npz(tmp_path, x=DRAWING)).sha256()
    assert not folder.labelled


# Folders


def test_class_folders_are_matched_by_name_not_by_sort_order(tmp_path: Path) -> None:
    for name in ("ankle-boot", "T-Shirt-Top", "Trouser"):
        save(tmp_path / name / "b.png", DRAWING[1])
        save(tmp_path / name / "deep" / "a.bmp", DRAWING[2])
    (tmp_path / "README.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    images = read_all(tmp_path)
    assert labels(images) == [0, 0, 1, 1, 2, 2]
    assert images.labelled
    assert [image.idx for image in images] == list(range(6))
    assert (stack(images)[0, 0] == DRAWING[1]).all()


def test_a_class_name_with_a_control_of_direction_is_known_by_folder_and_by_table(tmp_path: Path) -> None:
    """A sidecar's class names are made printable when it is read; names of folders come as they are."""
    name = "\u200f\u05d0"
    classes = (printable(name), "b")
    for label, folder in enumerate((name, "b")):
        save(tmp_path / folder / "x.png", DRAWING[label])
    assert labels(read_all(tmp_path, classes=classes)) == [0, 1]
    (tmp_path / "labels.csv").write_text(f"file,label\nb/x.png,{name}\n", encoding="utf-8")
    assert labels(read_all(tmp_path, classes=classes)) == [0]


def test_class_folders_may_be_numbers(tmp_path: Path) -> None:
    for name in ("10", "2", "007"):
        save(tmp_path / name / "a.png", DRAWING[0])
    assert labels(read_all(tmp_path, classes=tuple(f"c{i}" for i in range(11)))) == [2, 7, 10]


@pytest.mark.parametrize("names", [("Trouser", "Boots"), ("0", "3"), ("0", "Trouser"), ("n01440764",)])
def test_unknown_class_folders_are_listed(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        save(tmp_path / name / "a.png", DRAWING[0])
    with pytest.raises(UsageError, match=r"does not know .*t-shirt-top, trouser, ankle-boot.*0\.\.2") as caught:
        open_images(tmp_path, GREY, CLASSES)
    assert all(name in str(caught.value) for name in names)


def test_a_class_name_that_occurs_twice_is_not_guessed(tmp_path: Path) -> None:
    save(tmp_path / "crane" / "a.png", DRAWING[0])
    with pytest.raises(UsageError, match="crane"):
        open_images(tmp_path, GREY, ("crane", "dog", "crane"))


def test_labels_csv_gives_names_or_numbers(tmp_path: Path) -> None:
    save(tmp_path / "a.png", DRAWING[0])
    save(tmp_path / "sub" / "b, c.png", DRAWING[1])
    table = tmp_path / "labels.csv"
    table.write_text('file,label\r\n"sub/b, c.png",Ankle boot\r\n\r\na.png,T-shirt/top\r\n', encoding="utf-8-sig")
    images = read_all(tmp_path)
    assert labels(images) == [2, 0]
    assert (stack(images)[:, 0] == DRAWING[[1, 0]]).all()
    table.write_text("file,label\na.png,2\n")
    assert labels(read_all(tmp_path)) == [2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line must be file,label"),
        ("name,class\na.png,1\n", "first line must be file,label"),
        ("file,label\n", "lists no image"),
        ("file,label\na.png\n", "line 2 .* 1 fields"),
        ("file,label\n../a.png,1\n", r"relative to it and without"),
        ("file,label\n/etc/passwd,1\n", r"relative to it and without"),
        ("file,label\n,1\n", r"relative to it and without"),
        ("file,label\nb.png,1\n", "b.png: no such file"),
        ("file,label\na.png,3\n", "does not know 3"),
        ("file,label\na.png,-1\n", "does not know -1"),
        ("file,label\na.png,\n", "does not know"),
        ('file,label\n"a.png,1\n', "cannot be read as a CSV file"),
        ("file,label\nlabels.csv,1\n", "is not PNG"),
        ("file,label\na\0.png,1\n", "no file can have this name|NUL"),  # Python 3.10 reads no such line
    ],
)
def test_bad_labels_csv_is_refused(tmp_path: Path, text: str, message: str) -> None:
    save(tmp_path / "a.png", DRAWING[0])
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UsageError, match=message):
        open_images(tmp_path, GREY, CLASSES)


def test_links_that_lead_in_circles_are_followed_by_nothing(tmp_path: Path) -> None:
    """A folder that holds itself is left out; a picture that is itself is one error."""
    classes = tmp_path / "classes"
    save(classes / "trouser" / "a.png", DRAWING[0])
    (classes / "trouser" / "again").symlink_to(classes, target_is_directory=True)
    images = read_all(classes)
    assert (labels(images), [left.count for left in images.left_out]) == ([1], [1])
    (classes / "trouser" / "b.png").symlink_to(classes / "trouser" / "b.png")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (classes / "labels.csv").write_text("file,label\ntrouser/b.png,1\n")
    for path in (classes, classes / "trouser" / "b.png", tmp_path / "circle"):
        with pytest.raises(UsageError):
            open_images(path, GREY, CLASSES)


def test_folders_that_say_nothing_clear_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no images; give a folder of class folders"):
        open_images(tmp_path, GREY, CLASSES)
    (tmp_path / "Trouser").mkdir()
    with pytest.raises(UsageError, match="hold no images"):
        open_images(tmp_path, GREY, CLASSES)
    save(tmp_path / "a.png", DRAWING[0])
    with pytest.raises(UsageError, match=r"1 images and the folders Trouser; .* labels\.csv"):
        open_images(tmp_path, GREY, CLASSES)


def test_images_are_decoded_only_when_reached(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", DRAWING[i])
    images = iter(open_images(tmp_path, GREY, CLASSES))
    next(images)
    (tmp_path / "1.png").unlink()
    with pytest.raises(UsageError, match="1.png: no such file"):
        next(images)


# Splits


CIFAR = (3, 32, 32)


def refusal(path: Path, shape: tuple[int, int, int] = GREY, classes: tuple[str, ...] = CLASSES) -> str:
    with pytest.raises(UsageError) as refused:
        open_images(path, shape, classes)
    return str(refused.value)


def test_training_and_test_files_of_cifar_are_not_joined(tmp_path: Path) -> None:
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for label, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes([label]) + bytes(3072))
    (tmp_path / "readme.html").write_text("CIFAR-10")
    said = refusal(tmp_path, CIFAR, TEN)
    assert "several splits" in said
    assert f"name one: {', '.join(str(tmp_path / name) for name in names)}" in said
    assert labels(read_all(tmp_path / "test_batch.bin", CIFAR, TEN)) == [5]
    (tmp_path / "test_batch.bin").unlink()
    parts = read_all(tmp_path, CIFAR, TEN)
    assert labels(parts) == [0, 1, 2, 3, 4]
    assert "data_batch_1.bin to data_batch_5.bin, 5 files joined" in parts.name
    assert [(part.why, part.count, part.first) for part in parts.left_out] == [
        ("no images by their names", 1, ("readme.html",))
    ]


@pytest.mark.parametrize("names", [("train.bin", "test.bin"), ("train_1.bin", "test_1.bin"), ("a.bin", "b.bin")])
def test_binary_files_of_other_names_are_not_joined_either(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(cifar_bytes())
    assert all(str(tmp_path / name) in refusal(tmp_path, CIFAR, TEN) for name in names)


def test_folders_of_splits_are_named_instead_of_joined(tmp_path: Path) -> None:
    for split in ("train", "val2017", "Test"):
        for name in ("trouser", "ankle-boot"):
            save(tmp_path / "outside" / split / name / "a.png", DRAWING[0])
            save(tmp_path / "inside" / name / split / "a.png", DRAWING[0])
    folder = tmp_path / "outside"
    assert f"name one: {folder / 'Test'}, {folder / 'train'}, {folder / 'val2017'}" in refusal(folder)
    assert f"name one: {folder / 'Test'}" in refusal(folder, classes=("train", "test", "val2017"))
    assert labels(read_all(folder / "train")) == [1, 2]
    assert "several splits, Test, train, val2017" in refusal(tmp_path / "inside")
    table = folder / "labels.csv"
    table.write_text("file,label\ntrain/trouser/a.png,1\nTest/trouser/a.png,1\n")
    assert "several splits, Test, train" in refusal(folder)
    table.write_text("file,label\nTest/trouser/a.png,1\nTest/ankle-boot/a.png,2\n")
    assert labels(read_all(folder)) == [1, 2]


def test_a_class_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    classes = ("bullet train", "test tube")
    for name in ("bullet train", "test tube"):
        save(tmp_path / name / "a.png", DRAWING[0])
    assert labels(read_all(tmp_path, classes=classes)) == [0, 1]
    (tmp_path / "labels.csv").write_text("file,label\nbullet train/a.png,0\ntest tube/a.png,1\n")
    assert labels(read_all(tmp_path, classes=classes)) == [0, 1]


def test_a_folder_of_whole_sets_names_them(tmp_path: Path) -> None:
    for split in ("train", "t10k"):
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(idx_bytes(DRAWING))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(4, np.uint8)))
    said = refusal(tmp_path)
    assert said.endswith(f"name one: {tmp_path / 't10k-images-idx3-ubyte'}, {tmp_path / 'train-images-idx3-ubyte'}")
    assert labels(read_all(tmp_path / "t10k-images-idx3-ubyte")) == [0] * 4
    (tmp_path / "sub").mkdir()
    assert str(npz(tmp_path / "sub", x=DRAWING)) in refusal(tmp_path / "sub")


def test_a_pickle_is_never_opened_and_the_binary_version_is_named(tmp_path: Path) -> None:
    class Opened:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "opened"),)

    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "py").mkdir(exist_ok=True)
        (tmp_path / "py" / "test_batch").write_bytes(pickle.dumps(Opened(), protocol))
        for path in (tmp_path / "py", tmp_path / "py" / "test_batch"):
            assert "cifar-10-binary.tar.gz" in refusal(path, CIFAR, TEN)
    assert not (tmp_path / "opened").exists()


# What is left out


def test_what_is_no_image_of_a_folder_is_counted_with_its_reason_and_first_names(tmp_path: Path) -> None:
    save(tmp_path / "trouser" / "a.png", DRAWING[0])
    for name in ("1.gif", "2.gif", "3.gif", "4.gif", ".x.png", ".cache/y.png"):
        (tmp_path / "trouser" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "trouser" / name).write_bytes(b"")
    (tmp_path / ".DS_Store").write_bytes(b"")
    (tmp_path / "README.txt").write_text("")
    (tmp_path / "ankle-boot").mkdir()
    (tmp_path / "trouser" / "more").symlink_to(tmp_path / "ankle-boot", target_is_directory=True)
    images = read_all(tmp_path)
    assert labels(images) == [1]
    assert {part.why: (part.count, part.first) for part in images.left_out} == {
        "no images by their names": (5, ("README.txt", "trouser/1.gif", "trouser/2.gif")),
        "hidden": (3, (".DS_Store", "trouser/.cache/y.png", "trouser/.x.png")),
        "links to folders": (1, ("trouser/more",)),
        "class folders without an image": (1, ("ankle-boot",)),
    }
    assert str(images.left_out[0]) == "no images by their names: 5 (README.txt, trouser/1.gif, trouser/2.gif, ...)"
    assert images.select(limit=1).left_out == images.left_out


def test_a_class_of_which_nothing_can_be_read_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "trouser" / "a.png", DRAWING[0])
    (tmp_path / "ankle-boot").mkdir()
    (tmp_path / "ankle-boot" / "a.jp2").write_bytes(b"")
    assert "1 class folder of" in refusal(tmp_path)
    assert "ankle-boot/a.jp2" in refusal(tmp_path)


def test_images_that_labels_csv_does_not_list_are_counted(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "sub/c.png"):
        save(tmp_path / name, DRAWING[0])
    (tmp_path / "sub" / "notes").write_text("")
    (tmp_path / "labels.csv").write_text("file,label\na.png,1\n")
    assert {part.why: part.first for part in read_all(tmp_path).left_out} == {
        "images that labels.csv does not list": ("b.png", "sub/c.png"),
        "no images by their names": ("sub/notes",),
    }


def test_a_folder_of_images_alone_leaves_nothing_out(tmp_path: Path) -> None:
    save(tmp_path / "a.png", DRAWING[0])
    assert read_all(tmp_path).left_out == ()


# Image files


def test_grey_images_are_repeated_for_an_engine_of_colour_and_counted(tmp_path: Path) -> None:
    """Equal channels are the same picture; what is counted is of the images that are taken."""
    for i, picture in enumerate((PHOTO, DRAWING[0], DRAWING[1], DRAWING[2] > 127)):
        save(tmp_path / f"{i}.png", picture)
    images = read_all(tmp_path, COLOUR)
    pixels = stack(images)
    assert images.repeated == 3
    for i, expected in ((1, DRAWING[0]), (2, DRAWING[1]), (3, (DRAWING[2] > 127) * 255)):
        assert (pixels[i] == expected).all()
    assert (pixels[0] == PHOTO.transpose(2, 0, 1)).all()
    assert [images.select(2).repeated, images.select(limit=1).repeated] == [1, 0]
    assert read_all(save(tmp_path / "grey" / "a.png", DRAWING[0])).repeated == 0  # of a grey engine


def test_netpbm_and_tiff_are_read_to_the_level(tmp_path: Path) -> None:
    """PPM is written by hand, with a comment, as the format says; the others by Pillow."""
    ppm = tmp_path / "a.ppm"
    ppm.write_bytes(b"P6\n# made\n5 6\n255\n" + PHOTO.tobytes())
    assert (stack(read_all(ppm, COLOUR))[0] == PHOTO.transpose(2, 0, 1)).all()
    pgm = tmp_path / "a.pnm"
    pgm.write_bytes(b"P5 5 6 255\n" + DRAWING[0].tobytes())
    assert (stack(read_all(pgm))[0, 0] == DRAWING[0]).all()
    assert (stack(read_all(save(tmp_path / "b.pgm", DRAWING[1])))[0, 0] == DRAWING[1]).all()
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        for name, picture, shape in (("c.tif", PHOTO, COLOUR), ("d.TIFF", DRAWING[2], GREY)):
            Image.fromarray(picture).save(tmp_path / name, "TIFF", compression=compression)
            expected = picture.reshape(6, 5, -1).transpose(2, 0, 1)
            assert (stack(read_all(tmp_path / name, shape))[0] == expected).all()


def test_what_pillow_would_change_of_netpbm_and_tiff_is_refused(tmp_path: Path) -> None:
    def written(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    def tiff(name: str, picture: Image.Image, **options: Any) -> Path:
        picture.save(tmp_path / name, "TIFF", **options)
        return tmp_path / name

    photo = Image.fromarray(PHOTO)
    alpha = Image.fromarray(np.concatenate([PHOTO, PHOTO[..., :1]], axis=2))
    cases = [
        (written("few.ppm", b"P6 5 6 15\n" + bytes(90)), COLOUR, "levels up to 255"),
        (written("deep.ppm", b"P6 5 6 65535\n" + bytes(180)), COLOUR, "levels up to 255"),
        (written("plain.pgm", b"P2 5 6 255\n" + b"7 " * 30), GREY, "not binary"),
        (written("two.ppm", b"P6 5 6 255\n" + bytes(180)), COLOUR, "180 bytes of pixels, one image .* has 90"),
        (written("short.ppm", b"P6 5 6 255\n" + bytes(89)), COLOUR, "89 bytes of pixels"),
        (written("pixels.ppm", b"P6 6 5 255\n" + bytes(90)), COLOUR, "is 3x5x6, the engine takes 3x6x5"),
        (tiff("pages.tif", photo, save_all=True, append_images=[photo]), COLOUR, "several pages"),
        (tiff("wide.tif", Image.fromarray(DRAWING[0].astype(np.uint16))), GREY, "16 bits"),
        (tiff("real.tif", Image.fromarray(DRAWING[0].astype(np.float32))), GREY, "32 bits, signed or float"),
        (tiff("alpha.tif", alpha), COLOUR, "channels beside its colours"),
        (tiff("turned.tif", photo, tiffinfo={274: 6}), COLOUR, "orientation 6"),
        (tiff("inks.tif", alpha.convert("CMYK")), COLOUR, "mode CMYK"),
        (written("none.tif", b"II*\0" + bytes(20)), COLOUR, "none.tif"),
        (written("deep.tif", deep_rgb_tiff()), COLOUR, "16 bits"),
    ]
    for path, shape, message in cases:
        with pytest.raises(UsageError, match=message):
            open_images(path, shape, CLASSES)


def deep_rgb_tiff() -> bytes:
    """5 x 6 pixels of 3 x 16 bits, by the TIFF 6.0 specification: Pillow writes none, and reads their high bytes."""
    pixels = 180
    bits_at, strip_at = 8 + 2 + 9 * 12 + 4, 8 + 2 + 9 * 12 + 4 + 6
    tags = [(256, 3, 1, 5), (257, 3, 1, 6), (258, 3, 3, bits_at), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, strip_at)]
    tags += [(277, 3, 1, 3), (278, 3, 1, 6), (279, 4, 1, pixels)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    return head + struct.pack("<3H", 16, 16, 16) + bytes(range(pixels))


def test_lossless_conversions_are_made(tmp_path: Path) -> None:
    grey_as_rgb = np.repeat(DRAWING[0][..., None], 3, axis=2)
    assert (stack(read_all(save(tmp_path / "rgb.png", grey_as_rgb)))[0, 0] == DRAWING[0]).all()
    bits = DRAWING[0] > 127
    assert (stack(read_all(save(tmp_path / "bits.png", bits)))[0, 0] == bits * 255).all()
    palette = Image.fromarray(PHOTO).quantize(256)
    expected = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    assert (stack(read_all(save(tmp_path / "palette.png", palette), COLOUR))[0] == expected).all()
    for name in ("photo.png", "photo.bmp"):
        assert (stack(read_all(save(tmp_path / name, PHOTO), COLOUR))[0] == PHOTO.transpose(2, 0, 1)).all()
    assert len(read_all(save(tmp_path / "photo.jpg", PHOTO), COLOUR)) == 1


def test_lossy_conversions_are_refused(tmp_path: Path) -> None:
    alpha = np.concatenate([PHOTO, PHOTO[..., :1]], axis=2)
    deep = tmp_path / "deep.png"
    deep.write_bytes(deep_rgb_png())
    clear = tmp_path / "clear.png"
    Image.fromarray(PHOTO).quantize(256).save(clear, transparency=0)
    moving = tmp_path / "moving.png"
    Image.fromarray(PHOTO).save(moving, save_all=True, append_images=[Image.fromarray(PHOTO[::-1])])
    cases = [
        (save(tmp_path / "photo.png", PHOTO), GREY, "in colour"),
        (save(tmp_path / "alpha.png", alpha), COLOUR, "mode RGBA"),
        (save(tmp_path / "wide.png", DRAWING[0].astype(np.uint16) * 257), GREY, "mode I;16"),
        (save(tmp_path / "cmyk.jpg", Image.fromarray(alpha, "CMYK")), COLOUR, "mode CMYK"),
        (deep, COLOUR, "16 bits"),
        (clear, COLOUR, "with transparency"),
        (moving, COLOUR, "animated"),
        (save(tmp_path / "rgb.png", PHOTO), (4, 6, 5), "image files hold 1 or 3; give the images as .npz"),
    ]
    for path, shape, message in cases:
        with pytest.raises(UsageError, match=message):
            read_all(path, shape)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, colour, 0, 0, 0])
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def deep_rgb_png() -> bytes:
    return png(5, 6, 16, 2, (b"\0" + bytes(range(30))) * 6)


def test_another_size_is_refused_from_the_header_alone(tmp_path: Path) -> None:
    save(tmp_path / "a.png", DRAWING[0])
    bomb = tmp_path / "b.png"
    for side in (10_000, 60_000):  # Pillow warns at the first size and raises at the second
        bomb.write_bytes(png(side, side, 8, 0, b""))
        with pytest.raises(UsageError, match=r"b\.png"):
            open_images(tmp_path, GREY, CLASSES)
    bomb.write_bytes(png(6, 5, 8, 0, b""))
    with pytest.raises(UsageError, match=r"b\.png is 1x5x6, the engine takes 1x6x5 .* nothing is resized"):
        open_images(tmp_path, GREY, CLASSES)


# .npz


def test_npz_holds_images_labels_and_indices(tmp_path: Path) -> None:
    x = np.stack([PHOTO, PHOTO[::-1]])
    images = read_all(npz(tmp_path, x=x, y=np.array([2, 0], np.int32), index=np.array([9, 4])), COLOUR)
    assert labels(images) == [2, 0]
    assert [image.idx for image in images] == [9, 4]
    assert (stack(images) == x.transpose(0, 3, 1, 2)).all()
    assert not read_all(npz(tmp_path, x=np.asfortranarray(x)), COLOUR).labelled


def test_float_images_are_accepted_only_on_the_grid(tmp_path: Path) -> None:
    as_tensor = DRAWING.astype(np.float32) / np.float32(255)
    for x in (as_tensor, as_tensor.astype(np.float64), DRAWING / 255):
        assert (stack(read_all(npz(tmp_path, x=x)))[:, 0] == DRAWING).all()
    for value in (0.5001, 1.0 + 1 / 255, -1 / 255, 7.25, float("nan"), float("inf")):
        off = as_tensor.copy()
        off[2, 1, 1] = value
        with pytest.raises(UsageError, match=rf"image 2 of .*npz has the value {str(value)[:5]}.*1/255"):
            open_images(npz(tmp_path, x=off), GREY, CLASSES)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": DRAWING}, "holds images; save it with x"),
        ({"x": DRAWING, "labels": [0, 1, 2, 0]}, "holds x, labels; save it with x"),
        ({"x": DRAWING[0]}, "x in .* is 6x5; save it as"),
        ({"x": DRAWING[:, None]}, r"is 4x1x6x5, channels first; .*x\.transpose\(0, 2, 3, 1\)"),
        ({"x": DRAWING[:, :5]}, r"is 1x5x5, the engine takes 1x6x5"),
        ({"x_train": DRAWING, "y_train": [0], "x_test": DRAWING}, "several splits, x_train, x_test, .*save one"),
        ({"x": DRAWING[:0]}, "holds no image"),
        ({"x": DRAWING.astype(np.int64)}, "is int64; save it as uint8"),
        ({"x": DRAWING.astype(object)}, "cannot be read as an .npz file: Object arrays"),
        ({"x": DRAWING, "y": [0, 1, 2]}, "save y as 4 integers"),
        ({"x": DRAWING, "y": [0.0, 1.0, 2.0, 0.0]}, "save y as 4 integers"),
        ({"x": DRAWING, "y": [0, 1, 2, 3]}, r"image 3 of .* has label 3, the model knows 0\.\.2"),
        ({"x": DRAWING, "y": [0, 1, -1, 2]}, "image 2 of .* has label -1"),
        ({"x": DRAWING, "index": [0, 1, 1, 2]}, "repeated"),
        ({"x": DRAWING, "index": [0, 1, -1, 2]}, "negative"),
        ({"x": DRAWING, "index": np.array([0, 1, 2**63, 2], np.uint64)}, "huge"),
    ],
)
def test_bad_npz_is_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_images(npz(tmp_path, **arrays), GREY, CLASSES)


# IDX and CIFAR-10


@pytest.mark.parametrize(
    ("images_name", "labels_name"),
    [
        ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
        ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
        ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"),
        ("t10k-images.idx3-ubyte", "t10k-labels.idx1-ubyte"),
    ],
)
def test_idx_labels_are_found_beside_the_images(tmp_path: Path, images_name: str, labels_name: str) -> None:
    def write(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return tmp_path / name

    path = write(images_name, idx_bytes(DRAWING))
    assert not read_all(path).labelled
    write(labels_name, idx_bytes(np.array([2, 1, 0, 2], np.uint8)))
    images = read_all(path)
    assert labels(images) == [2, 1, 0, 2]
    assert (stack(images)[:, 0] == DRAWING).all()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"starts with 0x, IDX images start with 0x00000803"),
        (idx_bytes(DRAWING)[:10], "header is cut short"),
        (idx_bytes(DRAWING)[:-1], "promises 120 bytes, there are 119"),
        (idx_bytes(DRAWING) + b"\0", "promises 120 bytes, there are more"),
        (idx_bytes(DRAWING, 2**32 - 1, 6, 5), "more than the file can hold"),
        (idx_bytes(DRAWING, 4, 2**32 - 1, 2**32 - 1), "is 1x4294967295x4294967295"),
        (idx_bytes(DRAWING[:0], 0, 6, 5), "holds no image"),
        (idx_bytes(np.zeros(4, np.uint8)), "starts with 0x00000801.*give the images file"),
        (b"\0\0\x0d\x03" + idx_bytes(DRAWING)[4:], "starts with 0x00000d03"),
    ],
)
def test_bad_idx_is_refused(tmp_path: Path, data: bytes, message: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "images-idx3-ubyte"
    path.write_bytes(pack(data))
    with pytest.raises(UsageError, match=message):
        open_images(path, GREY, CLASSES)


def test_bad_idx_labels_are_refused(tmp_path: Path) -> None:
    path, beside = tmp_path / "images-idx3-ubyte", tmp_path / "labels-idx1-ubyte"
    path.write_bytes(idx_bytes(DRAWING))
    for data, message in [
        (idx_bytes(np.zeros(3, np.uint8)), "4 images and 3 labels"),
        (idx_bytes(np.full(4, 3, np.uint8)), "label 3, the model knows"),
        (idx_bytes(DRAWING), "labels-idx1-ubyte starts with 0x00000803"),
        (idx_bytes(np.zeros(4, np.uint8))[:-2], "labels-idx1-ubyte cannot be read as IDX labels"),
    ]:
        beside.write_bytes(data)
        with pytest.raises(UsageError, match=message):
            open_images(path, GREY, CLASSES)


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "images-idx3-ubyte.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(idx_bytes(DRAWING))
        for _ in range(64):
            file.write(bytes(2**20))
    with pytest.raises(UsageError, match="promises 120 bytes, there are more"):
        open_images(path, GREY, CLASSES)


def test_cifar_binary_is_read_alone_or_from_a_folder(tmp_path: Path) -> None:
    shape = (3, 32, 32)
    for name in ("data_batch_2.bin", "data_batch_1.bin"):
        (tmp_path / name).write_bytes(cifar_bytes(2 if "2" in name else 1))
    (tmp_path / "batches.meta.txt").write_text("airplane")
    images = read_all(tmp_path / "data_batch_2.bin", shape, TEN)
    assert labels(images) == [0, 1]
    first = next(iter(images)).pixels
    assert first[0, 0, 1] == 1
    assert first[0, 1, 0] == 32
    assert first[1, 0, 0] == 1024 % 251
    together = read_all(tmp_path, shape, TEN)
    assert labels(together) == [0, 0, 1]
    assert [image.idx for image in together] == [0, 1, 2]


def test_bad_cifar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test_batch.bin"
    for data, shape, message in [
        (b"", (3, 32, 32), "it is empty: download or copy it again"),
        (cifar_bytes()[:-1], (3, 32, 32), "whole number of 3073-byte records"),
        (b"\x0a" + cifar_bytes()[1:], (3, 32, 32), "label 10"),
        (cifar_bytes(), GREY, r"3x32x32, the engine takes 1x6x5"),
    ]:
        path.write_bytes(data)
        with pytest.raises(UsageError, match=message):
            open_images(path, shape, TEN)


# Paths


def test_paths_that_cannot_be_read_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder; check the path"):
        open_images(tmp_path / "nowhere", GREY, CLASSES)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UsageError, match="none of the formats that can be read; give a folder"):
        open_images(tmp_path / "notes.txt", GREY, CLASSES)
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UsageError, match="no such file"):
        open_images(tmp_path, GREY, CLASSES)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_missing_permission_is_a_usage_error(tmp_path: Path) -> None:
    path = save(tmp_path / "sub" / "a.png", DRAWING[0])
    for locked in (path, path.parent):
        locked.chmod(0)
        with pytest.raises(UsageError, match="may not be read; check its permissions"):
            open_images(path, GREY, CLASSES)
        locked.chmod(0o700)


def test_missing_permission_is_said_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(named: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(named))

    path = save(tmp_path / "a.png", DRAWING[0])
    for owner, verb in ((os, "open"), (Path, "is_dir")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, verb, refuse)
            with pytest.raises(UsageError, match="may not be read; check its permissions"):
                open_images(path, GREY, CLASSES)


# Memory: what is refused is refused by its header, before it is unpacked.

UNPACKED = 200 * 2**20  # bytes of each
GROWS = 16 * 2**20  # bytes at most
MEASURED = """
import re, sys
from pathlib import Path
from densepure_rt.images.datasets import open_images
from densepure_rt.errors import UsageError


def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])


before = peak()
try:
    open_images(Path(sys.argv[1]), (1, 6, 5), ["a", "b", "c"])
except UsageError as error:
    print(peak() - before, error)
"""


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def bomb(path: Path, members: dict[str, tuple[str, tuple[int, ...]]], method: int = zipfile.ZIP_DEFLATED) -> Path:
    """An .npz of zeros, written piece by piece. members: dtype and shape of each."""
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as archive:
        for name, (dtype, shape) in members.items():
            with archive.open(f"{name}.npy", "w") as member:
                member.write(npy_header(dtype, shape))
                left = math.prod(shape) * np.dtype(dtype).itemsize
                while left:
                    left -= member.write(bytes(min(left, 2**20)))
    return path


def wide_images(folder: Path) -> Path:
    return bomb(folder / "a.npz", {"x": ("|u1", (UNPACKED // 2**20, 1024, 1024))})


def wide_float_images(folder: Path) -> Path:
    return bomb(folder / "a.npz", {"x": ("<f4", (UNPACKED // 2**22, 1024, 1024))})


def too_many_labels(folder: Path) -> Path:
    return bomb(folder / "a.npz", {"x": ("|u1", (4, 6, 5)), "y": ("<i8", (UNPACKED // 8,))})


def too_many_idx_labels(folder: Path) -> Path:
    (folder / "images-idx3-ubyte").write_bytes(idx_bytes(DRAWING))
    with gzip.open(folder / "labels-idx1-ubyte.gz", "wb", 1) as labels:
        labels.write(idx_bytes(np.empty(0, np.uint8), UNPACKED))
        for _ in range(UNPACKED // 2**20):
            labels.write(bytes(2**20))
    return folder / "images-idx3-ubyte"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (wide_images, "is 1x1024x1024, the engine takes 1x6x5"),
        (wide_float_images, "is 1x1024x1024, the engine takes 1x6x5"),
        (too_many_labels, "save y as 4 integers"),
        (too_many_idx_labels, "4 images and 209715200 labels"),
    ],
)
def test_what_has_another_size_is_refused_before_it_takes_memory(
    tmp_path: Path, write: Callable[[Path], Path], message: str
) -> None:
    path = write(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2**21
    done = subprocess.run([sys.executable, "-c", MEASURED, path], capture_output=True, text=True, cwd=ROOT)
    grown, said = done.stdout.split(maxsplit=1)
    assert message in said
    assert int(grown) < GROWS


@pytest.mark.parametrize(
    ("dtype", "shape", "data", "message"),
    [
        ("|u1", (5, 6, 5), DRAWING.tobytes(), "which its header of 5x6x5 does not"),
        ("|u1", (3, 6, 5), DRAWING.tobytes(), "which its header of 3x6x5 does not"),
        ("|u1", (10**12, 6, 5), DRAWING.tobytes(), "which its header of 1000000000000x6x5 does not"),
        ("|u1", (-4, -6, 5), DRAWING.tobytes(), "which its header of -4x-6x5 does not"),
        ("|O", (4, 6, 5), DRAWING.tobytes(), "Object arrays are pickles"),
        ("|V1", (4, 6, 5), DRAWING.tobytes(), "save it as uint8"),
    ],
)
def test_an_npz_is_held_to_its_header(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], data: bytes, message: str
) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", npy_header(dtype, shape) + data)
    with pytest.raises(UsageError, match=message):
        open_images(path, GREY, CLASSES)


def test_an_npz_that_numpy_does_not_write_is_refused(tmp_path: Path) -> None:
    """Other compressions pack zeros tens of thousands to one."""
    with pytest.raises(UsageError, match="compressed in a way that numpy does not write"):
        open_images(bomb(tmp_path / "a.npz", {"x": ("|u1", (4, 6, 5))}, zipfile.ZIP_BZIP2), GREY, CLASSES)


def test_images_that_do_not_fit_into_the_free_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = tmp_path / "meminfo"
    monkeypatch.setattr(machine, "MEMINFO", free)
    many = np.zeros((50_000, 6, 5), np.uint8)
    (tmp_path / "images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(many)))
    (tmp_path / "test_batch.bin").write_bytes(bytes(3073 * 400))
    sets = {npz(tmp_path, x=many): GREY, tmp_path / "test_batch.bin": (3, 32, 32)}
    sets[tmp_path / "images-idx3-ubyte.gz"] = GREY
    for path, shape in sets.items():
        free.write_text("MemAvailable:    1000 kB\n")
        with pytest.raises(UsageError, match="1,024,000 bytes of memory are free: split it"):
            open_images(path, shape, TEN)
        free.write_text("MemAvailable:    3000 kB\n")
        open_images(path, shape, TEN)


# Damage: for formats with checksums every read that succeeds is the right one; IDX and CIFAR-10 have none, so there a
# flipped pixel cannot be told from a true one, and only shape and labels are held to.

X_NPZ = npz_bytes(x=DRAWING, y=np.array([0, 1, 2, 0]), index=np.arange(4))
FILES: dict[str, tuple[bytes, tuple[int, int, int], bool]] = {
    "images-idx3-ubyte": (idx_bytes(DRAWING), GREY, False),
    "images-idx3-ubyte.gz": (gzip.compress(idx_bytes(DRAWING), mtime=0), GREY, True),
    "images.npz": (X_NPZ, GREY, True),
    "test_batch.bin": (cifar_bytes(), (3, 32, 32), False),
    "image.png": (png_bytes(), GREY, True),
}


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(cut=st.floats(0, 1), flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), max_size=3))
@example(cut=0.0, flips=[])
@example(cut=1.0, flips=[])
def test_damaged_files_give_a_usage_error_or_the_right_images(
    name: str, cut: float, flips: list[tuple[float, int]]
) -> None:
    data, shape, checked = FILES[name]
    damaged = bytearray(data)
    for where, bit in flips:
        damaged[int(where * len(data))] ^= 1 << bit
    with tempfile.TemporaryDirectory() as folder:
        sound, path = Path(folder, "sound", name), Path(folder, name)
        sound.parent.mkdir()
        sound.write_bytes(data)
        path.write_bytes(damaged[: round(cut * len(data))])
        expected = read_all(sound, shape, TEN).sha256()
        with suppress(UsageError):
            images = read_all(path, shape, TEN)
            assert not checked or images.sha256() == expected


@pytest.mark.parametrize("name", [name for name, (_, _, checked) in FILES.items() if checked])
def test_no_single_flipped_bit_changes_what_is_read(tmp_path: Path, name: str) -> None:
    data, shape, _ = FILES[name]
    path = tmp_path / name
    path.write_bytes(data)
    expected = read_all(path, shape, TEN).sha256()
    for bit in range(0, 8 * len(data), 5):  # coprime to 8: every byte, and all bit positions
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with suppress(UsageError):
            assert read_all(path, shape, TEN).sha256() == expected


def test_one_file_that_cannot_be_read_has_failed_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b", "c", "d"):
        save(tmp_path / f"{name}.png", DRAWING[0])
    (tmp_path / "b.png").write_bytes(b"no picture")
    content = (tmp_path / "c.png").read_bytes()
    (tmp_path / "c.png").write_bytes(content[:-20])  # whose header is whole
    images = open_images(tmp_path, GREY, CLASSES)
    first = images.sha256()
    assert [image.name for image in images.readable()] == ["a.png", "d.png"]
    assert sorted(images.unreadable) == [1, 2]
    assert "b.png is not PNG" in images.unreadable[1]
    assert [record.message for record in caplog.records if "has failed" in record.message][0].startswith("image 1 ")
    with pytest.raises(UsageError, match=r"b\.png"):
        list(images)
    save(tmp_path / "b.png", DRAWING[0])
    (tmp_path / "c.png").write_bytes(content)
    again = open_images(tmp_path, GREY, CLASSES)
    assert again.sha256() != first
    assert again.hashed_as([1, 2]).sha256() == first
    assert len(list(again.readable())) == 4
    assert not again.unreadable


def test_labels_of_files_come_from_a_table_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        save(tmp_path / f"{name}.png", DRAWING[0])
    (tmp_path / "mine.csv").write_text("file,label\nb.png,1\na.png,0\n")
    images = open_images(tmp_path, GREY, CLASSES, labels_csv=tmp_path / "mine.csv")
    assert [(image.name, image.label) for image in images] == [("b.png", 1), ("a.png", 0)]
    monkeypatch.chdir(tmp_path)
    images = open_images([Path("a.png")], GREY, CLASSES, labels_csv=Path("mine.csv"))
    assert [(image.name, image.label) for image in images] == [("a.png", 0)]
    save(tmp_path / "c.png", DRAWING[0])
    with pytest.raises(UsageError, match=r"c\.png is not in mine\.csv"):
        open_images([Path("c.png")], GREY, CLASSES, labels_csv=Path("mine.csv"))
    with pytest.raises(UsageError, match="name them"):
        open_images(None, GREY, CLASSES, labels_csv=Path("mine.csv"))
    with pytest.raises(UsageError, match="is a folder"):
        open_images([tmp_path, Path("c.png")], GREY, CLASSES)
