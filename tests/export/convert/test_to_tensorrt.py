"""Plans are built for real here, by tensorrt-rtx, which needs no GPU to build."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from densepure_rt.commands.export import export
from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.export.convert import lowering, to_onnx, to_precision, to_tensorrt
from densepure_rt.export.convert.build_options import TILING, BuildOptions
from densepure_rt.export.convert.to_onnx import contents, lowered
from densepure_rt.export.convert.to_tensorrt import (
    add_profile,
    build,
    build_plans,
    configure,
    load_timing_cache,
    refuse_missing_dla,
    source_bundle,
)
from densepure_rt.export.models.check_images import CALIBRATION, Images
from densepure_rt.export.models.classifiers import zoo_classifier
from densepure_rt.export.models.onnx_graph import SCOPES, checked, scopes
from densepure_rt.export.models.sources import Models
from densepure_rt.export.models.unets import zoo_unet
from densepure_rt.runtime.bundle import (
    Bundle,
    FileRef,
    Flavour,
    StepSidecar,
    open_bundle,
    read_sidecar,
    sha256_of,
    shipped_engine,
    sidecar_path,
)
from tests.support.bundles import engines_copied, write_sidecars
from tests.support.cli import edit_sidecar, in_a_process

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

SHIPPED = shipped_engine()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The plans of the default bundle for SM86, 89 and 120 in a folder of their own, and the seconds they took."""
    out = tmp_path_factory.mktemp("plans")
    begun = time.process_time()
    build_plans(open_bundle(SHIPPED), out, "tensorrt-rtx", BuildOptions(batches=(64,)))
    return out, time.process_time() - begun


def toy_bundle(folder: Path, node: onnx.NodeProto, extra: tuple[onnx.NodeProto, ...] = ()) -> Bundle:
    """The default bundle with a small classifier of other nodes in place of its own: "mean" to "logits"."""
    engines_copied(folder)
    graph = helper.make_graph(
        [node, *extra],
        "toy",
        [helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["batch", 1, 28, 28])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, folder / "classifier.onnx")
    ref = FileRef("classifier.onnx", sha256_of(folder / "classifier.onnx"))
    shipped = open_bundle(SHIPPED)
    changed = dataclasses.replace(shipped.classifier, file=ref), dataclasses.replace(shipped.unet, classifier=ref)
    write_sidecars(folder, *changed)
    return open_bundle(folder / "unet.onnx")


def built_from(bundle: Bundle, out: Path, options: BuildOptions | None = None) -> None:
    build_plans(bundle, out, "tensorrt-rtx", options or BuildOptions(batches=(2,)))


def test_the_default_bundle_is_built_for_three_generations_within_a_minute(built: tuple[Path, float]) -> None:
    folder, seconds = built
    assert seconds < 60
    assert (folder / "unet.rtx.plan").read_bytes()[:4] == b"vtrt"  # of every plan of tensorrt-rtx


def test_a_plan_has_a_sidecar_that_says_what_it_was_built_from_and_for(built: tuple[Path, float]) -> None:
    folder, _ = built
    bundle, source = open_bundle(folder / "unet.rtx.plan"), open_bundle(SHIPPED)
    plan = bundle.unet.plan
    assert plan is not None
    assert (plan.flavour, plan.version, plan.batches) == ("tensorrt-rtx", trt.__version__, (64,))
    assert plan.compute_capabilities == ("8.6", "8.9", "12.0")
    assert plan.gpu is None  # none was there
    assert plan.onnx == source.unet.file
    assert plan.recipe == {"tf32": "false"}
    assert set(plan.types) == {"FLOAT"}
    assert bundle.unet.file.sha256 == sha256_of(bundle.unet_path)
    assert bundle.classifier_path.name == "classifier.rtx.plan"
    assert bundle.unet.schedule == source.unet.schedule


def test_the_multiplying_layers_are_those_of_the_onnx_file(built: tuple[Path, float]) -> None:
    model = onnx.load(SHIPPED.with_name("classifier.onnx"))
    expected = sum(node.op_type in ("Conv", "MatMul", "Gemm") for node in model.graph.node)
    plan = read_sidecar(built[0] / "classifier.rtx.plan").plan
    assert plan is not None
    assert sum(plan.types.values()) == expected


