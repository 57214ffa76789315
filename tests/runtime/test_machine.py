from __future__ import annotations

from pathlib import Path

import pytest

from densepure_rt.runtime import machine
from densepure_rt.runtime.machine import available_memory, instruction_sets, loaded_version, processor, tensorrt_version

X86 = """processor\t: {core}
model name\t: Some Processor 9000 @ 2.60GHz
flags\t\t: fpu sse4_1 smep smap {flags}

"""
ORIN = """processor\t: {core}
BogoMIPS\t: 62.50
Features\t: fp asimd evtstrm aes fphp asimdhp asimddp {flags}
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd42

"""


def told(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    path = folder / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr(machine, "CPUINFO", path)


def test_the_processor_of_this_machine_has_a_name() -> None:
    assert processor().strip() == processor() != ""


def test_an_x86_is_named_by_its_model_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told(monkeypatch, tmp_path, X86.format(core=0, flags="avx2"))
    assert processor() == "Some Processor 9000 @ 2.60GHz"


def test_an_arm_has_no_model_name_and_is_named_by_implementer_and_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    told(monkeypatch, tmp_path, ORIN.format(core=0, flags=""))
    assert processor() == "aarch64 0x41 0xd42 0x0"


def test_without_cpuinfo_the_processor_still_has_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    assert processor() != ""
    assert instruction_sets() == ()


def test_instruction_sets_are_those_that_all_cores_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    both = X86.format(core=0, flags="avx2 avx512f fma") + X86.format(core=1, flags="fma avx2")
    told(monkeypatch, tmp_path, both)
    assert instruction_sets() == ("avx2", "fma", "sse4_1")


def test_instruction_sets_of_an_arm_are_its_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told(monkeypatch, tmp_path, ORIN.format(core=0, flags="sve i8mm"))
    assert instruction_sets() == ("asimd", "asimddp", "asimdhp", "fphp", "i8mm", "sve")


def test_two_x86_of_one_model_name_differ_in_their_instruction_sets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told(monkeypatch, tmp_path, X86.format(core=0, flags="avx2 avx512_vnni"))
    first = processor(), instruction_sets()
    told(monkeypatch, tmp_path, X86.format(core=0, flags="avx2"))
    second = processor(), instruction_sets()
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_a_library_that_is_loaded_says_its_own_version() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    major, minor, patch, *_ = map(int, trt.__version__.split("."))
    assert loaded_version("libtensorrt_rtx.so", tensorrt_version) == major * 10_000 + minor * 100 + patch


def test_a_library_that_is_not_loaded_or_has_no_such_function_has_no_version() -> None:
    assert loaded_version("libthere-is-none.so", tensorrt_version) is None
    assert loaded_version("libc.so", tensorrt_version) is None


def test_free_memory_is_what_linux_estimates_and_none_where_it_says_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    monkeypatch.setattr(machine, "MEMINFO", path)
    monkeypatch.setattr(machine, "MEMORY_MAX", limit)
    assert available_memory() is None
    path.write_text("MemTotal:       8000 kB\nMemFree:          10 kB\nMemAvailable:   2000 kB\n")
    assert available_memory() == 2_048_000
    for text, expected in (("max\n", 2_048_000), ("1000000\n", 1_000_000), ("9000000\n", 2_048_000)):
        limit.write_text(text)
        assert available_memory() == expected
    limit.unlink()
    for text in ("", "MemAvailable:\n", "MemAvailable: much\n"):
        path.write_text(text)
        assert available_memory() is None
