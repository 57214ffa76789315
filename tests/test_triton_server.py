"""An exported repository on a real Triton with its real Python backend, asked by NVIDIA's client.

The wheel of nvidia-pytriton holds both, but not the backends of ONNX Runtime and TensorRT: here two Python models that
call ONNX Runtime stand for the engines, under the same names. The rest of the repository is as it was exported.

    python3 -m venv triton && triton/bin/pip install nvidia-pytriton '.[cpu]'
    TRITON_PYTHON=$PWD/triton/bin/python .venv-dev/bin/pytest -m slow tests/test_triton_server.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import densepure_rt
from densepure_rt.export.convert.to_triton import MODELS, export_repository
from densepure_rt.images.datasets import open_images
from densepure_rt.keys import shared_key
from densepure_rt.runtime.bundle import open_bundle, shipped_engine
from tests.support.cli import cli

pytest.importorskip("gevent", reason="tritonclient[http] is not installed")
from tritonclient.http import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

PYTHON = os.environ.get("TRITON_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="TRITON_PYTHON names no Python that has nvidia-pytriton"),
    pytest.mark.filterwarnings("default"),  # gevent's own
]
ENGINE = """
import triton_python_backend_utils as pb_utils
from pathlib import Path
import onnxruntime


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        file = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        return [self.respond(request) for request in requests]

    def respond(self, request):
        names = list(request.requested_output_names())
        found = self.session.run(names, {tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in zip(names, found)])
