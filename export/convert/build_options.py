"""How a TensorRT plan is built: what `densepure-rt export` is asked for, before TensorRT or onnx are there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from densepure_rt.errors import UsageError
from densepure_rt.export.models.model_options import Options
from densepure_rt.runtime.bundle import Flavour
from densepure_rt.runtime.device import MAX_BATCH

HARDWARE = {"ampere-plus": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}


@dataclass(frozen=True)
class BuildOptions(Options):
    """How a plan is built.

    compute_capabilities: tensorrt-rtx alone; empty for RTX_CAPABILITIES. workspace: MiB. level: TensorRT's optimisation
    level, 0 to 5. tf32: allow TensorFloat-32 in float32 products. The next four: tensorrt alone. batches: one fixed
    profile each.
    """

    compute_capabilities: tuple[str, ...] = ()
    workspace: int | None = None
    level: int | None = None
    tf32: bool = False
    timing_cache: Path | None = None
    timing_cache_strict: bool = False
    hardware: str | None = None
    version_compatible: bool = False
    batches: tuple[int, ...] = (64,)

    def refuse_what_lacks(self, flavour: Flavour) -> None:
        """Raise UsageError for an option that this flavour does not have, or a value that no flavour has."""
        if not self.batches or not all(1 <= batch <= MAX_BATCH for batch in self.batches):
            raise UsageError(f"`batches` {', '.join(map(str, self.batches))}: each must be between 1 and {MAX_BATCH}")
        if self.level is not None and not 0 <= self.level <= 5:
            raise UsageError(f"`level` {self.level}: TensorRT knows 0 (fast build) to 5 (fast plan)")
        if self.workspace is not None and self.workspace < 1:
            raise UsageError(f"`workspace` {self.workspace}: give the MiB of GPU memory that a layer may use")
        if self.hardware is not None and self.hardware not in HARDWARE:
            raise UsageError(f"`hardware` {self.hardware} is not known: {' or '.join(HARDWARE)}")
        if self.timing_cache_strict and self.timing_cache is None:
            raise UsageError("`timing_cache_strict` needs `timing_cache` FILE")
        enterprise = {
            "`timing_cache`": self.timing_cache is not None,
            "`hardware`": self.hardware is not None,
            "`version_compatible`": self.version_compatible,
        }
        lacking = [name for name, asked in enterprise.items() if asked and flavour == "tensorrt-rtx"]
        if self.compute_capabilities and flavour == "tensorrt":
            lacking.append("`compute_capabilities`")
        if lacking:
            why = "it builds for the GPU that it runs on" if flavour == "tensorrt" else "its plans are portable as is"
            raise UsageError(f"{flavour} has no {', '.join(lacking)}: {why}; leave it out")

    def recipe(self) -> dict[str, str]:
        """The options that were given, as text for the sidecar."""
        given = {
            "workspace": self.workspace,
            "builder_level": self.level,
            "timing_cache": self.timing_cache,
            "timing_cache_strict": "true" if self.timing_cache_strict else None,
            "hw_compat": self.hardware,
            "version_compatible": "true" if self.version_compatible else None,
        }
        return {"tf32": "true" if self.tf32 else "false"} | {k: str(v) for k, v in given.items() if v is not None}
