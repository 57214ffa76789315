"""From an empty folder to a report, as somebody with a model and a folder of mixed pictures goes."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import densepure_rt
from densepure_rt.errors import EnvironmentFault
from tests.support.certify import wait_for
from tests.support.cli import Done, cli, environment, started

MODULE = '''
import torch


class Denoiser(torch.nn.Module):
    """The best linear guess at the noise in a timestep of the linear schedule."""

    def __init__(self):
        super().__init__()
        kept = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000), 0)
        self.register_buffer("gain", (1 - kept).sqrt() / (0.13 * kept + 1 - kept))

    def forward(self, x, t):
        return x * self.gain[t.long()].reshape(-1, 1, 1, 1)


def network():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 2))


def trained():
    torch.manual_seed(0)
    found = network()
    optimiser = torch.optim.Adam(found.parameters(), 1e-2)
    for _ in range(200):
        labels = torch.randint(0, 2, (64,))
        x = torch.randn(64, 3, 16, 16) / 4 - 0.3
        x[..., :8] += (0.6 * (labels == 0))[:, None, None, None]
        x[..., 8:] += (0.6 * (labels == 1))[:, None, None, None]
        loss = torch.nn.functional.cross_entropy(found(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return found


def classifier():
    found = network()
    found.load_state_dict(torch.load("classifier.pt", weights_only=True))
    return found


def unet():
    return Denoiser()
'''
BROKEN = "right/kaputt ü.png"


def put_pictures(folder: Path) -> None:
    """Put 40 pictures of two classes there: six kinds, names of all sorts, and one that is cut short."""
    draw = np.random.default_rng(0)
    for place in range(40):
        name = ("left", "right")[place % 2]
        pixels = draw.integers(40, 100, (20, 24, 3), dtype=np.uint8)
        pixels[:, 12 * (place % 2) : 12 * (place % 2) + 12] += 90
        colour = Image.fromarray(pixels)
        kinds = {
            "plain.png": colour,
            "with alpha.png": Image.merge("RGBA", (*colour.split(), Image.new("L", colour.size, 255))),
            "grau-ä.png": colour.convert("L"),
            "palette[1].png": colour.convert("P"),
            "photo.jpg": colour,
            "☕.webp": colour,
        }
        kind, picture = list(kinds.items())[place // 2 % len(kinds)]
        (folder / name).mkdir(parents=True, exist_ok=True)
        picture.save(folder / name / f"{place:02d} {kind}")
    (folder / BROKEN).write_bytes((folder / "left" / "00 plain.png").read_bytes()[:200])


def walked(folder: Path, *words: object) -> Done:
    done = cli(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "results.tsv").open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


def test_from_an_empty_folder_to_a_report(tmp_path: Path) -> None:
    (tmp_path / "walkmodel.py").write_text(MODULE)
    train = "import torch, walkmodel; torch.save(walkmodel.trained().state_dict(), 'classifier.pt')"
    subprocess.run([sys.executable, "-c", train], cwd=tmp_path, env=environment(), timeout=120, check=True)
    put_pictures(tmp_path / "photos")
    (tmp_path / "labels.txt").write_text("left\nright\n")

    network = "--unet walkmodel:unet --image-size 3x16x16 --schedule linear --diffusion-steps 1000 --prediction epsilon"
    preprocessing = "--classifier walkmodel:classifier --labels labels.txt --pixel-range=-1,1"
    walked(tmp_path, "export", *network.split(), *preprocessing.split())

    run = tmp_path / "runs" / "first"
    how = "--images photos --fit resize --convert --sigma 0.25 --radii 0,0.25 --steps 2 --votes 3 --n 2000 --batch 16"
    here = how.replace("photos", str(tmp_path / "photos")).split()
    with started("certify", "--engine", tmp_path / "walkmodel", *here, "--out", run) as running:
        wait_for(lambda: (run / "results.tsv").exists() and len(rows(run)) >= 3, running)
        running.send_signal(signal.SIGINT)  # Ctrl-C
        _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert 3 <= len(rows(run)) < 41

    done = cli("certify", "--resume", "--out", run, cwd=tmp_path)  # no other option
    assert done.returncode == 1, done.stderr
    assert f"1 image failed: 40 ({BROKEN})" in done.stderr
    assert len(rows(run)) == 40

    with Image.open(tmp_path / "photos" / "right" / "01 plain.png") as picture:
        picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(tmp_path / "photos" / BROKEN)  # fetched again
    walked(tmp_path, "certify", "--resume", "--out", run)
    found = rows(run)
    assert len(found) == 41
    assert {row["name"] for row in found} >= {BROKEN, "left/04 grau-ä.png", "right/11 ☕.webp"}
    assert sum(row["correct"] == "1" for row in found) >= 36
    walked(tmp_path, "audit", run)

    second = tmp_path / "runs" / "second"
    other = how.replace("--sigma 0.25", "--sigma 0.5").split()
    walked(tmp_path, "certify", "--engine", "walkmodel", *other, "--out", second)
    walked(tmp_path, "report", run, second, "--gallery", 41, "--out", "page.html")
    assert "grau-ä.png" in (tmp_path / "page.html").read_text(encoding="utf-8")
    compared = cli("compare", run, second, cwd=tmp_path)
    assert compared.returncode in (0, 1)
    assert "41 images by SHA-256" in compared.stdout

    said = walked(
        tmp_path, "predict", "photos/left/00 plain.png", "--engine", "walkmodel", "--fit", "resize", "--json"
    ).stdout
    assert json.loads(said)["file"] == "00 plain.png"
    assert re.search(r'"predict": 0\b', said)

    if find_spec("pandas") is None:
        with pytest.raises(EnvironmentFault, match="pandas"):
            densepure_rt.to_dataframe(run)
    else:
        assert len(densepure_rt.to_dataframe(run)) == 41
