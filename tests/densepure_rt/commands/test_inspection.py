from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from densepure_rt.commands.inspect import inspect
from densepure_rt.commands.inspection import inspection, layer_rows, onnx_graph
from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.runtime import gpu, tensorrt_api
from densepure_rt.runtime.bundle import shipped_engine
from tests.support.bundles import ENGINES, engines_copied
from tests.support.cli import Done, in_a_process, sha256
from tests.support.plans import a_plan, put_bundle

NAMES = ("unet.onnx", "classifier.onnx")


def cli(*arguments: str | Path, blocked: tuple[str, ...] = ()) -> Done:
    return in_a_process("inspect", *arguments, without=blocked)


def sidecar_of(engine: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(Path(f"{engine}.json").read_text())
    return written


def leaves(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield place, value
        return
    for name, inner in value.items():
        yield from leaves(f"{place}.{name}", inner)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the shipped bundle, to be damaged."""
    return engines_copied(tmp_path).parent


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_the_sidecar_is_printed(name: str) -> None:
    done = cli(ENGINES / name)
    assert (done.returncode, done.stderr) == (0, "")
    printed = dict(line.split(None, 1) for line in done.stdout.splitlines())
    for field, value in sidecar_of(ENGINES / name).items():
        if field == "schema_version":
            continue
        for place, content in leaves(field, value):
            expected = ", ".join(map(str, content)) if isinstance(content, list) else str(content)
            assert printed[place].strip() == expected
    assert printed["check.matches"].strip() == "True"
    assert printed["check.sha256"].strip() == sha256(ENGINES / name)


@pytest.mark.parametrize("name", NAMES)
def test_json_holds_the_sidecar_and_the_check(name: str) -> None:
    done = cli(ENGINES / name, "--json", blocked=("onnx",))
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    written = sidecar_of(ENGINES / name)
    del written["schema_version"]
    size = (ENGINES / name).stat().st_size
    assert report.pop("check") == {"sha256": sha256(ENGINES / name), "matches": True, "bytes": size}
    assert report == written


@pytest.mark.parametrize("name", NAMES)
def test_the_sidecar_can_be_named_instead_of_the_engine(name: str) -> None:
    assert inspection(ENGINES / f"{name}.json") == inspection(ENGINES / name)


def test_the_graph_is_described_as_onnx_itself_reads_it() -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(ENGINES / "unet.onnx").graph
    found = inspection(ENGINES / "unet.onnx")["graph"]
    assert found["nodes"] == len(graph.node) == sum(found["operators"].values())
    assert [line.split(":")[0] for line in found["inputs"]] == [value.name for value in graph.input]
    assert [line.split(":")[0] for line in found["outputs"]] == [value.name for value in graph.output]
    assert found["operators"]["Conv"] == sum(node.op_type == "Conv" for node in graph.node)


def test_no_engine_library_and_no_onnx_are_needed() -> None:
    blocked = ("onnx", "onnxruntime", "torch", "tensorrt", "google.protobuf")
    done = cli(ENGINES / "unet.onnx", blocked=blocked)
    assert (done.returncode, done.stderr) == (0, "")
    assert "check.matches" in done.stdout
    assert "graph." not in done.stdout


@pytest.mark.parametrize("as_json", [False, True])
def test_a_changed_byte_exits_1_and_names_both_hashes(bundle: Path, as_json: bool) -> None:
    engine = bundle / "unet.onnx"
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)
    done = cli(engine, *(["--json"] if as_json else []))
    assert done.returncode == 1
    assert sha256(engine) in done.stdout
    assert sidecar_of(engine)["file"]["sha256"] in done.stdout
    assert done.stderr.startswith("error: ")
    assert "sidecar" in done.stderr
    if as_json:
        assert json.loads(done.stdout)["check"]["matches"] is False


def test_a_truncated_engine_exits_1(bundle: Path) -> None:
    os.truncate(bundle / "classifier.onnx", 1000)
    done = cli(bundle / "classifier.onnx")
    assert done.returncode == 1
    assert "damaged" in done.stderr


def test_an_engine_that_onnx_cannot_read_is_no_traceback(bundle: Path) -> None:
    """The hash is right, the content is not ONNX: another format, or a sidecar made for a damaged file."""
    engine = bundle / "unet.onnx"
    os.truncate(engine, 1000)
    fields = sidecar_of(engine)
    fields["file"]["sha256"] = sha256(engine)
    Path(f"{engine}.json").write_text(json.dumps(fields))
    done = cli(engine)
    assert done.returncode in (0, 1)
    assert "check.matches" in done.stdout or "unet.onnx" in done.stderr


@pytest.mark.parametrize("name", ["nothing.onnx", "nothing.onnx.json"])
def test_a_missing_file_exits_2_and_says_how_to_get_one(tmp_path: Path, name: str) -> None:
    done = cli(tmp_path / name)
    assert (done.returncode, done.stdout) == (2, "")
    assert str(tmp_path / "nothing.onnx") in done.stderr
    assert "densepure-rt export" in done.stderr
    assert f"such as {shipped_engine()}, which ships" in done.stderr  # from a wheel too


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no step engine"):
        inspection(tmp_path)


def test_the_folder_of_a_bundle_stands_for_its_step_engine() -> None:
    assert inspection(ENGINES) == inspection(ENGINES / "unet.onnx")


def test_a_missing_sidecar_is_refused_by_name(bundle: Path) -> None:
    (bundle / "unet.onnx.json").unlink()
    with pytest.raises(UsageError, match=r"unet\.onnx\.json.*copy it along"):
        inspection(bundle / "unet.onnx")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"schema_version": 99}', '{"schema_version": 1}']
)
def test_a_sidecar_of_another_kind_is_refused(bundle: Path, text: str) -> None:
    (bundle / "unet.onnx.json").write_text(text)
    with pytest.raises(CheckFailed, match=r"unet\.onnx\.json.*export the bundle again"):
        inspection(bundle / "unet.onnx")


def test_a_binary_sidecar_is_refused(bundle: Path) -> None:
    (bundle / "unet.onnx.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckFailed, match="not a text file"):
        inspection(bundle / "unet.onnx")


# As TensorRT 10 and 11 write them; a plan that was built elsewhere may hold names alone.
LAYERS: list[dict[str, Any]] = [
    {
        "Name": "node_conv2d + node_relu",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "mean", "Dimensions": [64, 1, 28, 28], "Format/Datatype": "Row major linear FP32"}],
        "Outputs": [{"Name": "relu", "Dimensions": [64, 32, 28, 28], "Format/Datatype": "Channel major FP16"}],
        "TacticName": "sm80_xmma_fprop_implicit_gemm",
    },
    {
        "Name": "softmax\x1b[31m",
        "LayerType": "SoftMax",
        "Outputs": [{"Name": "logits", "Dimensions": [64, 10], "Format": "Linear", "DataType": "FP32"}],
    },
    {"Name": "a name alone"},
]


def test_layers_are_shown_in_columns_by_both_forms_of_the_inspectors_words() -> None:
    assert layer_rows(LAYERS)[1:] == [
        (
            "CaskConvolution",
            "Channel major FP16 64x32x28x28",
            "node_conv2d + node_relu",
            "sm80_xmma_fprop_implicit_gemm",
        ),
        ("SoftMax", "FP32 Linear 64x10", r"softmax\x1b[31m", "-"),
        ("-", "-", "a name alone", "-"),
    ]


class Inspected:
    """The bindings of a library that opens every plan."""

    __version__ = "10.16.1.11"
    said = json.dumps({"Layers": [*LAYERS[:2], "a name alone"], "Bindings": ["mean", "logits"]})

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class LayerInformationFormat:
        JSON = 1

    def Runtime(self, logger: Any) -> Any:
        inspector = SimpleNamespace(get_engine_information=lambda form: self.said)
        engine = SimpleNamespace(create_engine_inspector=lambda: inspector) if self.said else None
        return SimpleNamespace(deserialize_cuda_engine=lambda content: engine)


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Inspected]:
    """A plan, a GPU and a library."""
    bindings = Inspected()
    monkeypatch.setattr(tensorrt_api, "import_flavour", lambda flavour: bindings)
    monkeypatch.setattr(gpu, "find", lambda: None)
    return put_bundle(tmp_path, a_plan("tensorrt", version="10.16.1.11")), bindings


@pytest.mark.parametrize("as_json", [False, True])
def test_the_layers_of_a_plan_are_shown_where_its_library_opens_it(
    opened: tuple[Path, Inspected], as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(opened[0], layers=True, as_json=as_json)
    printed = capsys.readouterr().out
    if as_json:
        assert json.loads(printed)["layers"] == LAYERS
        return
    lines = [line.split("  ") for line in printed.splitlines()[-4:]]
    assert lines[0][0] == "type"
    assert lines[1][0] == "CaskConvolution"
    assert printed.splitlines()[-1].startswith("-")
    assert "layers" not in printed


def test_a_library_that_refuses_a_plan_or_speaks_otherwise_ends_in_one_error(opened: tuple[Path, Inspected]) -> None:
    plan, bindings = opened
    bindings.said = "Layers: none"
    with pytest.raises(CheckFailed, match=r"tensorrt 10\.16\.1\.11 describes the layers of unet\.plan in words"):
        inspection(plan, layers=True)
    bindings.said = ""
    with pytest.raises(EnvironmentFault, match=r"tensorrt 10\.16\.1\.11 refuses unet\.plan"):
        inspection(plan, layers=True)


def test_an_onnx_file_has_no_layers_of_tensorrt() -> None:
    with pytest.raises(UsageError, match="`layers`: .*unet.onnx is no plan"):
        inspection(ENGINES / "unet.onnx", layers=True)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU here")
def test_the_layers_of_a_plan_need_its_gpu_and_the_error_says_so(tmp_path: Path) -> None:
    """The library, which is here, opens it nowhere else: `test_a_plan_that_was_really_built...`."""
    done = cli(put_bundle(tmp_path, a_plan("tensorrt-rtx")), "--layers")
    assert (done.returncode, done.stdout) == (3, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no NVIDIA GPU here: the driver library libcuda.so.1 is not found")


def test_ctrl_c_while_onnx_is_imported_is_no_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code makes an ImportError of it."""
    (tmp_path / "onnx.py").write_text("raise ImportError('initialization failed') from KeyboardInterrupt()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnx", raising=False)
    with pytest.raises(KeyboardInterrupt):
        onnx_graph(tmp_path / "unet.onnx")
