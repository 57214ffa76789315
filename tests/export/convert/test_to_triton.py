"""Model repositories: their configurations are parsed with Triton's own schema, which comes with tritonclient."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import onnx
import pytest

from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.export.convert.to_triton import MODELS, export_repository, published
from densepure_rt.runtime.bundle import (
    UNKNOWN,
    Bundle,
    FileRef,
    Plan,
    open_bundle,
    read_sidecar,
    sha256_of,
    shipped_engine,
)
from tests.support.bundles import engines_copied, write_sidecars
from tests.support.triton_config import SCHEMA, config_of


@pytest.fixture(scope="module")
def shipped() -> Bundle:
    return open_bundle(shipped_engine())


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, shipped: Bundle) -> Path:
    out = tmp_path_factory.mktemp("triton") / "models"
    assert export_repository(shipped, out) == [out / name for name in MODELS]
    return out


def planned(folder: Path, batches: tuple[int, ...] = (8, 64), **changed: Any) -> Bundle:
    """The shipped bundle's sidecars around files that pass for plans of TensorRT."""
    shipped = open_bundle(shipped_engine())

    def built(name: str, source: FileRef) -> dict[str, Any]:
        (folder / name).write_bytes(name.encode())
        plan = Plan("tensorrt", "10.16.1", batches, ("9.0",), "NVIDIA H100", source, {"FLOAT": 1}, {})
        return {"file": FileRef(name, sha256_of(folder / name)), "plan": dataclasses.replace(plan, **changed)}

    classifier = dataclasses.replace(shipped.classifier, **built("classifier.plan", shipped.classifier.file))
    unet = dataclasses.replace(shipped.unet, **built("unet.plan", shipped.unet.file), classifier=classifier.file)
    write_sidecars(folder, classifier, unet)
    return open_bundle(folder / "unet.plan")


def other_precision(bundle: Bundle, precision: str) -> Bundle:
    return dataclasses.replace(bundle, unet=dataclasses.replace(bundle.unet, precision=precision))


def test_a_repository_is_a_bundle_with_its_hashes(repository: Path, shipped: Bundle) -> None:
    found = open_bundle(repository / "unet/1/model.onnx", repository / "classifier/1/model.onnx")
    assert found.unet.classifier == found.classifier.file
    with pytest.raises(UsageError, match="lies in another folder: name it with `classifier`"):
        open_bundle(repository / "unet/1/model.onnx")
    for path, sidecar, source in (
        (found.unet_path, found.unet, shipped.unet),
        (found.classifier_path, found.classifier, shipped.classifier),
    ):
        assert sha256_of(path) == sidecar.file.sha256 == source.file.sha256
        assert sidecar.weights_sha256 == source.weights_sha256


@pytest.mark.parametrize("name", MODELS)
def test_every_configuration_is_one_by_tritons_schema(repository: Path, name: str) -> None:
    config = config_of(repository / name)
    assert config.name == name
    assert config.HasField("response_cache")
    assert not config.response_cache.enable
    assert list(config.version_policy.specific.versions) == [1]
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert len(config.instance_group) == 1
    assert config.instance_group[0].kind != SCHEMA.ModelInstanceGroup.KIND_AUTO  # which falls back to a CPU


@pytest.mark.parametrize("name", ["unet", "classifier"])
def test_an_engines_configuration_names_the_tensors_of_its_graph(repository: Path, name: str) -> None:
    config, graph = config_of(repository / name), onnx.load(repository / name / "1/model.onnx").graph
    for told, values in ((config.input, graph.input), (config.output, graph.output)):
        assert [one.name for one in told] == [value.name for value in values]
        for one, value in zip(told, values, strict=True):
            tensor = value.type.tensor_type
            assert SCHEMA.DataType.Name(one.data_type) == "TYPE_FP32"
            assert tensor.elem_type == onnx.TensorProto.FLOAT
            dims = [dim.dim_value or -1 for dim in tensor.shape.dim]
            assert list(one.dims) == dims or (name, one.name) == ("classifier", "logits")
    assert (config.backend, config.platform) == ("onnxruntime", "onnxruntime_onnx")


@pytest.mark.parametrize("name", ["predict", "certify"])
def test_the_two_models_pin_the_engines_and_hold_no_secret(repository: Path, shipped: Bundle, name: str) -> None:
    given = {key: value.string_value for key, value in config_of(repository / name).parameters.items()}
    assert (repository / given["engine"]).is_file()
    assert (given["engine_sha256"], given["classifier_sha256"]) == (
        shipped.unet.file.sha256,
        shipped.classifier.file.sha256,
    )
    assert given["key_file"] == ""
    assert given["batch"] == "32"
    compile((repository / name / "1/model.py").read_text(), "model.py", "exec")


def test_a_plan_runs_on_a_gpu_at_its_largest_batch_by_the_profile_that_has_it(tmp_path: Path) -> None:
    export_repository(planned(tmp_path), tmp_path / "models")
    config = config_of(tmp_path / "models/unet")
    assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
    group = config.instance_group[0]
    assert (group.kind, list(group.gpus), list(group.profile)) == (SCHEMA.ModelInstanceGroup.KIND_GPU, [0], ["1"])
    assert (tmp_path / "models/unet/1/model.plan").read_bytes() == b"unet.plan"
    parameters = config_of(tmp_path / "models/certify").parameters
    assert parameters["batch"].string_value == "64"
    assert parameters["engine"].string_value == "unet/1/model.plan"


