"""The noise that clients add together is what was promised for the fewest of them, and more where more survive."""

import hashlib
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from tests.privacy.secure_sum_in_memory import SecureSum, names, terms

from pomona.privacy.randomness import SecureRandom

CLIENTS, FEWEST, DIMENSIONS = 6, 4, 20_000
SIGMA, BOUND = 1.5, 2.0
UNLIKELY = 1e-4


def keyed(name: str) -> SecureRandom:
    return SecureRandom(hashlib.sha256(f"noise of {name}".encode()).digest())


def noise(survivors: int, *, sigma: float = SIGMA, sized_for: int = FEWEST) -> NDArray[np.float64]:
    """The released sum of updates that are all zero, in units of what was promised."""
    made = terms(
        CLIENTS, least_survivors=sized_for, threshold=4, dimensions=DIMENSIONS, clip=BOUND, noise_multiplier=sigma
    )
    silent = dict.fromkeys(names(CLIENTS)[survivors:], 2)
    ours = SecureSum(made, names(CLIENTS), silent, noise=keyed)
    total = ours.total(dict.fromkeys(names(CLIENTS), np.zeros(DIMENSIONS)))
    return np.asarray(total / (SIGMA * BOUND * 2.0**made.fraction_bits))


@pytest.mark.parametrize("survivors", range(FEWEST, CLIENTS + 1))
def test_the_noise_on_the_sum_is_at_least_what_is_promised(survivors: int) -> None:
    drawn = noise(survivors)
    expected = survivors / FEWEST
    spread = 4 * math.sqrt(2 / DIMENSIONS)
    assert drawn.var() == pytest.approx(expected, rel=spread)
    assert drawn.var() > 1 - spread
    assert stats.kstest(drawn / math.sqrt(expected), "norm").pvalue > UNLIKELY


@pytest.mark.parametrize("factor", [2 / 3, 3 / 2])
def test_noise_of_another_scale_would_be_noticed(factor: float) -> None:
    drawn = noise(FEWEST, sigma=SIGMA * factor)
    assert abs(drawn.var() - 1) > 4 * math.sqrt(2 / DIMENSIONS)
    assert stats.kstest(drawn, "norm").pvalue < UNLIKELY


def test_shares_sized_for_everybody_would_be_too_small_when_some_fail() -> None:
    """Four shares of a sixth each are two thirds of the variance; that round burns instead."""
    everybody = noise(CLIENTS, sized_for=CLIENTS)
    assert everybody.var() == pytest.approx(1.0, rel=4 * math.sqrt(2 / DIMENSIONS))
    assert everybody.var() * FEWEST / CLIENTS < 1 - 4 * math.sqrt(2 / DIMENSIONS)
    with pytest.raises(Exception, match="needs 6 clients, got 4; the round is burnt"):
        noise(FEWEST, sized_for=CLIENTS)


def test_clients_who_tell_the_server_their_noise_are_made_up_for() -> None:
    made = terms(6, threshold=5, least_survivors=5, colluding=2)
    honest = 5 - 2
    assert honest * made.share_variance >= (made.clip * made.noise_multiplier * 2.0**made.fraction_bits) ** 2
    plain = terms(6, threshold=5, least_survivors=5)
    assert made.share_variance == pytest.approx(plain.share_variance * 5 / 3, rel=1e-6)


def test_every_number_and_every_client_has_noise_of_its_own() -> None:
    first, second = noise(FEWEST), noise(CLIENTS)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 4 / math.sqrt(DIMENSIONS)
    added = second - first  # by the two who were silent before
    assert abs(np.corrcoef(first, added)[0, 1]) < 4 / math.sqrt(DIMENSIONS)
