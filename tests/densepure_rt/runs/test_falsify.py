from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from densepure_rt.errors import UsageError
from densepure_rt.images.datasets import ImageSet, LabelledImage, open_images
from densepure_rt.keys import seeded_secret
from densepure_rt.runs import falsify as falsify_run
from densepure_rt.runs.audit import audit
from densepure_rt.runs.certify import RunRequest, certify_images
from densepure_rt.runs.falsifier import Falsification
from densepure_rt.runs.falsify import EACH, attacked, certificate_of_record, check_share
from densepure_rt.runs.layout import record_of
from densepure_rt.runs.records import ImageRecord, TimingRecord
from densepure_rt.smoothing.certificate import Certificate
from densepure_rt.smoothing.classifier import load
from densepure_rt.smoothing.settings import Settings

SETTINGS = Settings(sigma=0.1, steps=0, n=400, alpha=0.01, radii=(0.0, 0.05))


def done(radius: float | None, samples: int, idx: int) -> tuple[ImageRecord, TimingRecord]:
    certificate = Certificate(3, radius, 0, samples, samples, 0.001, 0.6)
    return record_of(idx, "a" * 64, 3, certificate), TimingRecord(idx, samples, 0, 0, 0, 0.0)


@given(
    st.lists(st.tuples(st.none() | st.sampled_from([0.0, 0.25]), st.integers(1, 10_000)), max_size=40),
    st.floats(0.001, 1),
)
def test_attacks_take_no_more_than_their_share_and_lie_evenly(
    images: list[tuple[float | None, int]], share: float
) -> None:
    every = [done(radius, samples, idx) for idx, (radius, samples) in enumerate(images)]
    chosen = attacked(every, share)
    with_radius = [idx for idx, (radius, _) in enumerate(images) if radius]
    assert len(chosen) * EACH <= share * sum(samples for _, samples in images)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(with_radius)
    if chosen:
        gaps = np.diff([with_radius.index(idx) for idx in chosen])
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_a_certificate_is_what_its_record_says() -> None:
    certificate = Certificate(3, 0.25, 0, 64, 64, 0.001, 0.84)
    assert certificate_of_record(record_of(1, "a" * 64, 3, certificate)) == certificate


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match="`falsify` is a share"):
        check_share(share)


@pytest.fixture
def images() -> ImageSet:
    return open_images(None, (1, 28, 28), [str(label) for label in range(10)]).select(10, 25)


def broken(
    classifier: Any, image: LabelledImage, certificate: Certificate, *_: Any
) -> tuple[Falsification, NDArray[np.uint8]]:
    counts, radius = (1, 1, 60, 0.04, 7, 25, 25, 5e-7), certificate.radius or 0.0
    return Falsification(image.idx, radius, True, "random directions", *counts), image.pixels ^ np.uint8(1)


def attacked_run(out: Path, images: ImageSet, share: float) -> list[Falsification]:
    with load(secret=seeded_secret(5), batch=16, threads=1) as classifier:
        _, attacks = certify_images(classifier, RunRequest(images, SETTINGS, out, 5, falsify=share))
    return attacks


def test_a_run_is_attacked_with_a_share_of_its_samples_and_says_so(tmp_path: Path, images: ImageSet) -> None:
    attacks = attacked_run(tmp_path / "run", images, 1.0)
    lines = [json.loads(line) for line in (tmp_path / "run" / "falsify.jsonl").read_text().splitlines()]
    assert [line["idx"] for line in lines] == [attack.idx for attack in attacks]
    assert attacks
    assert all(0 < attack.samples <= EACH for attack in attacks)
    assert not any(attack.broken for attack in attacks)
    findings = {finding.what: finding for finding in audit(tmp_path / "run", images)}
    assert all(finding.holds for finding in findings.values()), findings
    assert "attacks" in findings
    assert attacked_run(tmp_path / "run", images, 1.0) == attacks  # a finished run, attacked again


def test_what_breaks_a_certificate_is_kept_and_the_audit_says_it(
    tmp_path: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(falsify_run, "falsify", broken)
    attacks = attacked_run(tmp_path / "run", images, 1.0)
    first = attacks[0]
    assert first.broken
    kept = np.asarray(Image.open(tmp_path / "run" / f"broken-{first.idx}.png"))
    original = next(image.pixels for image in images if image.idx == first.idx)
    assert (kept == original[0] ^ 1).all()
    (failed,) = (finding for finding in audit(tmp_path / "run") if not finding.holds)
    assert failed.what == "attacks"
    named = f"{first.idx} (fashion_mnist_test.npz:{first.idx // 20})"
    assert f"the certificate of image {named} is broken at a distance of 0.04" in failed.faults


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    from densepure_rt.cli import main

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["densepure-rt", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return call


def test_the_command_ends_with_1_when_a_certificate_is_broken(
    tmp_path: Path, command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (
        "certify --steps 0 --sigma 0.1 --radii 0,0.05 --alpha 0.01 --max 6 --batch 16 --threads 1 --seed 5 --falsify"
    )
    monkeypatch.setattr("densepure_rt.commands.certify.PROPOSALS", 0)  # gradients have a test of their own
    code, printed = command(*given.split(), 1.0, "--out", tmp_path / "a")
    assert code == 0
    assert "0 broken" in printed
    monkeypatch.setattr(falsify_run, "falsify", broken)
    code, printed = command(*given.split(), 1.0, "--out", tmp_path / "b")
    assert code == 1
    assert "25 of 25 samples are for class 7 at a distance of 0.04, inside the certified radius 0.05" in printed
    code, printed = command(*given.split(), 0.0001, "--out", tmp_path / "c")
    assert code == 0
    assert "no certificate was attacked" in printed
