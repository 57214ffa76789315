"""What stands where a file should be, after a transfer that did not end in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.images.datasets import open_images
from densepure_rt.runtime.bundle import verified_bytes
from densepure_rt.runtime.transport import transfer_fault

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 12345678\n"
LEFT = {
    "pointer": (POINTER, r'a pointer of Git LFS to 12,345,678 bytes, not the file itself: run "git lfs pull"'),
    "page": (b"\n<!DOCTYPE html><html><title>Sign in</title></html>", "is a web page"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page, an error or a login"),
    "nothing": (b"", "it is empty: download or copy it again"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_a_transfer_left_is_told(tmp_path: Path, case: str) -> None:
    content, said = LEFT[case]
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    assert said in (transfer_fault(path) or "")


def test_a_file_like_any_other_is_no_fault(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    assert transfer_fault(tmp_path / "a.npz") is None
    assert transfer_fault(tmp_path / "nowhere") is None
    assert transfer_fault(tmp_path) is None


@pytest.mark.parametrize("case", LEFT)
def test_an_engine_and_images_that_are_none_are_told_from_damaged_ones(tmp_path: Path, case: str) -> None:
    content, said = LEFT[case]
    for name in ("unet.onnx", "images.npz"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckFailed, match=said):
        verified_bytes(tmp_path / "unet.onnx", "a" * 64)
    with pytest.raises(UsageError, match=said):
        open_images(tmp_path / "images.npz", (1, 28, 28), ("a", "b"))
