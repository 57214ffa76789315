"""Numbers as they are shown. Whatever is claimed is rounded to the weaker claim, here and nowhere else.

| shown number | rounded | since the weaker claim is |
|---|---|---|
| radius of a certificate, lower bound on a probability, confidence | down | a smaller one |
| certified accuracy, right share of a test set, "at least" | down | fewer images |
| reach ("no radius beyond"), "fewer than", "at most", eta, error bound, p-value, false alarms | up | more is possible |
| shares of images that abstain or are certified for another class | up | more of them |
| relative L2 and largest difference from PyTorch, half width of a confidence band | up | further apart |
| what was asked for: radii of a grid, alpha, a level | not at all | it can be typed again as it stands |

Times, speeds, counts, sizes and sigma claim nothing: they are rounded to the nearest where they are printed. JSON and
JSONL hold full precision.

A float stands for its exact binary value, a share of images for its ratio of counts (`ratio`), and a number that was
asked for for the decimal that was typed (`typed`): 0.29 of 100 images is 29 %, and not 28.9 %.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction

MOST_COUNTED = 10**7  # images; two ratios of such counts are 1e-14 apart, a float is off by 1e-16

LEAST_PLAIN = Decimal("1e-4")  # that is shown without an exponent


def floored(value: float | Fraction, decimals: int = 3, figures: int | None = None, percent: bool = False) -> str:
    """Show `value` with so many decimals, never above it. figures: significant digits instead. percent: 12.3 %."""
    return _shown(value, ROUND_FLOOR, decimals, figures, percent)


def raised(value: float | Fraction, decimals: int = 3, figures: int | None = None, percent: bool = False) -> str:
    """Show `value` as `floored` does, but never below it."""
    return _shown(value, ROUND_CEILING, decimals, figures, percent)


def floored_share(share: float, decimals: int = 1) -> str:
    """Show the share of images of which something is claimed, such as an accuracy: 99.9 % of 0.9995."""
    return floored(ratio(share), decimals, percent=True)


def raised_share(share: float, decimals: int = 1) -> str:
    """Show the share of images of which nothing is claimed, such as those that abstain, in percent."""
    return raised(ratio(share), decimals, percent=True)


def exact(value: float) -> str:
    """Show a number that was asked for in the fewest digits that read back as the same float: 0.25, 1, 1e-06."""
    return repr(float(value)).removesuffix(".0")


def ratio(share: float) -> Fraction:
    """Return the ratio of counts that a share stands for: exact for up to MOST_COUNTED images."""
    return Fraction(share).limit_denominator(MOST_COUNTED)


def typed(value: float) -> Fraction:
    """Return the decimal that a number was asked for as: 1/1000 for 0.001."""
    return Fraction(repr(float(value)))


def _shown(value: float | Fraction, rounding: str, decimals: int, figures: int | None, percent: bool) -> str:
    if not math.isfinite(value):
        return str(value)
    number = Fraction(value) * (100 if percent else 1)
    if figures is None:
        units = number * 10**decimals
        whole = math.floor(units) if rounding == ROUND_FLOOR else math.ceil(units)
        found = Decimal(f"{whole}e-{decimals}")
    else:
        context = Context(prec=figures, rounding=rounding)
        found = context.divide(Decimal(number.numerator), Decimal(number.denominator))
    text = f"{found:e}" if 0 < abs(found) < LEAST_PLAIN and figures is not None else f"{found:f}"
    return f"{text} %" if percent else text
