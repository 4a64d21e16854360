"""What is kept of a class instead of its examples: how many, their sum, and their second moments.

::

    n,  s = sum_i f_i,  S = sum_i f_i f_i^T      mean = s / n,  covariance = (S - s s^T / n) / (n - 1)

All three are sums over examples, in float64. So those of clients add up to what one owner of all data would have, and
what one of them sent can be subtracted again, as long as the features of all come from the same frozen adapter.

``S`` in full takes ``width^2`` numbers a class, more than an adapter. Its diagonal alone is as additive and takes
``width``; the leading directions with the rest's diagonal take ``(rank + 1) width``, but add up no more.

A mean is an average of people's data, and a covariance of few examples can span them: these statistics are personal
data where the examples are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pomona.errors import DataError, PayloadError
from pomona.mos_settings import Moments

_JITTER = 1e-10  # of the mean variance: lets a singular covariance be factored
_ROUNDING = 1e-12  # of the mean square: features of one text, in float32, differ by less
_SLACK = 1e-8  # of the mean square: more than the check of what others send lets variances be below zero


class GaussianClass(Protocol):
    """A class as a normal distribution of features."""

    @property
    def count(self) -> int:
        """Examples behind it."""
        ...

    def mean(self) -> Tensor:
        """Return the mean, ``(width,)`` float64."""
        ...

    def covariance(self) -> Tensor:
        """Return the covariance, ``(width, width)`` float64."""
        ...

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw ``n`` features, ``(n, width)`` float64."""
        ...


