"""ONNX files from anywhere: of old versions, in caches of links, half transferred, and from strangers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.export.convert.to_onnx import classifier_onnx
from densepure_rt.export.models.classifiers import declare, open_classifier
from densepure_rt.export.models.onnx_classifiers import OnnxNetwork
from densepure_rt.export.models.onnx_files import onnx_sha256, prepared, read_onnx, rename_twins

IMAGE = (3, 8, 8)
AS_IT_IS = declare("-1,1")
X: NDArray[np.float32] = np.random.default_rng(1).uniform(-1, 1, (3, *IMAGE)).astype(np.float32)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 12345678\n"


def small(opset: int = 13, ir: int = 8, weights_are_inputs: bool = False, names: str = "") -> onnx.ModelProto:
    """Pixels -> four numbers, by a convolution and a mean."""
    kernel = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *IMAGE])]
    inputs += [helper.make_tensor_value_info("w", TensorProto.FLOAT, kernel.shape)] if weights_are_inputs else []
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name=names),
        helper.make_node("GlobalAveragePool", ["c"], ["p"], name=names),
        helper.make_node("Flatten", ["p"], ["y"], name=names),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, [onnx.numpy_helper.from_array(kernel, "w")])
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    return model


def saved(path: Path, model: onnx.ModelProto, **options: Any) -> Path:
    onnx.save_model(model, path, **options)
    return path


def beside(path: Path) -> Path:
    return saved(path, small(), save_as_external_data=True, location=f"{path.name}_data", size_threshold=0)


def expected() -> NDArray[np.float32]:
    """What ONNX Runtime makes of the plain file itself."""
    session = onnxruntime.InferenceSession(small().SerializeToString(), providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, {"x": X})[0]
    return found


def exported(path: Path) -> onnx.ModelProto:
    """The classifier as it is exported: sound by the full check, of the file's numbers."""
    opened = open_classifier(str(path), IMAGE, declared=AS_IT_IS)
    model = onnx.load_model_from_string(classifier_onnx(opened))
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(OnnxNetwork(model)(torch.from_numpy(X)).numpy(), expected(), rtol=1e-5, atol=1e-6)
    assert model.ir_version >= helper.find_min_ir_version_for(list(model.opset_import))
    names = [node.name for node in model.graph.node if node.name]
    assert len(names) == len(set(names))
    return model


@pytest.mark.parametrize("opset", [7, 8])
def test_weights_that_are_inputs_of_an_old_file_are_no_obstacle(tmp_path: Path, opset: int) -> None:
    """As before IR 4, where each initializer had to be an input; ONNX's converter needs what the file says to hold."""
    found = exported(saved(tmp_path / "toy.onnx", small(opset, ir=3, weights_are_inputs=True)))
    assert [value.name for value in found.graph.input] == ["mean"]


@pytest.mark.parametrize("opset", [9, 17, 21, 22])
def test_ir_version_is_one_that_the_opset_may_have(tmp_path: Path, opset: int) -> None:
    exported(saved(tmp_path / "toy.onnx", small(opset, ir=5)))


def test_nodes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    model = small(names="same")
    with pytest.raises(Exception, match="two nodes with same node name"):
        onnxruntime.InferenceSession(model.SerializeToString())
    exported(saved(tmp_path / "toy.onnx", model))


def test_new_names_are_nobody_s() -> None:
    model = small(names="same")
    model.graph.node[2].name = "same_2"
    rename_twins(model)
    assert [node.name for node in model.graph.node] == ["same", "same_3", "same_2"]
    model = small()
    rename_twins(model)
    assert [node.name for node in model.graph.node] == ["", "", ""]


def test_the_domain_s_other_name_is_the_same_domain(tmp_path: Path) -> None:
    model = small()
    for node in model.graph.node:
        node.domain = "ai.onnx"
    exported(saved(tmp_path / "toy.onnx", model))


