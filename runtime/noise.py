"""Counted, integer, replayable noise.

Random words are Philox4x64-10 (Salmon et al. 2011; numpy's `np.random.Philox`) under a key that belongs to one image
and one purpose. The counter is (block, step, vote, sample): pixel i reads word i % 4 of block 1 + i // 4. Nothing else
enters, so a pixel's noise does not depend on batch, order, thread or restart.

A word becomes a rounded normal by exact inverse CDF: a table of integer thresholds round(2^64 Phi((k + 1/2) / std)),
computed in integer arithmetic alone. Smoothing noise lives on the 1/255 pixel grid with std 255 sigma; vote noise on
the 1/4096 grid of the unit normal.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import struct
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from densepure_rt.errors import UsageError

Purpose = Literal["select", "certify", "predict", "falsify", "calibrate"]
Key = tuple[int, int]  # two 64-bit words

NOISE_LAW = "philox4x64-10, rounded normal, inverse CDF of 64-bit words, version 1"
PIXEL_LEVELS = 255  # a pixel is k / 255
UNIT_GRID = 4096  # vote noise is k / 4096
SMOOTHING_STEP = 0  # step counter of smoothing noise; vote noise has step >= 1

FRACTION_BITS = 256  # of the fixed-point numbers below; thresholds need 64
ONE = 1 << FRACTION_BITS
LARGEST_STD = 65_536  # grid steps; 1.2 million thresholds
SIGMAS = (0.004, 257)  # that errors name: within 1 / 255 and LARGEST_STD / 255
TAIL = 12  # standard deviations; the mass beyond is below 2^-107


def image_sha256(pixels: NDArray[np.uint8]) -> bytes:
    """Hash the shape and the pixels of an image."""
    digest = hashlib.sha256(struct.pack(f"<{1 + pixels.ndim}q", pixels.ndim, *pixels.shape))
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.digest()


def image_key(secret: bytes, purpose: Purpose, sigma: float, pixels: NDArray[np.uint8]) -> Key:
    """The Philox key of one image: the first 128 bits of HMAC-SHA256(secret, version, purpose, sigma, image).

    The engine, steps, votes, rule, n, alpha and batch are left out on purpose: equal noise makes comparisons paired.
    """
    message = b"\0".join([NOISE_LAW.encode(), purpose.encode(), struct.pack("<d", sigma) + image_sha256(pixels)])
    low, high = struct.unpack("<2Q", hmac.digest(secret, message, "sha256")[:16])
    return low, high


def random_words(key: Key, sample: int, vote: int, step: int, count: int) -> NDArray[np.uint64]:
    """`count` 64-bit words of one draw, uint64 [count]."""
    counter = np.array([0, step, vote, sample], np.uint64)  # numpy increments first, so the first block is 1
    words: NDArray[np.uint64] = np.random.Philox(key=np.array(key, np.uint64), counter=counter).random_raw(count)
    return words


@dataclass(frozen=True)
class RoundedNormal:
    """A normal of standard deviation `std`, rounded to the nearest integer, drawn from whole 64-bit words.

    thresholds: uint64, ascending; a word that reaches j of them is the integer lowest + j.
    total_variation: a bound on the distance between the law that is drawn and the exact one. A threshold is off by
        at most 2^-65 and the cut tails hold less than 2^-64 each, so (thresholds + 2) * 2^-64 is generous.
    """

    std: Fraction
    lowest: int
    thresholds: NDArray[np.uint64]

    @property
    def total_variation(self) -> float:
        return (len(self.thresholds) + 2) * 2.0**-64

    @property
    def sha256(self) -> str:
        """Hash the lowest value and the thresholds, little-endian: the noise law as a number."""
        return hashlib.sha256(struct.pack("<q", self.lowest) + self.thresholds.astype("<u8").tobytes()).hexdigest()

    def __call__(self, words: NDArray[np.uint64]) -> NDArray[np.int32]:
        """Return one integer per word, int32 of the same shape."""
        reached = np.searchsorted(self.thresholds, words, side="right")
        return (reached + self.lowest).astype(np.int32)


def multiply(a: int, b: int) -> int:
    return (a * b) >> FRACTION_BITS


def exp_minus(x: int) -> int:
    """exp(-x) of a fixed-point x in [0, 1], by its Taylor series."""
    total, term, n = ONE, ONE, 0
    while term:
        n += 1
        term = multiply(term, x) // n
        total += -term if n % 2 else term
    return total


def cell_moments(half: int, largest: int) -> list[int]:
    """2 / (2j)! times the integral of u^(2j) exp(-u^2 / 2) over [0, half], fixed-point, for j = 0, 1, ...

    Summed against m^(2j) they give the integral of exp(-m u - u^2 / 2) over [-half, half]. The list ends where, for
    m up to `largest`, what follows is below 2^-(FRACTION_BITS / 2).
    """
    moments, j, power, reach = [], 0, half, ONE
    while multiply(power, reach) >> (FRACTION_BITS // 2):
        moment, term, i = 0, power, 0  # term = half^(2j+2i+1) / ((2j)! 2^i i!)
        while term:
            moment += (-term if i % 2 else term) // (2 * j + 2 * i + 1)
            i += 1
            term = multiply(multiply(term, half), half) // (2 * i)
        moments.append(2 * moment)
        j += 1
        power = multiply(multiply(power, half), half) // (2 * j * (2 * j - 1))
        reach = multiply(multiply(reach, largest), largest)
    return moments


def cell_weights(std: Fraction) -> list[int]:
    """Proportional to P(|X| rounds to k) / 2 for k = 0, 1, ... as fixed-point numbers, X normal with `std`.

    With h = 1 / std, cell k is centred at m = k h and weighs exp(-m^2 / 2) times the integral of exp(-m u - u^2 / 2)
    over [-h/2, h/2].
    """
    count = TAIL * std.numerator // std.denominator + 2
    h = ONE * std.denominator // std.numerator
    moments = cell_moments(h // 2, count * h)
    ratio, ratio_step = exp_minus(multiply(h, h) // 2), exp_minus(multiply(h, h))
    weights, density = [], ONE
    for k in range(count):
        m2, integral = multiply(k * h, k * h), 0
        for moment in reversed(moments):  # Horner's rule in m^2
            integral = multiply(integral, m2) + moment
        weights.append(multiply(density, integral))
        density, ratio = multiply(density, ratio), multiply(ratio, ratio_step)
    return weights


@cache
def rounded_normal(std: Fraction) -> RoundedNormal:
    """The sampler of a normal with standard deviation `std` >= 1, rounded to the nearest integer.

    The normalising constant is the sum of the cells itself, so that neither pi nor a square root is needed.
    """
    if not 1 <= std <= LARGEST_STD:
        raise UsageError(
            f"noise of standard deviation {float(std):.3g} grid steps is not between 1, where it vanishes in rounding, "
            f"and {LARGEST_STD}, where its table outgrows the memory"
        )
    weights = cell_weights(std)
    total = 2 * sum(weights) - weights[0]
    upper, doubled = [], total - weights[0]  # twice the mass below the running threshold
    for weight in weights:
        doubled += 2 * weight
        threshold = ((doubled << 64) // total + 1) >> 1
        if threshold >= 1 << 64:
            break
        upper.append(threshold)
    lower = [(1 << 64) - threshold for threshold in reversed(upper)]  # the law is symmetric
    return RoundedNormal(std, -len(upper), np.array(lower + upper, np.uint64))


def smoothing_law(sigma: float) -> RoundedNormal:
    """Smoothing noise in grey levels: standard deviation 255 sigma, for the exact value of the float `sigma`."""
    if not (math.isfinite(sigma) and 1 <= PIXEL_LEVELS * Fraction(sigma) <= LARGEST_STD):
        raise UsageError(
            f"`sigma` is the standard deviation of the noise in [0, 1] pixel units, from {SIGMAS[0]} (below, it "
            f"vanishes in the rounding of pixels) to {SIGMAS[1]} (above, its table outgrows the memory), got {sigma}"
        )
    return rounded_normal(PIXEL_LEVELS * Fraction(sigma))


def vote_law() -> RoundedNormal:
    """Vote noise in steps of 1/4096 of the unit normal."""
    return rounded_normal(Fraction(UNIT_GRID))


def smoothing_noise(law: RoundedNormal, key: Key, sample: int, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Noise of one smoothed copy in grey levels, int32 of `shape`."""
    return law(random_words(key, sample, 0, SMOOTHING_STEP, math.prod(shape))).reshape(shape)


def vote_noise(key: Key, sample: int, vote: int, step: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The unit normals of one draw, float32 of `shape`, exact multiples of 1/4096. `step` >= 1: UNet calls done."""
    integers = vote_law()(random_words(key, sample, vote, step, math.prod(shape)))
    return np.divide(integers.reshape(shape), UNIT_GRID, dtype=np.float32)


def first_state(levels: NDArray[np.int32], scale: float) -> NDArray[np.float32]:
    """scale * (2 levels / 255 - 1) of the integers image + noise, in one fixed order of float32 operations."""
    pixels: NDArray[np.float32] = np.multiply(levels, 2, dtype=np.float32) / np.float32(PIXEL_LEVELS) - np.float32(1)
    return np.multiply(pixels, scale, dtype=np.float32)
