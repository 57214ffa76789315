"""What the TensorRT device refuses before it needs a GPU. What it computes is compared in tests marked gpu."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from densepure_rt.errors import CheckFailed, DensePureError, EnvironmentFault, UsageError
from densepure_rt.runtime import tensorrt_device
from densepure_rt.runtime.bundle import (
    ClassifierSidecar,
    Plan,
    StepSidecar,
    maker,
    open_bundle,
    read_sidecar,
    rebuild_command,
    refuse_damaged_plan,
    release,
    same_release,
    sha256_of,
    shipped_engine,
    sidecar_path,
)
from densepure_rt.runtime.open_device import open_device
from densepure_rt.runtime.tensorrt_device import STATES_AN_ITEM, most_states, refuse_misfit, refuse_other_gpu
from tests.runtime.host_cuda import plan_of
from tests.support.plans import ADA, NOT_A_PLAN, a_plan, put_bundle

SHIPPED = shipped_engine()


@pytest.mark.parametrize("damage", [lambda content: content[:-3], lambda content: b"w" + content[1:]])
def test_a_truncated_or_flipped_plan_is_refused_by_its_hash_before_any_library_is_loaded(
    tmp_path: Path, damage: Any
) -> None:
    plan = put_bundle(tmp_path)
    plan.write_bytes(damage(plan.read_bytes()))
    with pytest.raises(CheckFailed, match="unet.rtx.plan has SHA-256"):
        open_device(open_bundle(plan), None, 1)


def damaged(folder: Path, content: bytes, sidecars: bool, **changes: Any) -> DensePureError:
    """What opening ends in where the step plan has other bytes, under a true hash or, without sidecars, under none."""
    plan = put_bundle(folder, a_plan(batches=(8,)))
    plan.write_bytes(content)
    sidecar = json.loads(sidecar_path(plan).read_text())
    sidecar["file"]["sha256"] = sha256_of(plan)
    sidecar_path(plan).write_text(json.dumps(sidecar))
    if not sidecars:
        for name in ("unet", "classifier"):
            sidecar_path(folder / f"{name}.rtx.plan").unlink()
            shutil.copy(SHIPPED.with_name(f"{name}.onnx.json"), folder)
    with pytest.raises(DensePureError) as caught:
        open_device(open_bundle(plan, trust=not sidecars), 8, 1)
    return caught.value


@pytest.mark.parametrize("sidecars", [True, False])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is no plan of TensorRT, it begins with b''"),
        (SHIPPED.read_bytes()[:999], "is no plan of TensorRT"),
        (plan_of(NOT_A_PLAN, "tensorrt-rtx", "1.7.1.116")[:20], "is no plan of TensorRT"),
        (plan_of(NOT_A_PLAN, "tensorrt-rtx", "1.7.1.116")[:-3], "has 57 bytes of the 60 that it should: copy it again"),
    ],
)
def test_what_is_no_plan_or_not_a_whole_one_is_refused_before_any_library_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, words: str, sidecars: bool
) -> None:
    """Also under a hash that is right, or under none: a plan of tensorrt-rtx says how long it is."""
    monkeypatch.setattr(tensorrt_device, "library_for", None)
    error = damaged(tmp_path, content, sidecars)
    assert isinstance(error, CheckFailed)
    assert f"unet.rtx.plan {words}" in str(error)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (plan_of(NOT_A_PLAN, "tensorrt-rtx", "1.6.0.1"), "tensorrt-rtx 1.6.0.1"),
        (plan_of(NOT_A_PLAN, "tensorrt", "10.16.1.11"), "tensorrt 10.16.1.11"),
    ],
)
def test_a_sidecar_that_names_another_builder_than_the_plan_itself_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, found: str
) -> None:
    monkeypatch.setattr(tensorrt_device, "library_for", None)
    error = damaged(tmp_path, content, sidecars=True)
    assert isinstance(error, CheckFailed)
    assert f"was built by {found}, its sidecar says tensorrt-rtx 1.7.1.116: build the plan again" in str(error)


def test_a_trusted_plan_of_another_version_is_refused_by_what_it_says_of_itself(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    error = damaged(tmp_path, plan_of(NOT_A_PLAN, "tensorrt-rtx", "1.6.0.1"), sidecars=False)
    assert isinstance(error, EnvironmentFault)
    assert f"unet.rtx.plan was built by tensorrt-rtx 1.6.0.1, here is {trt.__version__}" in str(error)


def test_a_plan_that_was_really_built_says_by_what_and_how_long_it_is() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network()
    mean = network.add_input("mean", trt.DataType.FLOAT, (1, 3))
    network.mark_output(network.add_activation(mean, trt.ActivationType.RELU).get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    plan = bytes(builder.build_serialized_network(network, config))
    assert maker(plan) == ("tensorrt-rtx", trt.__version__)
    if shutil.which("nvidia-smi") is None:  # so nothing of it can be asked, its layers neither
        assert trt.Runtime(logger).deserialize_cuda_engine(plan) is None
    refuse_damaged_plan("unet.rtx.plan", a_plan(version=trt.__version__), plan)
    with pytest.raises(CheckFailed, match="copy it again"):
        refuse_damaged_plan("unet.rtx.plan", a_plan(version=trt.__version__), plan[:-1])


def test_versions_are_compared_in_the_numbers_that_both_have() -> None:
    assert release("10.14.1.48.post1") == (10, 14, 1, 48)
    assert same_release("10.3.0", "10.3.0.30")  # JetPack's, and the same with its build
    assert not same_release("10.16.1.11", "10.16.1.12")
    assert not same_release("10.3.0", "11.3.0")
    assert same_release("unknown", "11.4.0.106")  # the library says


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


def test_without_a_batch_the_largest_runs_whose_states_fit_the_gpu(tmp_path: Path) -> None:
    bundle = open_bundle(put_bundle(tmp_path, a_plan(batches=(16, 64, 1024))))
    imagenet = dataclasses.replace(bundle, unet=dataclasses.replace(bundle.unet, image=(3, 256, 256)))
    assert refuse_misfit(bundle, None, 80 << 30) == 1024
    assert refuse_misfit(imagenet, None, 80 << 30) == 1024
    assert refuse_misfit(imagenet, None, 8 << 30) == 64
    assert refuse_misfit(imagenet, None, 1 << 30) == 16  # what the loop then asks for is refused, if it is too much
    assert refuse_misfit(imagenet, 1024, 80 << 30) == 1024  # as it was asked for
    assert most_states(3 * 256 * 256, 8 << 30) < STATES_AN_ITEM * 1024


AMPERE_PLUS = {"hw_compat": "ampere-plus"}


@pytest.mark.parametrize(
    ("plan", "capability", "found"),
    [
        (a_plan(), "8.9", None),
        (a_plan(compute_capabilities=("12.0",)), "8.9", r"built for compute capability 12\.0.*8\.9"),
        (a_plan(compute_capabilities=("8.6",)), "8.9", None),  # runs on later GPUs too
        (a_plan("tensorrt", compute_capabilities=("8.6",)), "8.9", "built for compute capability"),
        (a_plan("tensorrt", compute_capabilities=("8.9",)), "8.9", None),
        (a_plan("tensorrt", compute_capabilities=("8.6",), recipe=AMPERE_PLUS), "8.9", None),
        (a_plan("tensorrt", compute_capabilities=("9.0",), recipe=AMPERE_PLUS), "8.6", None),
        (a_plan("tensorrt", compute_capabilities=("8.9",), recipe=AMPERE_PLUS), "8.0", None),
        (a_plan("tensorrt", compute_capabilities=("12.0",), recipe=AMPERE_PLUS), "10.0", None),
        (a_plan("tensorrt", compute_capabilities=("8.6",), recipe=AMPERE_PLUS), "7.5", r"this GPU .* has 7\.5"),
        (
            a_plan("tensorrt", compute_capabilities=("8.6",), recipe={"hw_compat": "same-compute-capability"}),
            "8.9",
            r"capability 8\.6",
        ),
        (a_plan("tensorrt", compute_capabilities=("10.0",)), "8.9", r"capability 10\.0"),  # not the string 10.0 < 8
    ],
)
def test_a_plan_for_another_gpu_is_refused_with_the_command_that_builds_it_here(
    plan: Plan, capability: str, found: str | None
) -> None:
    here = dataclasses.replace(ADA, compute_capability=capability)
    if found is None:
        refuse_other_gpu("unet.plan", plan, here, "rebuild")
    else:
        with pytest.raises(EnvironmentFault, match=rf'{found}.*run "rebuild"') as caught:
            refuse_other_gpu("unet.plan", plan, here, "rebuild")
        assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flavour", "tensorflow"),
        ("batches", []),
        ("batches", [0]),
        ("batches", "64"),
        ("types", 3),
        ("compute_capabilities", ["new"]),
    ],
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
