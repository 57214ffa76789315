"""Printed claims are rounded to the weaker one: no line formats one by itself, and what is printed is read."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from scipy import stats

from densepure_rt.commands.bench_tables import print_benchmark, print_procedures
from densepure_rt.commands.certify import print_summary
from densepure_rt.commands.compare import print_comparison
from densepure_rt.commands.export import print_exported
from densepure_rt.commands.import_results import show
from densepure_rt.commands.parity import print_agreement
from densepure_rt.commands.predict import print_prediction
from densepure_rt.errors import UsageError
from densepure_rt.images.datasets import LabelledImage
from densepure_rt.legacy.claims import Claim, Imported, ImportSettings
from densepure_rt.legacy.folder import tsv_line as imported_line
from densepure_rt.report.charts import accuracy_chart
from densepure_rt.report.compare import compare
from densepure_rt.report.page import page
from densepure_rt.report.summary import markdown, report_of
from densepure_rt.runs.layout import tsv_line
from densepure_rt.runs.reader import read_run
from densepure_rt.runs.records import Summary
from densepure_rt.runs.summary import accuracy_so_far
from densepure_rt.serving.models import values_of
from densepure_rt.smoothing.certificate import Certificate
from densepure_rt.smoothing.classifier import Certified, Predicted
from densepure_rt.smoothing.fixed import FixedRule
from densepure_rt.smoothing.scheduling import Cost
from densepure_rt.smoothing.settings import Settings
from tests.support.runs import SEQUENTIAL, Made, make_run, record_of

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for top in ("densepure_rt", "export", "runtime")
    for path in ROOT.glob(f"{top}/**/*.py")
    if not (top == "densepure_rt" and path.relative_to(ROOT).parts[1] in ("export", "runtime"))  # links
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOISE = (ROOT / "docs" / "concepts" / "noise-and-secrets.md").read_text(encoding="utf-8")

# What is rounded to the nearest where it is printed. None of it claims anything: times, speeds, counts, sizes, places
# on a page, sigma, what a network was declared with. A claim goes through `densepure_rt.rounding` instead.
NO_CLAIM = {
    "densepure_rt/cluster/fleet.py": "rate",
    "densepure_rt/cluster/ray_workers.py": "some.get(name, 0) | timeout",
    "densepure_rt/commands/bench_tables.py": """100 * found.main_thread | 100 * full | 100 * route.of_peak |
        100 * stage.share | 1000 * route.seconds.lower | 1000 * route.seconds.median | 1000 * route.seconds.upper |
        1000000.0 * seconds.lower | 1000000.0 * seconds.median | 1000000.0 * seconds.upper | cost.lower |
        cost.median | cost.unet_calls | cost.upper | found.ours.samples | found.samples_judged | found.sigma |
        gflops | load | ms | ms / total | number | others | ratio.lower | ratio.median | ratio.upper | route.gflops |
        total | work""",
    "densepure_rt/commands/certify.py": "2 * sigma | sigma | summary.samples | value",
    "densepure_rt/commands/diagnosis.py": "seconds",
    "densepure_rt/commands/export.py": """error | found.error[sigma] | found.other_error[sigma] |
        found.shrinkage[sigma] | labels.sigma""",
    "densepure_rt/commands/import_results.py": "sigma",
    "densepure_rt/commands/parity.py": "gap.noise",
    "densepure_rt/commands/procedure_chart.py": "1000 * seconds | count | factor",
    "densepure_rt/legacy/label_arrays.py": "value",
    "densepure_rt/report/page.py": "total / max(1, report.done)",
    "densepure_rt/report/step_chart.py": "100 * share | at - 4 | bottom | tick | top | x(place) | y_of(share)",
    "densepure_rt/report/summary.py": "identity.sigma | settings.sigma",
    "densepure_rt/report/templates.py": "round(value, 2)",
    "densepure_rt/rounding.py": "found",
    "densepure_rt/serving/api.py": "1000 * self.most | asked.deadline_ms | self.default | self.most",
    "densepure_rt/serving/clients.py": "seconds",
    "densepure_rt/serving/decoders.py": "DECODE_SECONDS",
    "densepure_rt/serving/server.py": "FORCE_SECONDS",
    "densepure_rt/serving/service.py": "END_SECONDS",
    "densepure_rt/serving/triton_model.py": "self.parameters.max_deadline_ms",
    "densepure_rt/smoothing/fastest_batch.py": "1000 * each",
    "densepure_rt/smoothing/settings.py": "self.image | self.run",
    "densepure_rt/text.py": "value",
    "export/compare/agreement.py": "found.sigma",
    "export/compare/denoising.py": "declared.timestep_scale | end | scale | sigma | start",
    "export/convert/parity.py": "coef[0] / coef[1] | sigma",
    "export/convert/to_onnx.py": "LARGE / 2 ** 30 | torch.finfo(DTYPES[kind]).max | weight_bytes(module) / 2 ** 30",
    "export/models/openai_unet.py": "trained.timestep_scale",
    "export/models/preprocessing.py": "high | low | p.scale[0] | p.scale[1] | value",
    "export/models/sources.py": "scale",
    "export/models/unets.py": "high | low",
    "export/zoo/train.py": "smooth_loss",
    "runtime/noise.py": "float(std)",
    "runtime/schedule.py": "sigma | timestep",
    "runtime/tensorrt_device.py": "needed | room",
}


def rounded(tree: ast.AST) -> Iterator[str]:
    """What an f-string, `%` or `format` rounds to the nearest."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FormattedValue) and isinstance(node.format_spec, ast.JoinedStr):
            spec = "".join(str(part.value) for part in node.format_spec.values if isinstance(part, ast.Constant))
            if re.search(r"[efgn%]$", spec, re.IGNORECASE):
                yield ast.unparse(node.value)
        elif by_operator(node) or by_call(node):
            yield ast.unparse(node)


