"""An attack on a mechanism by planted clients: what it measures must not exceed what the mechanism claims.

Each canary is a client that contributes in directions of its own, as far as the bound lets it. Half of them, drawn at
random, take part. The score of a canary is what the release says along its directions; scores of those that took part
and of those that did not should lie ``1 / sigma`` standard deviations apart, and no further
(Andrew et al. 2023, https://arxiv.org/abs/2302.03098, with one direction per canary instead of random ones).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.privacy.accounting import gaussian_epsilon
from pomona.privacy.randomness import SecureRandom

Update = Mapping[str, Tensor]
Scores = NDArray[np.float64]

_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What an attack found.

    Attributes:
        mu: Distance of the two means of scores, in standard deviations of the noise.
        standard_error: Of ``mu``.
        epsilon_fit: Epsilon of a Gaussian mechanism of that ``mu``.
        epsilon_bound: A lower bound on epsilon that holds with 95 % confidence, whatever the law of the scores.
        claimed_mu: What the mechanism claims: ``1 / sigma``.
    """

    mu: float
    standard_error: float
    epsilon_fit: float
    epsilon_bound: float
    claimed_mu: float

    def passes(self, *, tolerance: float = 4.0) -> bool:
        """Return whether what was found is what is claimed, within so many standard errors."""
        return abs(self.mu - self.claimed_mu) <= tolerance * self.standard_error


def audit(
    release: Callable[[list[Update]], Update],
    *,
    canaries: int,
    tensors: int = 4,
    noise_multiplier: float,
    delta: float,
    random: SecureRandom,
) -> Audit:
    """Attack one release.

    Args:
        release: The mechanism: from the updates of a cohort to what it publishes. Tensors are named ``t0`` to
            ``t{tensors - 1}``, each ``(canaries,)``.
        canaries: How many are planted, at least 8.
        tensors: Over how many a canary spreads: a bound that is applied to each by itself lets it contribute more.
        noise_multiplier: What the mechanism claims.
        delta: Of the claim.
        random: Decides who takes part.
    """
    present = random.chosen(canaries, 0.5)
    updates: list[Update] = [_canary(int(place), canaries, tensors) for place in np.flatnonzero(present)]
    released = release(updates)
    scores = sum(released[f"t{number}"].to(torch.float64).numpy() for number in range(tensors)) / math.sqrt(tensors)
    assert isinstance(scores, np.ndarray)
    return judged(scores[present], scores[~present], noise_multiplier=noise_multiplier, delta=delta)


def _canary(place: int, canaries: int, tensors: int) -> dict[str, Tensor]:
    """Return an update far beyond any bound, in one coordinate of each tensor."""
    update = {f"t{number}": torch.zeros(canaries, dtype=torch.float64) for number in range(tensors)}
    for tensor in update.values():
        tensor[place] = 1e6
    return update


def judged(inside: Scores, outside: Scores, *, noise_multiplier: float, delta: float) -> Audit:
    """Judge scores of releases in which a canary took part, and of others in which it did not."""
    deviation = math.sqrt((inside.var(ddof=1) + outside.var(ddof=1)) / 2.0)
    mu = float(inside.mean() - outside.mean()) / deviation
    error = math.sqrt(1.0 / len(inside) + 1.0 / len(outside) + mu**2 / (2.0 * (len(inside) + len(outside))))
    return Audit(
        mu=mu,
        standard_error=error,
        epsilon_fit=gaussian_epsilon(mu, delta) if mu > 0.0 else 0.0,
        epsilon_bound=clopper_pearson_epsilon(inside, outside, delta=delta),
        claimed_mu=1.0 / noise_multiplier,
    )


def clopper_pearson_epsilon(inside: Scores, outside: Scores, *, delta: float) -> float:
    """Return a lower bound on epsilon from one threshold: ``log((TPR - delta) / FPR)``.

    The threshold is chosen on half of the scores and judged on the other; both rates are replaced by the ends of their
    Clopper-Pearson intervals, of 97.5 % each.
    """
    threshold = _best_threshold(inside[::2], outside[::2], delta)
    judged_in, judged_out = inside[1::2], outside[1::2]
    alpha = (1.0 - _CONFIDENCE) / 2.0
    true_rate = _lower(int((judged_in > threshold).sum()), len(judged_in), alpha)
    false_rate = 1.0 - _lower(int((judged_out <= threshold).sum()), len(judged_out), alpha)
    if true_rate <= delta or false_rate <= 0.0:
        return 0.0
    return max(0.0, math.log((true_rate - delta) / false_rate))


def _best_threshold(inside: Scores, outside: Scores, delta: float) -> float:
    def bound(threshold: float) -> float:
        hits, alarms = float((inside > threshold).mean()), float((outside > threshold).mean())
        return (hits - delta) / (alarms + 3.0 / len(outside))

    return max((float(each) for each in np.quantile(outside, np.linspace(0.5, 1.0, 101))), key=bound)


def _lower(successes: int, trials: int, alpha: float) -> float:
    """Return the lower end of the Clopper-Pearson interval of a rate."""
    from scipy.stats import beta  # noqa: PLC0415 - half a second

    return float(beta.ppf(alpha, successes, trials - successes + 1)) if successes else 0.0
