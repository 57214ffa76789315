"""Bundles of plans that no library would run, with true hashes in their sidecars."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from densepure_rt.runtime.bundle import (
    FileRef,
    Flavour,
    Plan,
    plan_path,
    read_sidecar,
    sha256_of,
    shipped_engine,
    sidecar_path,
    to_json,
)
from densepure_rt.runtime.gpu import Gpu
from tests.runtime.host_cuda import plan_of

SHIPPED = shipped_engine()
ADA = Gpu("NVIDIA RTX 4090", "8.9", "12.6")
NOT_A_PLAN = b"nothing that a library would run"


def a_plan(flavour: Flavour = "tensorrt-rtx", **changes: Any) -> Plan:
    usual = Plan(flavour, "1.7.1.116", (64,), ("8.6", "8.9"), None, FileRef("unet.onnx", "0" * 64), {"FLOAT": 1}, {})
    return dataclasses.replace(usual, **changes)


def put_plan(folder: Path, name: str, plan: Plan, **changes: Any) -> FileRef:
    """A file that begins as a plan, with a true hash in a sidecar that says it is one."""
    path = plan_path(folder / name, plan.flavour)
    path.write_bytes(plan_of(NOT_A_PLAN, plan.flavour, plan.version))
    ref = FileRef(path.name, sha256_of(path))
    sidecar = dataclasses.replace(read_sidecar(SHIPPED.with_name(name)), file=ref, plan=plan, **changes)
    sidecar_path(path).write_text(to_json(sidecar))
    return ref


def put_bundle(folder: Path, unet: Plan | None = None, classifier: Plan | None = None) -> Path:
    plan = unet or a_plan()
    put_plan(folder, "unet.onnx", plan, classifier=put_plan(folder, "classifier.onnx", classifier or plan))
    return plan_path(folder / "unet.onnx", plan.flavour)
