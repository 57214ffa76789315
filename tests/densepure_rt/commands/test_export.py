from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from densepure_rt.commands.console import finite, in_options, write_report
from densepure_rt.commands.export import folder_of
from densepure_rt.errors import EnvironmentFault
from densepure_rt.export.models.model_options import ModelOptions
from densepure_rt.runtime.bundle import shipped_engine
from tests.support.bundles import engines_copied
from tests.support.cli import Done, cli, commands, edit_sidecar, one_line, refused, sha256

ENGINES = shipped_engine().parent
PARITY = "parity --max 1 --n 4 --steps 1 --batch 4 --threads 1".split()
PROCEDURE = "bench --procedure --max 1 --steps 2 --votes 2 --n 64 --threads 1".split()
BENCH = "bench --rounds 2 --batch 2 --threads 1 --no-compile".split()
OTHER_MODEL = "--unet none --image-size 1x28x28".split()
WITH_MODELS = ("export", "parity", "bench")
Here = Callable[..., Done]


@pytest.fixture(scope="module")
def perturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped bundle, one convolution of its UNet 2 % too strong; its sidecar claims the original weights."""
    folder = tmp_path_factory.mktemp("perturbed")
    engine = engines_copied(folder)
    model = onnx.load(engine)
    weights = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 4)
    stronger = 1.02 * onnx.numpy_helper.to_array(weights)
    weights.CopyFrom(onnx.numpy_helper.from_array(stronger.astype(np.float32), weights.name))
    onnx.save(model, engine)
    edit_sidecar(engine, file={"name": "unet.onnx", "sha256": sha256(engine)})
    return engine


# the models of every command


@pytest.mark.parametrize("name", WITH_MODELS)
def test_every_model_option_is_there_once(name: str) -> None:
    given = [parameter.name for parameter in commands()[name].params]
    for option in dataclasses.fields(ModelOptions):
        assert given.count(option.name) == 1, option.name
    flags = [flag for parameter in commands()[name].params for flag in (*parameter.opts, *parameter.secondary_opts)]
    assert len(flags) == len(set(flags))
    assert "models" not in given


@pytest.mark.parametrize("name", WITH_MODELS)
def test_model_options_are_the_same_on_every_command(name: str) -> None:
    def described(command: str) -> dict[str, tuple[Any, ...]]:
        names = {option.name for option in dataclasses.fields(ModelOptions)}
        return {
            parameter.name: (parameter.opts, parameter.help, parameter.default)
            for parameter in commands()[command].params
            if parameter.name in names
        }

    found = described(name)
    assert found == described("export")
    for option in dataclasses.fields(ModelOptions):
        assert found[option.name][0] == ["--" + option.name.replace("_", "-")]


def test_a_bundle_goes_into_a_folder_named_after_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the weights that ship are exported to `engines`, which a checkout tracks."""
    (tmp_path / "models" / "ddpm").mkdir(parents=True)
    (tmp_path / "models" / "ema_0.9999.pt").touch()
    monkeypatch.chdir(tmp_path / "models" / "ddpm")
    for given, folder in (
        (ModelOptions(), "engines"),
        (ModelOptions(unet="mymodel:unet", classifier="other:classifier"), "mymodel"),
        (ModelOptions(unet="package.mymodel:make.unet"), "mymodel"),
        (ModelOptions(unet="../ddpm/", classifier="timm:vit"), "ddpm"),
        (ModelOptions(unet=".", classifier="timm:vit"), "ddpm"),
        (ModelOptions(unet="../ema_0.9999.pt"), "ema_0.9999"),
        (ModelOptions(classifier="timm:vit_base.augreg"), "vit_base.augreg"),
        (ModelOptions(unet="none", classifier="timm:hf_hub:org/vit"), "vit"),
        (ModelOptions(unet="none", classifier="mymodel:classifier"), "mymodel"),
        (ModelOptions(weights=Path("..")), "models"),
    ):
        assert folder_of(given) == Path(folder)
    for engine in (Path("../ddpm"), Path("../ddpm/unet.onnx")):
        assert folder_of(ModelOptions(), engine) == Path("../ddpm")


