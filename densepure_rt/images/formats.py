"""One reader a file format: bytes in, uint8 pixels out, and one clear `UsageError` for anything else.

Nothing is resized, rescaled or guessed: a certificate is about the very pixels that were given. The size that an
image's, an archive's, IDX or CIFAR file's header declares is checked before its pixels are decoded or memory is taken
for them, and nothing is ever unpickled.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from densepure_rt.errors import UsageError
from densepure_rt.files import UnfitFile, check, opened
from densepure_rt.images.changes import AS_IS, Preparation
from densepure_rt.runtime.machine import available_memory
from densepure_rt.runtime.transport import transfer_fault

Pixels = NDArray[np.uint8]
Shape = tuple[int, int, int]  # [C, H, W]

IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
FILE_FORMATS = (*IMAGE_FORMATS, "PPM", "TIFF")  # of files in a data set; uploads are IMAGE_FORMATS alone
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".pnm", ".tif", ".tiff")
GREY_MODES = ("L", "1")  # Pillow's
NETPBM = re.compile(  # the header of binary PGM and PPM, netpbm.sourceforge.net/doc/ppm.html
    rb"P[56]" + 3 * rb"(?:\s|#[^\r\n]*[\r\n])+([0-9]{1,9})" + rb"\s"
)
NETPBM_HEADER = 4096  # bytes, comments included
BITS_PER_SAMPLE, ORIENTATION, EXTRA_SAMPLES, SAMPLE_FORMAT = 258, 274, 338, 339  # TIFF 6.0, section 8
PNG_DEPTH_AT = 24  # byte of the bit depth in IHDR, PNG specification 11.2.2
MOST_SCANS = 100  # of a JPEG, as in libtiff (tif_jpeg.c); libjpeg's own progressive script has 10
# One that begins a segment: not what stands alone inside a scan, ITU-T T.81, B.1.1.3.
JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
JPEG_START, JPEG_END, JPEG_SCAN = b"\xff\xd8", 0xD9, 0xDA
IDX_IMAGES, IDX_LABELS = b"\0\0\x08\x03", b"\0\0\x08\x01"  # uint8 of 3 and of 1 dimensions, yann.lecun.com/exdb/mnist
GZIP = b"\x1f\x8b"
PICKLE = b"\x80"  # PROTO, the first opcode of protocol 2 and later: Lib/pickletools.py
DEFLATE_MAX_RATIO = 1032  # to one, zlib.net/zlib_tech.html
NPZ_RATIOS = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: DEFLATE_MAX_RATIO}  # of savez and savez_compressed
NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
CIFAR_SHAPE = (3, 32, 32)
CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: label, then red, green and blue planes; www.cs.toronto.edu/~kriz/cifar.html
GRID_ATOL = 1e-3  # of value * 255; float32 k / 255, as ToTensor writes it, is within 2e-5


class Unreadable(UsageError):
    """A file of a set cannot be read: it alone has failed, and may be tried again."""


@contextmanager
def reading(path: Path | str, what: str) -> Iterator[None]:
    """Turn any failure to read or decode `path` into one UsageError.

    The net is wide because decoders that are fed damaged bytes raise nearly anything: struct.error, SyntaxError,
    zlib.error, IndexError, RuntimeError.
    """
    try:
        yield
    except UsageError:
        raise
    except FileNotFoundError as error:
        raise Unreadable(f"{path}: no such file or folder; check the path") from error
    except PermissionError as error:
        raise Unreadable(f"{path} may not be read; check its permissions (chmod u+r)") from error
    except UnfitFile as error:
        raise Unreadable(f"{path} cannot be read as {what}: {error.strerror}; give a regular file") from error
    except UnidentifiedImageError as error:
        raise Unreadable(f"{path} is not {', '.join(IMAGE_FORMATS)}; convert it to PNG, or fetch it again") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UsageError(f"{path} cannot be read as {what}: {error}; make it smaller, or leave it out") from error
    except MemoryError as error:
        raise UsageError(f"{path} does not fit in memory; split it, or give the images as a folder") from error
    except Exception as error:
        if fault := transfer_fault(Path(path)):
            raise Unreadable(f"{path} is not {what}: {fault}") from error
        found = str(error) or type(error).__name__
        raise Unreadable(f"{path} cannot be read as {what}: {found}; fetch or write the file again") from error


def require_shape(where: str, found: Shape, expected: Shape) -> None:
    """Refuse an image of another size."""
    if found != expected:
        raise UsageError(
            f"{where} is {size_text(found)}, the engine takes {size_text(expected)} (channels x height x width); "
            "nothing is resized here: bring the images to that size first, have `fit` do so, or use an engine made for "
            "this one"
        )


def size_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def require_few_scans(content: bytes, what: str) -> None:
    """Refuse a JPEG whose scans are so many that it was made to keep its decoder busy: each goes over all its pixels.

    Other content passes. Reads no pixels, in time proportional to the content.
    """
    at, scans = content.startswith(JPEG_START) * len(JPEG_START), 0
    while at and (found := JPEG_MARKER.search(content, at)) and found[1][0] != JPEG_END:
        scans += found[1][0] == JPEG_SCAN
        if scans > MOST_SCANS:
            raise Unreadable(f"{what} has more than {MOST_SCANS} scans, which no camera writes: save it anew")
        at = found.end() + int.from_bytes(content[found.end() : found.end() + 2], "big")


def check_image(path: Path, shape: Shape, how: Preparation = AS_IS) -> bool:
    """Refuse an image file that cannot become uint8 [C, H, W] without loss; reads only its header.

    Returns whether it is grey and becomes three equal channels.
    """
    with reading(path, "an image"), warnings.catch_warnings():
        # Without `fit` the size check below says it better.
        warnings.simplefilter("error" if how.fit else "ignore", Image.DecompressionBombWarning)
        with opened(path, "picture") as file:
            return _open_image(file, path, shape, how).mode in GREY_MODES and shape[0] == 3


def read_image(path: Path, shape: Shape, how: Preparation = AS_IS) -> Pixels:
    """The pixels of an image file, uint8 [C, H, W]."""
    with reading(path, "an image"), opened(path, "picture") as file, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # 90 megapixels
        image = _open_image(file, path, shape, how)
        if image.format in ("JPEG", "MPO"):  # MPO: what Pillow makes of a JPEG that says it has several pictures
            file.seek(0)
            require_few_scans(file.read(), str(path))
        if image.format == "PNG":
            image.verify()  # checksums: loading skips those of the pixel data; then the image must be opened anew
            file.seek(0)
            image = _open_image(file, path, shape, how)
        return _pixels_of(image, str(path), shape, how)


def picture_pixels(picture: Image.Image, shape: Shape) -> Pixels:
    """Return the pixels of a Pillow image, uint8 [C, H, W], as `read_image` does those of a file that holds it."""
    what = "the Pillow image"
    with reading(what, "an image"):  # one of a file is decoded now
        _require_channels(shape)
        require_shape(what, (shape[0], picture.height, picture.width), shape)
        _require_plain(picture, what, shape)
        return _pixels_of(picture, what, shape)


def _pixels_of(image: Image.Image, what: str, shape: Shape, how: Preparation = AS_IS) -> Pixels:
    """Decode an image that `_require_plain` takes, or that is to be converted."""
    channels, height, width = shape
    pixels = np.asarray(how.fitted(how.converted(image, channels), width, height))
    if pixels.ndim == 2 and channels == 3:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.ndim == 3 and channels == 1:
        if (pixels != pixels[..., :1]).any():
            raise UsageError(
                f"{what} is in colour, the engine takes grey; have `convert` make it so, or use a colour engine"
            )
        pixels = pixels[..., 0]
    return np.ascontiguousarray(pixels.reshape(height, width, channels).transpose(2, 0, 1), dtype=np.uint8)


def _open_image(file: IO[bytes], path: Path, shape: Shape, how: Preparation) -> Image.Image:
    """An image whose header promises the right size and a mode that converts without loss; pixels not yet decoded."""
    _require_channels(shape)
    start = file.read(PNG_DEPTH_AT + 1)
    file.seek(0)
    image = Image.open(file, formats=FILE_FORMATS)
    if image.format == "PPM":
        _require_netpbm(file, path)
    if isinstance(image, TiffImageFile):
        _require_plain_tiff(image, path, how.convert)
    if how.fit is None:
        require_shape(str(path), (shape[0], image.height, image.width), shape)
    deep = image.format == "PNG" and start[PNG_DEPTH_AT] == 16  # Pillow would drop the low byte of RGB in silence
    if not how.convert or getattr(image, "n_frames", 1) > 1:
        _require_plain(image, str(path), shape, deep)
    return image


def _require_channels(shape: Shape) -> None:
    if shape[0] not in (1, 3):
        raise UsageError(f"the engine takes {shape[0]} channels, image files hold 1 or 3; give the images as .npz")


def _require_plain(image: Image.Image, what: str, shape: Shape, deep: bool = False) -> None:
    """Refuse an image of a mode that does not convert without loss. deep: of more than 8 bits, whatever its mode."""
    several_pages = getattr(image, "n_frames", 1) > 1
    if image.mode not in (*GREY_MODES, "P", "RGB") or deep or "transparency" in image.info or several_pages:
        kind = ", 16 bits" * deep + ", with transparency" * ("transparency" in image.info)
        several = "several pages" if image.format == "TIFF" else "animated"
        kind += f", {several}" * several_pages
        wanted = "8-bit grey" if shape[0] == 1 else "8-bit RGB"
        raise UsageError(
            f"{what} has pixels of mode {image.mode}{kind}; convert it to {wanted}, or have `convert` do so"
        )


def _require_netpbm(file: IO[bytes], path: Path) -> None:
    """Refuse what is not one binary image of 8 bits: Pillow would scale other depths, and drop what follows."""
    file.seek(0)
    start = file.read(NETPBM_HEADER)
    header = NETPBM.match(start)
    if header is None or int(header[3]) != 255:
        raise UsageError(f"{path} is not binary PGM or PPM (P5, P6) with levels up to 255; convert it to PNG")
    size = file.seek(0, os.SEEK_END) - header.end()
    expected = math.prod((int(header[1]), int(header[2]), 3 if start.startswith(b"P6") else 1))
    if size != expected:
        raise Unreadable(
            f"{path} has {size:,} bytes of pixels, one image of its header has {expected:,}; fetch or write it again"
        )
    file.seek(0)


def _require_plain_tiff(image: TiffImageFile, path: Path, convert: bool = False) -> None:
    """Refuse what Pillow would change in silence: it drops low bytes and extra channels, and turns the image.

    convert: whether low bytes are to be dropped, and transparency may be there.
    """
    tags = image.tag_v2
    bits, formats = (tags.get(tag, (1,)) for tag in (BITS_PER_SAMPLE, SAMPLE_FORMAT))
    what = None
    known = {1} if image.mode == "1" else {8, 16} if convert else {8}
    if set(bits) - known or set(formats) != {1}:
        what = f"holds samples of {max(bits)} bits" + ("" if set(formats) == {1} else ", signed or float")
    elif tags.get(EXTRA_SAMPLES) and not convert:
        what = "holds channels beside its colours"
    elif tags.get(ORIENTATION, 1) != 1:
        what = f"is to be turned (orientation {tags[ORIENTATION]})"
    if what is not None:
        raise UsageError(f"{path} {what}; convert it to an upright image of 8 bits without them, such as a PNG")


def read_npz(path: Path, shape: Shape) -> tuple[Pixels, list[int] | None, list[int] | None]:
    """`x` as [N, C, H, W], `y` and `index` (None where absent) of an .npz file."""
    with reading(path, "an .npz file"), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if any(member.comment for member in archive.infolist()):
            # numpy writes none; a damaged comment length swallows the members that follow, labels among them.
            raise zipfile.BadZipFile("a member has a comment")
        splits = [name for name in names if re.fullmatch("(x|images)_.+", name.lower())]
        if len(splits) > 1:
            raise UsageError(
                f"{path} holds several splits, {', '.join(splits)}, which are not joined; save one of them as x, and "
                "its labels as y, in a file of its own"
            )
        if "x" not in names or not set(names) <= {"x", "y", "index"} or len(set(names)) < len(names):
            # A label array under another name would otherwise be dropped in silence.
            raise UsageError(f"{path} holds {', '.join(names) or 'nothing'}; save it with x and, if known, y and index")
        headers = {name: _member_header(archive, name, path.stat().st_size) for name in names}
        _require_columns(path, headers, shape)
        require_memory(path, sum(header.size for header in headers.values()))
        arrays = {name: _read_member(archive, name) for name in names}
    x = arrays["x"][..., None] if arrays["x"].ndim == 3 else arrays["x"]
    columns = [arrays[name].tolist() if name in arrays else None for name in ("y", "index")]
    return _to_uint8(x, path).transpose(0, 3, 1, 2), columns[0], columns[1]


class MemberHeader(NamedTuple):
    """Hold what the header of an .npy member promises. size: of the array, in bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    size: int


