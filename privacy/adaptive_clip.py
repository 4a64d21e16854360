"""A clipping bound that follows a quantile of the clients' norms, and pays for what it learns of them.

Andrew, Thakkar, McMahan and Ramaswamy 2021, https://arxiv.org/abs/1905.03871, algorithm 1.
"""

import math
from dataclasses import dataclass

from pomona.errors import ConfigError
from pomona.privacy.randomness import SecureRandom


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveClip:
    """How the bound moves.

    Attributes:
        quantile: ``gamma``: the share of clients whose norm should be below the bound, in (0, 1).
        learning_rate: ``eta_C``, above 0.
        count_noise: ``sigma_b``: standard deviation of the noise on how many are below it, above 0.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise: float = 10.0


def noise_beside_counting(noise_multiplier: float, *, count_noise: float) -> float:
    """Return the noise multiplier for the updates, so that these and the count together cost what ``z`` alone does.

    ``z_Delta = (z^-2 - (2 sigma_b)^-2)^(-1/2)`` (theorem 1 of the paper). Each client's bit is counted as +-1/2, which
    is where the 2 comes from.

    Raises:
        ConfigError: The count alone costs as much already: ``sigma_b <= z / 2``.
    """
    if count_noise <= noise_multiplier / 2.0:
        raise ConfigError(
            f"adaptive clipping needs count_noise above half the noise multiplier, {noise_multiplier / 2.0:g}; "
            f"got {count_noise:g}"
        )
    return 1.0 / math.sqrt(noise_multiplier**-2 - (2.0 * count_noise) ** -2)


def next_bound(
    bound: float, *, below: int, above: int, expected: float, clip: AdaptiveClip, noise: SecureRandom
) -> float:
    """Return the bound of the next round, ``C exp(-eta (b - gamma))``.

    ``b = 1/2 + (sum_i (b_i - 1/2) + N(0, sigma_b^2)) / n`` with ``b_i = 1`` where the norm of a client is at most
    ``C``, over a fixed ``n``. Where more than ``gamma`` of them fit, the bound shrinks.

    Args:
        bound: ``C`` of this round.
        below: How many clients of the cohort had a norm of at most ``C``.
        above: How many had a larger one; those who sent nothing count nowhere.
        expected: ``n = q N``.
        clip: How it moves.
        noise: Where noise comes from.
    """
    total = 0.5 * (below - above) + clip.count_noise * float(noise.normal(1)[0])
    share = min(1.0, max(0.0, 0.5 + total / expected))
    return bound * math.exp(-clip.learning_rate * (share - clip.quantile))
