"""The same engines on a CPU without AVX-512 and VNNI, which qemu emulates: what they compute, and that runs tell.

The emulator passes this machine's /proc/cpuinfo on, so it is given that of the CPU that it emulates.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import parser

from densepure_rt.runtime.bundle import open_bundle
from densepure_rt.runtime.machine import CPUINFO
from tests.support.bundles import engines_copied
from tests.support.small_engines import CLASSIFIER, STEP_GRAPH, replace_file

ROOT = Path(__file__).resolve().parents[2]
QEMU = shutil.which("qemu-x86_64")
SHAPE, CLASSES = (1, 4, 4), 3
LOST = re.compile(r"\b(avx512\w*|avx_vnni\w*|amx_\w+)\b")
REPORT = """
import json, sys
import numpy as np
from pathlib import Path
from dataclasses import asdict
from densepure_rt.runs.identity import arithmetic_of
from densepure_rt.runtime.bundle import open_bundle
from densepure_rt.runtime.open_device import open_device
device = open_device(open_bundle(Path(sys.argv[1])), batch=4, threads=1)
mean = np.random.default_rng(1).normal(size=(4, 1, 4, 4)).astype(np.float32)
(logits,) = device.networks.classify({"mean": mean})
print(json.dumps({"arithmetic": asdict(arithmetic_of(device.describe())), "logits": logits.tolist()}))
"""

pytestmark = [
    pytest.mark.skipif(QEMU is None, reason="no qemu-x86_64 here: apt-get install qemu-user"),
    pytest.mark.skipif(
        not CPUINFO.exists() or "avx512_vnni" not in CPUINFO.read_text(), reason="this CPU has no AVX-512 with VNNI"
    ),
]


@pytest.fixture
def shipped_copy(tmp_path: Path) -> Path:
    return engines_copied(tmp_path)


def literal(values: np.ndarray[Any, Any]) -> str:
    return ", ".join(f"{value:.6g}" for value in values.ravel().tolist())


def softmax_classifier() -> str:
    """A float32 classifier whose sums an AVX-512 adds in another order than an AVX2."""
    draw = np.random.default_rng(0)
    first, second = draw.normal(size=(16, 64)), draw.normal(size=(64, CLASSES))
    return f"""
<ir_version: 8, opset_import: ["" : 18]>
classify (float[B,1,4,4] mean) => (float[B,3] logits)
<int64[2] flat = {{0, -1}}, float[16,64] w = {{{literal(first)}}}, float[64,3] v = {{{literal(second)}}}>
{{
    flattened = Reshape(mean, flat)
    hidden = MatMul(flattened, w)
    shares = Softmax <axis = 1> (hidden)
    logits = MatMul(shares, v)
}}
"""


WEIGHTS = np.tile(np.array([127, 120, -127], np.int8), (16, 1))  # two products of them and of 255 pass int16


def int8_classifier() -> str:
    return f"""
<ir_version: 8, opset_import: ["" : 18]>
classify (float[B,1,4,4] mean) => (float[B,3] logits)
<int64[2] flat = {{0, -1}}, float k = {{5.0}}, float xs = {{0.02}}, uint8 xz = {{0}}, float ws = {{0.01}},
 int8 wz = {{0}}, int8[16,3] w = {{{literal(WEIGHTS)}}}>
{{
    flattened = Reshape(mean, flat)
    positive = Abs(flattened)
    large = Mul(positive, k)
    quantized = QuantizeLinear(large, xs, xz)
    x = DequantizeLinear(quantized, xs, xz)
    weights = DequantizeLinear(w, ws, wz)
    logits = MatMul(x, weights)
}}
"""


def exact_int8_logits(mean: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same in whole numbers, which nothing saturates."""
    levels = np.clip(np.rint(np.abs(mean.reshape(len(mean), -1)).astype(np.float64) * 5 / 0.02), 0, 255).astype(int)
    return np.asarray(levels @ WEIGHTS.astype(int) * 0.02 * 0.01)


def reported(engine: Path, root: Path | None = None) -> dict[str, Any]:
    """What a process says of the bundle; on the emulated CPU where `root` holds its /proc/cpuinfo."""
    own = [sys.executable]
    if root is not None:
        packages = sysconfig.get_paths()["purelib"]
        paths = f"{ROOT}:{packages}"
        real = str(Path(sys.executable).resolve())
        own = [str(QEMU), "-L", str(root), "-cpu", "max", "-E", f"PYTHONPATH={paths}", real]
    done = subprocess.run(
        [*own, "-c", REPORT, str(engine)], cwd=ROOT, capture_output=True, text=True, timeout=600, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def emulated(tmp_path: Path) -> Path:
    """The root of the emulated CPU, with all that this one has but AVX-512, VNNI and AMX."""
    cpuinfo = tmp_path / "root" / "proc" / "cpuinfo"
    cpuinfo.parent.mkdir(parents=True)
    cpuinfo.write_text(LOST.sub("", CPUINFO.read_text()))
    return tmp_path / "root"


def made(engine: Path, classifier: str, precision: str) -> Path:
    """The shipped bundle with small graphs in place of its networks."""
    step = parser.parse_model(STEP_GRAPH.replace("LIMIT", "1e30")).SerializeToString()
    replace_file(engine, step, image=SHAPE, precision=precision)
    content = parser.parse_model(classifier).SerializeToString()
    names = [f"class {i}" for i in range(CLASSES)]
    replace_file(engine.with_name(CLASSIFIER), content, image=SHAPE, class_names=names, precision=precision)
    open_bundle(engine)
    return engine


def test_a_float32_engine_has_another_fingerprint_and_another_identity_there(
    shipped_copy: Path, emulated: Path
) -> None:
    engine = made(shipped_copy, softmax_classifier(), "fp32")
    here, there = reported(engine), reported(engine, emulated)
    np.testing.assert_allclose(there["logits"], here["logits"], rtol=1e-5, atol=1e-6)
    assert there["logits"] != here["logits"]
    assert there["arithmetic"]["fingerprint"] != here["arithmetic"]["fingerprint"]


def test_an_int8_cpu_engine_does_not_saturate_there_and_the_instruction_sets_tell_the_two_machines_apart(
    shipped_copy: Path, emulated: Path
) -> None:
    engine = made(shipped_copy, int8_classifier(), "int8-cpu")
    here, there = reported(engine), reported(engine, emulated)
    mean = np.random.default_rng(1).normal(size=(4, *SHAPE)).astype(np.float32)
    for found in (here, there):
        np.testing.assert_allclose(found["logits"], exact_int8_logits(mean), rtol=1e-5)
    assert "avx512_vnni" in here["arithmetic"]["instruction_sets"]
    assert not LOST.search(" ".join(there["arithmetic"]["instruction_sets"]))
    assert there["arithmetic"] != here["arithmetic"]