def _member_header(archive: zipfile.ZipFile, name: str, file_size: int) -> MemberHeader:
    """Read no more than the header, and hold its promise against the archive, a file of so many bytes."""
    member = archive.getinfo(f"{name}.npy")
    ratio = NPZ_RATIOS.get(member.compress_type)
    if ratio is None:
        raise ValueError(f"{name} is compressed in a way that numpy does not write")
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in NPY_HEADERS:
            raise ValueError(f"{name} has the header of .npy {version[0]}.{version[1]}, numpy writes 1.0 or 2.0")
        shape, _, dtype = NPY_HEADERS[version](stream)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject:
            raise ValueError(f"Object arrays are pickles, which are never opened: {name} is one")
        if min(shape, default=0) < 0 or stream.tell() + size != member.file_size:
            raise ValueError(f"{name} has {member.file_size:,} bytes, which its header of {size_text(shape)} does not")
    if member.file_size > ratio * min(member.compress_size, file_size):
        raise ValueError(f"{name} promises {member.file_size:,} bytes, more than the file can hold")
    return MemberHeader(shape, dtype, size)


def _require_columns(path: Path, headers: Mapping[str, MemberHeader], shape: Shape) -> None:
    """Refuse arrays that are not images of this shape and a column of integers for each of the others."""
    found = headers["x"].shape
    if len(found) == 3 and shape[0] == 1:
        found = (*found, 1)
    if len(found) != 4:
        raise UsageError(f"x in {path} is {size_text(found)}; save it as images x height x width x channels")
    n, height, width, channels = found
    if (channels, height, width) != shape == found[1:]:
        raise UsageError(
            f"x in {path} is {size_text(found)}, channels first; save it as images x height x width x channels: "
            "x.transpose(0, 2, 3, 1)"
        )
    require_shape(f"an image of {path}", (channels, height, width), shape)
    if headers["x"].dtype != np.uint8 and headers["x"].dtype.kind != "f":
        raise UsageError(f"x in {path} is {headers['x'].dtype}; save it as uint8")
    for name in ("y", "index"):
        column = headers.get(name)
        if column is not None and (column.shape != (n,) or column.dtype.kind not in "iu"):
            raise UsageError(
                f"{name} in {path} is {column.dtype} of shape {column.shape}; x has {n} images: save {name} as {n} "
                "integers"
            )


