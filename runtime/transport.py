"""What a transfer can leave in place of a file: a pointer of Git LFS, a web page, nothing at all."""

from __future__ import annotations

import re
from pathlib import Path

from densepure_rt.files import opened

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # git-lfs, docs/spec.md: the first line of every pointer
HEAD = 1024  # bytes; a pointer is shorter


def transfer_fault(path: Path) -> str | None:
    """Say what a transfer left at `path` instead of the file, with the next move, as the end of a message.

    None for a file that looks like any other, and for one that cannot be read.
    """
    try:
        with opened(path, "data set") as file:
            head = file.read(HEAD)
    except OSError:
        return None
    if not head:
        return "it is empty: download or copy it again"
    if head.startswith(LFS_POINTER):
        size = re.search(rb"^size (\d{1,15})$", head, re.MULTILINE)
        of = f" to {int(size[1]):,} bytes" if size else ""
        return f'it is a pointer of Git LFS{of}, not the file itself: run "git lfs pull" where it was cloned'
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:15].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "it is a web page, an error or a login instead of the file: download the file itself"
    return None