def test_the_options_that_were_given_are_named() -> None:
    assert ModelOptions().given() == {}
    given = ModelOptions(unet="x.pt", num_heads=4, antialias=False).given()
    assert list(given.values()) == ["`unet`", "`num_heads`", "`antialias`=False"]
    assert list(map(in_options, given.values())) == ["--unet", "--num-heads", "--no-antialias"]


@pytest.mark.parametrize("name", WITH_MODELS)
def test_without_torch_the_exit_is_3_with_the_pip_command(name: str) -> None:
    refused(cli(name, without=("torch",)), 3, f"{name} needs PyTorch", "pip install 'densepure-rt[cpu,export]'")


# export --target triton


def test_triton_is_packaged_without_torch_onnx_and_onnxruntime(tmp_path: Path) -> None:
    done = cli("export", "--target", "triton", cwd=tmp_path, without=("torch", "onnx", "onnxruntime"))
    assert done.returncode == 0, done.stderr
    assert "wrote unet, classifier, predict, certify to models" in one_line(done.stdout)
    assert (tmp_path / "models/certify/config.pbtxt").is_file()
    refused(cli("export", "--target", "triton", cwd=tmp_path), 2, "already has unet", "--force")
    with (tmp_path / "models/certify/config.pbtxt").open("a") as config:
        config.write("# edited\n")
    again = one_line(cli("export", "--target", "triton", "--force", cwd=tmp_path).stderr)
    assert "kept in models/certify/config.pbtxt.old: set again what you had edited" in again


def test_the_result_of_packaging_is_json_for_programs(tmp_path: Path) -> None:
    command = ["export", "--target", "triton", "--engine", ENGINES / "unet.onnx", "--batch", 8, "--json"]
    done = cli(*command, "--out", tmp_path / "models")
    assert json.loads(done.stdout) == {
        "triton": [str(tmp_path / "models" / name) for name in ("unet", "classifier", "predict", "certify")]
    }
    assert '"batch" value: { string_value: "8" }' in (tmp_path / "models/predict/config.pbtxt").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "triton,onnx"], ["--target onnx", "as it is"]),
        (["--target", "triton", "--precision", "int8"], ["--precision", "as it is"]),
        (["--target", "triton", "--unet", "none"], ["--unet", "as it is"]),
        (["--target", "triton", "--tf32"], ["--tf32", "as it is"]),
        (["--target", "triton", "--batch", "8,9"], ["one batch with triton"]),
        (["--target", "triton", "--timing-cache-strict"], ["--timing-cache-strict", "as it is"]),
        (["--target", "triton", "--batch", "0"], ["--batch 0", "between 1 and"]),
        (["--target", "triton", "--engine", "none.onnx"], ["no engine at none.onnx"]),
        (["--target", "triton", "--engine", ENGINES / "classifier.onnx"], ["is a classifier"]),
        (["--engine", ENGINES / "unet.onnx"], ["--engine", "--target triton"]),
    ],
)
def test_what_packaging_cannot_do_is_refused_and_leaves_nothing(
    tmp_path: Path, arguments: list[str | Path], words: list[str]
) -> None:
    refused(cli("export", *arguments, cwd=tmp_path), 2, *words)
    assert list(tmp_path.iterdir()) == []


# parity


def test_parity_of_the_shipped_model_is_exit_0_with_a_report_and_a_picture(tmp_path: Path) -> None:
    done = cli(*PARITY, "--json", "--out", tmp_path / "new" / "folder")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["engine"] == str(shipped_engine())
    assert (report["precision"], report["sigma"], report["failures"]) == ("fp32", 0.5, [])
    (step,) = report["steps"]
    assert step["step"] == 0
    assert 0 < step["relative_l2"] < 1e-5
    assert report["chain_relative_l2"] < 1e-5
    assert report["labels"] == report["votes"] == {"differ": 0, "total": 4}
    (certificate,) = report["certificates"]
    assert (certificate["differ"], certificate["n"]) == (0, 3)
    assert "shown" not in report
    assert json.loads((tmp_path / "new" / "folder" / "parity.json").read_text()) == report
    with Image.open(tmp_path / "new" / "folder" / "parity.png") as picture:
        picture.load()
        assert picture.format == "PNG"


