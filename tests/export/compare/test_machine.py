from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from densepure_rt.export.compare import machine
from densepure_rt.export.compare.machine import STOPWATCHES, OtherLoad, gpu_state, load_average, measured_peak

GPU_KEYS = {"sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w", "throttle_reasons"}


def test_the_peak_is_the_operations_of_two_products_by_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "STOPWATCHES", {"wall": lambda run: 0.5})
    product, convolution = measured_peak("wall").values()
    assert product == pytest.approx(2 * 2048**3 / 0.5e9)
    assert convolution == pytest.approx(2 * (8 * 256 * 32 * 32) * (256 * 9) / 0.5e9)


def test_the_load_of_others_is_what_this_process_did_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[tuple[float, float, float | None]] = [(100.0, 5.0, 50.0), (110.0, 9.0, 62.0)]
    monkeypatch.setattr(OtherLoad, "clocks", lambda self: readings.pop(0))
    assert OtherLoad().cores() == pytest.approx((12 - 4) / 10)
    readings += [(0.0, 0.0, None), (1.0, 1.0, None)]
    assert OtherLoad().cores() is None


def test_the_state_of_the_gpu_is_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_state() == dict.fromkeys(GPU_KEYS)
    script = tmp_path / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "*query-gpu=clocks.sm\\ --format=csv,noheader,nounits) echo 1980 ;;\n"
        "*query-gpu=temperature.gpu\\ *) echo 41 ;;\n"
        "*query-gpu=power.draw\\ *) echo '[N/A]' ;;\n"
        "*query-gpu=clocks_throttle_reasons.active\\ *) echo 0x0000000000000004 ;;\n"
        "*) echo 'Field is not a valid field to query.'; exit 2 ;;\n"
        "esac\n"
    )
    script.chmod(0o755)
    assert gpu_state() == {
        "sm_clock_mhz": "1980",
        "memory_clock_mhz": None,
        "temperature_c": "41",
        "power_w": None,
        "throttle_reasons": "0x0000000000000004",
    }


def test_cpu_time_leaves_out_what_the_wall_counts() -> None:
    def asleep() -> None:
        time.sleep(0.05)

    assert STOPWATCHES["wall"](asleep) >= 0.05
    assert STOPWATCHES["core"](asleep) < 0.04


def test_the_other_cores_are_a_number_where_the_system_counts_them() -> None:
    found = OtherLoad()
    sum(range(1_000_000))  # this process's own work is not others'
    others = found.cores()
    assert (others is not None) == Path("/proc/stat").exists()
    assert others is None or 0 <= others <= 2 * (os.cpu_count() or 1)


def test_a_system_without_load_averages_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getloadavg", raising=False)
    assert load_average() is None