"""
SETTINGS = {"steps": "2", "votes": "3", "n": "256"}
FIRST, COUNT = 37, 3  # of the images: every 37th of those that ship
WHERE = """
import json, sys, sysconfig, pytriton
print(json.dumps([pytriton.__path__[0], sysconfig.get_path("purelib"), "%d.%d" % sys.version_info[:2]]))
"""


@dataclass(frozen=True)
class Installed:
    """A Triton to start: its program, its backends, and a folder from which its Python imports."""

    program: Path
    backends: Path
    libraries: Path
    site: Path


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    assert PYTHON is not None
    found = subprocess.run([PYTHON, "-c", WHERE], check=True, capture_output=True, text=True, timeout=120)
    package, packages, version = json.loads(found.stdout)
    folder = tmp_path_factory.mktemp("server")
    server = Path(package) / "tritonserver"
    shutil.copytree(server / "backends", folder / "backends")
    stub = folder / "backends" / "python" / "triton_python_backend_stub"
    shutil.copy(server / "python_backend_stubs" / version / stub.name, stub)
    program = folder / "tritonserver"
    shutil.copy(server / "bin" / "tritonserver", program)
    for file in (stub, program):
        file.chmod(0o755)
    site = folder / "site"  # this Python reads no PYTHONPATH, but imports from where it was started
    site.mkdir()
    for entry in Path(packages).iterdir():
        if not entry.name.startswith(("densepure_rt", "__editable__")):
            (site / entry.name).symlink_to(entry)
    (site / "densepure_rt").symlink_to(Path(densepure_rt.__file__).parent)
    return Installed(program, folder / "backends", Path(package).parent / "nvidia_pytriton.libs", site)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(triton: Installed, repository: Path, log: Path) -> Iterator[str | None]:
    """A Triton of this repository: its address, or None when it ended by itself."""
    port = free_port()
    command = [str(triton.program), f"--model-repository={repository}", f"--backend-directory={triton.backends}"]
    command += [f"--http-port={port}", "--http-address=127.0.0.1", "--allow-grpc=false", "--allow-metrics=false"]
    command += [f"--backend-config=python,shm-region-prefix-name=densepure_{port}"]
    environment = os.environ | {"LD_LIBRARY_PATH": str(triton.libraries)}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, cwd=triton.site, env=environment, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        try:
            yield f"127.0.0.1:{port}" if comes_up(process, port) else None
        finally:
            process.terminate()
            process.wait(60)


def comes_up(process: subprocess.Popen[bytes], port: int) -> bool:
    client = InferenceServerClient(f"127.0.0.1:{port}")
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        try:
            if client.is_server_ready():
                return True
        except OSError:
            time.sleep(0.2)
    return False


def edited(config: Path, **parameters: str) -> None:
    """Parameters as a person sets them: in the text of config.pbtxt."""
    text = config.read_text()
    for name, value in parameters.items():
        pattern = rf'(key: "{name}" value: {{ string_value: ")[^"]*'
        text, changed = re.subn(pattern, lambda match, value=value: match[1] + value, text)  # type: ignore[misc]
        assert changed == 1
    config.write_text(text)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("repository") / "models"
    export_repository(open_bundle(shipped_engine()), out)
    for name in ("unet", "classifier"):
        (out / name / "1/model.py").write_text(ENGINE)
        config = out / name / "config.pbtxt"
        text = config.read_text().replace('platform: "onnxruntime_onnx"\n', "")
        config.write_text(text.replace('backend: "onnxruntime"', 'backend: "python"'))
    shared_key(out.parent / "noise.key")
    for name in ("predict", "certify"):
        edited(out / name / "config.pbtxt", key_file=str(out.parent / "noise.key"), **SETTINGS)
    return out


@pytest.fixture(scope="module")
def address(installed: Installed, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "triton.log"
    with served(installed, repository, log) as found:
        assert found is not None, log.read_text(errors="replace")
        yield found


@pytest.fixture(scope="module")
def pixels() -> np.ndarray[Any, np.dtype[np.uint8]]:
    chosen = open_images(None, (1, 28, 28), list("0123456789")).select(FIRST, COUNT)
    return np.stack([image.pixels for image in chosen])


def asked(address: str, model: str, pixels: Any, **parameters: Any) -> dict[str, list[Any]]:
    client = InferenceServerClient(address, network_timeout=300, connection_timeout=300)
    tensor = InferInput("image", pixels.shape, "UINT8")
    tensor.set_data_from_numpy(pixels)
    result = client.infer(model, [tensor], parameters=parameters or None)
    found = {one["name"]: result.as_numpy(one["name"]).tolist() for one in result.get_response()["outputs"]}
    if "outcome" in found:
        found["outcome"] = [text.decode() for text in found["outcome"]]
    return found


def test_all_four_models_are_ready_and_say_what_they_take(address: str) -> None:
    client = InferenceServerClient(address)
    assert all(client.is_model_ready(name) for name in MODELS)
    told = client.get_model_metadata("certify")
    assert told["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 1, 28, 28]}]
    assert "radius" in {output["name"] for output in told["outputs"]}


def test_labels_and_radii_are_those_of_the_command_line_with_the_same_key(
    address: str, repository: Path, pixels: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image[0]).save(folder / f"{i}.png")
    key = repository.parent / "noise.key"
    options = ["--steps", "2", "--votes", "3", "--n", "256", "--key", key]
    done = cli("certify", "--images", folder, "--out", tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run/results.jsonl").read_text().splitlines()]
    found = asked(address, "certify", pixels, deadline_ms=300_000)
    assert found["label"] == [-1 if record["predict"] is None else record["predict"] for record in records]
    assert found["radius"] == [record["radius"] or 0.0 for record in records]
    for name in ("n", "n_a", "p_lower"):
        assert found[name] == [record[name] for record in records]
    assert found["stopped"] == [False] * COUNT
    assert any(radius > 0 for radius in found["radius"])
    shown = cli("predict", "--images", folder, "--json", *options).stdout
    lines = [json.loads(line) for line in shown.splitlines()]
    predicted = asked(address, "predict", pixels, deadline_ms=300_000)
    assert predicted["label"] == [-1 if line["predict"] is None else line["predict"] for line in lines]
    assert predicted["n"] == [line["n"] for line in lines]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"deadline_ms": -1}, "deadline_ms is milliseconds above 0"), ({"deadline_ms": "x"}, "deadline_ms is milli")],
)
def test_a_wrong_deadline_is_a_400(address: str, pixels: Any, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InferenceServerException, match=message) as caught:
        asked(address, "certify", pixels, **parameters)
    assert caught.value.status() == "400"


@pytest.mark.parametrize("shape", [(17, 1, 28, 28), (1, 3, 28, 28), (1, 28, 28)])
def test_wrong_shapes_are_a_400(address: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InferenceServerException) as caught:
        asked(address, "predict", np.zeros(shape, np.uint8))
    assert caught.value.status() == "400"


def test_a_deadline_gives_what_is_known_by_then(address: str, pixels: Any) -> None:
    found = asked(address, "certify", pixels, deadline_ms=1)
    assert found["stopped"] == [True] * COUNT
    assert found["outcome"] == ["out of time"] * COUNT


def test_a_repository_of_other_engines_is_not_served(
    installed: Installed, repository: Path, tmp_path: Path, pixels: Any
) -> None:
    shutil.copytree(repository, tmp_path / "models")
    with (tmp_path / "models/unet/1/model.onnx").open("ab") as file:
        file.write(b"\0\0")
    with served(installed, tmp_path / "models", tmp_path / "log") as found:
        assert found is None
    assert "the file is damaged or is another engine" in (tmp_path / "log").read_text(errors="replace")
