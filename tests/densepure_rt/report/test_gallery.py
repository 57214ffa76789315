from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from densepure_rt.images.datasets import open_images
from densepure_rt.report.gallery import choose
from tests.support.cli import Done, cli, refused
from tests.support.html import Seen
from tests.support.pictures import decoded
from tests.support.runs import Made, record_of

TINY = "certify --steps 2 --votes 3 --sigma 0.25 --n 40 --max 2 --batch 4 --threads 1".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shipped images, certified with a secret."""
    out = tmp_path_factory.mktemp("gallery") / "run"
    assert cli(*TINY, "--out", out).returncode == 0
    return out


def test_images_are_chosen_from_the_strongest_down_to_those_without_a_certificate() -> None:
    made = (Made(None), Made(0.2), Made(0.9), Made(0.4), Made(0.9, predict=1))
    records = [record_of(idx, each) for idx, each in enumerate(made)]
    assert [record.idx for record in choose(records, 3)] == [2, 1, 0]
    assert [record.idx for record in choose(records, 99)] == [2, 3, 1, 4, 0]
    assert [record.idx for record in choose(records, 1)] == [2]
    assert choose([], 3) == []


def test_the_page_shows_images_noise_and_every_vote(run: Path, tmp_path: Path) -> None:
    """Each of the two images stands beside its noisy and its three purified pictures."""
    done = cli("report", run, "--out", tmp_path / "x.html", "--gallery", 5)
    assert done.returncode == 0, done.stderr
    shown = [attributes for tag, attributes in Seen((tmp_path / "x.html").read_text()).tags if tag == "img"]
    assert len(shown) == 2 * (1 + 1 + 3)
    pictures = [decoded(str(attributes["src"])) for attributes in shown]
    images = open_images(None, (1, 28, 28), tuple("0123456789")).select(1, 2)
    shipped = {image.pixels[0].tobytes(): image.pixels[0] for image in images}
    for clean, noisy, *purified in (pictures[:5], pictures[5:]):
        pixels = shipped.pop(clean.tobytes()).astype(float)
        inside = (pixels + 3 * 64 < 255) & (pixels - 3 * 64 > 0)  # where clipping does not reach
        spread = np.std((noisy - pixels)[inside]) if inside.any() else 255 * 0.25
        assert spread == pytest.approx(255 * 0.25, rel=0.5)
        for image in purified:
            assert np.abs(image - pixels).mean() < np.abs(noisy - pixels).mean()
    assert not shipped


def test_what_a_gallery_cannot_show_is_refused(here: Callable[..., Done], run: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "others.npz", x=np.zeros((2, 28, 28, 1), np.uint8), y=np.zeros(2, np.int64))
    out = ("--out", tmp_path / "x.html")
    refused(here("report", run, *out, "--gallery", 1, "--images", tmp_path / "others.npz"), 2, "--images")
    refused(here("report", run, *out, "--gallery", 0), 2, "--gallery 0")
    other = json.loads((run / "manifest.json").read_text())
    for part, code in (("engine", 1), ("classifier", 2)):
        strange = other | {"identity": other["identity"] | {part: other["identity"][part] | {"sha256": "f" * 64}}}
        shutil.copytree(run, tmp_path / part)
        (tmp_path / part / "manifest.json").write_text(json.dumps(strange))
        refused(here("report", tmp_path / part, *out, "--gallery", 1), code, "of ffffffffffffffff: name", "--engine")
    (run / "secret.key").rename(run / "elsewhere")
    refused(here("report", run, *out, "--gallery", 1), 2, "secret")
    (run / "elsewhere").rename(run / "secret.key")
    assert not (tmp_path / "x.html").exists()
