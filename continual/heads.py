"""Classifiers over frozen features: a linear map, the cosine to class means, ridge regression.

::

    linear   z = sqrt(d) f W^T + b
    cosine   z_c = f . mu_c / (||f|| ||mu_c||),   mu_c the mean of the class       (SimpleCIL, Zhou et al. 2023)
    ridge    h = relu(f R),  G = sum h h^T,  Q = sum h y^T,  z = h (G + lambda I)^-1 Q   (RanPAC, McDonnell et al. 2023)

A feature ``f`` has ``d`` dimensions and length 1, so a linear head scales it by ``sqrt(d)``: learning rates then mean
what they mean for features of unit variance. ``R`` is drawn from a seed, never trained.

The ridge head is a function of two sums. Whatever the order of the examples, however they are spread over clients, the
sums are the same, and subtracting what somebody added gives the sums without them. So is ``lambda``: examples are held
out by what they are and not by when they came, and the held-out error is a function of sums too.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.errors import DataError
from pomona.seeds import generator_of

HELD_OUT_SHARE = 0.2
REGULARIZATIONS = tuple(10.0**power for power in range(-6, 9))
_SLABS = 4.0


@dataclass(frozen=True, slots=True)
class LinearHead:
    """Logits that are linear in the features.

    Attributes:
        weight: ``(classes, width)`` float32.
        bias: ``(classes,)`` float32.
    """

    weight: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"expected weight: (classes, width) and bias: (classes,), "
                f"got {tuple(self.weight.shape)} and {tuple(self.bias.shape)}"
            )

    @classmethod
    def zeros(cls, classes: int, width: int) -> "LinearHead":
        """Return a head that gives every class the same logit."""
        return cls(torch.zeros(classes, width), torch.zeros(classes))

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.weight)

    def logits(self, features: Tensor) -> Tensor:
        """Return logits ``(examples, classes)``, with gradient to weight, bias and features."""
        return torch.nn.functional.linear(features * math.sqrt(self.weight.shape[1]), self.weight, self.bias)

    def grown(self, classes: int) -> "LinearHead":
        """Return the head with rows of zeros for further classes, ``classes`` in all."""
        more, width = classes - self.classes, self.weight.shape[1]
        return LinearHead(
            torch.cat([self.weight, self.weight.new_zeros(more, width)]),
            torch.cat([self.bias, self.bias.new_zeros(more)]),
        )

    def joined(self, other: "LinearHead") -> "LinearHead":
        """Return the head of these classes, then those of another."""
        return LinearHead(torch.cat([self.weight, other.weight]), torch.cat([self.bias, other.bias]))

    def without(self, classes: Collection[int]) -> "LinearHead":
        """Return the head without the rows of some classes; those behind them move up."""
        kept = _kept(self.classes, classes)
        return LinearHead(self.weight[kept], self.bias[kept])


@dataclass(frozen=True, slots=True)
class CosineHead:
    """The cosine of a feature to the mean of each class.

    Attributes:
        means: ``(classes, width)``; a row of zeros is a class that has no examples, and is never predicted.
    """

    means: Tensor

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.means)

    def logits(self, features: Tensor) -> Tensor:
        """Return cosines ``(examples, classes)``, ``-inf`` for a class without examples."""
        known = self.means.norm(dim=1) > 0
        directions = torch.nn.functional.normalize(self.means, dim=1).to(features)
        cosines = torch.nn.functional.normalize(features, dim=1) @ directions.T
        return cosines.masked_fill(~known, -math.inf)

    def joined(self, other: "CosineHead") -> "CosineHead":
        """Return the head of these classes, then those of another."""
        return CosineHead(torch.cat([self.means, other.means]))

    def without(self, classes: Collection[int]) -> "CosineHead":
        """Return the head without some classes; those behind them move up."""
        return CosineHead(self.means[_kept(self.classes, classes)])


def class_means(features: Tensor, targets: Tensor, *, classes: int) -> Tensor:
    """Return the mean feature of each class, ``(classes, width)`` in the dtype of the features; zeros where none came.

    Args:
        features: ``(examples, width)``.
        targets: Class of each, ``(examples,)`` int64.
        classes: Number of classes.

    Raises:
        DataError: A target is no class.
    """
    indicators = _indicators(targets, classes)  # (examples, classes)
    counts = indicators.sum(0).clamp(min=1)
    return (indicators.T @ features.double() / counts[:, None]).to(features.dtype)


def random_projection(width: int, dimensions: int, *, seed: int) -> Tensor:
    """Return ``R``, standard normal, ``(width, dimensions)`` float64: the same for everybody who has the seed."""
    return torch.randn(width, dimensions, generator=generator_of("random_projection", seed), dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class NormalEquations:
    """What ridge regression must know of some examples: both sides of ``G W = Q``.

    Attributes:
        gram: ``G``, ``(dimensions, dimensions)`` float64.
        cross: ``Q``, ``(dimensions, classes)`` float64.
        count: Examples.
    """

    gram: Tensor
    cross: Tensor
    count: int

    def __post_init__(self) -> None:
        if self.gram.ndim != 2 or self.cross.ndim != 2 or self.gram.shape != (len(self.cross), len(self.cross)):
            raise ValueError(
                f"expected gram: (dimensions, dimensions) and cross: (dimensions, classes), "
                f"got {tuple(self.gram.shape)} and {tuple(self.cross.shape)}"
            )

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        return self._plus(other, 1)

    def __sub__(self, other: "NormalEquations") -> "NormalEquations":
        return self._plus(other, -1)

    def without(self, classes: Collection[int]) -> "NormalEquations":
        """Return the sums without the columns of some classes; the Gram matrix still counts their examples."""
        return NormalEquations(self.gram, self.cross[:, _kept(self.cross.shape[1], classes)], self.count)

    def _plus(self, other: "NormalEquations", sign: int) -> "NormalEquations":
        if self.gram.shape != other.gram.shape:
            raise DataError(
                f"expected sums of {len(self.gram)} dimensions, got {len(other.gram)}; both need the same projection"
            )
        classes = max(self.cross.shape[1], other.cross.shape[1])
        cross = _widened(self.cross, classes) + sign * _widened(other.cross, classes)
        return NormalEquations(self.gram + sign * other.gram, cross, self.count + sign * other.count)


@dataclass(frozen=True, slots=True)
class RidgeSums:
    """The additive state of a ridge head: sums over all examples, and over those held out to choose ``lambda``.

    Attributes:
        total: Over all examples.
        held_out: Over the held-out ones, which ``total`` counts too.
    """

    total: NormalEquations
    held_out: NormalEquations

    @property
    def classes(self) -> int:
        """Number of classes that there are columns for."""
        return self.total.cross.shape[1]

    def __add__(self, other: "RidgeSums") -> "RidgeSums":
        return RidgeSums(self.total + other.total, self.held_out + other.held_out)

    def __sub__(self, other: "RidgeSums") -> "RidgeSums":
        return RidgeSums(self.total - other.total, self.held_out - other.held_out)

    def without(self, classes: Collection[int]) -> "RidgeSums":
        """Return the sums without the columns of some classes, so that they are not predicted any more.

        The Gram matrices still count their examples. To leave no trace, subtract the sums of those examples first.
        """
        return RidgeSums(self.total.without(classes), self.held_out.without(classes))


@dataclass(frozen=True, slots=True)
class RidgeHead:
    """Ridge regression on random features.

    Attributes:
        projection: ``R``, ``(width, dimensions)`` float64.
        weight: ``(dimensions, classes)`` float64.
        regularization: ``lambda``.
    """

    projection: Tensor
    weight: Tensor
    regularization: float

    def logits(self, features: Tensor) -> Tensor:
        """Return scores ``(examples, classes)`` float64; a score near 1 says the class, near 0 another."""
        return _projected(features, self.projection) @ self.weight


def ridge_sums(features: Tensor, targets: Tensor, *, projection: Tensor, classes: int) -> RidgeSums:
    """Return the sums of some examples; add them to those of others.

    Args:
        features: ``(examples, width)``.
        targets: Class of each, ``(examples,)`` int64.
        projection: ``R``, ``(width, dimensions)``.
        classes: Number of classes.

    Raises:
        DataError: A target is no class.
    """
    hidden, indicators = _projected(features, projection), _indicators(targets, classes)
    chosen = held_out(features)
    return RidgeSums(_equations(hidden, indicators), _equations(hidden[chosen], indicators[chosen]))


def held_out(features: Tensor) -> Tensor:
    """Return which examples choose ``lambda`` and are not fitted for that, ``(examples,)`` bool.

    An example is held out by its feature alone: space is cut into thin slabs across one direction, and a fifth of each
    is held out. So neither order nor client decides it, and equal examples are on the same side.
    """
    direction = torch.randn(features.shape[1], generator=generator_of("held_out"), dtype=torch.float64)
    along = features.double() @ direction * (math.sqrt(features.shape[1]) * _SLABS)
    return along - along.floor() < HELD_OUT_SHARE


def ridge_head(sums: RidgeSums, *, projection: Tensor, regularization: float | None = None) -> RidgeHead:
    """Solve ``(G + lambda I) W = Q`` in float64.

    Args:
        sums: Over all examples so far.
        projection: What the sums were made with, ``(width, dimensions)``.
        regularization: ``lambda``; None: what errs least on the held-out examples, see :func:`held_out_errors`.

    Raises:
        DataError: The sums are of another projection or of no examples.
    """
    if sums.total.gram.shape[0] != projection.shape[1] or sums.total.count < 1:
        raise DataError(
            f"expected sums of {projection.shape[1]} dimensions over at least one example, "
            f"got {sums.total.gram.shape[0]} dimensions over {sums.total.count}"
        )
    chosen = best_regularization(sums) if regularization is None else regularization
    return RidgeHead(projection, _solved(sums.total, chosen), chosen)


def best_regularization(sums: RidgeSums) -> float:
    """Return the ``lambda`` of :data:`REGULARIZATIONS` with the least held-out error; 1 where nothing is held out."""
    if not 0 < sums.held_out.count < sums.total.count:
        return 1.0
    errors = held_out_errors(sums, REGULARIZATIONS)
    return min(zip(errors, REGULARIZATIONS, strict=True))[1]


def held_out_errors(sums: RidgeSums, regularizations: Collection[float]) -> list[float]:
    """Return the mean squared error on the held-out examples of what the others give, for each ``lambda``.

    With ``W`` solved from the sums of the others, and ``G, Q, n`` those of the held-out examples,
    ``sum ||h W - y||^2 = tr(W^T G W) - 2 tr(W^T Q) + n``. One eigendecomposition serves all ``lambda``.

    Args:
        sums: With at least one example held out.
        regularizations: The values of ``lambda``.
    """
    fitted, held = sums.total - sums.held_out, sums.held_out
    values, vectors = torch.linalg.eigh(fitted.gram)
    cross = vectors.T @ fitted.cross
    gram, target = vectors.T @ held.gram @ vectors, vectors.T @ held.cross
    found = []
    for each in regularizations:
        weight = cross / (values.clamp(min=0) + each)[:, None]
        squared = (weight * (gram @ weight)).sum() - 2 * (weight * target).sum() + held.count
        found.append(float(squared) / held.count)
    return found


def _solved(sums: NormalEquations, regularization: float) -> Tensor:
    """Return ``W``; where rounding, or what a check let pass, left eigenvalues below zero, as if they were zero."""
    factor, failed = torch.linalg.cholesky_ex(sums.gram + regularization * torch.eye(len(sums.gram)).to(sums.gram))
    if not int(failed):
        return torch.cholesky_solve(sums.cross, factor)
    values, vectors = torch.linalg.eigh(sums.gram)
    weight: Tensor = vectors @ (vectors.T @ sums.cross / (values.clamp(min=0) + regularization)[:, None])
    return weight


def _projected(features: Tensor, projection: Tensor) -> Tensor:
    return torch.relu(features.to(projection) @ projection)


def _equations(hidden: Tensor, indicators: Tensor) -> NormalEquations:
    return NormalEquations(hidden.T @ hidden, hidden.T @ indicators, len(hidden))


def _indicators(targets: Tensor, classes: int) -> Tensor:
    """Return one-hot rows ``(examples, classes)`` float64."""
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise DataError(
            f"expected targets from 0 to {classes - 1}, got {int(targets.min())} to {int(targets.max())}; "
            "say how many classes there are"
        )
    return torch.nn.functional.one_hot(targets, classes).double()


def _widened(cross: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.pad(cross, (0, classes - cross.shape[1]))


def _kept(classes: int, dropped: Collection[int]) -> Tensor:
    if unknown := sorted(set(dropped) - set(range(classes))):
        raise DataError(f"expected classes from 0 to {classes - 1} to drop, got {unknown}")
    return torch.tensor([i for i in range(classes) if i not in set(dropped)], dtype=torch.long)