def test_parity_prints_every_level_for_a_person(here: Here) -> None:
    done = here(*PARITY, "--steps", 2, "--votes", 2, "--n", 3, "--max", 2)
    assert done.returncode == 0, done.stderr
    printed = one_line(done.stdout)
    assert "unet.onnx (fp32) against PyTorch" in printed
    for level in ("step 1, timestep", "step 2, timestep", "whole chain", "labels", "votes"):
        assert level in printed
    assert printed.count("0 6 ") == 2  # labels and votes: 2 images, 3 samples
    assert "abstains" in printed  # three samples certify nothing
    assert "2/2 images" in done.stderr
    assert "error" not in done.stderr


def test_parity_says_which_radius_it_transfers(here: Here) -> None:
    """With alpha = 0.4, eleven of eleven samples bound p by 0.2^(1/11), and eta is what is missing from 1."""
    done = here(*PARITY, "--n", 12, "--alpha", 0.4, "--json")
    (certificate,) = json.loads(done.stdout)["certificates"]
    assert certificate["n"] == 11
    assert certificate["eta"] == pytest.approx(1 - 0.2 ** (1 / 11), rel=1e-9)
    if certificate["transferred"] is not None:
        assert certificate["transferred"] < min(certificate["torch"], certificate["engine"])


@pytest.mark.parametrize("as_json", [False, True])
def test_an_engine_that_is_not_the_model_is_exit_1_with_the_reasons(
    here: Here, perturbed: Path, tmp_path: Path, as_json: bool
) -> None:
    done = here(*PARITY, "--engine", perturbed, "--out", tmp_path, *(["--json"] if as_json else []))
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors[0].startswith("error: step 1: relative L2 ")
    assert errors[0].endswith("fp32 allows 1e-05")
    assert errors[1].startswith("error: the chain: ")
    report = json.loads((tmp_path / "parity.json").read_text())
    assert report["failures"] == [line.removeprefix("error: ") for line in errors]
    assert 1e-4 < report["steps"][0]["relative_l2"] < 1e-1
    assert (tmp_path / "parity.png").is_file()
    assert "against PyTorch" in done.stdout or json.loads(done.stdout) == report


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--provider", "nonsense"], 2, ["--provider nonsense", "cpu, cuda, tensorrt"]),
        (["--n", 1], 2, ["--n 1", "two"]),
        (["--n", 0], 2, ["got", "0"]),
        (["--max", 0], 2, ["0 images"]),
        (["--max", 100_000], 2, ["100000", "holds"]),
        (["--steps", -1], 2, ["steps"]),
        (["--votes", 0], 2, ["votes"]),
        (["--alpha", 0.5], 2, ["alpha"]),
        (["--sigma", 0], 2, ["sigma"]),
        (["--batch", 0], 2, ["--batch"]),
        (["--threads", 0], 2, ["--threads"]),
        (["--engine", "none.onnx"], 2, ["none.onnx", "densepure-rt export"]),
        (["--images", "none.npz"], 2, ["none.npz"]),
        (["--timestep-rule", "nonsense"], 2, ["--timestep-rule nonsense"]),
        (OTHER_MODEL, 2, ["unet.onnx was exported from weights", "--unet", "--engine"]),
        ([*OTHER_MODEL, "--images", "none.npz"], 2, ["--unet"]),  # not of the images of the model that is not meant
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value),
)
def test_parity_refuses_what_it_cannot_do(here: Here, options: list[object], code: int, words: list[str]) -> None:
    refused(here(*PARITY, *options), code, *words)


