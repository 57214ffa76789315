"""`--light`: where heavy packages are not installed, the test files that import them are skipped instead of failing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

HEAVY = {
    "aiohttp",
    "cuda",
    "diffusers",
    "ml_dtypes",
    "onnx",
    "polygraphy",
    "ray",
    "safetensors",
    "tensorrt_rtx",
    "torch",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--light", action="store_true", help="skip test files whose heavy packages are not installed")


class LightModule(pytest.Module):
    """A test file that is skipped as a whole when a heavy package that it imports is not there."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            cause = error.__cause__
            while cause is not None and not isinstance(cause, ModuleNotFoundError):
                cause = cause.__cause__
            name = (cause.name or "").partition(".")[0] if cause is not None else ""
            if name in HEAVY:
                pytest.skip(f"needs {name}", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if not parent.config.getoption("--light"):
        return None
    module: pytest.Module = LightModule.from_parent(parent, path=module_path)
    return module