def _read_member(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with archive.open(f"{name}.npy") as stream:
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        if stream.read(1):  # this also reaches the end of the stream, where zipfile compares the checksum
            raise ValueError(f"{name} is longer than its header says")
    return array


def require_memory(path: Path, size: int) -> None:
    """Refuse, before it is read, what takes more memory than this process can have. size: in bytes."""
    available = available_memory()
    if available is not None and size > available:
        raise UsageError(
            f"{path} holds {size:,} bytes of pixels and labels, and {available:,} bytes of memory are free: split it, "
            "or give the images as a folder"
        )


def _to_uint8(x: NDArray[Any], path: Path) -> Pixels:
    """uint8 as it is; float in [0, 1] only when every value is k / 255, else the engine would see other pixels."""
    if x.dtype == np.uint8:
        return x
    pixels = np.empty(x.shape, np.uint8)
    for i, image in enumerate(x):
        with np.errstate(invalid="ignore", over="ignore"):
            scaled = image.astype(np.float64) * 255
            level = np.rint(scaled)
            on_grid = (np.abs(scaled - level) <= GRID_ATOL) & (level >= 0) & (level <= 255)
        if not on_grid.all():
            raise UsageError(
                f"image {i} of {path} has the value {image[~on_grid][0]}; float images must lie in [0, 1] on the 1/255 "
                "grid (not resized, normalised or noised): save the original pixels as uint8"
            )
        pixels[i] = level
    return pixels


def read_idx(path: Path, shape: Shape) -> tuple[Pixels, list[int] | None]:
    """Images [N, 1, H, W] of an IDX file, gzipped or not, and the labels of the file beside it (None without one)."""
    pixels = _idx_payload(path, IDX_IMAGES, "IDX images", shape)
    with reading(path.parent, "a folder"):
        labels = next((found for found in _idx_label_files(path) if found.exists()), None)
    if labels is None:
        return pixels, None
    return pixels, _idx_payload(labels, IDX_LABELS, "IDX labels", shape, len(pixels)).tolist()


def _idx_label_files(images: Path) -> list[Path]:
    """List where labels may lie: beside the images, under the name the MNIST family gives them, gzipped or not."""
    name = re.sub(r"images([-.])idx3", r"labels\1idx1", images.name).removesuffix(".gz")
    renamed = name != images.name.removesuffix(".gz")
    endings = (".gz", "") if images.suffix == ".gz" else ("", ".gz")
    return [images.with_name(name + ending) for ending in endings] if renamed else []


def _idx_payload(path: Path, magic: bytes, what: str, shape: Shape, items: int | None = None) -> Pixels:
    """Return what an IDX file holds. items: how many there must be, None where any number may be."""
    with reading(path, what), opened(path, "data set") as raw:
        zipped = raw.read(2) == GZIP
        raw.seek(0)
        stream = gzip.GzipFile(fileobj=raw) if zipped else raw
        found = stream.read(4)
        if found != magic:
            hint = "; give the images file, its labels are found beside it" if found == IDX_LABELS else ""
            raise UsageError(f"{path} starts with 0x{found.hex()}, {what} start with 0x{magic.hex()}{hint}")
        header = stream.read(4 * magic[3])  # the last byte of the magic is the number of dimensions
        if len(header) < 4 * magic[3]:
            raise EOFError("the header is cut short")
        n, *size = (int.from_bytes(header[at : at + 4], "big") for at in range(0, len(header), 4))
        if size:
            require_shape(f"an image of {path}", (1, size[0], size[1]), shape)
        if items is not None and n != items:
            raise UsageError(f"there are {items} images and {n} labels in {path}; give one label an image")
        expected = n * math.prod(size)
        if expected > path.stat().st_size * (DEFLATE_MAX_RATIO if zipped else 1):
            raise EOFError(f"the header promises {n} items, more than the file can hold")
        require_memory(path, expected)
        data = stream.read(expected + 1)  # one more: a longer file is refused, and gzip compares its checksum
        if len(data) != expected:
            there = "more" if data[expected:] else len(data)
            raise EOFError(f"the header promises {expected} bytes, there are {there}")
    return np.frombuffer(data, np.uint8).reshape(n, 1, *size) if size else np.frombuffer(data, np.uint8)


def read_cifar(path: Path, shape: Shape) -> tuple[Pixels, list[int]]:
    """Images [N, 3, 32, 32] and labels of a CIFAR-10 binary file."""
    require_shape(f"an image of {path} (CIFAR-10 binary)", CIFAR_SHAPE, shape)
    with reading(path, "CIFAR-10 binary"):
        check(path, "data set")
        size = path.stat().st_size
        if size == 0 or size % CIFAR_RECORD:
            raise EOFError(f"{size} bytes are not a whole number of {CIFAR_RECORD}-byte records")
        require_memory(path, size)
        records = np.fromfile(path, np.uint8).reshape(-1, CIFAR_RECORD)
    return records[:, 1:].reshape(-1, *CIFAR_SHAPE), records[:, 0].tolist()