def test_a_folder_that_cannot_be_written_is_said_before_the_work(here: Here, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        done = here(*PARITY, "--out", out)
        refused(done, 3, f"cannot write {out}", "--out")
        assert "images" not in done.stderr


def test_a_report_that_cannot_be_written_after_all_is_one_plain_error(tmp_path: Path) -> None:
    (tmp_path / "parity.json").mkdir()
    with pytest.raises(EnvironmentFault, match=r"cannot write .*--out"):
        write_report(tmp_path, "parity", {}, lambda path: None)


def test_without_matplotlib_the_numbers_are_there_and_the_picture_is_left_out(
    here: Here, perturbed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And a mismatch is still what the exit code says."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for engine, code in (([], 0), (["--engine", perturbed], 1)):
        out = tmp_path / str(code)
        done = here(*PARITY, *engine, "--json", "--out", out)
        assert done.returncode == code
        assert "the picture was left out: the picture needs matplotlib" in done.stderr
        assert "pip install 'densepure-rt[report]'" in done.stderr
        assert json.loads(done.stdout) == json.loads((out / "parity.json").read_text())
        assert not (out / "parity.png").exists()


def test_an_engine_is_compared_only_with_the_model_as_it_was_exported(here: Here) -> None:
    done = here(*PARITY, "--timestep-rule", "carlini")
    refused(done, 2, "exported with timestep_rule nearest", "carlini", "repeat the options of the export")


def test_a_report_holds_null_where_a_number_is_none() -> None:
    assert finite({"a": [math.nan, 1.0, (math.inf,)], "b": "x", "c": 3}) == {"a": [None, 1.0, [None]], "b": "x", "c": 3}


# bench


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("densepure_rt.export.compare.machine.PEAK_REPEATS", 1)
    monkeypatch.setattr("densepure_rt.export.compare.bench.STEADY", 1e-3)


@pytest.mark.usefixtures("quick")
def test_bench_as_json_times_every_route_and_stage(here: Here) -> None:
    done = here(*BENCH, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["engine"] == str(shipped_engine())
    assert found["engine_sha256"] == sha256(shipped_engine())
    assert (found["batch"], found["rounds"], found["threads"], found["clock"]) == (2, 2, 1, "core")
    assert [route["name"] for route in found["routes"]][:2] == ["engine", "PyTorch eager"]
    assert found["routes"][-1]["absent"] == "left out"
    assert found["routes"][1]["engine_speedup"]["median"] > 0
    assert sum(stage["share"] for stage in found["stages"]) == pytest.approx(1)
    assert found["relative_l2"] < 1e-5
    assert "timing 2 rounds" in done.stderr


@pytest.mark.usefixtures("quick")
def test_bench_prints_tables_for_a_person(here: Here) -> None:
    done = here(*BENCH, "--sigma", 0.25)
    assert done.returncode == 0, done.stderr
    for word in ("PyTorch eager", "torch.compile: left out", "sigma 0.25", "smoothing noise", "of peak"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--provider", "nonsense"], 2, ["--provider nonsense", "cpu, cuda, tensorrt"]),
        (["--rounds", 0], 2, ["--rounds 0"]),
        (["--batch", 0], 2, ["--batch 0"]),
        (["--threads", 0], 2, ["--threads 0"]),
        (["--sigma", 0], 2, ["sigma"]),
        (["--engine", "none.onnx"], 2, ["none.onnx", "densepure-rt export"]),
        (OTHER_MODEL, 2, ["unet.onnx was exported from weights", "--unet", "--engine"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value),
)
def test_bench_refuses_what_it_cannot_do(here: Here, options: list[object], code: int, words: list[str]) -> None:
    refused(here(*BENCH, *options), code, *words)


# bench --procedure


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published procedure, smaller still."""
    from densepure_rt.export.compare import procedure
    from densepure_rt.smoothing.settings import Settings

    monkeypatch.setitem(
        procedure.compare.__kwdefaults__ or {},
        "small",
        Settings(steps=2, votes=2, n0=2, n=6, method="fixed"),
    )


@pytest.mark.usefixtures("tiny")
def test_bench_procedure_as_json_has_both_ratios_at_the_top_and_writes_its_report(here: Here, tmp_path: Path) -> None:
    done = here(*PROCEDURE, "--json", "--out", tmp_path / "new" / "folder")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["engine_sha256"] == sha256(shipped_engine())
    assert (found["images"], found["sigma"], found["seed"], found["threads"]) == (1, 0.25, 0, 1)
    assert found["published"]["unet_calls"] == 100_100 * 2 * 2
    assert found["small"]["unet_calls"] == 8 * 2 * 2
    assert found["ours"]["certified"] == 1.0
    assert found["ours"]["settings"]["n"] == 64
    assert found["unet_call_ratio"] > 1000
    assert found["time_ratio"] > 100
    assert "1/1 images" in done.stderr
    assert "n0 2, n 6, K 2, b 2" in done.stderr
    assert json.loads((tmp_path / "new" / "folder" / "procedure.json").read_text()) == found
    with Image.open(tmp_path / "new" / "folder" / "procedure.png") as picture:
        picture.load()
        assert picture.format == "PNG"


@pytest.mark.usefixtures("tiny")
def test_bench_procedure_prints_a_table_and_bars_and_leaves_the_picture_out_without_matplotlib(
    here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = here(*PROCEDURE, "--sigma", 0.2, "--seed", 7, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("seed 7", "the radius 0.2", "published, priced", "share the first step", "times fewer UNet calls"):
        assert words in done.stdout
    assert "the picture was left out: the picture needs matplotlib" in done.stderr
    assert (tmp_path / "procedure.json").is_file()
    assert not (tmp_path / "procedure.png").exists()


@pytest.mark.usefixtures("tiny")
def test_ctrl_c_ends_bench_procedure_in_one_line(here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(work: Iterable[object], total: int) -> Iterator[object]:
        yield next(iter(work))
        raise KeyboardInterrupt

    monkeypatch.setattr("densepure_rt.commands.bench.watched", interrupted)
    done = here(*PROCEDURE, "--max", 2, "--out", tmp_path)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.endswith("\nstopped\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rounds", 3], ["--rounds: only for a single step"]),
        (["--no-compile"], ["--no-compile: only for a single step"]),
        (["--rounds", 3, "--compile"], ["--rounds, --compile: only for a single step"]),
        (["--steps", 0], ["--steps 1 or more"]),
        (["--steps", 10_000], ["steps do not fit"]),
        (["--votes", 0], ["votes"]),
        (["--n", 20], ["--n 20", "ask for --n"]),
        (["--max", 0], ["0 images"]),
        (["--sigma", 0], ["sigma"]),
        (["--batch", 0], ["--batch 0"]),
        (["--threads", 0], ["--threads 0"]),
        (["--provider", "nonsense"], ["--provider nonsense", "cpu, cuda, tensorrt"]),
        (["--engine", "none.onnx"], ["none.onnx", "densepure-rt export"]),
        (OTHER_MODEL, ["a diffusion network"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value),
)
def test_bench_procedure_refuses_what_it_cannot_do(here: Here, options: list[object], words: list[str]) -> None:
    refused(here(*PROCEDURE, *options), 2, *words)


def test_options_of_whole_certifications_are_refused_without_procedure(here: Here, tmp_path: Path) -> None:
    options = {"--max": 1, "--steps": 1, "--votes": 1, "--n": 50, "--seed": 0, "--out": tmp_path / "new"}
    refused(here(*BENCH, *(word for pair in options.items() for word in pair)), 2, ", ".join(options), "--procedure")
    for option, value in options.items():
        refused(here(*BENCH, option, value), 2, f"{option}: only for --procedure")
    assert not (tmp_path / "new").exists()
