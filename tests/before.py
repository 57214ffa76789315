"""Make the runs in `tests/data/before-the-rooms`, of before modules moved: python -m tests.before."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

from tests.support.cli import ROOT, densepure_rt

KEPT = ROOT / "tests" / "data" / "before-the-rooms"
COMMON = "--n 100 --sigma 0.25 --max 2 --seed 1 --threads 1".split()
RUNS = {
    f"{method}-{steps}": ["--method", method, "--steps", str(steps), "--votes", votes, *COMMON]
    for method in ("fixed", "sequential", "radius")
    for steps, votes in ((1, "1"), (2, "2"))
}


def certify(name: str, folder: Path) -> None:
    """Run it anew into folder/name."""
    done = densepure_rt("certify", *RUNS[name], "--out", name, cwd=folder)
    assert done.returncode == 0, done.stderr


def said(name: str) -> str:
    """Return what `audit` and `compare` print of a kept run."""
    calls = (("audit", name), ("compare", "fixed-1", name))
    return "".join((done := densepure_rt(*call, cwd=KEPT)).stdout + done.stderr for call in calls)


def main() -> None:
    """Make all folders, with what is printed of them."""
    shutil.rmtree(KEPT, ignore_errors=True)
    KEPT.mkdir(parents=True)
    platform.node, platform.platform = lambda: "a-machine", lambda *_: "Linux"
    for name in RUNS:
        certify(name, KEPT)
    for name in RUNS:
        (KEPT / f"{name}.txt").write_text(said(name))


if __name__ == "__main__":
    main()