@dataclass(frozen=True, slots=True)
class ClassStatistics:
    """The sums of one class's features.

    Attributes:
        count: Examples.
        total: Sum of the features, ``(width,)`` float64.
        moment: Sum of their outer products, ``(width, width)`` float64, or of their squares, ``(width,)``.
    """

    count: int
    total: Tensor
    moment: Tensor

    def __post_init__(self) -> None:
        width = self.total.shape[0] if self.total.ndim == 1 else -1
        if (
            self.count < 0
            or self.moment.shape not in ((width,), (width, width))
            or {self.total.dtype, self.moment.dtype} != {torch.float64}
        ):
            raise ValueError(
                f"expected a count, and float64 sums (width,) and (width, width) or (width,), got {self.count}, "
                f"{tuple(self.total.shape)} of {self.total.dtype} and {tuple(self.moment.shape)} of {self.moment.dtype}"
            )

    @classmethod
    def of(cls, features: Tensor, *, moments: Moments = "full") -> "ClassStatistics":
        """Sum the features of one class, ``(examples, width)``; there may be none."""
        rows = features.double()
        moment = rows.T @ rows if moments == "full" else rows.square().sum(0)
        return cls(len(rows), rows.sum(0), moment)

    @property
    def moments(self) -> Moments:
        """Which second moments are kept."""
        return "full" if self.moment.ndim == 2 else "diagonal"

    def __add__(self, other: "ClassStatistics") -> "ClassStatistics":
        """Return the statistics of both sets of examples together."""
        _check_alike(self, other)
        return ClassStatistics(self.count + other.count, self.total + other.total, self.moment + other.moment)

    def __sub__(self, other: "ClassStatistics") -> "ClassStatistics":
        """Return the statistics without examples that are in them.

        Raises:
            DataError: More examples are taken away than there are.
        """
        _check_alike(self, other)
        if other.count > self.count:
            raise DataError(f"cannot take {other.count} examples out of statistics of {self.count}")
        return ClassStatistics(self.count - other.count, self.total - other.total, self.moment - other.moment)

    def diagonal(self) -> "ClassStatistics":
        """Return the same with the diagonal of the second moments alone."""
        return (
            self if self.moment.ndim == 1 else ClassStatistics(self.count, self.total, self.moment.diagonal().clone())
        )

    def mean(self) -> Tensor:
        """Return the mean, ``(width,)`` float64.

        Raises:
            DataError: There are no examples.
        """
        if self.count == 0:
            raise DataError("a class without examples has no mean")
        return self.total / self.count

    def covariance(self) -> Tensor:
        """Return the unbiased covariance, ``(width, width)`` float64; zero for a single example.

        With diagonal moments the rest is zero. Variances that rounding made negative are zero, and so are all where
        they are nothing but rounding: of one text many times, a covariance would be noise of either sign.
        """
        mean = self.mean()
        squares = self.moment if self.moment.ndim == 1 else self.moment.diagonal()
        spread = squares - self.count * mean.square()
        if self.count == 1 or abs(float(spread.sum())) <= _ROUNDING * abs(float(squares.sum())):
            return mean.new_zeros(len(mean), len(mean))
        if self.moment.ndim == 1:
            return (spread / (self.count - 1)).clamp(min=0.0).diag()
        centred = (self.moment - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return (centred + centred.T) / 2

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw ``n`` features from the normal distribution of this mean and covariance, ``(n, width)`` float64."""
        noise = torch.randn(n, len(self.total), generator=generator, dtype=torch.float64)
        if self.moment.ndim == 1:
            return self.mean() + noise * self.covariance().diagonal().sqrt()
        return self.mean() + noise @ cholesky(self.covariance(), slack=self.slack()).T

    def slack(self) -> float:
        """Return how far below zero a variance may be in sums that were checked, see :func:`cholesky`."""
        squares = self.moment if self.moment.ndim == 1 else self.moment.diagonal()
        return _SLACK * float(squares.sum()) / self.count

    def compressed(self, rank: int) -> "CompressedStatistics":
        """Keep ``rank`` leading directions of the covariance, and the exact variance of each coordinate.

        Raises:
            ValueError: ``rank`` is below 1.
        """
        if rank < 1:
            raise ValueError(f"expected a rank of at least 1, got {rank}")
        covariance = self.covariance()
        values, vectors = torch.linalg.eigh(covariance)
        kept = vectors[:, -rank:] * values[-rank:].clamp(min=0.0).sqrt()  # (width, rank)
        rest = (covariance.diagonal() - kept.square().sum(1)).clamp(min=0.0)
        return CompressedStatistics(self.count, self.mean(), kept.T.contiguous(), rest)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the statistics as tensors, ``count`` int64 and the sums float64."""
        return {"count": torch.tensor([self.count]), "total": self.total, "moment": self.moment}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "ClassStatistics":
        """Read what :meth:`to_tensors` gave.

        Raises:
            PayloadError: Something is missing or has another shape or dtype.
        """
        try:
            return cls(int(tensors["count"]), tensors["total"], tensors["moment"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise PayloadError(f"expected count, total and moment of a class: {error}") from error


@dataclass(frozen=True, slots=True)
class CompressedStatistics:
    """A class as mean and covariance ``F^T F + diag(d)``; neither adds up with another.

    Attributes:
        count: Examples behind it.
        centre: The mean, ``(width,)`` float64.
        directions: ``F``, ``(rank, width)`` float64.
        rest: ``d``, ``(width,)`` float64, not negative.
    """

    count: int
    centre: Tensor
    directions: Tensor
    rest: Tensor

    def mean(self) -> Tensor:
        """Return the mean, ``(width,)`` float64."""
        return self.centre

    def covariance(self) -> Tensor:
        """Return the covariance, ``(width, width)`` float64."""
        return self.directions.T @ self.directions + self.rest.diag()

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw ``n`` features, ``(n, width)`` float64, without forming the covariance."""
        rank, width = self.directions.shape
        noise = torch.randn(n, rank + width, generator=generator, dtype=torch.float64)
        return self.centre + noise[:, :rank] @ self.directions + noise[:, rank:] * self.rest.sqrt()


def class_statistics(
    features: Tensor, targets: Tensor, classes: range, *, moments: Moments = "full"
) -> tuple[ClassStatistics, ...]:
    """Return the statistics of each class of a range, from features ``(examples, width)`` and their targets."""
    return tuple(ClassStatistics.of(features[targets == c], moments=moments) for c in classes)


def shrunk(covariance: Tensor, count: int) -> Tensor:
    """Shrink a covariance of few examples towards the sphere of its mean variance, by the oracle approximation.

    ``(1 - rho) S + rho (tr S / p) I`` with ``rho`` the best weight for normal data, approximated (Chen et al.,
    Shrinkage algorithms for MMSE covariance estimation, 2010, eq. 23, https://arxiv.org/abs/0907.4698). Positive
    definite unless ``S`` is zero.

    Args:
        covariance: ``S``, ``(p, p)`` float64.
        count: Examples it was estimated from.
    """
    width = len(covariance)
    trace, squares = float(covariance.trace()), float(covariance.square().sum())
    spread = (count + 1 - 2 / width) * (squares - trace**2 / width)
    rho = 1.0 if spread <= 0.0 else min(1.0, ((1 - 2 / width) * squares + trace**2) / spread)
    return (1 - rho) * covariance + rho * (trace / width) * torch.eye(width, dtype=covariance.dtype)


def cholesky(covariance: Tensor, *, slack: float = 0.0) -> Tensor:
    """Return ``L`` with ``L L^T`` the covariance, ``(width, width)`` float64, where it may be singular.

    Args:
        covariance: Is added to only as much as it takes.
        slack: Added to all variances where nothing less will do: sums of others are checked to rounding, and one that
            used it up would let nobody have a normal distribution.

    Raises:
        DataError: It is not finite, or not positive semi-definite beyond rounding.
    """
    scale = covariance.diagonal().mean()
    eye = torch.eye(len(covariance), dtype=covariance.dtype)
    jitters = [times * _JITTER * float(scale) for times in (1.0, 1e2, 1e4)]
    for added in (*jitters, slack):
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(covariance + (added + 1e-300) * eye)
        if not int(failed) and bool(factor.isfinite().all()):
            return factor
    raise DataError("expected a finite positive semi-definite covariance; the statistics of a class are damaged")


def _check_alike(one: ClassStatistics, other: ClassStatistics) -> None:
    if one.moment.shape != other.moment.shape:
        raise DataError(
            f"expected statistics of one width and kind, got {tuple(one.moment.shape)} and {tuple(other.moment.shape)}"
        )
