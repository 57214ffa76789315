"""Run folders with records made to measure: for tests of what is read from runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from densepure_rt.json_files import line, page
from densepure_rt.runs.records import ImageRecord, ImagesIdentity, Provenance, RuleIdentity, TimingRecord
from densepure_rt.runtime.bundle import Accuracy
from tests.densepure_rt.runs.test_folder import manifest

N, ALPHA, SIGMA = 200, 0.001, 0.5
FIXED = RuleIdentity("fixed", N, ALPHA, 0.0, "", n0=4)
GRID = (0.0, 0.25, 0.5, 9.0)  # 9: beyond reach
SEQUENTIAL = RuleIdentity("sequential", N, ALPHA, 0.0, "", radii=GRID, reserve=0.25, look=32)


class Made(NamedTuple):
    """An image's outcome. radius: None for an abstention."""

    radius: float | None
    label: int | None = 3
    predict: int = 3
    pixels: str | None = None  # what names them; None: those of the image's place
    samples: int = 64
    stopped: bool = False


def record_of(idx: int, made: Made) -> ImageRecord:
    name = str(idx) if made.pixels is None else made.pixels
    predict = None if made.radius is None else made.predict
    return ImageRecord(
        idx=idx,
        image_sha256=hashlib.sha256(name.encode()).hexdigest(),
        label=made.label,
        predict=predict,
        radius=made.radius,
        correct=None if made.label is None else predict == made.label,
        n0=0,
        n=made.samples,
        n_a=made.samples // 2,
        alpha=ALPHA,
        p_lower=0.5,
        stopped=made.stopped,
    )


def make_run(
    path: Path,
    done: Sequence[Made],
    asked: int | None = None,
    rule: RuleIdentity = FIXED,
    argv: tuple[str, ...] = (),
    parity: Accuracy | None = None,
    **identity: Any,
) -> Path:
    """The folder of a run that has `done` images, numbered from 0, of `asked`."""
    path.mkdir(parents=True)
    count = ImagesIdentity(len(done) if asked is None else asked, "b" * 64)
    of = manifest(None, **({"images": count, "rule": rule, "sigma": SIGMA} | identity))
    provenance: Provenance = replace(of.provenance, argv=argv, parity=parity)
    (path / "manifest.json").write_text(page(replace(of, provenance=provenance)))
    records = "".join(line(record_of(idx, made)) for idx, made in enumerate(done))
    timings = "".join(line(TimingRecord(idx, made.samples, 10, 20, 1, 0.5)) for idx, made in enumerate(done))
    (path / "results.jsonl").write_text(records)
    (path / "timing.jsonl").write_text(timings)
    return path
