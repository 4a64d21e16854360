"""The integers have the law that the privacy proof is about, to the last digit, not nearly."""

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from pomona.privacy.randomness import SecureRandom
from pomona.privacy.secure_sum import discrete_gaussian as module
from pomona.privacy.secure_sum.discrete_gaussian import discrete_gaussian

KEY = bytes(range(32))
SIZE = 50_000
UNLIKELY = 1e-4  # of a test with a fixed key: it fails for good or never


def drawn(variance: int, size: int = SIZE) -> NDArray[np.int64]:
    return discrete_gaussian(size, variance=variance, noise=SecureRandom(KEY))


def p_value(numbers: NDArray[np.int64], log_mass: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> float:
    """Of the chi-square test of integers against a law, in at most 41 bins of some probability each."""
    reach = int(np.abs(numbers).max()) + 50
    support = np.arange(-reach, reach + 1)
    mass = np.exp(log_mass(support.astype(np.float64)))
    upto = np.cumsum(mass / mass.sum())
    bins = np.minimum((upto * 41).astype(int), 40)
    expected = np.bincount(bins, weights=mass / mass.sum(), minlength=41) * numbers.size
    observed = np.bincount(bins[numbers + reach], minlength=41)
    there = expected > 0
    return float(stats.chisquare(observed[there], expected[there]).pvalue)


@pytest.mark.parametrize("variance", [1, 2, 4, 5, 64, 100, 12_345])
def test_the_law_is_the_discrete_gaussian(variance: int) -> None:
    assert p_value(drawn(variance), lambda x: -(x**2) / (2 * variance)) > UNLIKELY


@pytest.mark.parametrize("variance", [1, 100, 12_345])
@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_the_test_would_notice_another_variance(variance: int, factor: float) -> None:
    assert p_value(drawn(variance), lambda x: -(x**2) / (2 * variance * factor)) < UNLIKELY


def test_rounding_a_gaussian_has_another_law() -> None:
    """It is what comes to mind first, and no proof is about it."""
    rounded = np.rint(SecureRandom(KEY).normal(SIZE)).astype(np.int64)
    assert p_value(rounded, lambda x: -(x**2) / 2) < UNLIKELY


@pytest.mark.parametrize("variance", [2**32, 2**52])
def test_wide_noise_looks_like_a_gaussian(variance: int) -> None:
    scaled = drawn(variance) / math.sqrt(variance)
    assert stats.kstest(scaled, "norm").pvalue > UNLIKELY
    assert abs(scaled.var() - 1) < 4 * math.sqrt(2 / SIZE)
    assert stats.kstest(scaled * 1.1, "norm").pvalue < UNLIKELY


@pytest.mark.parametrize("variance", [1, 5, 10**6, 2**52])
def test_deciding_every_coin_exactly_changes_nothing(variance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What float64 decides is what all digits decide, coin by coin; only the close ones need them."""
    fast = drawn(variance, 200)
    monkeypatch.setattr(module, "_MARGIN", 1.0)
    assert np.array_equal(drawn(variance, 200), fast)


@given(st.integers(0, 2**53 - 1), st.fractions(0, 40, max_denominator=10**12))
@settings(deadline=None)
def test_an_exact_coin_is_that_of_all_digits(word: int, exponent: Fraction) -> None:
    with localcontext() as context:
        context.prec = 200
        power = Fraction((-Decimal(exponent.numerator) / exponent.denominator).exp())
    if Fraction(word + 1, 2**53) < power or Fraction(word, 2**53) > power:
        assert module._is_below(word, exponent, SecureRandom(KEY)) == (Fraction(word + 1, 2**53) < power)


def test_a_coin_that_53_bits_do_not_decide_is_fair_to_the_rest() -> None:
    """``U`` begins like ``1/e``; whether it is below depends on the bits after, which are drawn."""
    with localcontext() as context:
        context.prec = 60
        scaled = Decimal(-1).exp() * 2**53
    tosses, noise = 2000, SecureRandom(KEY)
    heads = sum(module._is_below(int(scaled), Fraction(1), noise) for _ in range(tosses))
    assert stats.binomtest(heads, tosses, float(scaled % 1)).pvalue > UNLIKELY
    assert 0.1 < float(scaled % 1) < 0.9


@pytest.mark.parametrize("size", [0, 1, 17])
def test_any_size_is_served(size: int) -> None:
    numbers = drawn(9, size)
    assert numbers.shape == (size,)
    assert numbers.dtype == np.int64


def test_streams_of_their_own_give_noise_of_their_own() -> None:
    first, second = (discrete_gaussian(1000, variance=10**6, noise=SecureRandom()) for _ in range(2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.2


@pytest.mark.parametrize("variance", [0, -1, 2**52 + 1])
def test_a_variance_out_of_range_is_refused(variance: int) -> None:
    with pytest.raises(ValueError, match="variance from 1 to"):
        drawn(variance)
