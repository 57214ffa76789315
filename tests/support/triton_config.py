"""Triton's own schema of a model's configuration, and what is read by it."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Any

from google.protobuf import text_format


def schema() -> Any:
    """`model_config_pb2`, without the gRPC that the package around it needs."""
    files = metadata.files("tritonclient") or []
    path = next(file for file in files if file.name == "model_config_pb2.py").locate()
    spec = importlib.util.spec_from_file_location("model_config_pb2", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCHEMA = schema()


def config_of(model: Path) -> Any:
    """The configuration of a model's folder; an unknown field or a wrong type raises ParseError."""
    return text_format.Parse((model / "config.pbtxt").read_text(), SCHEMA.ModelConfig())
