"""The noise against mpmath, scipy and a Philox of its own; and the known answers of noise law version 1."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import math
import struct
from fractions import Fraction
from typing import get_args

import mpmath
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from densepure_rt.errors import UsageError
from densepure_rt.runtime.noise import (
    NOISE_LAW,
    Purpose,
    RoundedNormal,
    first_state,
    image_key,
    random_words,
    rounded_normal,
    smoothing_law,
    smoothing_noise,
    vote_noise,
)

QUICK = settings(deadline=None, max_examples=50)
KEY = (0x0123456789ABCDEF, 0xFEDCBA9876543210)
SECRET = bytes(range(32))
WORD = st.integers(0, 2**64 - 1)
STDS = [
    Fraction(1),
    Fraction(7, 5),
    Fraction(255, 12),
    Fraction(255, 4),
    Fraction(255, 2),
    255 * Fraction(0.1),
    Fraction(4096),
]


def philox4x64_10(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al. 2011, section 3.3, with the constants of Random123's philox.h."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(c[0] * 0xD2E7470EE14C6C93, 1 << 64)
        high1, low1 = divmod(c[2] * 0xCA5A826395121157, 1 << 64)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B97F4A7C15) % (1 << 64), (k[1] + 0xBB67AE8584CAA73B) % (1 << 64)]
    return c


def hex_words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def exact_cdf(k: int, std: Fraction) -> mpmath.mpf:
    """P(the rounded normal <= k), to 60 digits."""
    return mpmath.ncdf((mpmath.mpf(2 * k + 1) / 2) * std.denominator / std.numerator)


def exact_threshold(k: int, std: Fraction) -> int:
    return int(mpmath.floor(mpmath.mpf(2) ** 64 * exact_cdf(k, std) + mpmath.mpf("0.5")))


@pytest.fixture(autouse=True)
def _sixty_digits() -> None:
    mpmath.mp.dps = 60


# Random123's tests/kat_vectors, philox4x64 with 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("0 0 0 0", "0 0", "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
        (
            "ffffffffffffffff " * 4,
            "ffffffffffffffff " * 2,
            "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0",
        ),
        (
            "243f6a8885a308d3 13198a2e03707344 a4093822299f31d0 082efa98ec4e6c89",
            "452821e638d01377 be5466cf34e90c6c",
            "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
        ),
    ],
)
def test_philox_written_here_gives_the_published_answers(counter: str, key: str, expected: str) -> None:
    assert philox4x64_10(hex_words(counter), hex_words(key)) == hex_words(expected)


@QUICK
@given(key=st.tuples(WORD, WORD), sample=WORD, vote=WORD, step=WORD, count=st.integers(1, 13))
@example(key=(2**64 - 1, 2**64 - 1), sample=2**64 - 1, vote=2**64 - 1, step=2**64 - 1, count=13)
@example(key=(0, 0), sample=0, vote=0, step=0, count=1)
def test_word_of_a_pixel_is_philox_of_its_block_step_vote_and_sample(
    key: tuple[int, int], sample: int, vote: int, step: int, count: int
) -> None:
    words = random_words(key, sample, vote, step, count)
    expected = [philox4x64_10([1 + i // 4, step, vote, sample], list(key))[i % 4] for i in range(count)]
    assert words.dtype == np.uint64
    assert words.tolist() == expected


def test_no_two_draws_share_a_word() -> None:
    draws = [
        random_words(KEY, sample, vote, step, 64)
        for sample, vote, step in itertools.product([0, 1, 2, 83_217], [0, 1, 2, 39], [0, 1, 2, 9])
    ]
    assert len(np.unique(np.concatenate(draws))) == len(draws) * 64


def test_smoothing_noise_is_drawn_at_step_0_and_vote_noise_at_its_own_step() -> None:
    law = smoothing_law(0.5)
    assert (smoothing_noise(law, KEY, 5, (2, 3, 4)).ravel() == law(random_words(KEY, 5, 0, 0, 24))).all()
    integers = rounded_normal(Fraction(4096))(random_words(KEY, 5, 3, 2, 24))
    assert (vote_noise(KEY, 5, 3, 2, (2, 3, 4)).ravel().astype(np.float64) * 4096 == integers).all()


def test_noise_of_a_pixel_does_not_depend_on_how_many_others_are_drawn() -> None:
    assert (vote_noise(KEY, 7, 1, 1, (3, 32, 32)).ravel()[:100] == vote_noise(KEY, 7, 1, 1, (100,))).all()


@pytest.mark.parametrize("std", STDS, ids=lambda std: f"{float(std):g}")
def test_thresholds_are_the_rounded_cdf_of_mpmath(std: Fraction) -> None:
    law = rounded_normal(std)
    count = len(law.thresholds)
    ends = range(20)
    places = range(count) if count < 1300 else sorted({*ends, *(count - 1 - i for i in ends), *range(0, count, 997)})
    for place in places:
        assert int(law.thresholds[place]) == exact_threshold(law.lowest + place, std), place


@pytest.mark.parametrize("std", STDS, ids=lambda std: f"{float(std):g}")
def test_tables_leave_out_only_what_64_bits_cannot_reach(std: Fraction) -> None:
    law = rounded_normal(std)
    assert exact_threshold(law.lowest - 1, std) == 0
    assert exact_threshold(law.lowest + len(law.thresholds), std) == 2**64
    assert law.lowest == -len(law.thresholds) // 2
    assert (law.thresholds[1:] >= law.thresholds[:-1]).all()


@pytest.mark.parametrize("std", STDS, ids=lambda std: f"{float(std):g}")
def test_word_at_a_threshold_is_the_first_of_its_integer(std: Fraction) -> None:
    law = rounded_normal(std)
    middle = -law.lowest  # the threshold between 0 and 1
    threshold = law.thresholds[middle]
    words = np.array([0, threshold - np.uint64(1), threshold, 2**64 - 1], np.uint64)
    assert law(words).tolist() == [law.lowest, 0, 1, -law.lowest]


def test_words_keep_their_shape_and_become_int32() -> None:
    drawn = rounded_normal(Fraction(3))(np.zeros((2, 3, 4), np.uint64))
    assert drawn.shape == (2, 3, 4)
    assert drawn.dtype == np.int32


@pytest.mark.parametrize(
    "std", [Fraction(1), Fraction(7, 5), Fraction(255, 12), Fraction(255, 4)], ids=lambda std: f"{float(std):g}"
)
def test_total_variation_bounds_the_exact_distance(std: Fraction) -> None:
    law = rounded_normal(std)
    edges = [0, *(int(threshold) for threshold in law.thresholds), 2**64]
    drawn = [mpmath.mpf(high - low) / mpmath.mpf(2) ** 64 for low, high in itertools.pairwise(edges)]
    cdf = [exact_cdf(law.lowest - 1 + i, std) for i in range(len(drawn) + 1)]
    exact = [high - low for low, high in itertools.pairwise(cdf)]
    never_drawn = cdf[0] + (1 - cdf[-1])
    distance = (sum(abs(p - q) for p, q in zip(drawn, exact, strict=True)) + never_drawn) / 2
    assert 0 < distance <= law.total_variation
    assert law.total_variation < 1e-15


def drawn_integers(law: RoundedNormal, count: int) -> NDArray[np.int32]:
    return law(random_words(KEY, 0, 0, 0, count))


def chi_square(integers: NDArray[np.int32], std: float) -> float:
    """The p-value of a fit of `integers` to the rounded normal with `std`, in cells that expect 20 or more."""
    everywhere = np.arange(-math.ceil(6 * std), math.ceil(6 * std)) + 0.5
    edges, below = [], [0.0]
    for edge, expected in zip(everywhere, len(integers) * stats.norm.cdf(everywhere / std), strict=True):
        if expected - below[-1] >= 20 and len(integers) - expected >= 20:
            edges.append(edge)
            below.append(float(expected))
    observed = np.bincount(np.searchsorted(edges, integers), minlength=len(below))
    return float(stats.chisquare(observed, np.diff(below, append=len(integers))).pvalue)


@pytest.mark.parametrize("std", STDS, ids=lambda std: f"{float(std):g}")
def test_drawn_integers_fit_the_rounded_normal_and_not_one_3_percent_wider(std: Fraction) -> None:
    integers = drawn_integers(rounded_normal(std), 1 << 20)
    assert 1e-3 < chi_square(integers, float(std)) < 1 - 1e-3
    assert chi_square(integers, float(std) * 1.03) < 1e-6


@pytest.mark.parametrize("std", STDS, ids=lambda std: f"{float(std):g}")
def test_mean_variance_and_tails_are_those_of_a_rounded_normal(std: Fraction) -> None:
    count = 1 << 20
    integers = drawn_integers(rounded_normal(std), count).astype(np.float64)
    scale = float(std)
    variance = scale**2 + 1 / 12  # Sheppard; what is left out is below exp(-2 pi^2 std^2)
    assert abs(integers.mean()) < 4 * math.sqrt(variance / count)
    assert integers.var() == pytest.approx(variance, rel=4 * math.sqrt(2 / count))
    for deviations in (2, 3, 4):
        edge = math.ceil(deviations * scale)
        for tail in (integers >= edge, integers <= -edge):
            expected = count * float(stats.norm.sf((edge - 0.5) / scale))
            assert abs(int(tail.sum()) - expected) < 4 * math.sqrt(expected) + 1


def test_vote_noise_is_unit_normal_on_a_grid_of_4096() -> None:
    noise = np.concatenate([vote_noise(KEY, 0, vote, 1, (4096,)) for vote in range(64)])
    assert noise.dtype == np.float32
    assert (noise * 4096 == np.round(noise * 4096)).all()
    assert stats.kstest(noise.astype(np.float64), "norm").pvalue > 1e-3
    assert stats.kstest(noise.astype(np.float64) * 1.03, "norm").pvalue < 1e-6  # 3 % would be seen


def test_draws_of_neighbouring_samples_votes_and_steps_are_uncorrelated() -> None:
    count = 1 << 16
    places = [(0, 1, 1), (1, 1, 1), (0, 2, 1), (0, 1, 2), (1, 2, 1), (2, 1, 1)]
    draws = np.stack([vote_noise(KEY, *place, (count,)) for place in places]).astype(np.float64)
    correlation = np.corrcoef(np.concatenate([draws, draws[:1, ::-1], np.roll(draws[:1], 1)]))
    apart = correlation[~np.eye(len(correlation), dtype=bool)]
    assert np.abs(apart).max() < 4.5 / math.sqrt(count)


@pytest.mark.parametrize("sigma", [0.0039, 1e-3, 1e-300, 0.0, -0.5])
def test_noise_that_vanishes_in_rounding_is_a_usage_error(sigma: float) -> None:
    with pytest.raises(UsageError, match="`sigma` is the standard deviation.*from 0.004 .*to 257"):
        smoothing_law(sigma)


@pytest.mark.parametrize("sigma", [0.004, 257])
def test_sigma_that_the_error_asks_for_is_taken(sigma: float) -> None:
    assert float(smoothing_law(sigma).std) == pytest.approx(255 * sigma)


def test_smoothing_law_takes_the_float_for_what_it_is() -> None:
    assert smoothing_law(0.1).std == 255 * Fraction(0.1) != Fraction(51, 2)
    assert smoothing_law(0.25).std == Fraction(255, 4)
    assert smoothing_law(math.nextafter(1 / 255, 1)).std >= 1


KeyInput = tuple[bytes, Purpose, float, NDArray[np.uint8]]
IMAGE = np.arange(6, dtype=np.uint8).reshape(1, 2, 3) * 37
BASE: KeyInput = (SECRET, "certify", 0.5, IMAGE)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_every_bit_of_what_a_key_stands_for_changes_it() -> None:
    variants: list[KeyInput] = [BASE]
    for bit in range(8 * IMAGE.size):
        pixels = np.frombuffer(flipped(IMAGE.tobytes(), bit), np.uint8).reshape(IMAGE.shape)
        variants.append((SECRET, "certify", 0.5, pixels))
    variants += [(flipped(SECRET, bit), "certify", 0.5, IMAGE) for bit in range(8 * len(SECRET))]
    variants += [(SECRET, purpose, 0.5, IMAGE) for purpose in get_args(Purpose) if purpose != "certify"]
    sigmas = [struct.unpack("<d", flipped(struct.pack("<d", 0.5), bit))[0] for bit in range(64)]
    variants += [(SECRET, "certify", sigma, IMAGE) for sigma in sigmas]
    shapes = [(1, 3, 2), (2, 1, 3), (3, 2, 1), (6, 1, 1), (6,), (2, 3), (1, 1, 2, 3)]
    variants += [(SECRET, "certify", 0.5, IMAGE.reshape(shape)) for shape in shapes]
    keys = [image_key(*variant) for variant in variants]
    assert len(set(keys)) == len(keys) == 1 + 48 + 256 + 4 + 64 + 7
    halves = [half for key in keys for half in key]
    assert len(set(halves)) == len(halves)


def test_key_is_the_hmac_of_its_description_and_of_nothing_else() -> None:
    image = hashlib.sha256(struct.pack("<4q", 3, 1, 2, 3) + bytes(IMAGE.ravel().tolist())).digest()
    text = NOISE_LAW.encode() + b"\0certify\0" + struct.pack("<d", 0.5) + image
    digest = hmac.new(SECRET, text, hashlib.sha256).digest()
    expected = (int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little"))
    assert image_key(*BASE) == expected
    strided = np.zeros((1, 4, 6), np.uint8)
    strided[:, ::2, ::2] = IMAGE
    for same in (np.asfortranarray(IMAGE), strided[:, ::2, ::2], IMAGE.copy()):
        assert image_key(SECRET, "certify", 0.5, same) == expected


@QUICK
@given(st.integers(-5000, 5000), st.integers(0, 255), st.floats(0.05, 1.0))
def test_first_state_depends_only_on_the_sum_of_image_and_noise(total: int, grey: int, scale: float) -> None:
    splits = [(grey, total - grey), (0, total), (255, total - 255)]
    states = [
        first_state(np.add(np.array([u], np.uint8), np.array([k], np.int32), dtype=np.int32), scale) for u, k in splits
    ]
    assert all(state.dtype == np.float32 for state in states)
    assert len({state.tobytes() for state in states}) == 1
    assert float(states[0][0]) == pytest.approx(scale * (2 * total / 255 - 1), rel=3e-7, abs=3e-7)


def test_first_state_does_not_depend_on_neighbours_or_layout() -> None:
    levels = np.arange(-3000, 3000, dtype=np.int32)
    whole = first_state(levels, 0.7071)
    one_by_one = np.concatenate([first_state(levels[i : i + 1], 0.7071) for i in range(len(levels))])
    assert whole.tobytes() == one_by_one.tobytes() == first_state(levels[::-1], 0.7071)[::-1].tobytes()


def test_first_state_of_a_clean_image_spans_minus_one_to_one() -> None:
    assert first_state(np.array([0, 255], np.int32), 1.0).tolist() == [-1.0, 1.0]


def test_first_state_is_not_clipped() -> None:
    assert first_state(np.array([-255, 510], np.int32), 1.0).tolist() == [-3.0, 3.0]


# The noise law, version 1. These numbers never change: another law is another version.
def test_known_answers_of_the_tables() -> None:
    assert rounded_normal(Fraction(255, 2)).sha256 == "14dfbf2e3bebaf0fcad0b6ece4a8c1817f7e78d13db0bcc7907c370dc2ddcf8d"
    assert rounded_normal(Fraction(4096)).sha256 == "49bda7d4d2fb4a5ef92202313f937f769aed4af6d0c5b238e66b470f771932a6"


def test_known_answers_of_the_noise() -> None:
    assert NOISE_LAW == "philox4x64-10, rounded normal, inverse CDF of 64-bit words, version 1"
    assert smoothing_noise(smoothing_law(0.5), (1, 2), 7, (6,)).tolist() == [251, -163, 105, 59, -43, -110]
    votes = vote_noise((1, 2), 1, 2, 3, (6,)).astype(np.float64) * 4096
    assert votes.tolist() == [-157, -252, 2938, -706, 3381, 4267]
    image = np.arange(12, dtype=np.uint8).reshape(1, 3, 4)
    assert image_key(b"s" * 32, "certify", 0.5, image) == (13023216608751359702, 18019724488593878322)
