"""Results of other programs, made to measure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from densepure_rt.legacy.claims import Imported, import_log
from densepure_rt.legacy.logs import read_log

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
GOOD = HEADER + "0\t3\t3\t0.5\t1\t0:00:01.5\n20\t4\t-1\t0.0\t0\t1.5\n40\t5\t5\t0.731\t1\t1.5\n"
DDS = GOOD.replace("0.0\t0\t", "0.0\t1\t").replace("0.731\t1\t", "0.731\t2\t")
RADII = (0.0, 0.5)


def label_arrays(folder: Path) -> Path:
    """What the authors' code leaves of three images: an array of labels for each of three seeds."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    for idx in (0, 20, 40):
        for part, n in (("n0", 20), ("n", 400)):
            noise = rng.uniform(size=n)
            for seed in range(3):
                labels = np.where(noise + 0.1 * rng.uniform(size=n) < 0.9, 5, 2)
                np.save(folder / f"0.5-{idx}-{seed}-{part}_predictions.npy", labels)
    return folder


def log_imported(path: Path, text: str = DDS, sigma: float | None = None, n: int | None = None) -> Imported:
    path.write_text(text)
    return import_log(read_log(path), sigma, n, 0.001, RADII)


def edited(change: Callable[[dict[str, object]], object], kept: Path) -> None:
    origin = json.loads((kept / "imported.json").read_text())
    change(origin)
    (kept / "imported.json").write_text(json.dumps(origin))
