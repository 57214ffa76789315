"""Make what is missing in `tests/data/before-the-rooms`, runs of before modules moved: python -m tests.before."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path

from tests.support.cli import ROOT, densepure_rt
from tests.support.legacy import GOOD

KEPT = ROOT / "tests" / "data" / "before-the-rooms"
COMMON = "--n 100 --sigma 0.25 --max 2 --threads 1"
SEEDED = f"{COMMON} --seed 1"
GIVEN = {"noise.key": f"{bytes(range(32)).hex()}\n", "log.tsv": GOOD}  # to the commands
RUNS = {  # the commands that make each
    **{
        f"{method}-{steps}": [
            f"certify --method {method} --steps {steps} --votes {steps} {SEEDED} --out {method}-{steps}"
        ]
        for method in ("fixed", "sequential", "radius")
        for steps in (1, 2)
    },
    "revealed": [
        f"certify --steps 1 --votes 1 {COMMON} --key noise.key --out revealed",
        "reveal revealed",
    ],
    "merged": [
        f"certify --steps 1 --votes 1 {SEEDED} --shard 1/2 --out shard-1",
        f"certify --steps 1 --votes 1 {SEEDED} --shard 2/2 --out shard-2",
        "merge shard-1 shard-2 --out merged",
    ],
    "imported": ["import log.tsv --sigma 0.25 --n 10000 --out imported"],
}


def make(name: str, folder: Path, *options: str) -> None:
    """Make it anew as folder/name, with what it is made of beside it. options: more of the first command."""
    for file, content in GIVEN.items():
        (folder / file).write_text(content)
    first, *others = RUNS[name]
    for command in (" ".join((first, *options)), *others):
        done = densepure_rt(*command.split(), cwd=folder)
        assert done.returncode == 0, done.stderr
    for file in GIVEN:
        (folder / file).unlink()


def said(name: str) -> str:
    """Return what `audit` and `compare` print of a kept run, or a report's table of imported results."""
    if name == "imported":
        with tempfile.TemporaryDirectory() as out:
            assert densepure_rt("report", name, "--also", "md", "--out", f"{out}/page.html", cwd=KEPT).returncode == 0
            return Path(out, "page.md").read_text()
    calls = (("audit", name), ("compare", "fixed-1", name))
    return "".join((done := densepure_rt(*call, cwd=KEPT)).stdout + done.stderr for call in calls)


def main() -> None:
    """Make the missing folders, with what is printed of them."""
    KEPT.mkdir(parents=True, exist_ok=True)
    platform.node, platform.platform = lambda: "a-machine", lambda *_: "Linux"
    for name in [name for name in RUNS if not (KEPT / name).exists()]:
        make(name, KEPT)
        (KEPT / f"{name}.txt").write_text(said(name))


if __name__ == "__main__":
    main()
