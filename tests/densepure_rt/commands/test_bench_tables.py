from __future__ import annotations

import dataclasses

import pytest

from densepure_rt.commands.bench_tables import print_benchmark
from densepure_rt.export.compare.bench import Benchmark, Route, Spread, Stage
from densepure_rt.export.compare.machine import Load
from tests.support.benchmarks import MACHINE, SUBJECT, printed

FOUND = Benchmark(
    subject=SUBJECT,
    machine=MACHINE,
    batch=32,
    calls=1,
    threads=1,
    rounds=3,
    clock="core",
    sigma=0.5,
    routes=(
        Route("engine", (0.002, 0.002, 0.004), Spread(0.002, 0.0015, 0.0031), None, 123.4, 0.456),
        Route("PyTorch eager", (0.005,) * 3, Spread(0.005, 0.005, 0.005), Spread(2.5, 1.6, 3.34), None, None),
        Route("torch.compile", absent="no [bold]compiler[/bold] here"),
    ),
    stages=(
        Stage("UNet", Spread(1.5e-3, 1e-3, 2e-3), 0.9),
        Stage("vote", Spread(-1e-7, -2e-7, 1e-7), 0.1),
    ),
    gflop={"UNet": 0.25, "classifier": None},
    peak={"matrix product of 2048": 99.6},
    relative_l2=1.25e-7,
    load=Load((0.1, None), others=0.2),
)


def cells(text: str, name: str) -> list[str]:
    """What stands behind `name` in the last line that begins with it."""
    *_, found = (line.strip() for line in text.splitlines() if line.strip().startswith(name + " "))
    return found.removeprefix(name).split()


def test_what_was_run_on_what_stands_above() -> None:
    text = printed(print_benchmark, FOUND)
    assert "engines/unet.onnx, fp32, sha256 0123456789abcdef\n" in text
    assert "provider onnxruntime CPU, batch 32" in text
    assert "Some Processor 9000, 4 cores; torch 2.13.0" in text
    assert "0.1 before, unknown after" in text
    assert "1 x 32 images [1, 28, 28] a call, sigma 0.5" in text
    assert "UNet 0.25, classifier unknown an image" in text
    assert "100 GFLOP/s matrix product of 2048, float32" in text
    assert "1.3e-7 relative L2" in text


def test_routes_are_in_milliseconds_and_as_ratios() -> None:
    text = printed(print_benchmark, FOUND)
    assert "3 interleaved rounds, CPU time" in text
    assert cells(text, "engine") == ["2", "1.5-3.1", "123", "46", "%"]
    assert cells(text, "PyTorch eager") == ["5", "5-5", "2.50", "x", "1.60-3.34", "-", "-"]


def test_a_route_that_is_absent_is_named_with_its_reason_as_it_is() -> None:
    text = printed(print_benchmark, FOUND)
    assert "\ntorch.compile: no [bold]compiler[/bold] here\n" in text
    assert text.count("torch.compile") == 1


def test_stages_are_in_microseconds_with_their_shares() -> None:
    text = printed(print_benchmark, FOUND)
    assert cells(text, "UNet") == ["1500.0", "1000.0-2000.0", "90.0", "%"]
    assert cells(text, "vote") == ["-0.1", "-0.2-0.1", "10.0", "%"]


def test_nothing_is_cut_on_a_terminal_of_80_columns() -> None:
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed(print_benchmark, FOUND)


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (Load((0.1, 1.0), others=0.2), None),
        (Load((3.0, 3.0), others=0.2), None),
        (Load((0.1, 1.0), others=0.7), "0.7"),
        (Load((1.5, 1.0), others=None), "1.5"),
        (Load((None, None), others=None), None),
    ],
)
def test_it_warns_of_what_other_programs_used(load: Load, said: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    printed(print_benchmark, dataclasses.replace(FOUND, load=load))
    err = capsys.readouterr().err
    if said is None:
        assert err == ""
    else:
        assert f"warning: other programs used {said} cores meanwhile, of 4 here: read the ratios" in err


def test_with_several_threads_the_warning_gives_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    printed(print_benchmark, dataclasses.replace(FOUND, clock="wall", load=Load((0.1, 1.0), others=2.0)))
    assert "--threads 1" in capsys.readouterr().err


def test_the_state_of_a_gpu_is_shown_where_there_is_one() -> None:
    state: dict[str, str | None] = {"sm_clock_mhz": "1980", "power_w": None}
    text = printed(
        print_benchmark,
        dataclasses.replace(
            FOUND, machine=dataclasses.replace(MACHINE, gpu="Some GPU"), load=Load((None, None), None, ({}, state))
        ),
    )
    assert "Some GPU, 4 cores" in text
    assert "GPU after: sm_clock_mhz 1980, power_w unknown" in text
    assert "GPU before" not in text