def test_each_batch_is_a_profile_of_its_own(tmp_path: Path) -> None:
    node = helper.make_node("ReduceMean", ["mean"], ["logits"], keepdims=0)
    bundle = toy_bundle(tmp_path, node)
    built_from(dataclasses.replace(bundle, unet=bundle.unet), tmp_path / "out", BuildOptions(batches=(1, 8)))
    plan = read_sidecar(tmp_path / "out" / "classifier.rtx.plan").plan
    assert plan is not None
    assert plan.batches == (1, 8)


def test_an_operator_that_tensorrt_lacks_is_named_with_its_module_the_cause_and_the_next_move(tmp_path: Path) -> None:
    node = helper.make_node("NonZero", ["mean"], ["where"], name="node_nonzero_1")
    node.metadata_props.append(onnx.StringStringEntryProto(key=SCOPES, value="['', 'network.head.pick', 'nonzero_1']"))
    cast = helper.make_node("Cast", ["where"], ["logits"], to=TensorProto.FLOAT)
    bundle = toy_bundle(tmp_path, node, (cast,))
    with pytest.raises(CheckFailed) as caught:
        built_from(bundle, tmp_path / "out")
    for words in ("node_nonzero_1 (NonZero)", "module head.pick", "Likely cause: an operator", "export"):
        assert words in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("operator", ["RandomNormalLike", "Bernoulli"])
def test_a_graph_that_draws_its_own_noise_is_refused_before_tensorrt_sees_it(tmp_path: Path, operator: str) -> None:
    node = helper.make_node(operator, ["mean"], ["logits"], name="node_random")
    with pytest.raises(CheckFailed, match="node_random .* random numbers.*must be an input"):
        built_from(toy_bundle(tmp_path, node), tmp_path / "out")


