"""What a benchmark must know of the machine: its name, its clocks, its float32 peak, and what else keeps it busy."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from densepure_rt.runtime.machine import available_cores, installed_versions, processor

PEAK_REPEATS = 3  # before the rounds and again after them
PEAK_SIDE, PEAK_SIDE_GPU = 2048, 8192  # of the matrix product
PEAK_CHANNELS, PEAK_SIZE, PEAK_IMAGES, PEAK_IMAGES_GPU = 256, 32, 8, 256  # of the convolution
# What nvidia-smi calls them; the older name of the last is that of drivers before 535.
GPU_FIELDS = {
    "sm_clock_mhz": ("clocks.sm",),
    "memory_clock_mhz": ("clocks.mem",),
    "temperature_c": ("temperature.gpu",),
    "power_w": ("power.draw",),
    "throttle_reasons": ("clocks_event_reasons.active", "clocks_throttle_reasons.active"),
}

# "wall" for several cores; "core", CPU time, for one; "events", of CUDA for PyTorch, with the wall for the engine.
Clock = Literal["wall", "core", "events"]
Stopwatch = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Machine:
    """The machine of a benchmark. gpu: None where it ran on the CPU."""

    processor: str
    cores: int
    gpu: str | None
    versions: Mapping[str, str]

    @classmethod
    def this(cls, on_gpu: bool) -> Machine:
        versions = {"torch": torch.__version__} | installed_versions("onnxruntime", "onnxruntime-gpu", "diffusers")
        return cls(processor(), available_cores(), torch.cuda.get_device_name() if on_gpu else None, versions)


@dataclass(frozen=True)
class Load:
    """The load of the machine. average: the system's, of the last minute, before and after.

    others: cores that other programs used while the routes were timed; None where the system does not say. gpu: what
    nvidia-smi says, before and after; empty where there is none.
    """

    average: tuple[float | None, float | None]
    others: float | None
    gpu: tuple[dict[str, str | None], dict[str, str | None]] = ({}, {})


def by_the_wall(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def by_the_core(run: Callable[[], object]) -> float:
    """Time work on one core: seconds that it ran there, which other programs stretch less than those by the wall."""
    started = time.process_time()
    run()
    return time.process_time() - started


def by_events(run: Callable[[], object]) -> float:
    """Seconds between two events on the stream that `run` works on. Not run on a GPU yet."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


STOPWATCHES: Mapping[Clock, Stopwatch] = {"wall": by_the_wall, "core": by_the_core, "events": by_events}


def measured_peak(clock: Clock) -> dict[str, float]:
    """The best GFLOP/s of PyTorch in float32 on what it is best at, with as many threads as it has now."""
    on_gpu, stopwatch = clock == "events", STOPWATCHES[clock]
    side, images = (PEAK_SIDE_GPU, PEAK_IMAGES_GPU) if on_gpu else (PEAK_SIDE, PEAK_IMAGES)
    where = "cuda" if on_gpu else "cpu"
    factor = torch.randn(side, side, device=where)
    x = torch.randn(images, PEAK_CHANNELS, PEAK_SIZE, PEAK_SIZE, device=where)
    weight = torch.randn(PEAK_CHANNELS, PEAK_CHANNELS, 3, 3, device=where)
    products: dict[str, tuple[float, Callable[[], object]]] = {
        f"matrix product of {side}": (2e-9 * side**3, lambda: factor @ factor),
        f"3x3 convolution of {PEAK_CHANNELS} channels": (
            2e-9 * 9 * PEAK_CHANNELS * x.numel(),
            lambda: torch.conv2d(x, weight, padding=1),
        ),
    }
    for _, product in products.values():
        product()
    return {
        name: gflop / min(stopwatch(product) for _ in range(PEAK_REPEATS))
        for name, (gflop, product) in products.items()
    }


def load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


class OtherLoad:
    """Counts, from its making, the cores that other programs use."""

    def __init__(self) -> None:
        self.begun = self.clocks()

    @staticmethod
    def clocks() -> tuple[float, float, float | None]:
        """Seconds by the wall, of this process on all its cores, and of all programs on all cores if that is known."""
        busy = None
        with contextlib.suppress(OSError, ValueError):
            # proc(5): user, nice, system, idle, iowait, irq, softirq, steal, in ticks
            ticks = [int(word) for word in Path("/proc/stat").read_text(encoding="utf-8").split()[1:9]]
            busy = (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), time.process_time(), busy

    def cores(self) -> float | None:
        now = self.clocks()
        if now[2] is None or self.begun[2] is None:
            return None
        return max(0.0, now[2] - self.begun[2] - (now[1] - self.begun[1])) / (now[0] - self.begun[0])


def gpu_state() -> dict[str, str | None]:
    """Clocks, temperature, power and throttle reasons of the first GPU; None for what nvidia-smi does not tell."""

    def ask(field: str) -> str | None:
        command = ["nvidia-smi", "--id=0", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        found = done.stdout.strip()
        return None if not found or found.startswith("[") else found  # [N/A], [Not Supported]

    return {name: next(filter(None, map(ask, fields)), None) for name, fields in GPU_FIELDS.items()}