def test_function_of_another_opset_is_inlined_as_it_was_meant() -> None:
    mean = helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)
    function = helper.make_function("mine", "Pool", ["x"], ["y"], [mean], [helper.make_opsetid("", 13)])
    graph = helper.make_graph(
        [helper.make_node("Pool", ["x"], ["y"], domain="mine")],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *IMAGE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=[function])
    found = OnnxNetwork(prepared(model, "toy"))(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(found, X.mean((2, 3)), rtol=1e-5, atol=1e-6)


def test_cache_of_a_hub_is_read_through_its_links(tmp_path: Path) -> None:
    """snapshots/REVISION/model.onnx and its data are links into one folder of blobs."""
    plain = beside(tmp_path / "model.onnx")
    digest = onnx_sha256(plain)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("model.onnx", "model.onnx_data")):
        os.rename(tmp_path / name, blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    exported(snapshot / "model.onnx")
    assert onnx_sha256(snapshot / "model.onnx") == digest
    (blobs / "1").unlink()
    with pytest.raises(UsageError, match="model.onnx_data, which is a link to a file that is not there: download"):
        read_onnx(snapshot / "model.onnx")


def test_hard_link_is_a_file_like_any_other(tmp_path: Path) -> None:
    path = beside(tmp_path / "model.onnx")
    os.link(tmp_path / "model.onnx_data", tmp_path / "another_name")
    exported(path)


@pytest.mark.parametrize("place", ["link", "linked folder", "both", "absolute"])
def test_graph_of_a_stranger_opens_no_file_elsewhere(tmp_path: Path, place: str) -> None:
    """Whatever its graph or its folder says, the bytes of a secret never become weights."""
    home, private = tmp_path / "download", tmp_path / "private"
    home.mkdir()
    private.mkdir()
    path = beside(home / "model.onnx")
    secret = private / "secret"
    secret.write_bytes((home / "model.onnx_data").read_bytes())
    (home / "model.onnx_data").unlink()
    if place in ("link", "both"):
        (home / "model.onnx_data").symlink_to(secret)
    if place == "both":  # a graph that is a link itself, elsewhere than the secret
        (home / "blobs").mkdir()
        os.rename(path, home / "blobs" / "graph")
        path.symlink_to("blobs/graph")
    if place in ("linked folder", "absolute"):
        (home / "sub").symlink_to(private)
        model = onnx.load(path, load_external_data=False)
        for entry in model.graph.initializer[0].external_data:
            if entry.key == "location":
                entry.value = str(secret) if place == "absolute" else "sub/secret"
        path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckFailed, match="copy both files out of the cache|outside its folder, which is not read"):
        read_onnx(path)
    with pytest.raises(CheckFailed):
        onnx_sha256(path)


LEFT = {
    "missing": (None, UsageError, "model.onnx_data, which is not there: download or copy it too, beside the graph"),
    "pointer": (POINTER, CheckFailed, 'model.onnx_data, but it is a pointer of Git LFS .*run "git lfs pull"'),
    "empty": (b"", CheckFailed, "model.onnx_data, but it is empty"),
    "cut short": (b"1" * 100, CheckFailed, "reads bytes 0 to 432 of model.onnx_data, which holds 100: it is cut short"),
}


@pytest.mark.parametrize("case", LEFT)
def test_weights_that_did_not_arrive_are_no_defect_of_the_model(tmp_path: Path, case: str) -> None:
    content, kind, said = LEFT[case]
    path = beside(tmp_path / "model.onnx")
    (tmp_path / "model.onnx_data").unlink()
    if content is not None:
        (tmp_path / "model.onnx_data").write_bytes(content)
    with pytest.raises(kind, match=said) as caught:
        read_onnx(path)
    assert "export it again" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER, "no ONNX file: it is a pointer of Git LFS"),
        (b"<!doctype html><p>Not found", "no ONNX file: it is a web page"),
        (b"", "no ONNX file: it is empty"),
        (small().SerializeToString()[:200], "cannot be read as an ONNX file .*it is cut short or something else"),
    ],
)
def test_file_that_did_not_arrive_is_no_defect_of_the_model(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "toy.onnx").write_bytes(content)
    with pytest.raises(CheckFailed, match=said):
        read_onnx(tmp_path / "toy.onnx")


@pytest.mark.parametrize("opset", [5, 6])
def test_opset_that_is_too_old_to_run_is_named(tmp_path: Path, opset: int) -> None:
    path = saved(tmp_path / "toy.onnx", small(opset, ir=4))
    model = onnx.load(path)
    vectors = {name: np.full(3, value, np.float32) for name, value in (("g", 2), ("b", 1), ("m", 0), ("v", 1))}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in vectors.items())
    consumed: dict[str, Any] = {"consumed_inputs": [0, 0, 0, 1, 1]} if opset < 6 else {}
    model.graph.node[0].input[0] = "n"
    model.graph.node.insert(0, helper.make_node("BatchNormalization", ["x", *"gbmv"], ["n"], is_test=1, **consumed))
    onnx.save(model, path)
    with pytest.raises(CheckFailed, match=f"it is of opset {opset}, and 7 is the oldest that is run; export it again"):
        open_classifier(str(path), IMAGE, declared=AS_IT_IS)
