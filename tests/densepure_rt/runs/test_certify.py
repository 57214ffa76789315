from __future__ import annotations

import hashlib
import json
import math
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from densepure_rt.commands.certify import notes_on
from densepure_rt.images.datasets import open_images
from densepure_rt.runs.identity import manifest_of
from densepure_rt.runs.summary import RADII
from densepure_rt.smoothing.classifier import load
from densepure_rt.smoothing.settings import UNLIMITED, Settings
from tests.support.certify import Run, certify, kill_at_a_random_moment, wait_for
from tests.support.cli import densepure_rt, in_a_process, started

ROOT = Path(__file__).resolve().parents[3]
ENGINES = ROOT / "engines"
N0, N, ALPHA, SIGMA = 4, 20, 0.001, 0.5
TINY = f"--method fixed --n {N} --n0 {N0} --batch 4 --threads 1 --steps 1".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every third shipped image, four of them, with a new secret."""
    out = tmp_path_factory.mktemp("secret") / "run"
    finished = Run(in_a_process("certify", *TINY, "--skip", 3, "--max", 4, "--out", out), out)
    assert finished.done.returncode == 0, finished.done.stderr
    return finished


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Runs on two images with two steps, three votes and a public seed."""
    folder = tmp_path_factory.mktemp("seeded")

    def new(name: str, batch: int, threads: int, seed: int = 7) -> Run:
        options = f"--n 20 --n0 4 --steps 2 --votes 3 --max 2 --seed {seed} --batch {batch} --threads {threads}"
        finished = certify(folder / name, "--method", "fixed", *options.split())
        assert finished.done.returncode == 0, finished.done.stderr
        return finished

    return new


@pytest.fixture(scope="module")
def first(seeded: Callable[..., Run]) -> Run:
    return seeded("first", batch=7, threads=1)


@pytest.fixture(scope="module")
def coin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier whose label of a grey image is decided by the noise alone: random linear logits."""
    onnx = pytest.importorskip("onnx")
    sidecar = json.loads((ENGINES / "classifier.onnx.json").read_text())
    path = tmp_path_factory.mktemp("coin") / "coin.onnx"
    channels, height, width = sidecar["image"]
    weights = np.random.default_rng(0).standard_normal((channels * height * width, len(sidecar["class_names"])))
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Flatten", ["mean"], ["flat"]),
            onnx.helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        ],
        "coin",
        [onnx.helper.make_tensor_value_info("mean", float32, ["batch", channels, height, width])],
        [onnx.helper.make_tensor_value_info("logits", float32, ["batch", weights.shape[1]])],
        [onnx.numpy_helper.from_array(weights.astype(np.float32), "w")],
    )
    opsets = [onnx.helper.make_opsetid("", sidecar["opset"])]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    sidecar["file"] = {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    Path(f"{path}.json").write_text(json.dumps(sidecar))
    return path


@pytest.fixture(scope="module")
def abstained(coin: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two unlabelled grey images, smoothed without a UNet and labelled by the coin."""
    folder = tmp_path_factory.mktemp("abstained")
    channels, height, width = json.loads(Path(f"{coin}.json").read_text())["image"]
    np.savez(folder / "grey.npz", x=np.full((2, height, width, channels), 128, np.uint8))
    options = (
        "--classifier",
        coin,
        "--images",
        folder / "grey.npz",
        "--method",
        "fixed",
        "--n",
        20,
        "--n0",
        4,
        "--batch",
        4,
        "--threads",
        1,
    )
    finished = certify(folder / "run", *options, "--steps", 0, "--seed", 1, "--json")
    assert finished.done.returncode == 0, finished.done.stderr
    return finished


def canonical_sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_run_leaves_these_files(run: Run, first: Run) -> None:
    tables = {"results.tsv", "results.jsonl", "timing.jsonl"}
    always = tables | {"manifest.json", "ledger.sqlite", "summary.json", "seal.json"}
    assert {path.name for path in run.out.iterdir()} == always | {"secret.key"}
    assert {path.name for path in first.out.iterdir()} == always


