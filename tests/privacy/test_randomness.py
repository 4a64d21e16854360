"""The stream is ChaCha20's, the numbers have the law they claim, and no two streams are alike."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from scipy import stats

from pomona.privacy.randomness import SecureRandom

KEY = bytes(range(32))
SIZE = 200_000
UNLIKELY = 1e-4  # of a test with a fixed key: it fails for good or never


def test_uniform_numbers_are_the_keystream() -> None:
    stream = Cipher(ChaCha20(KEY, bytes(16)), mode=None).encryptor().update(bytes(8 * 5))
    words = [int.from_bytes(stream[at : at + 8], "little") for at in range(0, 40, 8)]
    expected = [((word >> 11) + 1) / 2**53 for word in words]
    assert SecureRandom(KEY).uniform(5).tolist() == expected


def test_normal_numbers_are_standard_normal() -> None:
    numbers = SecureRandom(KEY).normal(SIZE)
    assert stats.kstest(numbers, "norm").pvalue > UNLIKELY
    assert abs(numbers.mean()) < 4 / np.sqrt(SIZE)
    assert abs(numbers.var() - 1) < 4 * np.sqrt(2 / SIZE)
    assert abs(stats.kurtosis(numbers)) < 4 * np.sqrt(24 / SIZE)


@pytest.mark.parametrize("scale", [2 / 3, 3 / 2])
def test_the_test_would_notice_another_scale(scale: float) -> None:
    assert stats.kstest(SecureRandom(KEY).normal(2000) * scale, "norm").pvalue < UNLIKELY


@pytest.mark.parametrize("size", [0, 1, 2, 7])
def test_any_size_is_served(size: int) -> None:
    assert SecureRandom(KEY).normal(size).shape == (size,)


def test_numbers_do_not_repeat_within_a_stream_nor_between_streams() -> None:
    stream = SecureRandom(KEY)
    first, second = stream.normal(1000), stream.normal(1000)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15
    assert not np.array_equal(SecureRandom().normal(8), SecureRandom().normal(8))


def test_coins_are_independent_and_fair_to_their_rate() -> None:
    """Cohorts are binomial, not of one size, and who is in one says nothing of who else is."""
    stream, clients, rounds, rate = SecureRandom(KEY), 50, 4000, 0.1
    cohorts = np.array([stream.chosen(clients, rate) for _ in range(rounds)])
    sizes = cohorts.sum(axis=1)
    assert abs(cohorts.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / cohorts.size)
    assert sizes.var() == pytest.approx(clients * rate * (1 - rate), rel=0.1)
    correlation = np.corrcoef(cohorts.T) - np.eye(clients)
    assert np.abs(correlation).max() < 6 / np.sqrt(rounds)


def test_a_rate_of_one_takes_everybody() -> None:
    assert SecureRandom(KEY).chosen(100, 1.0).all()


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"rate in \(0, 1\]"):
        SecureRandom(KEY).chosen(3, rate)


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        SecureRandom(b"short")
