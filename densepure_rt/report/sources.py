"""Read runs and imported results alike."""

from __future__ import annotations

import os
from pathlib import Path

from densepure_rt.errors import UsageError
from densepure_rt.legacy.folder import ORIGIN, ImportedRun, read_imported
from densepure_rt.runs.layout import MANIFEST
from densepure_rt.runs.reader import Run, read_run


def read_results(path: Path) -> Run | ImportedRun:
    """The run or the imported results in a folder. Raises UsageError when it holds neither; else as `read_run`."""
    if os.path.exists(path / MANIFEST):
        return read_run(path)
    if os.path.exists(path / ORIGIN):
        return read_imported(path)
    raise UsageError(f"{path} holds no run and no imported results: there is no {MANIFEST} and no {ORIGIN} in it")