def test_the_table_has_the_header_of_the_field_and_a_line_an_image_in_index_order(run: Run) -> None:
    header, *lines = (run.out / "results.tsv").read_text().splitlines()
    assert header == "idx\tlabel\tpredict\tradius\tcorrect\ttime\tname"
    shipped = np.load(ROOT / "densepure_rt" / "data" / "fashion_mnist_test.npz")
    assert [int(line.split("\t")[0]) for line in lines] == shipped["index"][:12:3].tolist()
    assert [int(line.split("\t")[1]) for line in lines] == shipped["y"][:12:3].tolist()
    assert [line.split("\t")[6] for line in lines] == [f"fashion_mnist_test.npz:{i}" for i in range(0, 12, 3)]
    assert all(line.count("\t") == 6 for line in lines)


def test_the_records_have_these_keys_and_no_times(run: Run) -> None:
    for record in run.records:
        names = "idx image_sha256 label predict radius correct n0 n n_a alpha p_lower stopped outcomes name"
        assert list(record) == names.split()
        assert (record["n0"], record["n"], record["alpha"]) == (N0, N, ALPHA)


def test_bound_and_radius_follow_from_the_counts(run: Run, first: Run) -> None:
    """Cohen et al. 2019 with scipy's own beta and normal quantiles; never above them."""
    for record in [*run.records, *first.records]:
        n_a = record["n_a"]
        bound = stats.beta.ppf(ALPHA, n_a, N - n_a + 1) if n_a else 0.0
        assert record["p_lower"] == pytest.approx(bound, rel=1e-6)
        if bound <= 0.5:
            assert (record["predict"], record["radius"]) == (None, None)
        else:
            assert record["radius"] == pytest.approx(SIGMA * stats.norm.ppf(bound), rel=1e-5)
            assert record["radius"] <= SIGMA * stats.norm.ppf(bound) * (1 + 1e-9)


def test_table_and_records_say_the_same_and_the_table_rounds_down(run: Run, first: Run, abstained: Run) -> None:
    for finished in (run, first, abstained):
        for row, record in zip(finished.rows, finished.records, strict=True):
            assert int(row["idx"]) == record["idx"]
            assert int(row["label"]) == (-1 if record["label"] is None else record["label"])
            assert int(row["predict"]) == (-1 if record["predict"] is None else record["predict"])
            assert int(row["correct"]) == int(record["correct"] or False)
            assert 0 <= (record["radius"] or 0.0) - float(row["radius"]) < 0.001


def test_an_image_is_correct_when_its_certified_label_is_its_own(run: Run, first: Run) -> None:
    for record in [*run.records, *first.records]:
        assert record["correct"] is (record["predict"] == record["label"])


def test_the_printed_accuracy_is_what_analyze_py_computes_from_the_table(tmp_path: Path) -> None:
    """locuslab/smoothing, code/analyze.py: mean of (correct & radius >= r)."""
    finished = certify(tmp_path / "run", *TINY, "--max", 3, "--seed", 2, "--json")
    summary = json.loads(finished.done.stdout)
    reach = SIGMA * stats.norm.ppf(stats.beta.ppf(ALPHA, N, 1))
    rows = finished.rows
    expected = {
        f"{r:g}": sum(int(row["correct"]) and float(row["radius"]) >= r for row in rows) / len(rows)
        if r < reach
        else None
        for r in RADII
    }
    assert summary["accuracy"] == expected
    assert summary["done"] == summary["asked"] == 3
    assert summary["abstained"] == sum(row["predict"] == "-1" for row in rows)
    assert summary["out"] == str(finished.out)


def test_times_stand_apart(run: Run) -> None:
    timing = [json.loads(line) for line in (run.out / "timing.jsonl").read_text().splitlines()]
    assert [line["idx"] for line in timing] == [record["idx"] for record in run.records]
    for line, row in zip(timing, run.rows, strict=True):
        assert line["unet_calls"] == N0 + N
        hours, minutes, seconds = row["time"].split(":")
        assert 3600 * int(hours) + 60 * int(minutes) + float(seconds) == pytest.approx(line["seconds"], abs=1e-5)


