"""`densepure-rt certify` to its end, or killed on its way."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.cli import densepure_rt, started


class Run(NamedTuple):
    """A finished `densepure-rt certify`: what it printed and the folder it left."""

    done: subprocess.CompletedProcess[str]
    out: Path

    @property
    def rows(self) -> list[dict[str, str]]:
        """results.tsv as pandas.read_csv(delimiter="\\t") of locuslab/smoothing reads it."""
        with (self.out / "results.tsv").open(newline="") as lines:
            return list(csv.DictReader(lines, delimiter="\t"))

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "results.jsonl").read_text().splitlines()]

    @property
    def manifest(self) -> dict[str, Any]:
        read: dict[str, Any] = json.loads((self.out / "manifest.json").read_text())
        return read


def certify(out: Path, *options: object) -> Run:
    return Run(densepure_rt("certify", *options, "--out", out), out)


def wait_for(condition: Callable[[], bool], running: subprocess.Popen[str], seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)


def kill_at_a_random_moment(*options: object, out: Path, chance: random.Random) -> None:
    """Start a run and kill it: as it starts, or within moments of its next image."""

    def lines() -> int:
        table = out / "results.tsv"
        return table.read_text().count("\n") if table.exists() else 1

    before = lines()
    with started("certify", *options, "--out", out) as running:
        if chance.random() < 0.3:
            with suppress(subprocess.TimeoutExpired):
                running.wait(0.4 + 0.8 * chance.random())  # a start takes about a second
        else:
            wait_for(lambda: lines() > before or running.poll() is not None, running)  # a fast machine may be done
            time.sleep(0.15 * chance.random())  # an image takes about 0.1 s
        running.kill()
