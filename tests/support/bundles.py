"""Bundles in folders of their own."""

from __future__ import annotations

import shutil
from pathlib import Path

from densepure_rt.runtime.bundle import Sidecar, shipped_engine, sidecar_path, to_json


def copy_shipped(folder: Path) -> None:
    """Copy the shipped engines with their sidecars."""
    for name in ("unet.onnx", "classifier.onnx"):
        for file in (shipped_engine().with_name(name), sidecar_path(shipped_engine().with_name(name))):
            shutil.copy(file, folder / file.name)


def write_sidecars(folder: Path, *sidecars: Sidecar) -> None:
    for sidecar in sidecars:
        sidecar_path(folder / sidecar.file.name).write_text(to_json(sidecar))