def test_noise_that_is_drawn_within_a_loop_is_found_too(tmp_path: Path) -> None:
    body = helper.make_graph(
        [
            helper.make_node("RandomNormalLike", ["state"], ["next"], name="node_inner"),
            helper.make_node("Identity", ["go"], ["go_on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("trip", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    trips = helper.make_node("Constant", [], ["trips"], value_int=3)
    loop = helper.make_node("Loop", ["trips", "", "mean"], ["logits"], body=body)
    with pytest.raises(CheckFailed, match="node_inner .* random numbers"):
        built_from(toy_bundle(tmp_path, trips, (loop,)), tmp_path / "out")


def test_an_unsigned_tensor_is_refused_by_name(tmp_path: Path) -> None:
    to = helper.make_node("Cast", ["mean"], ["bits"], name="to_bits", to=TensorProto.UINT32)
    back = helper.make_node("Cast", ["bits"], ["logits"], to=TensorProto.FLOAT)
    with pytest.raises(CheckFailed, match=r"to_bits \(Cast\) is uint32.*int64"):
        built_from(toy_bundle(tmp_path, to, (back,)), tmp_path / "out")


def test_a_sidecar_that_promises_another_precision_is_found_out(tmp_path: Path) -> None:
    bundle = open_bundle(SHIPPED)
    liar = dataclasses.replace(bundle, classifier=dataclasses.replace(bundle.classifier, precision="fp16"))
    with pytest.raises(CheckFailed, match="should be fp16 .* are FLOAT"):
        built_from(liar, tmp_path)


def test_a_graph_that_does_not_hash_to_its_sidecar_is_never_parsed(tmp_path: Path) -> None:
    node = helper.make_node("ReduceMean", ["mean"], ["logits"], keepdims=0)
    bundle = toy_bundle(tmp_path, node)
    with (tmp_path / "classifier.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckFailed, match="SHA-256"):
        built_from(bundle, tmp_path / "out")


def test_float32_products_on_turing_are_refused_with_the_precision_as_cause(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match=r"Likely cause: a precision .*`compute_capabilities`"):
        built_from(open_bundle(SHIPPED), tmp_path, BuildOptions(batches=(2,), compute_capabilities=("7.5",)))


@pytest.mark.parametrize(("capability", "device"), [("8.7", "Orin"), ("9.0", "Hopper"), ("10.0", "Blackwell")])
def test_gpus_that_rtx_does_not_know_are_sent_to_the_other_flavour(
    tmp_path: Path, capability: str, device: str
) -> None:
    options = BuildOptions(compute_capabilities=(capability,))
    with pytest.raises(UsageError, match=f"{device}.*use `target` tensorrt on that device"):
        built_from(open_bundle(SHIPPED), tmp_path, options)


@pytest.mark.parametrize(
    ("flavour", "options", "words"),
    [
        ("tensorrt-rtx", BuildOptions(timing_cache=Path("cache")), "tensorrt-rtx has no `timing_cache`"),
        ("tensorrt-rtx", BuildOptions(version_compatible=True), "tensorrt-rtx has no `version_compatible`"),
        ("tensorrt-rtx", BuildOptions(hardware="ampere-plus"), "tensorrt-rtx has no `hardware`"),
        ("tensorrt", BuildOptions(compute_capabilities=("8.6",)), "tensorrt has no `compute_capabilities`"),
        ("tensorrt", BuildOptions(timing_cache_strict=True), "needs `timing_cache`"),
        ("tensorrt-rtx", BuildOptions(max_aux_streams=0), "tensorrt-rtx has no `max_aux_streams`"),
        ("tensorrt-rtx", BuildOptions(avg_timing=4), "tensorrt-rtx has no `avg_timing`"),
        ("tensorrt-rtx", BuildOptions(tiling_optimization_level=0), "tensorrt-rtx has no `tiling_optimization_level`"),
        ("tensorrt-rtx", BuildOptions(use_dla_core=0), "tensorrt-rtx has no `use_dla_core`"),
        ("tensorrt", BuildOptions(max_aux_streams=-1), "`max_aux_streams` -1: give 0 to 7"),
        ("tensorrt", BuildOptions(tiling_optimization_level=4), "`tiling_optimization_level` 4: give 0 to 3"),
        ("tensorrt", BuildOptions(avg_timing=0), "`avg_timing` 0: give 1 to 100"),
        ("tensorrt", BuildOptions(allow_gpu_fallback=True), "give `use_dla_core` as well"),
        ("tensorrt", BuildOptions(batches=(1, 8), use_dla_core=0), "`batches` 1, 8: a DLA knows fixed shapes alone"),
        ("tensorrt", BuildOptions(use_dla_core=0), "a DLA multiplies fp16 and int8, unet.onnx is fp32"),
        ("tensorrt", BuildOptions(allow_weight_streaming=True), "keep a plan out of the CUDA graphs"),
        ("tensorrt-rtx", BuildOptions(level=9), "`level` 9"),
        ("tensorrt-rtx", BuildOptions(batches=(0,)), "`batches` 0"),
        ("tensorrt-rtx", BuildOptions(workspace=0), "`workspace` 0"),
        ("tensorrt", BuildOptions(hardware="turing"), "`hardware` turing"),
    ],
)
def test_an_option_that_a_flavour_lacks_is_refused_by_name(
    tmp_path: Path, flavour: Flavour, options: BuildOptions, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        build_plans(open_bundle(SHIPPED), tmp_path, flavour, options)


def new_config() -> tuple[Any, Any]:
    """A builder of the real library, which its configuration needs to live, and a configuration."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    return (logger, builder), builder.create_builder_config()


@pytest.mark.parametrize("flavour", get_args(Flavour))
def test_every_plan_keeps_what_its_layers_are_and_treats_each_image_of_a_batch_alike(flavour: Flavour) -> None:
    _alive, config = new_config()
    configure(trt, flavour, config, BuildOptions(), ("8.9",))
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert config.get_flag(trt.BuilderFlag.DISTRIBUTIVE_INDEPENDENCE)
    assert not config.get_flag(trt.BuilderFlag.TF32)


def test_a_plan_of_several_batches_is_built_without_the_promise_that_the_library_gives_for_one() -> None:
    """It refuses the flag beside several profiles: found by a real build, `test_each_batch_is_a_profile_of_its_own`."""
    _alive, config = new_config()
    configure(trt, "tensorrt-rtx", config, BuildOptions(batches=(1, 8)), ("8.9",))
    assert not config.get_flag(trt.BuilderFlag.DISTRIBUTIVE_INDEPENDENCE)


def test_a_version_without_a_flag_or_a_level_builds_without_it_or_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As 10.3, of JetPack 6."""
    members = {
        name: member for name, member in trt.BuilderFlag.__members__.items() if name != "DISTRIBUTIVE_INDEPENDENCE"
    }
    old = SimpleNamespace(
        __version__="10.3.0",
        BuilderFlag=SimpleNamespace(__members__=members, TF32=trt.BuilderFlag.TF32),
        ProfilingVerbosity=trt.ProfilingVerbosity,
    )
    _alive, config = new_config()
    configure(old, "tensorrt", config, BuildOptions(), ())
    assert not config.get_flag(trt.BuilderFlag.DISTRIBUTIVE_INDEPENDENCE)
    without = SimpleNamespace(clear_flag=lambda flag: None)
    with pytest.raises(UsageError, match=r"`tiling_optimization_level`: tensorrt 10\.3\.0 does not have it"):
        configure(old, "tensorrt", without, BuildOptions(tiling_optimization_level=2), ())


def test_trtexecs_options_reach_the_builder() -> None:
    """The real configuration of tensorrt-rtx, which has the names of tensorrt's."""
    _alive, config = new_config()
    options = BuildOptions(
        max_aux_streams=2, tiling_optimization_level=3, avg_timing=4, use_dla_core=1, allow_gpu_fallback=True
    )
    configure(trt, "tensorrt", config, options, ())
    assert (config.max_aux_streams, config.avg_timing_iterations) == (2, 4)
    assert config.tiling_optimization_level == trt.TilingOptimizationLevel.FULL
    assert config.default_device_type == trt.DeviceType.DLA
    assert config.DLA_core == -1  # the library takes no core that is not there
    on_a_jetson = SimpleNamespace(clear_flag=id, set_flag=id, tiling_optimization_level=None)
    configure(trt, "tensorrt", on_a_jetson, options, ())
    assert on_a_jetson.DLA_core == 1
    assert config.get_flag(trt.BuilderFlag.GPU_FALLBACK)
    assert options.recipe() == {
        "tf32": "false",
        "max_aux_streams": "2",
        "tiling_optimization_level": "3",
        "avg_timing": "4",
        "use_dla_core": "1",
        "allow_gpu_fallback": "true",
    }
    levels = [int(trt.TilingOptimizationLevel.__members__[name]) for name in TILING]
    assert levels == [0, 1, 2, 3]  # trtexec's numbers are the enum's


def test_each_word_of_a_recipe_is_an_option_of_the_command_that_builds_the_plan_again() -> None:
    options = BuildOptions(
        compute_capabilities=("8.6",),
        workspace=1,
        level=1,
        tf32=True,
        timing_cache=Path("cache"),
        timing_cache_strict=True,
        hardware="ampere-plus",
        version_compatible=True,
        max_aux_streams=1,
        tiling_optimization_level=1,
        avg_timing=1,
        use_dla_core=1,
        allow_gpu_fallback=True,
    )
    recipe = options.recipe()
    assert len(recipe) == 12
    assert recipe.keys() <= inspect.signature(export).parameters.keys()


def test_a_dla_core_that_is_not_there_is_refused_with_the_versions_that_have_any() -> None:
    (_, builder), _config = new_config()
    with pytest.raises(
        UsageError, match=r"`use_dla_core` 0: TensorRT 1\..* finds 0 DLA cores here.*10\.7 was the last"
    ):
        refuse_missing_dla(builder, BuildOptions(use_dla_core=0), trt.__version__)
    refuse_missing_dla(builder, BuildOptions(), trt.__version__)


def test_one_batch_makes_every_shape_fixed_and_several_leave_it_free(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def noting(*arguments: Any) -> None:
        network = arguments[2]
        shapes.extend(tuple(network.get_output(i).shape) for i in range(network.num_outputs))
        add_profile(*arguments)

    monkeypatch.setattr(to_tensorrt, "add_profile", noting)
    path = SHIPPED.with_name("classifier.onnx")
    for batches in ((4,), (4, 8)):
        build(trt, "tensorrt-rtx", path.read_bytes(), path, "fp32", BuildOptions(batches=batches), ("8.9",))
    assert shapes == [(4, 10), (-1, 10), (-1, 10)]


class Timings:
    """What a builder's configuration does with timing caches; `fits` says which it takes."""

    def __init__(self, fits: Callable[[bytes], bool]) -> None:
        self.fits, self.taken = fits, b"none"

    def create_timing_cache(self, content: bytes) -> bytes:
        return content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.taken = cache if self.fits(cache) else self.taken
        return self.fits(cache)


def test_timings_are_kept_beside_the_plans_unless_another_file_is_named(tmp_path: Path) -> None:
    options = BuildOptions().with_cache(tmp_path)
    assert options.timing_cache == tmp_path / "timing.cache"
    assert "timing_cache" not in BuildOptions().recipe()
    named = BuildOptions(timing_cache=tmp_path / "mine")
    assert named.with_cache(tmp_path) == named
    config = Timings(lambda content: content in (b"", b"of this GPU"))
    for content, taken in ((None, b""), (b"of this GPU", b"of this GPU"), (b"of another GPU", b"")):
        if content is not None:
            (tmp_path / "timing.cache").write_bytes(content)
        load_timing_cache(config, options)
        assert config.taken == taken
    (tmp_path / "mine").write_bytes(b"of another GPU")
    with pytest.raises(CheckFailed, match="mine is not a timing cache of this TensorRT and this GPU"):
        load_timing_cache(config, named)
    (tmp_path / "timing.cache").unlink()
    (tmp_path / "timing.cache").mkdir()
    load_timing_cache(config, options)  # it cannot be read: the build takes longer
    assert config.taken == b""


@pytest.mark.parametrize("kind", ["int8-cpu", "fp12"])
def test_a_precision_that_no_plan_has_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UsageError, match=f"`precision` {kind}: plans are built in fp32, fp16"):
        source_bundle(tmp_path, kind)


def copied(out: Path, **changes: object) -> None:
    """The shipped float32 bundle in a folder; changes: of both sidecars."""
    out.mkdir(exist_ok=True)
    for name in ("unet.onnx", "classifier.onnx"):
        for path in (SHIPPED.with_name(name), sidecar_path(SHIPPED.with_name(name))):
            shutil.copy(path, out)
        if changes:
            edit_sidecar(out / name, **changes)


def lowering_to(out: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a bundle be lowered into `out` by copying the shipped one, noting from what."""

    def lower_bundle(bundle: Bundle, out: Path, kind: str, *_: object, **__: object) -> SimpleNamespace:
        made.append(f"{kind} of {bundle.unet_path}")
        copied(out)
        return SimpleNamespace(unet=out / "unet.onnx")

    monkeypatch.setattr(to_precision, "lower_bundle", lower_bundle)


def test_plans_of_the_model_that_ships_are_fp16_unless_told_and_it_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    assert source_bundle(tmp_path, say=said.append).unet_path == SHIPPED.with_name("unet.fp16.onnx")
    assert said == ["building the model that ships in fp16, as GPUs run it; `precision` fp32 is for float32"]
    copied(tmp_path)  # as in a checkout, where --out is the folder of the shipped engines
    assert source_bundle(tmp_path, say=said.append).unet_path == SHIPPED.with_name("unet.fp16.onnx")
    said.clear()
    assert source_bundle(tmp_path, "fp32", say=said.append).unet_path == tmp_path / "unet.onnx"
    assert source_bundle(tmp_path, "fp16", say=said.append).unet_path == SHIPPED.with_name("unet.fp16.onnx")
    assert source_bundle(tmp_path / "other", "fp32", say=said.append).unet_path == SHIPPED
    assert source_bundle(tmp_path / "other", engine=tmp_path / "unet.onnx", say=said.append).unet.precision == "fp32"
    assert said == []


def test_plans_of_another_model_are_in_its_own_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    lowering_to(tmp_path, made, monkeypatch)
    copied(tmp_path, weights_sha256="a" * 64)
    assert source_bundle(tmp_path).unet_path == tmp_path / "unet.onnx"
    source_bundle(tmp_path, "fp16")
    assert made == [f"fp16 of {tmp_path / 'unet.onnx'}"]


def test_a_precision_that_is_not_there_is_made_of_the_float32_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    lowering_to(tmp_path, made, monkeypatch)
    source_bundle(tmp_path / "out", "int8")
    source_bundle(tmp_path / "out", "bf16", engine=SHIPPED)
    assert made == [f"int8 of {SHIPPED}", f"bf16 of {SHIPPED}"]


def test_a_plan_is_no_source_of_plans(tmp_path: Path, built: tuple[Path, float]) -> None:
    with pytest.raises(UsageError, match=r"unet\.rtx\.plan is a plan: give the ONNX engine"):
        source_bundle(tmp_path, engine=built[0] / "unet.rtx.plan")


def test_the_shipped_fp16_bundle_is_built_where_pytorch_cannot_be_imported(tmp_path: Path) -> None:
    given = ("--target", "tensorrt-rtx", "--out", tmp_path, "--compute-capability", "8.9", "--batch", 4)
    done = in_a_process("export", *given, without=("torch", "diffusers", "onnxruntime"))
    assert done.returncode == 0, done.stderr
    assert "building the model that ships in fp16, as GPUs run it; --precision fp32 is for float32" in done.stderr
    plan = read_sidecar(tmp_path / "unet.fp16.rtx.plan").plan
    assert plan is not None
    assert plan.types["HALF"] > 0.9 * sum(plan.types.values())
    assert plan.onnx == open_bundle(SHIPPED.with_name("unet.fp16.onnx")).unet.file


def test_a_failed_step_engine_leaves_no_classifier_plan_behind(tmp_path: Path) -> None:
    bundle = open_bundle(SHIPPED)
    wrong = dataclasses.replace(bundle.unet, file=FileRef("unet.onnx", "0" * 64))
    assert isinstance(wrong, StepSidecar)
    with pytest.raises(CheckFailed, match="SHA-256"):
        built_from(dataclasses.replace(bundle, unet=wrong), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU here")
def test_the_flavour_that_builds_on_its_gpu_says_what_it_misses(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="tensorrt"):
        build_plans(open_bundle(SHIPPED), tmp_path, "tensorrt", BuildOptions())


def test_ctrl_c_ends_a_build_and_publishes_nothing(tmp_path: Path) -> None:
    code = "from densepure_rt.cli import main; main()"
    arguments = ["export", "--target", "tensorrt-rtx", "--out", str(tmp_path), "--batch", "64"]
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "building unet" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "capabilities", "multiplied"),
    [
        ("fp16", ("8.6", "8.9", "12.0"), "HALF"),
        ("bf16", ("8.6", "8.9", "12.0"), "BF16"),
        ("int8", ("8.6", "8.9", "12.0"), "INT8"),
        ("fp8", ("8.9", "12.0"), "FP8"),  # from Ada on
    ],
)
def test_the_default_model_is_built_in_every_smaller_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, capabilities: tuple[str, ...], multiplied: str
) -> None:
    if (
        kind == "int8"
    ):  # quantizes the float32 graph, which is the shipped one: tests/export/convert/test_to_onnx.py exports it
        monkeypatch.setattr(to_onnx, "step_onnx", lambda *_: SHIPPED.read_bytes())
    with np.load(str(files("densepure_rt") / "data" / CALIBRATION)) as archive:
        images = Images(np.empty(0, np.uint8), calibration=archive["x"].transpose(0, 3, 1, 2))
    shipped = open_bundle(SHIPPED)
    models = lowered(Models(zoo_unet(), zoo_classifier()), kind, ())
    for content, sidecar in zip(contents(models, kind, (), images), (shipped.unet, shipped.classifier), strict=True):
        path = tmp_path / sidecar.file.name
        begun = time.process_time()
        options = BuildOptions(batches=(64,))
        plan, types = build(trt, "tensorrt-rtx", content, path, kind, options, capabilities)
        assert time.process_time() - begun < 60
        assert plan[:4] == b"vtrt"
        assert types[multiplied] > sum(types.values()) / 2


def test_a_quantized_graph_for_the_cpu_is_refused_by_name(tmp_path: Path) -> None:
    quantize = helper.make_node("QuantizeLinear", ["mean", "scale", "zero"], ["levels"], name="quantize_mean")
    back = helper.make_node("DequantizeLinear", ["levels", "scale", "zero"], ["logits"])
    constants = (
        helper.make_node("Constant", [], ["scale"], value_float=0.1),
        helper.make_node("Constant", [], ["zero"], value=helper.make_tensor("zero", TensorProto.UINT8, [], [128])),
    )
    with pytest.raises(CheckFailed, match="quantize_mean has UINT8 values; TensorRT takes S8"):
        built_from(toy_bundle(tmp_path, constants[0], (constants[1], quantize, back)), tmp_path / "out")


@pytest.mark.parametrize(("kind", "multiplied"), [("fp16", "HALF"), ("bf16", "BF16")])
def test_a_lowered_graph_is_built(tmp_path: Path, kind: str, multiplied: str) -> None:
    for name in ("unet.onnx", "classifier.onnx"):
        content = checked(lowering.lowered(onnx.load(SHIPPED.with_name(name)), kind))
        options = BuildOptions(batches=(8,))
        plan, types = build(trt, "tensorrt-rtx", content, tmp_path / name, kind, options, ("8.9",))
        assert plan[:4] == b"vtrt"
        assert types[multiplied] > 0.9 * sum(types.values())


CIFAR_SIZED = """
import dataclasses, resource, sys
from pathlib import Path
import tensorrt_rtx
import torch
from diffusers import UNet2DModel
from densepure_rt.export.convert.to_onnx import step_onnx
from densepure_rt.export.models.onnx_graph import SCOPES, scopes
from densepure_rt.export.convert.build_options import BuildOptions
from densepure_rt.export.convert.to_tensorrt import build
from densepure_rt.export.models.unets import DiffusersNetwork, zoo_unet
torch.manual_seed(0)
down = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D")
up = ("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
unet = UNet2DModel(sample_size=32, in_channels=3, out_channels=6, layers_per_block=3, attention_head_dim=64,
                   block_out_channels=(128, 256, 288, 256), down_block_types=down, up_block_types=up)
parameters = sum(parameter.numel() for parameter in unet.parameters())
model = dataclasses.replace(zoo_unet(), network=DiffusersNetwork(unet), image=(3, 32, 32), variance="learned_range")
path = Path(sys.argv[1])
path.write_bytes(step_onnx(model))
del unet, model
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plan, types = build(tensorrt_rtx, "tensorrt-rtx", path.read_bytes(), path, "fp32", BuildOptions(batches=(64,)),
                    ("8.6", "8.9", "12.0"))
print(parameters, len(plan), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_unet_of_the_published_cifar_10_size_is_built_within_12_gib(tmp_path: Path) -> None:
    """52.8 M parameters; the published checkpoint has 52,546,438 (improved-diffusion, CIFAR-10)."""
    command = [sys.executable, "-c", CIFAR_SIZED, str(tmp_path / "unet.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    parameters, size, peak_kib = map(int, done.stdout.split()[-3:])
    assert parameters > 52_546_438
    assert size > parameters  # bytes
    assert peak_kib < 12 << 20


def test_the_modules_behind_a_node_are_named_as_in_the_network() -> None:
    def scopes_of(recorded: str) -> list[str]:
        node = helper.make_node("Conv", ["x", "w"], ["y"])
        node.metadata_props.append(onnx.StringStringEntryProto(key=SCOPES, value=recorded))
        return scopes(node)

    assert scopes_of("['', 'network', 'network.unet', 'network.unet.conv_in', 'conv2d']") == ["unet", "unet.conv_in"]
    assert scopes_of("['', 'add']") == []
    assert scopes_of("__import__('os')") == []
    assert scopes_of("3") == []
