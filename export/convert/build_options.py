"""Hold the options for building a TensorRT plan, and name which TensorRT flavour has which option."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from densepure_rt.errors import UsageError
from densepure_rt.runtime.bundle import Flavour
from densepure_rt.runtime.device import MAX_BATCH

HARDWARE = {"ampere-plus": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}
TILING = ("NONE", "FAST", "MODERATE", "FULL")  # TilingOptimizationLevel, by the numbers that trtexec gives them
TIMING_CACHE = "timing.cache"  # beside the plans, unless another is named


@dataclass(frozen=True)
class BuildOptions:
    """The options of building a plan.

    batches: one fixed profile each. compute_capabilities: tensorrt-rtx alone; empty for RTX_CAPABILITIES.
    workspace: MiB. level: TensorRT's optimisation level, 0 to 5. tf32: allow TensorFloat-32 in float32 products.
    From timing_cache on: tensorrt alone, and from max_aux_streams on named as in trtexec. renew_cache: whether a timing
    cache that does not fit is begun anew. tiling_optimization_level: 0 to 3. use_dla_core: of a Jetson, to run what it
    can, and the GPU the rest with allow_gpu_fallback. allow_weight_streaming: refused.
    """

    batches: tuple[int, ...] = (64,)
    compute_capabilities: tuple[str, ...] = ()
    workspace: int | None = None
    level: int | None = None
    tf32: bool = False
    timing_cache: Path | None = None
    timing_cache_strict: bool = False
    hardware: str | None = None
    version_compatible: bool = False
    max_aux_streams: int | None = None
    tiling_optimization_level: int | None = None
    avg_timing: int | None = None
    use_dla_core: int | None = None
    allow_gpu_fallback: bool = False
    allow_weight_streaming: bool = False
    renew_cache: bool = False

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
        if self.allow_weight_streaming:
            raise UsageError(
                "`allow_weight_streaming`: weights that come from the CPU at every call keep a plan out of the CUDA "
                "graphs that it runs in here; use a smaller `batch`, or `precision` fp16, where the memory is short"
            )
        for name, value, least, most in (
            ("max_aux_streams", self.max_aux_streams, 0, 7),
            ("tiling_optimization_level", self.tiling_optimization_level, 0, len(TILING) - 1),
            ("avg_timing", self.avg_timing, 1, 100),
            ("use_dla_core", self.use_dla_core, 0, 15),
        ):
            if value is not None and not least <= value <= most:
                raise UsageError(f"`{name}` {value}: give {least} to {most}")
        if self.allow_gpu_fallback and self.use_dla_core is None:
            raise UsageError("`allow_gpu_fallback` is for what a DLA cannot run: give `use_dla_core` as well")
        if self.use_dla_core is not None and len(self.batches) > 1:
            raise UsageError(
                f"`batches` {', '.join(map(str, self.batches))}: a DLA knows fixed shapes alone; give one with "
                f"`use_dla_core`"
            )
        enterprise = {
            "`timing_cache`": self.timing_cache is not None,
            "`hardware`": self.hardware is not None,
            "`version_compatible`": self.version_compatible,
            "`max_aux_streams`": self.max_aux_streams is not None,
            "`tiling_optimization_level`": self.tiling_optimization_level is not None,
            "`avg_timing`": self.avg_timing is not None,
            "`use_dla_core`": self.use_dla_core is not None,
        }
        lacking = [name for name, asked in enterprise.items() if asked and flavour == "tensorrt-rtx"]
        if self.compute_capabilities and flavour == "tensorrt":
            lacking.append("`compute_capabilities`")
        if lacking:
            why = "it builds for the GPU that it runs on" if flavour == "tensorrt" else "it builds for GPUs elsewhere"
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
            "max_aux_streams": self.max_aux_streams,
            "tiling_optimization_level": self.tiling_optimization_level,
            "avg_timing": self.avg_timing,
            "use_dla_core": self.use_dla_core,
            "allow_gpu_fallback": "true" if self.allow_gpu_fallback else None,
        }
        return {"tf32": "true" if self.tf32 else "false"} | {k: str(v) for k, v in given.items() if v is not None}

    def with_cache(self, out: Path) -> BuildOptions:
        """Keep timings beside the plans, unless another file was named."""
        if self.timing_cache is not None:
            return self
        return dataclasses.replace(self, timing_cache=out / TIMING_CACHE, renew_cache=True)