def test_results_go_to_stdout_and_progress_to_stderr(run: Run) -> None:
    assert "certified accuracy of 4 images" in run.done.stdout
    assert str(run.out) in run.done.stdout
    assert "UNet calls" not in run.done.stdout
    assert "4/4 images" in run.done.stderr


def test_the_key_is_the_owners_and_the_manifest_commits_to_it(run: Run) -> None:
    key = run.out / "secret.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    secret = bytes.fromhex(key.read_text().strip())
    assert len(secret) == 32
    assert run.manifest["identity"]["secret_commitment"] == hashlib.sha256(secret).hexdigest()
    assert run.manifest["identity"]["public_seed"] is None


def test_nothing_but_the_key_gives_the_secret_away(run: Run) -> None:
    secret = (run.out / "secret.key").read_text().strip()
    others = [path for path in run.out.iterdir() if path.name != "secret.key"]
    assert all(secret.encode() not in path.read_bytes() for path in others)
    assert all(bytes.fromhex(secret) not in path.read_bytes() for path in others)
    assert secret not in run.done.stdout + run.done.stderr


def test_a_seeded_run_is_marked_as_public(first: Run) -> None:
    assert first.manifest["identity"]["public_seed"] == 7
    assert "public" in first.manifest["provenance"]["seed_note"]


def test_the_manifest_says_what_was_run(run: Run, first: Run) -> None:
    identity = run.manifest["identity"]
    for name, role in (("unet.onnx", "engine"), ("classifier.onnx", "classifier")):
        sidecar = hashlib.sha256((ENGINES / f"{name}.json").read_bytes()).hexdigest()
        sha256 = hashlib.sha256((ENGINES / name).read_bytes()).hexdigest()
        assert identity[role] == {"name": name, "sha256": sha256, "sidecar_sha256": sidecar}
    assert identity["images"]["count"] == 4
    assert (identity["sigma"], identity["sigma_in_network_units"]) == (SIGMA, 2 * SIGMA)
    assert (identity["steps"], identity["votes"]) == (1, 1)
    assert (first.manifest["identity"]["steps"], first.manifest["identity"]["votes"]) == (2, 3)
    rule = identity["rule"]
    assert (rule["method"], rule["n0"], rule["n"], rule["alpha"]) == ("fixed", N0, N, ALPHA)
    assert identity["alpha_bar"] == pytest.approx(1 / (1 + (2 * SIGMA) ** 2))
    assert 0 < rule["alpha_charged_for_noise"] < ALPHA / 1e6
    assert run.manifest["identity_sha256"] == canonical_sha256(identity)
    assert (identity["timesteps"], identity["conditioning"]) == ([258], [258.0])
    assert identity["coefficients"][0]["signal"] == pytest.approx(math.sqrt(identity["alpha_bar"]), rel=1e-6)
    assert (identity["schedule"]["steps"], identity["variance"]) == (1000, "fixed_small")
    assert identity["class_names"][0] == "T-shirt/top"
    provenance = run.manifest["provenance"]
    assert provenance["device"]["batch"] == 4
    assert "--skip" in provenance["argv"]
    assert {"densepure-rt", "numpy", "onnxruntime", "scipy"} <= set(provenance["versions"])
    assert provenance["parity"] == json.loads((ENGINES / "unet.onnx.json").read_text())["accuracy"]


@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (64, 1), (7, 2)])
def test_records_are_byte_for_byte_equal_for_any_batch_and_threads(
    first: Run, seeded: Callable[..., Run], batch: int, threads: int
) -> None:
    again = seeded(f"batch-{batch}-threads-{threads}", batch, threads)
    assert (again.out / "results.jsonl").read_bytes() == (first.out / "results.jsonl").read_bytes()


def test_another_seed_draws_other_noise(first: Run, seeded: Callable[..., Run]) -> None:
    other = seeded("other", batch=7, threads=1, seed=8)
    ours, theirs = (found.manifest["identity"]["secret_commitment"] for found in (first, other))
    assert ours != theirs


