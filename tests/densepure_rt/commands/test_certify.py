from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from densepure_rt.commands.image_options import SHIPPED_MAX
from tests.support.bundles import ENGINES, engines_copied
from tests.support.cli import (
    DRY,
    TINY,
    Done,
    cli,
    densepure_rt,
    edit_sidecar,
    in_a_process,
    one_line,
    refused,
    sha256,
    started,
)

FIXED = ("--method", "fixed")
FULL = Path("/dev/full")


# certify --dry-run


def test_a_dry_run_prints_cost_and_reach_and_certifies_nothing(tmp_path: Path) -> None:
    done = cli(*DRY, *FIXED, "--n", 50, "--n0", 10, "--max", 3, "--out", "run", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert list(tmp_path.iterdir()) == []
    printed = one_line(done.stderr)
    assert "device onnxruntime CPU" in printed
    assert "images 3 of Fashion-MNIST" in printed
    assert "UNet calls 60 an image" in printed
    assert re.search(r"time [0-9.]+ (s|min)", printed)
    reach = 0.5 * stats.norm.ppf(stats.beta.ppf(0.001, 50, 1))
    assert f"no radius beyond {math.ceil(1000 * reach) / 1000:.3f} can be certified with n = 50" in printed


def test_a_dry_run_makes_no_runs_folder_either(tmp_path: Path) -> None:
    assert cli(*DRY, "--max", 1, cwd=tmp_path).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_the_forecast_can_be_read_by_a_program() -> None:
    done = cli(*DRY, *FIXED, "--steps", 2, "--votes", 5, "--n", 50, "--n0", 10, "--max", 3, "--json")
    assert done.returncode == 0
    forecast = json.loads(done.stdout)
    assert forecast["images"] == 3
    assert forecast["samples"] == [60, 60, 60]
    assert forecast["unet_calls"] == [60 * (1 + 3), 60 * (1 + 3), 60 * (1 + 5)]
    assert forecast["classifier_calls"] == [60 * 3, 60 * 3, 60 * 5]
    assert forecast["reach"] == pytest.approx(0.5 * stats.norm.ppf(stats.beta.ppf(0.001, 50, 1)), rel=1e-6)
    assert 0 < forecast["seconds"][0] <= forecast["seconds"][2]


@pytest.mark.parametrize("steps", [0, 1])
def test_with_fewer_than_two_steps_votes_are_set_to_1_and_it_is_said(steps: int) -> None:
    done = cli(*DRY, *FIXED, "--steps", steps, "--votes", 5, "--max", 1, "--n", 20, "--n0", 4)
    assert done.returncode == 0
    assert "votes set to 1" in done.stderr
    assert f"UNet calls {24 * steps} an image" in one_line(done.stderr)


@pytest.mark.parametrize("options", [["--steps", "1", "--votes", "1"], ["--steps", "2", "--votes", "5"]])
def test_nothing_is_said_about_votes_that_are_kept(options: list[str]) -> None:
    assert "votes set to 1" not in cli(*DRY, *options, "--max", 1, "--n", 20).stderr


def test_the_preset_of_the_paper_is_10_steps_40_votes_and_100000_samples() -> None:
    done = cli("certify", "--dry-run", "--preset", "paper", "--max", 1, "--batch", 4, "--threads", 1)
    assert done.returncode == 0
    printed = one_line(done.stderr)
    assert re.search(r"steps 10, timesteps ([0-9]+, ){9}[0-9]+; 40 votes", printed)
    assert "n = 100000" in printed
    assert f"{100_100 * 361:,}) an image" in printed


def test_options_that_are_typed_win_over_the_preset() -> None:
    printed = one_line(cli(*DRY, "--preset", "paper", "--max", 1, "--steps", 1, "--n", 20).stderr)
    assert "steps 1," in printed
    assert "n = 20" in printed
    assert f"UNet calls {100 + 20} an image" in printed


def test_without_max_a_part_of_the_shipped_images_is_taken() -> None:
    assert f"images {SHIPPED_MAX} of Fashion-MNIST" in one_line(cli(*DRY, "--n", 20).stderr)


# engines


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the shipped bundle, to be damaged."""
    return engines_copied(tmp_path / "engines").parent


@pytest.mark.parametrize("upper", [False, True])
def test_the_right_engine_hash_is_accepted(upper: bool) -> None:
    pin = sha256(ENGINES / "unet.onnx")
    assert cli(*DRY, "--max", 1, "--n", 20, "--engine-sha256", pin.upper() if upper else pin).returncode == 0


@pytest.mark.parametrize("command", ["certify", "predict"])
def test_another_engine_hash_exits_1(command: str) -> None:
    pin = sha256(ENGINES / "classifier.onnx")
    found = sha256(ENGINES / "unet.onnx")
    refused(in_a_process(command, "--engine-sha256", pin), 1, "--engine-sha256", pin[:16], found[:16], "unet.onnx")


def test_a_missing_engine_exits_2(tmp_path: Path) -> None:
    refused(
        in_a_process(*DRY, "--engine", tmp_path / "none.onnx"), 2, str(tmp_path / "none.onnx"), "densepure-rt export"
    )


@pytest.mark.parametrize("name", ["unet.onnx", "classifier.onnx"])
def test_a_truncated_engine_exits_1(bundle: Path, name: str) -> None:
    os.truncate(bundle / name, 100_000)
    found, promised = sha256(bundle / name), sha256(ENGINES / name)
    done = cli(*DRY, "--engine", bundle / "unet.onnx")
    refused(done, 1, str(bundle / name), found[:16], promised[:16], "damaged", "copy it again")


def test_a_truncated_engine_with_a_sidecar_made_for_it_exits_1(bundle: Path) -> None:
    os.truncate(bundle / "unet.onnx", 100_000)
    edit_sidecar(bundle / "unet.onnx", file={"name": "unet.onnx", "sha256": sha256(bundle / "unet.onnx")})
    refused(cli(*DRY, "--engine", bundle / "unet.onnx"), 1, "unet.onnx", "cannot load")


def test_a_sidecar_with_another_hash_exits_1(bundle: Path) -> None:
    edit_sidecar(bundle / "unet.onnx", file={"name": "unet.onnx", "sha256": "0" * 64})
    refused(cli(*DRY, "--engine", bundle / "unet.onnx"), 1, "unet.onnx", "0" * 16, sha256(ENGINES / "unet.onnx")[:16])


@pytest.mark.parametrize("name", ["unet.onnx", "classifier.onnx"])
def test_a_missing_sidecar_exits_2(bundle: Path, name: str) -> None:
    (bundle / f"{name}.json").unlink()
    refused(cli(*DRY, "--engine", bundle / "unet.onnx"), 2, f"{name}.json", "sidecar", "copy it along")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"schema_version": 99}'])
def test_a_sidecar_of_garbage_exits_1(here: Callable[..., Done], bundle: Path, content: bytes) -> None:
    (bundle / "unet.onnx.json").write_bytes(content)
    refused(here(*DRY, "--engine", bundle / "unet.onnx"), 1, "unet.onnx.json", "again")


def test_a_missing_classifier_exits_2(bundle: Path) -> None:
    (bundle / "classifier.onnx").unlink()
    refused(cli(*DRY, "--engine", bundle / "unet.onnx"), 2, str(bundle / "classifier.onnx"), "--classifier")


def test_engine_and_classifier_in_each_others_place_exit_2() -> None:
    refused(cli(*DRY, "--engine", ENGINES / "classifier.onnx"), 2, "is a classifier", "--classifier")
    refused(cli(*DRY, "--classifier", ENGINES / "unet.onnx"), 2, "unet.onnx is a step engine")


def test_a_classifier_can_be_named(bundle: Path) -> None:
    shutil.move(bundle / "classifier.onnx", bundle / "other.onnx")
    shutil.move(bundle / "classifier.onnx.json", bundle / "other.onnx.json")
    engine = ("--engine", bundle / "unet.onnx", "--max", 1, "--n", 20)
    assert cli(*DRY, *engine, "--classifier", bundle / "other.onnx").returncode == 0
    refused(cli(*DRY, *engine), 2, "no classifier at")


def test_an_engine_with_nan_weights_exits_1(bundle: Path) -> None:
    onnx = pytest.importorskip("onnx")
    engine = bundle / "unet.onnx"
    model = onnx.load(engine)
    weights = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 4)
    spoilt = onnx.numpy_helper.to_array(weights).copy()
    spoilt.flat[0] = np.nan
    weights.CopyFrom(onnx.numpy_helper.from_array(spoilt, weights.name))
    onnx.save(model, engine)
    edit_sidecar(engine, file={"name": "unet.onnx", "sha256": sha256(engine)})
    refused(cli(*DRY, "--engine", engine), 1, "unet.onnx", "NaN", "weights are damaged", "export it again")


@pytest.mark.parametrize("folder", ["a[/b]", "a[red]"])
def test_an_engine_is_named_as_its_path_is(bundle: Path, folder: str) -> None:
    target = bundle.parent / folder
    target.parent.mkdir(exist_ok=True)  # one of the names has a slash in it
    bundle.rename(target)
    done = cli(*DRY, "--engine", target / "unet.onnx", "--max", 1, "--n", 20)
    assert done.returncode == 0
    assert str(target / "unet.onnx") in done.stderr


# options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--radii", "5"), ("--radii from 5 on are all beyond reach", "no radius beyond 1.573 is certified")),
        (("--radii-sigma", "4", "--dry-run"), ("--radii from 2 on are all beyond reach", "takes n = ")),
        (("--steps", 0, "--sigma", 300), ("--sigma is the standard deviation", "to 257", "got 300")),
        (("--sigma", 0.001, "--steps", 0), ("--sigma is the standard deviation", "from 0.004")),
        (("--sigma=-1",), ("--sigma is the standard deviation", "got -1")),
    ],
    ids=str,
)
def test_what_can_certify_nothing_is_refused_with_its_option(
    here: Callable[..., Done], options: tuple[object, ...], words: tuple[str, ...]
) -> None:
    done = here("certify", "--max", 1, *options)
    assert "grid steps" not in done.stderr
    refused(done, 2, *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sigma", "1000"], ["sigma 1000", "beyond", "schedule", "smaller sigma"]),
        (["--sigma", "0"], ["sigma"]),
        (["--sigma=-1"], ["sigma"]),
        (["--sigma", "nan"], ["sigma"]),
        (["--sigma", "inf"], ["sigma"]),
        (["--sigma", "1e-9"], ["sigma"]),
        (["--steps", "900"], ["900 steps", "timestep", "at most"]),
        (["--steps=-1"], ["steps", "-1"]),
        (["--alpha", "0"], ["alpha", "0.5"]),
        (["--alpha", "0.5"], ["alpha", "0.5"]),
        (["--alpha", "nan"], ["alpha"]),
        (["--alpha", "1e-300"], ["alpha", "1e-300"]),
        (["--n", "0"], ["n", "0"]),
        (["--n0", "0"], ["n0", "0"]),
        (["--votes", "0"], ["votes", "0"]),
        (["--batch", "0"], ["batch", "0"]),
        (["--threads", "0"], ["threads", "0"]),
        (["--skip", "0"], ["skip", "0"]),
        (["--max", "0"], ["max", "0"]),
        (["--method", "other"], ["--method other", "fixed"]),
        (["--radius-loss", "0.1"], ["radius loss", "sequential was asked for"]),
        (["--method", "radius", "--radius-loss", "1"], ["radius loss", "1"]),
        (["--budget", "30 parsecs"], ["--budget 30 parsecs", "such as 30s"]),
        (["--budget", "0s"], ["--budget 0s"]),
        (["--run-budget", "s"], ["--run-budget s"]),
        (["--run-budget", "nan"], ["--run-budget nan"]),
        (["--preset", "other"], ["--preset other", "paper"]),
        (
            ["--method", "fixed", "--radii", "0,0.25"],
            ["--radii are what the method sequential decides", "fixed was asked for"],
        ),
        (["--radii", "0,x"], ["radii are numbers", "0,x"]),
        (["--radii", "0.5,0"], ["from 0 up and ascending"]),
        (["--radii", "0", "--radii-sigma", "0"], ["--radii and --radii-sigma", "give one"]),
    ],
    ids=lambda value: "-".join(value) if value and value[0].startswith("--") else "",
)
def test_an_impossible_option_of_certify_exits_2(
    here: Callable[..., Done], tmp_path: Path, options: list[str], words: list[str]
) -> None:
    refused(here(*DRY, *options, "--out", tmp_path / "run"), 2, *words)
    assert list(tmp_path.iterdir()) == []


def test_too_small_an_n_exits_2_and_names_the_n_that_is_enough() -> None:
    refused(cli(*DRY, *FIXED, "--n", 9), 2, "--n 9 cannot", "alpha = 0.001", "ask for 10 at least")
    assert stats.beta.ppf(0.001, 9, 1) <= 0.5 < stats.beta.ppf(0.001, 10, 1)


def test_a_batch_beyond_all_memory_is_no_traceback() -> None:
    done = in_a_process(*DRY, "--batch", 10**9)
    assert done.returncode in (2, 3)
    assert "--batch" in done.stderr


@pytest.mark.parametrize("name", ["engine", "out"])
def test_a_path_with_too_long_a_name_is_no_traceback(name: str) -> None:
    done = cli("certify", *TINY, *FIXED, "--n0", 1, "--max", 1, f"--{name}", "x" * 300)
    assert done.returncode in (2, 3)
    assert "xxx" in done.stderr


@pytest.mark.parametrize("below", ["", "run"])
def test_an_out_folder_that_cannot_be_made_exits_3(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    out = tmp_path / "file" / below
    refused(cli("certify", *TINY, *FIXED, "--n0", 1, "--max", 1, "--out", out), 3, "cannot write", str(out), "--out")
    assert (tmp_path / "file").read_text() == "not a folder"


# images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of which none fits the shipped engine but grey.npz and grey.png."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    grey = draw.integers(0, 256, (2, 28, 28, 1), dtype=np.uint8)
    np.savez(folder / "grey.npz", x=grey)
    np.savez(folder / "off-grid.npz", x=draw.random((2, 28, 28, 1), np.float32))
    np.savez(folder / "large.npz", x=draw.integers(0, 256, (2, 32, 32, 1), dtype=np.uint8))
    np.savez(folder / "label.npz", x=grey, y=[0, 10])
    np.savez(folder / "pickled.npz", x=np.array([{"a": 1}], object))
    Image.fromarray(grey[0, :, :, 0]).save(folder / "grey.png")
    Image.fromarray(draw.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(folder / "colour.png")
    Image.fromarray(draw.integers(0, 256, (28, 27), dtype=np.uint8)).save(folder / "narrow.png")
    (folder / "text.png").write_text("not an image")
    (folder / "notes.txt").write_text("not an image either")
    (folder / "cut.png").write_bytes((folder / "grey.png").read_bytes()[:200])
    return folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.png", ["no such file", "check the path"]),
        ("off-grid.npz", ["image 0", "1/255", "uint8"]),
        ("large.npz", ["1x32x32", "1x28x28"]),
        ("narrow.png", ["1x28x27", "1x28x28"]),
        ("colour.png", ["colour", "grey"]),
        ("label.npz", ["label 10", "0..9"]),
        ("pickled.npz", ["pickled.npz"]),
        ("text.png", ["text.png", "PNG"]),
        ("cut.png", ["cut.png"]),
        ("notes.txt", ["formats", ".npz"]),
    ],
)
def test_images_that_do_not_fit_exit_2_and_leave_no_folder(
    here: Callable[..., Done], images: Path, tmp_path: Path, name: str, words: list[str]
) -> None:
    out = tmp_path / "run"
    refused(
        here("certify", *TINY, *FIXED, "--n0", 1, "--images", images / name, "--out", out),
        2,
        str(images / name),
        *words,
    )
    assert not out.exists()


# anytime methods


@pytest.mark.parametrize("option", ["--budget", "--run-budget"])
def test_time_that_is_up_leaves_the_best_radius_so_far(here: Callable[..., Done], tmp_path: Path, option: str) -> None:
    """No time at all: what comes back with the first batches decides, and it is not a full run's answer."""
    given = f"certify --sigma 0.1 --radii 0,0.2 --steps 1 --max 3 --seed 1 --batch 4 --threads 1 {option} 0.001s"
    done = here(*given.split(), "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert not summary["interrupted"]
    assert summary["done"] == 3 if option == "--budget" else summary["done"] <= 3  # none, where a batch takes long
    records = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert len(records) == summary["done"]
    for record in records:
        assert record["stopped"]
        assert record["n"] < 64
        assert (record["radius"] or 0.0) < 0.2
    if option == "--run-budget" and summary["done"] < 3:
        assert f"the time was up after {summary['done']} of 3 images" in done.stderr
    budget = json.loads((tmp_path / "run" / "manifest.json").read_text())["identity"]["budget_seconds"]
    assert budget == {"image": None, "run": None} | {"image" if option == "--budget" else "run": 0.001}


def test_a_sequential_run_names_its_radii_and_what_it_skips(here: Callable[..., Done], tmp_path: Path) -> None:
    given = "certify --method sequential --radii-sigma 0,1,9 --sigma 0.25 --n 64 --alpha 0.2 --steps 1 --max 2".split()
    done = here(*given, "--seed", 1, "--batch", 8, "--threads", 1, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    assert "(32 to 64) an image" in done.stderr
    assert "0 from 32 samples, 0.25 from 32 samples, 2.25 skipped: beyond reach" in done.stderr
    assert set(json.loads(done.stdout)["accuracy"]) == {"0", "0.25", "2.25"}
    identity = json.loads((tmp_path / "run" / "manifest.json").read_text())["identity"]
    rule = identity["rule"]
    assert (rule["method"], rule["radii"], rule["look"]) == ("sequential", [0.0, 0.25, 2.25], 32)
    for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["n"] in (32, 64)
        assert [outcome["eps"] for outcome in record["outcomes"]] == [0.0, 0.25, 2.25]
        assert record["outcomes"][2]["result"] == "skipped"


def test_the_papers_preset_keeps_radii_in_multiples_of_sigma(here: Callable[..., Done]) -> None:
    given = "certify --dry-run --preset paper --method sequential --radii-sigma 0,2 --steps 1 --max 1".split()
    done = here(*given, "--batch", 4, "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert "radii       0 from 32 samples, 1 from 384 samples" in done.stderr


# signals and pipes


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is sent in another way there")
def test_ctrl_c_before_the_first_image_ends_with_a_message_and_130(tmp_path: Path) -> None:
    """While the forecast times batches that take seconds each."""
    with started(
        "certify", "--steps", 1, "--batch", 1024, "--threads", 1, "--max", 1, "--out", tmp_path / "run"
    ) as running:
        assert running.stderr
        said = running.stderr.readline()  # that votes are set to 1: the engines are opened next
        running.send_signal(signal.SIGINT)
        stderr = said + running.communicate(timeout=180)[1]
    assert running.returncode == 130
    assert "Traceback" not in stderr
    assert "stopped" in stderr or "interrupted" in stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
def test_a_log_that_cannot_be_written_is_said_once_and_the_run_goes_on_to_exit_code_3(tmp_path: Path) -> None:
    done = densepure_rt("certify", *TINY, "--max", 2, "--seed", 1, "--out", tmp_path / "run", "--log-json", FULL)
    assert done.returncode == 3
    assert done.stderr.count("No space left on device") == 1
    assert "cannot write the log /dev/full" in done.stderr
    assert (tmp_path / "run" / "seal.json").exists()
    assert densepure_rt("certify", *TINY, "--max", 2, "--seed", 1, "--out", tmp_path / "run").returncode == 0
