"""Run folders with records made to measure: for tests of what is read from runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from densepure_rt.images.datasets import LabelledImage
from densepure_rt.json_files import line, page
from densepure_rt.runs.records import (
    SCHEMA_VERSION,
    ArithmeticIdentity,
    BudgetIdentity,
    Identity,
    ImageRecord,
    ImagesIdentity,
    Manifest,
    NamedFile,
    NoiseIdentity,
    Provenance,
    RuleIdentity,
    TimingRecord,
)
from densepure_rt.runtime.bundle import Accuracy
from densepure_rt.runtime.schedule import Schedule
from densepure_rt.smoothing.certificate import Certificate
from densepure_rt.smoothing.classifier import Certified
from densepure_rt.smoothing.scheduling import Cost

SECRET = bytes(range(32))
OLD_RUN = Path(__file__).resolve().parents[1] / "data" / "run-of-0.1.0"  # certify --max 4 --sigma 0.25 --n 64 --seed 1
N, ALPHA, SIGMA = 200, 0.001, 0.5
FIXED = RuleIdentity("fixed", N, ALPHA, 0.0, "", n0=4)
GRID = (0.0, 0.25, 0.5, 9.0)  # 9: beyond reach
SEQUENTIAL = RuleIdentity("sequential", N, ALPHA, 0.0, "", radii=GRID, reserve=0.25, look=32)


def manifest(secret: bytes | None = None, **changed: object) -> Manifest:
    """Of a run of four images."""
    one, rule = NamedFile("a.onnx", "a" * 64, None), RuleIdentity("fixed", 20, 0.001, 0.0, "", n0=4)
    given: dict[str, Any] = {
        "engine": one,
        "classifier": one,
        "precision": "fp32",
        "runs_on": "onnxruntime CPU",
        "compute_capability": None,
        "processor": "one",
        "schedule": Schedule("linear", 1000),
        "variance": "fixed_small",
        "prediction": "epsilon",
        "clip": None,
        "class_names": tuple("0123456789"),
        "image": (1, 2, 2),
        "images": ImagesIdentity(4, "b" * 64),
        "sigma": 0.5,
        "sigma_in_network_units": 1.0,
        "steps": 1,
        "timestep_rule": "nearest",
        "timesteps": (258,),
        "conditioning": (258.0,),
        "coefficients": (),
        "alpha_bar": 0.5,
        "votes": 1,
        "tie_rule": "the label seen first",
        "rule": rule,
        "budget_seconds": BudgetIdentity(None, None),
        "noise": NoiseIdentity("law", "c" * 64, "d" * 64),
        "secret_commitment": hashlib.sha256(secret or b"").hexdigest(),
        "public_seed": None if secret else 1,
        "arithmetic": ArithmeticIdentity("f" * 64),
    }
    identity = Identity(**(given | changed))
    provenance = Provenance((), {}, "now", "here", "four", "3", "Linux", {}, {}, None)
    return Manifest(SCHEMA_VERSION, identity.sha256, identity, provenance)


def result(
    idx: int = 0, label: int | None = 3, predict: int | None = 3, radius: float | None = 0.25, seconds: float = 1.5
) -> Certified:
    certificate = Certificate(predict, radius, n0=4, n=20, n_a=19, alpha=0.001, p_lower=0.6)
    return Certified(LabelledImage(idx, np.zeros((1, 2, 2), np.uint8), label), certificate, Cost(0, 7, 5, 0, seconds))


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
