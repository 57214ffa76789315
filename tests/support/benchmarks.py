"""What benchmarks in the tests were run on, and how they look to a person."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeVar

from rich.console import Console

from densepure_rt.export.compare.engine_run import Subject
from densepure_rt.export.compare.machine import Machine

T = TypeVar("T")
SUBJECT = Subject(
    engine="engines/unet.onnx",
    engine_sha256="0123456789abcdef" * 4,
    classifier_sha256="f" * 64,
    precision="fp32",
    image=(1, 28, 28),
    device={"provider": "onnxruntime CPU", "batch": 32},
)
MACHINE = Machine("Some Processor 9000", 4, None, {"torch": "2.13.0"})


def printed(show: Callable[[T, Console], None], found: T) -> str:
    """What `show` prints of `found` on a terminal of 80 columns."""
    file = io.StringIO()
    show(found, Console(file=file, width=80, highlight=False, markup=False, soft_wrap=True))
    return file.getvalue()