def test_a_run_of_another_identity_is_refused_and_stays_as_it_is(run: Run) -> None:
    before = {path.name: path.read_bytes() for path in run.out.iterdir() if path.name != "ledger.sqlite"}
    again = certify(run.out, *TINY, "--max", 1).done
    assert (again.returncode, again.stdout) == (2, "")
    differs = "(--skip 3 there, 1 now; --max 4 there, 1 now; images.count: 4 there, 1 now"
    assert f"error: {run.out} already holds a run of another identity {differs}" in again.stderr
    assert "--out" in again.stderr
    assert {path.name: path.read_bytes() for path in run.out.iterdir() if path.name != "ledger.sqlite"} == before


def test_a_finished_run_that_is_run_again_stays_as_it_is(run: Run) -> None:
    def files() -> dict[str, bytes]:  # the ledger's pages may differ; the seal has the hash of its content
        return {path.name: path.read_bytes() for path in run.out.iterdir() if path.name != "ledger.sqlite"}

    before = files()
    for option in ((), ("--resume",)):
        again = certify(run.out, *TINY, "--skip", 3, "--max", 4, *option).done
        assert again.returncode == 0, again.stderr
        assert again.stdout == run.done.stdout
        assert files() == before


def test_to_resume_what_is_not_there_starts_it_and_without_a_folder_is_refused(tmp_path: Path) -> None:
    started = certify(tmp_path / "new", *TINY, "--max", 1, "--resume").done
    assert started.returncode == 0
    assert (tmp_path / "new" / "seal.json").exists()
    refused = densepure_rt("certify", *TINY, "--max", 1, "--resume")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "name its folder with --out" in refused.stderr


def test_max_is_a_count_after_skip(run: Run) -> None:
    assert len(run.records) == 4
    assert [record["idx"] for record in run.records] == [0, 60, 120, 180]  # the shipped ones are every 20th


def test_an_image_whose_noise_decides_is_abstained_on(abstained: Run) -> None:
    for row, record in zip(abstained.rows, abstained.records, strict=True):
        assert record["n_a"] < N / 2
        assert (row["predict"], row["radius"], row["correct"]) == ("-1", "0.0", "0")
        assert (record["predict"], record["radius"]) == (None, None)


def test_unlabelled_images_have_no_accuracy(abstained: Run) -> None:
    for row, record in zip(abstained.rows, abstained.records, strict=True):
        assert row["label"] == "-1"
        assert (record["label"], record["correct"]) == (None, None)
    summary = json.loads(abstained.done.stdout)
    assert summary["accuracy"] is None
    assert summary["abstained"] == 2


def test_a_classifier_that_is_named_is_the_one_that_is_used(abstained: Run, coin: Path) -> None:
    found = abstained.manifest["identity"]["classifier"]
    assert (found["name"], found["sha256"]) == ("coin.onnx", hashlib.sha256(coin.read_bytes()).hexdigest())


def test_without_steps_the_unet_is_not_called(abstained: Run) -> None:
    for line in (abstained.out / "timing.jsonl").read_text().splitlines():
        timing = json.loads(line)
        assert (timing["unet_calls"], timing["classifier_calls"]) == (0, N0 + N)
    identity = abstained.manifest["identity"]
    assert (identity["timesteps"], identity["alpha_bar"], identity["votes"]) == ([], 1.0, 1)


@pytest.mark.parametrize("name", ["run[/b]", "run[red]", "run with spaces"])
def test_a_folder_is_named_as_it_was_given(tmp_path: Path, name: str) -> None:
    finished = certify(tmp_path / name, "--n", 20, "--steps", 0, "--max", 1, "--batch", 4, "--threads", 1)
    assert finished.done.returncode == 0
    assert str(tmp_path / name) in finished.done.stdout
    assert len(finished.rows) == 1


