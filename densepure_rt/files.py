"""Opening files that somebody else may have written: regular ones alone, no larger than their kind can be.

A pipe may never answer, a device may never end. What is refused is an OSError, as a file that cannot be read is, so
that each caller says in its own words what the file was wanted for.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

Kind = Literal[
    "key",
    "sidecar",
    "run file",
    "results file",
    "ledger",
    "config file",
    "table",
    "picture",
    "data set",
    "model",
    "log",
    "array",
]
KIB, MIB, GIB = 2**10, 2**20, 2**30
MOST_BYTES: dict[Kind, int] = {
    "key": 64 * KIB,  # 64 hexadecimal digits, or some more
    "sidecar": 64 * MIB,  # JSON; class names are most of it
    "run file": 64 * MIB,  # manifest, summary, seal
    "results file": 4 * GIB,  # a line an image, of about 1 KiB
    "ledger": 256 * GIB,  # read page by page
    "config file": MIB,
    "table": 512 * MIB,  # labels.csv; that of ImageNet has 50 MiB
    "picture": GIB,  # one of a data set; its size in pixels is judged by its header
    "data set": 256 * GIB,  # .npz, IDX, .bin: judged by their headers before they are read
    "model": 64 * GIB,  # engines, weights, checkpoints
    "log": 64 * MIB,  # of older tools; 50,000 images of ImageNet take 3 MiB
    "array": 128 * MIB,  # 16 million labels of 8 bytes; published runs have 100,000
}
LONGEST_LINE = 16 * MIB  # of a results file; one with a hundred radii takes 12 KiB
OTHERS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


class UnfitFile(OSError):
    """A file of a wrong type or size; `strerror` says which."""


def check(path: Path, kind: Kind, found: os.stat_result | None = None) -> None:
    """Refuse what is no regular file, and one that is too large to be of this kind. Nothing is opened.

    Raises:
        UnfitFile: That is so.
        OSError: There is no such file, or it cannot be reached.
    """
    try:
        found = os.stat(path) if found is None else found
    except ValueError:  # a null byte, or what no encoding has
        raise UnfitFile(errno.EINVAL, "no file can have this name", str(path)) from None
    if not stat.S_ISREG(found.st_mode):
        what = next((name for is_such, name in OTHERS if is_such(found.st_mode)), "something else")
        raise UnfitFile(errno.EINVAL, f"it is {what}, not a regular file", str(path))
    if found.st_size > MOST_BYTES[kind]:
        raise UnfitFile(errno.EFBIG, f"it has {found.st_size:,} bytes, more than any {kind}", str(path))


def opened(path: Path, kind: Kind) -> BinaryIO:
    """Open a regular file of a kind for reading, without waiting for anybody. Raises as `check` does."""
    check(path, kind)  # before it is opened: some devices act on that alone
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    try:
        check(path, kind, os.fstat(file.fileno()))  # what was opened, should the name mean another file by now
    except OSError:
        file.close()
        raise
    return file


def content(path: Path, kind: Kind) -> bytes:
    """Read a file's bytes. Raises as `check` does, also where the file grows beyond the limit while it is read."""
    with opened(path, kind) as file:
        found = file.read(os.fstat(file.fileno()).st_size)
        grown = bytearray()
        while chunk := file.read(MIB):
            grown += chunk
            if len(found) + len(grown) > MOST_BYTES[kind]:
                raise UnfitFile(errno.EFBIG, f"it has more bytes than any {kind}", str(path))
    return found + grown if grown else found


def lines(path: Path, kind: Kind) -> Iterator[bytes]:
    """Yield a file's lines without their ends; a last one that does not end is left out.

    One is held at a time: a sparse file of gigabytes costs no more than LONGEST_LINE. Raises as `content` does, and
    UnfitFile where a line is longer.
    """
    size = 0
    with opened(path, kind) as file:
        while (line := file.readline(LONGEST_LINE + 1)).endswith(b"\n"):
            if (size := size + len(line)) > MOST_BYTES[kind]:
                raise UnfitFile(errno.EFBIG, f"it has more bytes than any {kind}", str(path))
            yield line[:-1]
    if len(line) > LONGEST_LINE:
        raise UnfitFile(errno.EFBIG, f"it has a line of more than {LONGEST_LINE:,} bytes", str(path))


def text(path: Path, kind: Kind) -> str:
    """Read a file as text in UTF-8. Raises as `content` does, and UnicodeDecodeError when it is none."""
    return content(path, kind).decode("utf-8")


def sha256_of(path: Path, kind: Kind) -> str:
    """Hash a file, in hexadecimal digits, without holding it in memory. Raises as `check` does."""
    digest = hashlib.sha256()
    with opened(path, kind) as file:
        while chunk := file.read(MIB):
            digest.update(chunk)
    return digest.hexdigest()
