from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from densepure_rt.commands.bench_tables import print_procedures
from densepure_rt.commands.procedure_chart import NAMES, bars, draw_procedures
from densepure_rt.export.compare.machine import Load
from densepure_rt.export.compare.procedure import SMALL, CallSeconds, Procedure, ProcedureBenchmark, factors_of
from densepure_rt.smoothing.settings import PAPER, Settings
from tests.support.benchmarks import MACHINE, SUBJECT, printed

CALLS = CallSeconds(unet=0.003, classifier=0.0005)
OURS = Procedure(
    Settings(sigma=0.25, steps=10, votes=40, n=10_000, method="sequential", radii=(0.25,)),
    samples=80.0,
    unet_calls=15_000.0,
    classifier_calls=1700.0,
    seconds=40.0,
    certified=0.9,
)


def found_with(ours: Procedure = OURS, others: float = 0.2) -> ProcedureBenchmark:
    published = CALLS.priced(dataclasses.replace(PAPER, sigma=0.25))
    return ProcedureBenchmark(
        unet_call_ratio=published.unet_calls / ours.unet_calls,
        time_ratio=published.seconds / ours.seconds,
        factors=factors_of(published, ours),
        small=Procedure(SMALL, 64, 384.0, 192.0, 1.3, 0.8),
        published=published,
        ours=ours,
        call_seconds=CALLS,
        predicted_seconds=1.248,
        samples_judged=70.4,
        fill={"smooth": 0.987, "step": 1.0, "classify": 0.5},
        main_thread=0.0123,
        images=10,
        sigma=0.25,
        seed=0,
        subject=SUBJECT,
        batch=32,
        threads=2,
        clock="wall",
        machine=MACHINE,
        load=(Load((0.1, None), others=0.1), Load((0.3, 0.4), others=others)),
    )


def cells(text: str, name: str) -> list[str]:
    """What stands behind `name` in the table, which comes before the sentence on the ratios."""
    table = text.partition("of one image")[2].partition("ours takes")[0]
    (found,) = (line.strip() for line in table.splitlines() if line.strip().startswith(name + "  "))
    return found.removeprefix(name).split()


def test_what_was_run_on_what_stands_above() -> None:
    text = printed(print_procedures, found_with())
    assert "engines/unet.onnx, fp32, sha256 0123456789abcdef\n" in text
    assert "provider onnxruntime CPU, batch 32" in text
    assert "Some Processor 9000, 4 cores; torch 2.13.0" in text
    assert "0.1 to unknown beside the published procedure, 0.3 to 0.4 beside ours" in text
    assert "10 of [1, 28, 28], seed 0; certified: at the radius 0.25" in text
    assert "n0 100, n 100,000, K 40, b 10; run small: n0 8, n 56, K 3, b 2" in text
    assert "sequential, n 10,000 at most, K 40, b 10; 70.4 samples judged of 80.0 drawn" in text
    assert "smooth 99 %, step 100 %, classify 50 % full" in text
    assert "1.2 % of the CPU time" in text


def test_pricing_stands_beside_what_it_should_have_given() -> None:
    assert (
        "UNet 3 ms, classifier 0.5 ms a call; that gives 1.2 s for the small run, which took 1.3 s, an image"
        in printed(print_procedures, found_with())
    )


def test_what_each_procedure_takes_of_an_image() -> None:
    text = printed(print_procedures, found_with())
    assert "of one image, wall clock" in text
    assert cells(text, "published, run small") == ["64", "384", "192", "1.3", "s", "80", "%"]
    assert cells(text, "published, priced") == ["100,100", "40,040,000", "4,004,000", "34", "h", "-"]
    assert cells(text, "ours") == ["80", "15,000", "1,700", "40", "s", "90", "%"]
    assert "2,669 times fewer UNet calls and 3,053 times less time" in text


def test_bars_lie_end_to_end_from_the_published_procedure_to_ours() -> None:
    published, *steps, ours = bars(found_with())
    assert [step.name for step in steps] == list(NAMES.values())
    end = published.high
    for step in steps:
        assert step.high == pytest.approx(end)
        end = step.low
    assert ours.high == pytest.approx(end)
    assert ours.low == published.low < ours.high
    assert [step.text for step in steps] == ["/ 1,251", "/ 1.11", "/ 1.93", "/ 1.14"]
    assert [bar.kind for bar in (published, *steps, ours)] == ["published", *["saved"] * 4, "ours"]


def test_a_factor_that_costs_time_goes_the_other_way() -> None:
    *_, engine, ours = bars(found_with(dataclasses.replace(OURS, seconds=90.0)))
    assert (engine.kind, engine.text) == ("lost", "/ 0.508")
    assert engine.high == pytest.approx(ours.high) == pytest.approx(90)


def test_what_each_factor_saves_is_printed_from_the_published_procedure_to_ours() -> None:
    shown, lines = bars(found_with()), printed(print_procedures, found_with()).splitlines()[-6:]
    for line, bar in zip(lines, shown, strict=True):
        assert line.startswith(f" {bar.name} ")
        assert line.endswith(f" {bar.text}")


def test_no_line_of_the_table_is_cut_on_a_terminal_of_80_columns() -> None:
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed(print_procedures, found_with())


def test_it_warns_once_of_what_other_programs_used(capsys: pytest.CaptureFixture[str]) -> None:
    printed(print_procedures, found_with())
    assert capsys.readouterr().err == ""
    printed(print_procedures, found_with(others=1.3))
    err = capsys.readouterr().err
    assert err.count("warning") == 1
    assert "1.3 cores" in err
    assert "--threads 1" in err


@pytest.mark.parametrize(
    "ours", [OURS, dataclasses.replace(OURS, seconds=90.0), dataclasses.replace(OURS, seconds=1e6)]
)
def test_the_picture_is_drawn_of_any_result(tmp_path: Path, ours: Procedure) -> None:
    draw_procedures(found_with(ours), tmp_path / "procedure.png")
    with Image.open(tmp_path / "procedure.png") as picture:
        picture.load()
        assert picture.width > 1000