def test_what_is_left_out_of_a_folder_is_on_screen_and_in_the_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("0", "1", "2"):
        (folder / name).mkdir(parents=True)
    for name in ("0/a.tif", "1/b.pgm"):
        Image.new("L", (28, 28), 90).save(folder / name)
    (folder / "0" / "c.gif").write_bytes(b"")
    finished = certify(tmp_path / "run", "--images", folder, "--n", 20, "--steps", 0, "--batch", 4, "--threads", 1)
    assert finished.done.returncode == 0, finished.done.stderr
    assert len(finished.rows) == 2
    said = "left out    no images by their names: 1 (0/c.gif); class folders without an image: 1 (2)"
    assert said in finished.done.stderr.splitlines()
    assert finished.manifest["provenance"]["left_out"] == [
        {"why": "no images by their names", "count": 1, "first": ["0/c.gif"]},
        {"why": "class folders without an image", "count": 1, "first": ["2"]},
    ]
    assert finished.manifest["provenance"]["grey_repeated"] == 0


def test_grey_images_that_are_repeated_are_on_screen_and_in_the_manifest() -> None:
    """Of the images that are taken: one of the two that are grey."""
    shipped = replace(open_images(None, (1, 28, 28), [str(label) for label in range(10)]), grey=frozenset({0, 7}))
    chosen = shipped.select(limit=3)
    assert notes_on(chosen) == {"grey": "1 grey image repeated to three channels"}
    with load(threads=1, batch=4) as classifier:
        assert manifest_of(classifier, chosen, Settings(), UNLIMITED, 1).provenance.grey_repeated == 1


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 400 images to which Ctrl-C is sent once the first line is there."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    with started("certify", *TINY, "--max", 400, "--out", out) as running:
        table = out / "results.tsv"
        wait_for(lambda: table.exists() and table.read_text().count("\n") > 1, running)
        assert (out / "manifest.json").exists()
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=180)
    return Run(subprocess.CompletedProcess(running.args, running.returncode, stdout, stderr), out)


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is sent in another way there")
class TestCtrlC:
    def test_it_exits_130_with_one_message_and_no_traceback(self, interrupted: Run) -> None:
        assert interrupted.done.returncode == 130
        assert "Traceback" not in interrupted.done.stderr
        assert f"stopped after {len(interrupted.rows)} of 400 images" in interrupted.done.stderr
        assert str(interrupted.out) in interrupted.done.stderr.splitlines()[-1]

    def test_what_was_done_is_kept_in_complete_lines(self, interrupted: Run) -> None:
        for name in ("results.tsv", "results.jsonl", "timing.jsonl"):
            assert (interrupted.out / name).read_text().endswith("\n")
        assert 1 <= len(interrupted.rows) < 400
        assert [int(row["idx"]) for row in interrupted.rows] == [record["idx"] for record in interrupted.records]

    def test_what_is_summed_up_is_what_was_done(self, interrupted: Run) -> None:
        assert f"certified accuracy of {len(interrupted.rows)} image" in interrupted.done.stdout


def test_the_manifest_is_there_before_the_first_result(tmp_path: Path) -> None:
    """The first image takes far longer than we watch: only what stands at its beginning can be on disk."""
    out = tmp_path / "run"
    with started(
        "certify", "--n", 100_000, "--steps", 2, "--batch", 4, "--threads", 1, "--max", 1, "--out", out
    ) as running:
        wait_for((out / "timing.jsonl").exists, running)
        running.kill()  # without a chance to tidy up
    assert json.loads((out / "manifest.json").read_text())["identity"]["rule"]["n"] == 100_000
    assert (out / "secret.key").exists()
    assert (out / "results.jsonl").read_text() == ""


# Cheap images, some of which take long: the classifier alone, at little noise.
KILLED = "--steps 0 --sigma 0.1 --radii 0,0.05,0.1 --n 1500 --seed 3 --batch 8 --threads 1".split()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL there")
@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_never_was(tmp_path: Path, times: int) -> None:
    options, chance = (*KILLED, "--max", 4 * times), random.Random(times)
    uninterrupted = certify(tmp_path / "uninterrupted", *options)
    out = tmp_path / "run"
    for _ in range(times):
        kill_at_a_random_moment(*options, out=out, chance=chance)
    final = certify(out, *options)
    assert final.done.returncode == 0, final.done.stderr
    for name in ("results.jsonl", "summary.json"):
        assert (out / name).read_bytes() == (uninterrupted.out / name).read_bytes()
    timeless = [[list(row.values())[:5] for row in found.rows] for found in (final, uninterrupted)]
    assert timeless[0] == timeless[1]
