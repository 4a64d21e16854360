"""What releases cost: epsilon of composed, Poisson-subsampled Gaussian releases, and the noise for a target.

Opacus keeps the accounts. Everything here is for add-or-remove-one adjacency: a unit is there, or it is not.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Literal

from pomona.errors import ConfigError

Accountant = Literal["prv", "rdp"]

_LARGEST_NOISE = 1e4
_TOLERANCE = 1e-3  # relative, of calibrated noise
_MOST_STEPS_OF_BISECTION = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Releases of one kind: ``count`` times a sum over a Poisson sample, with Gaussian noise.

    Attributes:
        noise_multiplier: ``sigma``: standard deviation of the noise over the clipping bound, above 0.
        sample_rate: ``q``: probability with which each unit takes part, in (0, 1]; 1 claims no amplification.
        count: How many, at least 1.
    """

    noise_multiplier: float
    sample_rate: float
    count: int


def library() -> str:
    """Return the name and version of what keeps the accounts."""
    return f"opacus {version('opacus')}"


def epsilon(events: Sequence[Event], *, delta: float, accountant: Accountant = "prv") -> float:
    """Return the epsilon of all releases together.

    ``prv`` convolves privacy random variables (Gopi, Lee and Wutschitz 2021, https://arxiv.org/abs/2106.02848) and
    returns its upper bound; it holds for releases that were fixed in advance. ``rdp`` composes Renyi divergences
    (Mironov 2017, https://arxiv.org/abs/1702.07476) and also holds where a release was chosen in view of earlier ones
    (Feldman and Zrnic 2021, https://arxiv.org/abs/2008.11193); it states more.

    Args:
        events: In any order; none costs nothing.
        delta: In (0, 1).
        accountant: Which.

    Returns:
        Epsilon, infinite where the account cannot bound it.

    Raises:
        ConfigError: A number is out of range.
    """
    _check(events, delta)
    if not events:
        return 0.0
    if accountant == "prv" and all(event.sample_rate == 1.0 for event in events):
        return gaussian_epsilon(math.sqrt(sum(event.count / event.noise_multiplier**2 for event in events)), delta)
    from opacus.accountants import create_accountant  # noqa: PLC0415 - imports torch's optimisers

    account = create_accountant(accountant)
    account.history = [(event.noise_multiplier, event.sample_rate, event.count) for event in events]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is the largest: what comes out is a bound all the same
        return float(account.get_epsilon(delta))


def gaussian_delta(mu: float, at_epsilon: float) -> float:
    """Return the delta of a Gaussian release of sensitivity ``mu`` standard deviations, at an epsilon.

    ``delta = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu)`` (Balle and Wang 2018, https://arxiv.org/abs/1805.06530,
    theorem 8). It is exact, and composes: ``mu^2`` of several releases add up.
    """
    first = _log_phi(mu / 2.0 - at_epsilon / mu)
    second = at_epsilon + _log_phi(-mu / 2.0 - at_epsilon / mu)
    return math.exp(first) * -math.expm1(min(0.0, second - first))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the least epsilon, by bisection, at which :func:`gaussian_delta` is at most ``delta``."""
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(mu, high) > delta:
        high *= 2.0
    return _bisect(lambda value: gaussian_delta(mu, value) <= delta, low=0.0, high=high, relative=1e-12)


def noise_for(target: float, *, delta: float, sample_rate: float, count: int, accountant: Accountant = "prv") -> float:
    """Return the least noise multiplier, within 0.1 %, with which so many releases cost at most ``target``.

    Args:
        target: Epsilon, above 0.
        delta: In (0, 1).
        sample_rate: ``q``.
        count: How many releases.
        accountant: Which.

    Raises:
        ConfigError: A number is out of range, or no noise multiplier up to 10,000 is enough.
    """
    if not (target > 0.0 and math.isfinite(target)):
        raise ConfigError(f"expected an epsilon above 0, got {target}")
    return _noise_for(target, delta, sample_rate, count, accountant)


@cache
def _noise_for(target: float, delta: float, sample_rate: float, count: int, accountant: Accountant) -> float:
    def enough(noise: float) -> bool:
        event = Event(noise_multiplier=noise, sample_rate=sample_rate, count=count)
        return epsilon([event], delta=delta, accountant=accountant) <= target

    high = 1.0
    while not enough(high):
        high *= 2.0
        if high > _LARGEST_NOISE:
            raise ConfigError(
                f"no noise multiplier up to {_LARGEST_NOISE:.0f} gives epsilon {target} at delta {delta} for {count} "
                "releases; allow a larger epsilon or fewer rounds"
            )
    low = high / 2.0
    while enough(low) and low > 1e-3:
        high, low = low, low / 2.0
    return _bisect(enough, low=low, high=high, relative=_TOLERANCE)


def _bisect(holds: Callable[[float], bool], *, low: float, high: float, relative: float) -> float:
    """Return the least value for which something holds, from above; it holds at ``high``."""
    for _ in range(_MOST_STEPS_OF_BISECTION):
        if high - low <= relative * high:
            break
        middle = (low + high) / 2.0
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _log_phi(value: float) -> float:
    from scipy.special import log_ndtr  # noqa: PLC0415 - half a second

    return float(log_ndtr(value))


def _check(events: Sequence[Event], delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise ConfigError(f"expected a delta between 0 and 1, got {delta}")
    for event in events:
        if not (event.noise_multiplier > 0.0 and math.isfinite(event.noise_multiplier)):
            raise ConfigError(f"expected a noise multiplier above 0, got {event.noise_multiplier}")
        if not 0.0 < event.sample_rate <= 1.0:
            raise ConfigError(f"expected a sample rate in (0, 1], got {event.sample_rate}")
        if event.count < 1:
            raise ConfigError(f"expected at least one release, got {event.count}")
