"""Statistics of a class from sums with noise on them: brought back to what sums of features can be.

Noise makes counts negative, means longer than any feature and variances negative. All that is done about it is a
function of the noised sums and of the public size of the noise, so it tells no more of anybody than they do::

    n  = max(1, n~),   m = J(s~ / n),   shortened to a length just below 1
    D  = S~ / n - m m^T,    V = J(D - tr(D)/d I) + (1 - |m|^2)/d I,    eigenvalues below 0 made 0, and tr V = 1 - |m|^2

with ``J(x) = max(0, 1 - E|noise|^2 / |x|^2) x``. Features have length 1, so the variances of a class add up to
``1 - |m|^2``, exactly; that is known and needs no release. ``J`` draws an estimate towards what is known without it, a
mean of 0 and a sphere, the more the larger the noise in it is: the positive part of James and Stein's estimator (1961),
which for a covariance is the shrinkage of Ledoit and Wolf (2004, https://doi.org/10.1016/S0047-259X(03)00096-4), whose
error is known here. Without noise nothing is changed, unless all rows of a class are alike.

A class whose noised count is below 1 counts as one row: it has no covariance of its own, that of all classes stands in
for it, and its mean is what is left of its noised sum, mostly 0. It is hardly ever an answer.
"""

import math

import torch
from torch import Tensor

from pomona.continual.statistics import ClassStatistics

_MOST_ROWS = 2.0**53
_LEAST_SPREAD = 1e-3  # else what rounding leaves of a covariance would decide whether it can be factored
_TINY = 1e-300


def plausible_statistics(
    count: float, total: Tensor, moment: Tensor, *, total_noise: float, moment_noise: float
) -> ClassStatistics:
    """Return statistics that those of features of length 1 can be, close to noised ones.

    Args:
        count: Noised number of rows.
        total: Noised sum of their features, ``(width,)`` float64.
        moment: Noised second moments, ``(width, width)`` float64 and symmetric, or ``(width,)``.
        total_noise: Standard deviation of the noise on each number of ``total``.
        moment_noise: On each of ``moment``; of a matrix on its diagonal, ``1 / sqrt(2)`` of that beside it.

    Returns:
        At least one row; positive semi-definite, no variance below 0.
    """
    rows, width = min(max(count, 1.0), _MOST_ROWS), len(total)
    mean = _shrunk(total / rows, width * (total_noise / rows) ** 2)
    mean = mean * min(1.0, math.sqrt(1.0 - _LEAST_SPREAD) / max(float(mean.norm()), _TINY))
    spread = 1.0 - float(mean.square().sum())
    freedom = width if moment.ndim == 1 else width * (width + 1) // 2
    energy = (freedom - 1) * (moment_noise / rows) ** 2
    variance = _spread_out(moment / rows - _outer(mean, moment), energy, spread)
    whole = max(1, round(rows))
    return ClassStatistics(whole, whole * mean, whole * (variance + _outer(mean, moment)))


def _spread_out(deviation: Tensor, energy: float, spread: float) -> Tensor:
    """Return a covariance, or variances, of a given trace above 0: what noise of some energy has left of one."""
    if deviation.ndim == 1:
        found = (_shrunk(deviation - deviation.mean(), energy) + spread / len(deviation)).clamp(min=0.0)
        return found * (spread / found.sum())
    eye = torch.eye(len(deviation), dtype=deviation.dtype)
    symmetric = (deviation + deviation.T) / 2
    shape = _shrunk(symmetric - symmetric.trace() / len(eye) * eye, energy)
    values, vectors = torch.linalg.eigh(shape + spread / len(eye) * eye)
    kept = values.clamp(min=0.0)
    whole: Tensor = (vectors * (kept * (spread / kept.sum()))) @ vectors.T
    return (whole + whole.T) / 2


def _shrunk(estimate: Tensor, energy: float) -> Tensor:
    """Return an estimate drawn to 0 by the expected squared norm of the noise in it."""
    found = float(estimate.square().sum())
    return estimate * (max(0.0, 1.0 - energy / found) if found > 0.0 else 0.0)


def _outer(mean: Tensor, like: Tensor) -> Tensor:
    return mean.square() if like.ndim == 1 else torch.outer(mean, mean)
