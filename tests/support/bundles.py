"""The shipped engines, and copies of them to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

from densepure_rt.runtime.bundle import Sidecar, shipped_engine, sidecar_path, to_json

ENGINES = shipped_engine().parent


def engines_copied(folder: Path) -> Path:
    """The step engine of a copy in `folder`, with its classifier and their sidecars."""
    folder.mkdir(exist_ok=True)
    for file in ENGINES.glob("*.onnx*"):
        shutil.copy(file, folder)
    return folder / "unet.onnx"


def write_sidecars(folder: Path, *sidecars: Sidecar) -> None:
    for sidecar in sidecars:
        sidecar_path(folder / sidecar.file.name).write_text(to_json(sidecar))
