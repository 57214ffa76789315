"""The shipped engines, and copies of them to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

from densepure_rt.runtime.bundle import shipped_engine

ENGINES = shipped_engine().parent


def engines_copied(folder: Path) -> Path:
    """The step engine of a copy in `folder`, with its classifier and their sidecars."""
    folder.mkdir(exist_ok=True)
    for file in ENGINES.glob("*.onnx*"):
        shutil.copy(file, folder)
    return folder / "unet.onnx"