def by_operator(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and is_text(node.left)


def by_call(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Name):
        return node.func.id == "format"
    if not (isinstance(node.func, ast.Attribute) and node.func.attr == "format" and is_text(node.func.value)):
        return False
    return re.search(r":[^{}]*[efgn%]\}", ast.unparse(node.func.value), re.IGNORECASE) is not None


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_no_line_rounds_a_claim_by_itself() -> None:
    found = {str(path.relative_to(ROOT)): set(rounded(ast.parse(path.read_text()))) for path in SOURCES}
    known = {name: {each.strip() for each in text.split("|")} for name, text in NO_CLAIM.items()}
    assert {name: sorted(values) for name, values in found.items() if values} == {
        name: sorted(values) for name, values in known.items()
    }


@pytest.mark.parametrize(
    ("line", "caught"),
    [
        ("f'{100 * share:.1f} %'", ["100 * share"]),
        ("f'{p:.{digits}g}'", ["p"]),
        ("f'{share:.0%}'", ["share"]),
        ("'%.2f' % radius", ["'%.2f' % radius"]),
        ("'{:.2f}'.format(radius)", ["'{:.2f}'.format(radius)"]),
        ("format(radius, '.2f')", ["format(radius, '.2f')"]),
        ("f'{floored(radius)} of {count:,} {name:>8}'", []),
        ("n % 2", []),
    ],
)
def test_every_way_to_round_by_itself_is_caught(line: str, caught: list[str]) -> None:
    assert list(rounded(ast.parse(line))) == caught


# The screens, pages and files, with values that the nearest digits would overstate


class Printed(NamedTuple):
    """A number of a screen. pattern: has the number as its group, once or more. value: in the unit that is printed."""

    screen: str
    pattern: str
    value: Fraction | float
    down: bool


SHARE = Fraction(2, 3)  # of made images that are certified
RADIUS, RADIUS_LESS = 0.29996, 0.19996
UPPER, ETA, GAP, MOST = 0.066746, 0.0121001, 1.21e-7, 3.4000001e-6
REACH = 0.78637
BOUND = 0.00012001


def made(path: Path, radius: float = RADIUS) -> Path:
    return make_run(path, [Made(radius), Made(radius), Made(None)])


def summary_of(*accuracy: float) -> Summary:
    radii = tuple(map(float, range(len(accuracy))))
    return Summary(2000, 2000, False, radii, accuracy, 1, {"at n": 1}, 64.0, 9, 0, 0)


def text_of_summary(tmp_path: Path) -> None:
    print_summary(summary_of(1999 / 2000), True, tmp_path, False)


def text_of_progress(tmp_path: Path) -> None:
    print(accuracy_so_far(summary_of(199 / 200)))


def text_of_comparison(tmp_path: Path) -> None:
    print_comparison(compare(read_run(made(tmp_path / "a")), read_run(made(tmp_path / "b", RADIUS_LESS))))


def text_of_page(tmp_path: Path) -> None:
    print(page([report_of(read_run(made(tmp_path / "run")), "run")]))


def text_of_bound(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [Made(RADIUS)] * 299 + [Made(None)])
    print(page([report_of(read_run(run), "run")]))


def text_of_markdown(tmp_path: Path) -> None:
    print(markdown([report_of(read_run(made(tmp_path / "run")), "run")]))


def text_of_chart(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [Made(0.25), Made(0.25), Made(None)], rule=SEQUENTIAL)
    print(accuracy_chart([report_of(read_run(run), "run")], alone=True))


def text_of_import(tmp_path: Path) -> None:
    claims = (Claim.of(0, 3, 3, RADIUS), Claim.of(1, 3, 3, RADIUS), Claim.of(2, 3, None, None))
    show(Imported(claims, (), REACH, {}, ImportSettings("log", None, None, 0.001)), (0.0, 0.25))


def text_of_results(tmp_path: Path) -> None:
    print(tsv_line(record_of(0, Made(RADIUS)), 1.0))


def text_of_imported_results(tmp_path: Path) -> None:
    print(imported_line(Claim.of(0, 3, 3, RADIUS)))


def text_of_prediction(tmp_path: Path) -> None:
    print_prediction(PREDICTED, ["a", "b"], as_json=False)


def text_of_agreement(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from densepure_rt.export.compare import agreement

    transfer = agreement.Transfer(0, 3, 3, 0, 40, 0, ETA, RADIUS, RADIUS, RADIUS_LESS)
    steps, none_of_fifty = [agreement.StepGap(0, 258, 0.5, MOST, GAP)], agreement.Share(0, 50)
    found = agreement.Agreement("e", "fp32", 0.5, steps, MOST, GAP, none_of_fifty, none_of_fifty, [transfer], [])
    print_agreement(found)


def text_of_failures(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from densepure_rt.export.compare import agreement

    share = agreement.Share(50, 50)
    print(agreement.failures(agreement.Agreement("e", "fp32", 0.5, [], MOST, 0.5100001, share, share, [], [])))


def text_of_export(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from densepure_rt.export.convert.parity import Difference, Exported, LabelParity

    worst = Difference("step", 16, MOST, GAP)
    labels = LabelParity("cpu", 0.5, 5, 20, 0, UPPER, (0.0,), ((1999 / 2000,), (199 / 200,)))
    print_exported(Exported(tmp_path, tmp_path, "int8", "cpu", worst, worst, 2, {}, labels))


def text_of_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests.densepure_rt.commands.test_bench_tables import FOUND

    print_benchmark(replace(FOUND, relative_l2=GAP))


def text_of_procedures(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests.densepure_rt.commands.test_procedure_chart import OURS, found_with

    print_procedures(found_with(replace(OURS, certified=199 / 200)))


def text_of_a_charge(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        FixedRule(n0=100, n=1000, alpha=0.001, sigma=0.25, charge=0.00051001)
    print(refused.value)


def text_of_reach(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        Settings(sigma=0.25, radii=(0.9,)).check_reach(784, True)
    print(refused.value)


REACHED = Settings(sigma=0.25).rule(784, True).reach() or 0.0
PREDICTED = Predicted(LabelledImage(0, np.zeros((1, 2, 2), np.uint8), 0), 0, 13, np.array([13, 0]), BOUND, Cost())
BAND = 100 * math.sqrt(math.log(40) / 6)
REACHED_FIXED = 0.5 * float(stats.norm.ppf(stats.beta.ppf(0.001, 200, 1)))
RIGHT = 100 * (299 / 300 - 0.001 - math.sqrt(0.001 * 0.999 * math.log(20) / 300) - math.log(20) / 900)
WRONG = "are expected to be"
CLAIMS: dict[Callable[[Path], None], list[Printed]] = {
    text_of_summary: [Printed("certify", r"certified +([\d.]+) %", Fraction(199900, 2000), True)],
    text_of_progress: [Printed("progress and merge", r"certified ([\d.]+) % at 0", Fraction(19900, 200), True)],
    text_of_comparison: [
        Printed("compare: accuracy of A", r"0\.25 +([\d.]+) %", 100 * SHARE, True),
        Printed("compare: p", r"0\.25 .* ([\d.]+) *\n", Fraction(1, 2), False),
        Printed("compare: radii", r"(?:0|1) +3 +([\d.]+) ", RADIUS, True),
        Printed("compare: radii of B", r"(?:0|1) +3 +[\d.]+ +([\d.]+)", RADIUS_LESS, True),
    ],
    text_of_page: [
        Printed("report: certified", r"2 certified for their label \(([\d.]+) %\)", 100 * SHARE, True),
        Printed("report: abstained", r"1 undecided after all n samples \(([\d.]+) %\)", 100 * (1 - SHARE), False),
        Printed("report: card", r"<b>([\d.]+) %</b><small>at radius 0<", 100 * SHARE, True),
        Printed("report: band", r"to either side ([\d.]+) points", BAND, False),
        Printed("report: wrong", rf"at most ([\d.]+) {WRONG}", Fraction(3, 1000), False),
        Printed("report: reach", r"no radius beyond</t[hd]><td[^>]*>([\d.]+)<", REACHED_FIXED, False),
    ],
    text_of_bound: [Printed("report: right of these", r"99\.6 %<small>≥ ([\d.]+) %<", RIGHT, True)],
    text_of_markdown: [Printed("report: md", r"3 of 3 \| ([\d.]+) %", 100 * SHARE, True)],
    text_of_chart: [Printed("report: svg", r"([\d.]+) % at 0\.25<", 100 * SHARE, True)],
    text_of_import: [
        Printed("import: accuracy", r"(?:printed|sound) +([\d.]+) %", 100 * SHARE, True),
        Printed("import: reach", r"no radius beyond ([\d.]+) ", REACH, False),
    ],
    text_of_results: [Printed("results.tsv", r"^0\t3\t3\t([\d.]+)\t", RADIUS, True)],
    text_of_imported_results: [Printed("imported.tsv", r"^0\t3\t3\t([\d.]+)\t", RADIUS, True)],
    text_of_prediction: [Printed("predict", r"13/13\t([\d.e-]+)", BOUND, False)],
    text_of_agreement: [
        Printed("parity: L2", r"(?:timestep 258|whole chain) +([\d.e-]+)", GAP, False),
        Printed("parity: largest", r"(?:timestep 258|whole chain) +[\d.e-]+ +([\d.e-]+)", MOST, False),
        Printed(
            "parity: fewer than",
            r"(?:labels|votes) .* ([\d.]+) %",
            100 * (1 - float(stats.beta.ppf(0.001, 50, 1))),
            False,
        ),
        Printed("parity: radii", r"\n +0 +3 +([\d.]+)", RADIUS, True),
        Printed("parity: transferred", r"\n +0 +3 +[\d.]+ +[\d.]+ +([\d.]+)", RADIUS_LESS, True),
        Printed("parity: eta", r"\n +0 +3 +[\d.]+ +[\d.]+ +[\d.]+ +([\d.]+)", ETA, False),
    ],
    text_of_failures: [
        Printed("parity: chain", r"the chain: relative L2 ([\d.]+),", 0.5100001, False),
        Printed("parity: at least", r"so at least ([\d.]+) %", 100 * float(stats.beta.ppf(0.001, 50, 1)), True),
    ],
    text_of_export: [
        Printed("export: fewer than", r"fewer than ([\d.]+) %", 100 * UPPER, False),
        Printed("export: L2", r"relative L2 ([\d.e-]+),", GAP, False),
        Printed("export: largest", r"max ([\d.e-]+)", MOST, False),
        Printed("export: certified", r"radius 0: ([\d.]+) %", Fraction(19900, 200), True),
        Printed("export: float32", r"float32 ([\d.]+) %", Fraction(199900, 2000), True),
    ],
    text_of_benchmark: [Printed("bench", r"([\d.e-]+) relative L2", GAP, False)],
    text_of_procedures: [Printed("bench --procedure", r"ours .* ([\d.]+) % *\n", Fraction(19900, 200), True)],
    text_of_a_charge: [Printed("alpha's charge", r"costs ([\d.]+),", 0.00051001, False)],
    text_of_reach: [Printed("reach", r"no radius beyond ([\d.]+) is", REACHED, False)],
}


@pytest.mark.parametrize("text_of", CLAIMS, ids=lambda text_of: text_of.__name__.removeprefix("text_of_"))
def test_what_is_printed_is_the_weaker_claim_and_the_nearest_such(
    text_of: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text_of(tmp_path)
    text = capsys.readouterr().out
    for claim in CLAIMS[text_of]:
        numbers = re.findall(claim.pattern, text)
        assert numbers, f"{claim.screen}: nothing like {claim.pattern} in\n{text}"
        for number in numbers:
            digit = Fraction(10) ** int(Decimal(number).as_tuple().exponent)
            short = Fraction(claim.value) - Fraction(number) if claim.down else Fraction(number) - Fraction(claim.value)
            assert 0 <= short < digit, f"{claim.screen}: {number} for {float(claim.value)}"


def test_the_server_claims_no_more_than_was_found() -> None:
    """Its numbers are whole floats, and none is rounded but the confidence."""
    certificate = Certificate(0, RADIUS, 0, 64, 64, 0.001, 0.9)
    (radius,) = values_of([Certified(PREDICTED.image, certificate, Cost())])["radius"]
    (confidence,) = values_of([PREDICTED])["confidence"]
    assert radius == RADIUS
    assert 0 <= 1 - Fraction(BOUND) - Fraction(float(confidence)) < Fraction(1, 10**15)


# Figures of README and docs that follow from others


def test_the_charge_in_the_docs_is_that_of_the_defaults_rounded_up() -> None:
    (said,) = re.findall(r"([\d.]+e-\d+) at the defaults", NOISE)
    charge = Settings().rule(28 * 28, True).charge
    assert charge <= float(said) <= 1.1 * charge


def test_the_standard_errors_in_the_readme_are_those_of_its_table() -> None:
    ((least, most),) = re.findall(r"500 images leave a standard error of ([\d.]+) to ([\d.]+) points", README)
    table = README.partition("| sigma | 0 | 0.5 sigma |")[2].partition("500 images")[0]
    errors = [100 * math.sqrt(p * (1 - p) / 500) for p in (float(p) / 100 for p in re.findall(r"([\d.]+) %", table))]
    assert len(errors) == 12
    assert (float(least), float(most)) == (round(min(errors), 1), round(max(errors), 1))