def test_what_a_sidecar_says_of_a_plan_cannot_write_configuration(tmp_path: Path) -> None:
    export_repository(planned(tmp_path, gpu='H100\nmax_batch_size: 64\nname: "theirs"'), tmp_path / "models")
    assert (config_of(tmp_path / "models/unet").name, config_of(tmp_path / "models/unet").max_batch_size) == ("unet", 0)


def test_a_batch_that_a_plan_has_is_taken_and_another_one_refused(tmp_path: Path) -> None:
    bundle = planned(tmp_path)
    export_repository(bundle, tmp_path / "models", batch=8)
    assert list(config_of(tmp_path / "models/unet").instance_group[0].profile) == ["0"]
    with pytest.raises(UsageError, match=r"batches of 8, 64, not 32: build them again with `batch`"):
        export_repository(bundle, tmp_path / "others", batch=32)
    assert not (tmp_path / "others").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"flavour": "tensorrt-rtx"}, "a plan of tensorrt-rtx, which Triton does not run: build one with"),
        ({"version": UNKNOWN}, "no sidecar that vouches for it"),
    ],
)
def test_plans_that_triton_cannot_take_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export_repository(planned(tmp_path, **changed), tmp_path / "models")


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_precisions_that_onnx_runtime_computes_wrongly_are_refused(
    tmp_path: Path, shipped: Bundle, precision: str
) -> None:
    with pytest.raises(UsageError, match=f"{precision}, which ONNX Runtime does not run rightly"):
        export_repository(other_precision(shipped, precision), tmp_path / "models")


def test_weights_beside_a_graph_come_along_under_their_name(tmp_path: Path, shipped: Bundle) -> None:
    engines_copied(tmp_path)
    model = onnx.load(tmp_path / "unet.onnx")
    onnx.save(model, tmp_path / "unet.onnx", save_as_external_data=True, location="unet.onnx.data")
    sidecar = dataclasses.replace(
        shipped.unet,
        file=FileRef("unet.onnx", sha256_of(tmp_path / "unet.onnx")),
        data=FileRef("unet.onnx.data", sha256_of(tmp_path / "unet.onnx.data")),
    )
    write_sidecars(tmp_path, sidecar)
    export_repository(open_bundle(tmp_path / "unet.onnx"), tmp_path / "models")
    folder = tmp_path / "models/unet/1"
    assert sorted(os.listdir(folder)) == ["model.onnx", "model.onnx.json", "unet.onnx.data"]
    assert read_sidecar(folder / "model.onnx").data == sidecar.data
    onnx.checker.check_model(str(folder / "model.onnx"))  # finds its weights


def test_a_bundle_without_a_network_takes_no_steps(tmp_path: Path, shipped: Bundle) -> None:
    unet = dataclasses.replace(shipped.unet, prediction="none")
    export_repository(dataclasses.replace(shipped, unet=unet), tmp_path / "models")
    parameters = config_of(tmp_path / "models/predict").parameters
    assert (parameters["steps"].string_value, parameters["votes"].string_value) == ("0", "1")


def test_models_that_are_there_are_replaced_by_force_alone_and_others_stay(tmp_path: Path, shipped: Bundle) -> None:
    out = tmp_path / "models"
    export_repository(shipped, out)
    (out / "theirs").mkdir()
    (out / "certify/config.pbtxt").write_text("edited")
    with pytest.raises(UsageError, match=r"already has unet, classifier, predict, certify: .* `force`"):
        export_repository(shipped, out)
    assert (out / "certify/config.pbtxt").read_text() == "edited"
    export_repository(shipped, out, force=True)
    assert config_of(out / "certify").name == "certify"
    assert sorted(os.listdir(out)) == sorted([*MODELS, "theirs"])


def test_an_edited_configuration_is_kept_beside_the_one_that_replaces_it(tmp_path: Path, shipped: Bundle) -> None:
    out = tmp_path / "models"
    export_repository(shipped, out)
    export_repository(shipped, out, force=True)
    assert not list(out.glob("*/*.old"))
    (out / "certify/config.pbtxt").write_text("edited")
    for _ in range(2):
        export_repository(shipped, out, force=True)
        assert [path.relative_to(out) for path in out.glob("*/*.old")] == [Path("certify/config.pbtxt.old")]
        assert (out / "certify/config.pbtxt.old").read_text() == "edited"
        assert config_of(out / "certify").name == "certify"


@pytest.mark.parametrize("last", range(len(MODELS)))
def test_models_that_cannot_all_be_put_in_their_place_leave_those_that_were_there(tmp_path: Path, last: int) -> None:
    for name in MODELS[1:]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.pbtxt").write_text("old")

    def publish() -> None:
        with published(tmp_path) as folder:
            for name in MODELS[:last]:  # the next one is missing: its rename fails
                (folder / name).mkdir()

    with pytest.raises(EnvironmentFault, match=r"cannot write .* choose another folder"):
        publish()
    assert sorted(os.listdir(tmp_path)) == sorted(MODELS[1:])
    assert {(tmp_path / name / "config.pbtxt").read_text() for name in MODELS[1:]} == {"old"}


def test_a_damaged_engine_leaves_no_repository(tmp_path: Path, shipped: Bundle) -> None:
    damaged = dataclasses.replace(shipped.unet, file=FileRef("unet.onnx", "0" * 64))
    with pytest.raises(CheckFailed, match="SHA-256"):
        export_repository(dataclasses.replace(shipped, unet=damaged), tmp_path / "models")
    assert os.listdir(tmp_path / "models") == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, shipped: Bundle) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match=r"cannot write .*file/models .*: choose another folder with `out`"):
        export_repository(shipped, tmp_path / "file" / "models")
