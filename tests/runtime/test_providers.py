"""ONNX Runtime falls back to the CPU without raising. Here, where it has no GPU, that must be an error."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from densepure_rt.errors import EnvironmentFault, UsageError
from densepure_rt.runtime.bundle import Bundle, open_bundle, shipped_engine
from densepure_rt.runtime.open_device import open_device
from densepure_rt.smoothing.classifier import load
from tests.runtime.stand_in_cuda import BUILT_FOR_GPUS
from tests.support.cli import cli

OPEN = """
import json, sys
import onnxruntime
from densepure_rt.errors import DensePureError
from densepure_rt.runtime.device import CLASSIFY_INPUTS, CLASSIFY_OUTPUTS
from densepure_rt.runtime.onnx_device import Place, open_session
from densepure_rt.runtime.bundle import shipped_engine
path = shipped_engine().with_name("classifier.onnx")
try:
    session = open_session(path.read_bytes(), path.name, CLASSIFY_INPUTS, CLASSIFY_OUTPUTS, Place(sys.argv[1]))
    found = {"used": session.get_providers()}
except DensePureError as error:
    found = {"error": str(error), "exit_code": error.exit_code}
print(json.dumps(found | {"built with": onnxruntime.get_available_providers()}))
"""

needs_gpu_build = pytest.mark.skipif(not BUILT_FOR_GPUS.is_dir(), reason="no ONNX Runtime with GPU providers here")


def opened_with(provider: str) -> dict[str, object]:
    """What opening the shipped classifier with this provider ends in, under an ONNX Runtime that was built for GPUs."""
    environment = os.environ | {"PYTHONPATH": str(BUILT_FOR_GPUS), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", OPEN, provider], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


@needs_gpu_build
@pytest.mark.parametrize(("provider", "name"), [("cuda", "CUDA"), ("tensorrt", "Tensorrt")])
def test_a_gpu_provider_that_cannot_start_is_an_error_though_the_wheel_was_built_with_it(
    provider: str, name: str
) -> None:
    found = opened_with(provider)
    assert f"{name}ExecutionProvider" in str(found["built with"])
    assert found["exit_code"] == 3
    assert f"`provider` {provider}" in str(found["error"])
    assert "densepure-rt doctor" in str(found["error"])


@needs_gpu_build
def test_the_same_wheel_serves_the_cpu_when_the_cpu_is_asked_for() -> None:
    assert opened_with("cpu")["used"] == ["CPUExecutionProvider"]


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_an_onnx_runtime_built_without_gpus_says_which_one_to_install(provider: str) -> None:
    with pytest.raises(EnvironmentFault, match=rf"`provider` {provider}.*densepure-rt\[gpu-cu13\]'"):
        load(provider=provider)


@pytest.mark.parametrize(("provider", "name"), [("cpu", "unet.onnx"), ("cuda", "unet.fp16.onnx")])
def test_the_model_that_ships_is_fp16_on_a_gpu_and_a_named_engine_is_taken_as_it_is(
    monkeypatch: pytest.MonkeyPatch, provider: str, name: str
) -> None:
    opened: list[Path] = []

    def open_device(bundle: Bundle, *_: object) -> None:
        opened.append(bundle.unet_path)
        raise EnvironmentFault("no further")

    monkeypatch.setattr("densepure_rt.smoothing.classifier.open_device", open_device)
    for engine in (None, shipped_engine(), shipped_engine(on_gpu=True)):
        with pytest.raises(EnvironmentFault, match="no further"):
            load(engine, provider=provider)
    assert [path.name for path in opened] == [name, "unet.onnx", "unet.fp16.onnx"]


@pytest.mark.parametrize("command", ["certify", "predict"])
def test_the_screen_says_that_the_model_that_ships_is_fp16_on_a_gpu(command: str) -> None:
    said = "with --provider cuda the model that ships runs in fp16: --engine "
    assert said in cli(command, "--provider", "cuda", "--max", 1).stderr
    assert said not in cli(command, "--provider", "cuda", "--max", 1, "--engine", shipped_engine()).stderr


def test_an_unknown_provider_is_a_usage_error_that_lists_the_known() -> None:
    with pytest.raises(UsageError, match="^`provider` rocm is not known: cpu, cuda, tensorrt"):
        load(provider="rocm")


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_a_precision_that_onnx_runtime_computes_wrongly_is_refused_and_never_run(
    tmp_path: Path, precision: str
) -> None:
    shipped = open_bundle(shipped_engine())
    bundle = dataclasses.replace(shipped, unet=dataclasses.replace(shipped.unet, precision=precision))
    with pytest.raises(UsageError, match=f"unet.onnx is {precision}.*export --target tensorrt --precision {precision}"):
        open_device(bundle, None, 1)
    bundle = dataclasses.replace(shipped, classifier=dataclasses.replace(shipped.classifier, precision=precision))
    with pytest.raises(UsageError, match=f"classifier.onnx is {precision}"):
        open_device(bundle, None, 1)


def test_the_cpu_device_says_that_it_is_one() -> None:
    device = open_device(open_bundle(shipped_engine()), 1, 1)
    assert device.describe()["provider"] == "onnxruntime CPU"
    device.close()
