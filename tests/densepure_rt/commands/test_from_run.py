"""A run knows what it was asked for: it goes on, and is replayed, reported and attacked, without being told again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from densepure_rt.runs.ledger import Ledger
from densepure_rt.runtime.bundle import shipped_engine
from tests.support.cli import Done
from tests.support.cli import densepure_rt as cli

TINY = ("--steps", 0, "--votes", 1, "--n", 100, "--sigma", 0.1, "--batch", 16, "--threads", 1, "--radii", "0,0.1")


def pictures(folder: Path) -> Path:
    folder.mkdir()
    with np.load(Path(__file__).parents[3] / "densepure_rt" / "data" / "fashion_mnist_test.npz") as shipped:
        for i, pixels in enumerate(shipped["x"][:6, ..., 0]):
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def bundle(folder: Path) -> Path:
    shutil.copytree(shipped_engine().parent, folder)
    return folder / "unet.onnx"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, the images and the engine that it was made with."""
    folder = tmp_path_factory.mktemp("made")
    images, engine = pictures(folder / "images"), bundle(folder / "bundle")
    done = cli(
        *("certify", "--images", images.name, "--engine", engine.relative_to(folder), *TINY, "--skip", 2),
        *("--out", "run", "--budget", "5min"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def half(made: Path, tmp_path: Path) -> Path:
    """The run, as if it had been stopped after its first image."""
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "run" / "seal.json").unlink()
    with Ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        ledger._database.execute("delete from images where place > 0")
    return tmp_path / "run"


def manifest(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return found


def forget_options(run: Path, **provenance: Any) -> None:
    """Leave the manifest as one of before."""
    found = manifest(run)
    del found["provenance"]["options"]
    found["provenance"] |= provenance
    (run / "manifest.json").write_text(json.dumps(found))


def went_on(done: Done, run: Path, made: Path) -> bool:
    assert done.returncode == 0, done.stderr
    return (run / "results.jsonl").read_bytes() == (made / "run" / "results.jsonl").read_bytes()


def test_the_manifest_has_the_options_typed(made: Path) -> None:
    assert manifest(made / "run")["provenance"]["options"] == {
        "images": str(made / "images"),
        "skip": 2,
        "sigma": 0.1,
        "steps": 0,
        "votes": 1,
        "alpha": 0.001,
        "method": "sequential",
        "radii": "0,0.1",
        "n": 100,
        "engine": str(made / "bundle" / "unet.onnx"),
        "provider": "cpu",
        "batch": "16",
        "threads": 1,
        "budget": "5min",
    }


def test_resume_needs_no_other_option_and_says_which_it_takes(half: Path, made: Path) -> None:
    done = cli("certify", "--resume", "--out", half)
    assert went_on(done, half, made)
    assert f"as the run in {half} was made: --" in done.stderr
    assert f"--images {made / 'images'}" in done.stderr
    assert "--sigma 0.1" in done.stderr


def test_a_run_of_before_goes_on_as_far_as_its_command_line_tells(
    half: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)  # paths of then are as they were typed
    forget_options(half)
    assert went_on(cli("certify", "--resume", "--out", half), half, made)


def test_a_run_of_before_that_has_no_command_line_is_refused_with_the_options_that_it_takes(half: Path) -> None:
    forget_options(half, argv=["other-program"])
    done = cli("certify", "--resume", "--out", half)
    assert (
        "another identity (--budget 300 there, not given now; --n 100 there, 10000 now; --radii 0,0.1 there, "
        in done.stderr
    )


def test_what_has_moved_is_named_anew(half: Path, made: Path, tmp_path: Path) -> None:
    options = manifest(half)["provenance"]["options"]
    lost = {name: f"{options[name]}-gone" for name in ("images", "engine")}
    found = manifest(half)
    found["provenance"]["options"] |= lost
    (half / "manifest.json").write_text(json.dumps(found))
    done = cli("certify", "--resume", "--out", half)
    assert done.returncode == 2
    assert "where there is nothing now: say with --images where it went" in done.stderr
    done = cli("certify", "--resume", "--out", half, "--images", made / "images")
    assert "say with --engine where it went" in done.stderr
    again = ("--images", made / "images", "--engine", bundle(tmp_path / "moved"))
    assert went_on(cli("certify", "--resume", "--out", half, *again), half, made)


def test_a_run_of_files_that_were_named_one_by_one_goes_on_with_them(made: Path, tmp_path: Path) -> None:
    files = [made / "images" / f"{i}.png" for i in (3, 1)]
    started = cli("certify", *files, *TINY, "--fit", "pad", "--background", "black", "--out", tmp_path / "run")
    assert started.returncode == 0, started.stderr
    kept = manifest(tmp_path / "run")["provenance"]["options"]
    assert (kept["files"], kept["fit"], kept["background"]) == (list(map(str, files)), "pad", "black")
    done = cli("certify", "--resume", "--out", tmp_path / "run")
    assert (done.returncode, done.stdout) == (0, started.stdout), done.stderr
    assert str(files[0]) in done.stderr
    done = cli("replay", tmp_path / "run", "--image", 1)
    assert done.returncode == 0, done.stderr
    done = cli("certify", "--resume", "--out", tmp_path / "run", "--images", made / "images")
    assert done.returncode == 2
    assert "another identity (--images not given there" in done.stderr


def test_other_images_of_the_same_path_are_refused(half: Path, tmp_path: Path) -> None:
    other = pictures(tmp_path / "other")
    (other / "0.png").unlink()
    done = cli("certify", "--resume", "--out", half, "--images", other)
    assert done.returncode == 2
    there = manifest(half)["provenance"]["options"]["images"]
    assert f"another identity (--images {there} there, {other} now; images.sha256" in done.stderr


def test_a_run_of_other_options_is_refused_with_the_options_first(half: Path, made: Path) -> None:
    done = cli("certify", "--resume", "--out", half, "--sigma", 0.5, "--n", 200, "--max", 2)
    assert done.returncode == 2
    assert (
        "another identity (--n 100 there, 200 now; --sigma 0.1 there, 0.5 now; --max not given there, 2 now; "
        "images.count: 3 there, 2 now; images.sha256: "
    ) in done.stderr
    assert done.stderr.index("images.sha256") < done.stderr.index("noise.smoothing_table_sha256")
    assert "more): choose another folder with --out" in done.stderr


def test_replay_and_a_gallery_take_engine_and_images_from_the_run(made: Path, half: Path, tmp_path: Path) -> None:
    done = cli("replay", half, "--image", "0.png")
    assert done.returncode == 0, done.stderr
    assert f"as the run in {half} was made: --images {made / 'images'}" in done.stderr
    assert f"as the run in {half} was made: --engine {made / 'bundle' / 'unet.onnx'}" in done.stderr
    done = cli("report", half, "--gallery", 1, "--out", tmp_path / "r.html")
    assert done.returncode == 0, done.stderr
    assert re.search(r"Image ([024]) \(\1.png\)", (tmp_path / "r.html").read_text(encoding="utf-8"))


def test_falsify_takes_its_options_from_the_run(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    done = cli("certify", "--falsify", 0.01, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "--sigma 0.1" in done.stderr
    assert (tmp_path / "run" / "falsify.jsonl").exists()


def test_what_a_foreign_manifest_says_opens_no_cluster_and_trusts_no_plan(half: Path, made: Path) -> None:
    found = manifest(half)
    found["provenance"]["options"] |= {"cluster": "ray://attacker:10001", "trust": True, "key": "/etc/passwd"}
    (half / "manifest.json").write_text(json.dumps(found))
    assert went_on(cli("certify", "--resume", "--out", half), half, made)


@pytest.mark.parametrize(
    ("option", "says"), [({"sigma": "wide"}, "--sigma"), ({"s\x1b": 1}, r'names "s\x1b", which is no option')]
)
def test_an_option_that_is_none_is_refused(half: Path, option: dict[str, Any], says: str) -> None:
    found = manifest(half)
    found["provenance"]["options"] |= option
    (half / "manifest.json").write_text(json.dumps(found))
    done = cli("certify", "--resume", "--out", half)
    assert done.returncode == 2
    assert says in done.stderr
    assert "\x1b" not in done.stderr


def test_the_options_of_a_preset_are_kept_by_what_they_are(tmp_path: Path) -> None:
    started = cli(
        *("certify", "--preset", "paper", "--steps", 0, "--n", 10, "--n0", 1, "--method", "fixed", "--max", 1),
        *("--seed", 1, "--batch", 16, "--out", tmp_path / "run"),
    )
    assert started.returncode == 0, started.stderr
    options = manifest(tmp_path / "run")["provenance"]["options"]
    assert {name: options.get(name) for name in ("preset", "steps", "votes", "n0", "n", "seed", "method")} == {
        "preset": None,
        "steps": 0,
        "votes": 40,
        "n0": 1,
        "n": 10,
        "seed": 1,
        "method": "fixed",
    }
    done = cli("certify", "--resume", "--out", tmp_path / "run")
    assert (done.returncode, done.stdout) == (0, started.stdout)
