"""The bound finds the quantile from either side, and its price is in the account."""

import math

import numpy as np
import pytest

from pomona.errors import ConfigError
from pomona.privacy.adaptive_clip import AdaptiveClip, next_bound, noise_beside_counting
from pomona.privacy.randomness import SecureRandom

KEY = bytes(range(32))


def _after(rounds: int, *, start: float, quantile: float, sign: float = 1.0) -> float:
    """Follow the bound over rounds in which 500 clients have log-normal norms of median 1."""
    norms = np.random.default_rng(0).lognormal(sigma=0.5, size=(rounds, 500))
    clip = AdaptiveClip(quantile=quantile, learning_rate=sign * 0.2, count_noise=25.0)
    noise, bound = SecureRandom(KEY), start
    for cohort in norms:
        below = int((cohort <= bound).sum())
        bound = next_bound(bound, below=below, above=500 - below, expected=500, clip=clip, noise=noise)
    return bound


@pytest.mark.parametrize("start", [0.01, 1.0, 100.0])
@pytest.mark.parametrize(("quantile", "expected"), [(0.5, 1.0), (0.9, math.exp(0.5 * 1.2816))])
def test_the_bound_finds_the_quantile_from_either_side(start: float, quantile: float, expected: float) -> None:
    assert _after(400, start=start, quantile=quantile) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("start", [0.5, 2.0])
def test_with_the_other_sign_it_would_run_away(start: float) -> None:
    """Flower's own adaptive clipping has it."""
    assert abs(math.log(_after(150, start=start, quantile=0.5, sign=-1.0))) > 5.0


def test_the_two_releases_cost_what_one_did() -> None:
    """``1/z_u^2 + (1/(2 sigma_b))^2 = 1/z^2``: precisions add up; each bit is counted as +-1/2."""
    noise = noise_beside_counting(1.0, count_noise=5.0)
    assert noise > 1.0
    assert noise**-2 + (0.5 / 5.0) ** 2 == pytest.approx(1.0)


@pytest.mark.parametrize("count_noise", [0.5, 0.1])
def test_a_count_that_costs_all_is_refused(count_noise: float) -> None:
    """The formula turns complex there."""
    with pytest.raises(ConfigError, match="count_noise above half"):
        noise_beside_counting(1.0, count_noise=count_noise)


def test_noise_cannot_throw_the_bound_far() -> None:
    clip = AdaptiveClip(count_noise=1e12)
    moved = [next_bound(1.0, below=1, above=1, expected=2, clip=clip, noise=SecureRandom()) for _ in range(20)]
    assert all(math.exp(-0.1) - 1e-12 <= each <= math.exp(0.1) + 1e-12 for each in moved)


def test_the_count_is_noised() -> None:
    clip, noise = AdaptiveClip(count_noise=1.0), SecureRandom(KEY)
    moved = {next_bound(1.0, below=50, above=50, expected=100, clip=clip, noise=noise) for _ in range(10)}
    assert len(moved) == 10
