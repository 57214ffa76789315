"""What the TensorRT device refuses before it needs a GPU. What it computes is compared in tests marked gpu."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.runtime.bundle import (
    ClassifierSidecar,
    FileRef,
    Flavour,
    Plan,
    StepSidecar,
    open_bundle,
    plan_path,
    read_sidecar,
    rebuild_command,
    sha256_of,
    shipped_engine,
    sidecar_path,
    to_json,
)
from densepure_rt.runtime.gpu import Gpu
from densepure_rt.runtime.open_device import open_device
from densepure_rt.runtime.tensorrt_device import layout, refuse_misfit, refuse_other_machine

SHIPPED = shipped_engine()
NOT_A_PLAN = b"vtrt but no plan"
ADA = Gpu("NVIDIA RTX 4090", "8.9", "12.6")


def a_plan(flavour: Flavour = "tensorrt-rtx", **changes: Any) -> Plan:
    usual = Plan(flavour, "1.7.1.116", (64,), ("8.6", "8.9"), None, FileRef("unet.onnx", "0" * 64), {"FLOAT": 1}, {})
    return dataclasses.replace(usual, **changes)


def put_plan(folder: Path, name: str, plan: Plan, **changes: Any) -> FileRef:
    """A file that is no plan, with a true hash in a sidecar that says it is one."""
    path = plan_path(folder / name, plan.flavour)
    path.write_bytes(NOT_A_PLAN)
    ref = FileRef(path.name, sha256_of(path))
    sidecar = dataclasses.replace(read_sidecar(SHIPPED.with_name(name)), file=ref, plan=plan, **changes)
    sidecar_path(path).write_text(to_json(sidecar))
    return ref


def put_bundle(folder: Path, unet: Plan | None = None, classifier: Plan | None = None) -> Path:
    plan = unet or a_plan()
    put_plan(folder, "unet.onnx", plan, classifier=put_plan(folder, "classifier.onnx", classifier or plan))
    return plan_path(folder / "unet.onnx", plan.flavour)


@pytest.mark.parametrize("damage", [lambda content: content[:-3], lambda content: b"w" + content[1:]])
def test_a_truncated_or_flipped_plan_is_refused_by_its_hash_before_any_library_is_loaded(
    tmp_path: Path, damage: Any
) -> None:
    plan = put_bundle(tmp_path)
    plan.write_bytes(damage(plan.read_bytes()))
    with pytest.raises(CheckFailed, match="unet.rtx.plan has SHA-256"):
        open_device(open_bundle(plan), None, 1)


def test_a_pinned_hash_must_be_the_plans(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="`engine_sha256` pins"):
        open_bundle(put_bundle(tmp_path), engine_sha256="0" * 64)


def test_a_sidecar_that_lies_about_its_flavour_finds_no_library_of_that_name(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="tensorrt cannot be imported"):
        open_device(open_bundle(put_bundle(tmp_path, a_plan("tensorrt"))), None, 1)


def test_a_plan_and_a_classifier_of_other_kinds_are_not_joined(tmp_path: Path) -> None:
    plan = put_bundle(tmp_path)
    with pytest.raises(UsageError, match="is for tensorrt-rtx, classifier.onnx for onnxruntime"):
        open_bundle(plan, SHIPPED.with_name("classifier.onnx"))


def test_an_onnx_runtime_provider_does_not_run_a_plan(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`provider` cuda does not run"):
        open_device(open_bundle(put_bundle(tmp_path)), None, 1, "cuda")


def test_a_plan_that_is_not_there_is_named_with_the_command_that_builds_it(tmp_path: Path) -> None:
    for name in ("unet.onnx", "unet.onnx.json"):
        shutil.copy(SHIPPED.with_name(name), tmp_path)
    with pytest.raises(UsageError, match=rf"densepure-rt export --target tensorrt --out {tmp_path}"):
        open_bundle(tmp_path / "unet.plan")
    with pytest.raises(UsageError, match=r"densepure-rt export --target tensorrt-rtx --out"):
        open_bundle(tmp_path / "unet.rtx.plan")


def test_a_plan_without_a_sidecar_is_refused(tmp_path: Path) -> None:
    plan = put_bundle(tmp_path)
    sidecar_path(plan).unlink()
    with pytest.raises(UsageError, match="sidecar of unet.rtx.plan"):
        open_bundle(plan)


def test_a_trusted_plan_without_a_sidecar_is_what_the_onnx_file_of_its_name_is(tmp_path: Path) -> None:
    plan = put_bundle(tmp_path)
    for name in ("unet", "classifier"):
        sidecar_path(tmp_path / f"{name}.rtx.plan").unlink()
        shutil.copy(SHIPPED.with_name(f"{name}.onnx.json"), tmp_path)
    bundle = open_bundle(plan, trust=True)
    shipped = open_bundle(SHIPPED)
    assert isinstance(bundle.unet, StepSidecar)
    assert isinstance(bundle.classifier, ClassifierSidecar)
    assert bundle.unet.schedule == shipped.unet.schedule
    assert bundle.unet.file.sha256 == sha256_of(plan)
    assert bundle.unet.plan is not None
    assert bundle.unet.plan.flavour == "tensorrt-rtx"
    with pytest.raises(UsageError, match="give it with `batch`"):
        open_device(bundle, None, 1)


def test_the_batch_is_the_largest_that_both_plans_hold_unless_told(tmp_path: Path) -> None:
    bundle = open_bundle(put_bundle(tmp_path, a_plan(batches=(1, 8, 64)), a_plan(batches=(8, 1, 32))))
    assert refuse_misfit(bundle, None) == 8
    assert refuse_misfit(bundle, 1) == 1
    with pytest.raises(UsageError, match="`batch` 64: .* built for 1, 8"):
        refuse_misfit(bundle, 64)


def test_plans_that_share_no_batch_are_refused_with_the_command_that_builds_them_again(tmp_path: Path) -> None:
    bundle = open_bundle(put_bundle(tmp_path, a_plan(batches=(64,)), a_plan(batches=(32,))))
    with pytest.raises(UsageError, match="different batches.*densepure-rt export .*--batch 64"):
        refuse_misfit(bundle, None)


@pytest.mark.parametrize(
    ("plan", "library", "found"),
    [
        (a_plan(), "1.7.1.116", None),
        (a_plan(), "1.6.0.1", "was built by tensorrt-rtx 1.7.1.116, here is 1.6.0.1"),
        (a_plan(compute_capabilities=("12.0",)), "1.7.1.116", r"built for compute capability 12\.0.*8\.9"),
        (a_plan(compute_capabilities=("8.6",)), "1.7.1.116", None),  # runs on later GPUs too
        (a_plan("tensorrt", compute_capabilities=("8.6",)), "1.7.1.116", "built for compute capability"),
        (a_plan("tensorrt", compute_capabilities=("8.9",)), "1.7.1.116", None),
        (a_plan("tensorrt", compute_capabilities=("8.6",), recipe={"hw_compat": "ampere-plus"}), "1.7.1.116", None),
        (
            a_plan("tensorrt", compute_capabilities=("8.6",), recipe={"hw_compat": "same-compute-capability"}),
            "1.7.1.116",
            r"capability 8\.6",
        ),
        (a_plan("tensorrt", compute_capabilities=("8.9",), recipe={"version_compatible": "true"}), "1.9.0", None),
        (a_plan("tensorrt", compute_capabilities=("8.9",), recipe={"version_compatible": "true"}), "2.0.0", "built by"),
        (
            a_plan("tensorrt", compute_capabilities=("10.0",)),
            "1.7.1.116",
            r"capability 10\.0",
        ),  # not the string 10.0 < 8
    ],
)
def test_a_plan_for_another_version_or_gpu_is_refused_with_the_command_that_builds_it_here(
    plan: Plan, library: str, found: str | None
) -> None:
    if found is None:
        refuse_other_machine("unet.plan", plan, library, ADA, "rebuild")
    else:
        with pytest.raises(EnvironmentFault, match=rf'{found}.*run "rebuild"') as caught:
            refuse_other_machine("unet.plan", plan, library, ADA, "rebuild")
        assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("field", "value"), [("flavour", "tensorflow"), ("batches", []), ("batches", [0]), ("batches", "64"), ("types", 3)]
)
def test_a_sidecar_whose_plan_makes_no_sense_is_refused(tmp_path: Path, field: str, value: object) -> None:
    plan = put_bundle(tmp_path)
    sidecar = json.loads(sidecar_path(plan).read_text())
    sidecar["plan"][field] = value
    sidecar_path(plan).write_text(json.dumps(sidecar))
    with pytest.raises(CheckFailed, match=field):
        read_sidecar(plan)


def test_the_command_that_builds_a_plan_again_has_the_options_of_its_recipe(tmp_path: Path) -> None:
    recipe = {"tf32": "true", "workspace": "512", "version_compatible": "false", "hw_compat": "ampere-plus"}
    bundle = open_bundle(put_bundle(tmp_path, a_plan("tensorrt", batches=(8, 64), recipe=recipe)))
    assert rebuild_command(bundle.unet_path, bundle.unet) == (
        f"densepure-rt export --target tensorrt --out {tmp_path} --precision fp32 --batch 8,64 --hw-compat ampere-plus "
        f"--tf32 --workspace 512"
    )


def test_regions_start_where_tensorrt_wants_addresses() -> None:
    assert layout(48 * 3, 4 * 3, 24 * 3) == ([0, 256, 512], 768)
    assert layout(256, 1) == ([0, 256], 512)
