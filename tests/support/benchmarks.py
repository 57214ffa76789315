"""What a benchmark was made on, and what is printed of one."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, TypeVar

from rich.console import Console

T = TypeVar("T")
MADE_ON: dict[str, Any] = {
    "engine": "engines/unet.onnx",
    "engine_sha256": "0123456789abcdef" * 4,
    "classifier_sha256": "f" * 64,
    "precision": "fp32",
    "image": (1, 28, 28),
    "device": {"provider": "onnxruntime CPU", "batch": 32},
    "batch": 32,
    "processor": "Some Processor 9000",
    "cores": 4,
    "gpu": None,
    "versions": {"torch": "2.13.0"},
}


def printed(print_one: Callable[[T, Console], None], found: T) -> str:
    """On a terminal of 80 columns."""
    file = io.TextIOWrapper(io.BytesIO(), "utf-8")
    print_one(found, Console(file=file, width=80, highlight=False, markup=False, soft_wrap=True))
    file.seek(0)
    return file.read()
