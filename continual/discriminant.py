"""Classify by the normal distribution of each class, from statistics that are sums.

::

    W   = sum_c (n_c - 1) Sigma_c / (N - C),          shrunk towards a sphere, the more the fewer examples
    S_c = (k W + (n_c - 1) Sigma_c) / (k + n_c - 1),                         k = prior * width
    z_c = -1/2 (f - mu_c)^T S_c^-1 (f - mu_c) - 1/2 log det S_c

The covariance of a class is drawn to that of all classes within, the more the fewer examples it has: with few it is
linear discriminant analysis, with many quadratic. ``k`` is what a prior is worth, in examples.

Every part is a function of ``n``, ``sum f`` and ``sum f f^T`` of each class. So the head is the same under any order
of tasks and any spread over clients, and without a class, or after a client's sums are subtracted, it is the one that
never had them. It takes no random features and no Gram matrix of them.

Reference: Friedman, Regularized discriminant analysis, JASA 1989; as a head over frozen features of a stream, Hayes and
Kanan, Lifelong machine learning with deep streaming linear discriminant analysis, 2020
(https://arxiv.org/abs/1909.01520).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.continual.statistics import ClassStatistics, cholesky, shrunk
from pomona.errors import DataError


@dataclass(frozen=True, slots=True)
class GaussianHead:
    """Log densities of classes.

    Attributes:
        means: ``(classes, width)`` float64.
        whitenings: ``L_c^-1`` with ``L_c L_c^T = S_c``, ``(classes, width, width)`` float64.
    """

    means: Tensor
    whitenings: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Return log densities up to a constant, ``(examples, classes)`` float64; one class at a time."""
        rows = features.double()
        found = [
            whitening.diagonal().log().sum() - 0.5 * ((rows - mean) @ whitening.T).square().sum(1)
            for mean, whitening in zip(self.means, self.whitenings, strict=True)
        ]
        return torch.stack(found, dim=1)


@dataclass(frozen=True, slots=True)
class NormalClass:
    """A class as the normal distribution that the head takes it for.

    Attributes:
        count: Examples behind it.
        centre: The mean, ``(width,)`` float64.
        factor: ``L_c``, lower triangular with ``L_c L_c^T = S_c``, ``(width, width)`` float64.
    """

    count: int
    centre: Tensor
    factor: Tensor

    def mean(self) -> Tensor:
        """Return the mean, ``(width,)`` float64."""
        return self.centre

    def covariance(self) -> Tensor:
        """Return ``S_c``, ``(width, width)`` float64."""
        return self.factor @ self.factor.T

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw ``n`` features, ``(n, width)`` float64."""
        return self.centre + torch.randn(n, len(self.centre), generator=generator, dtype=torch.float64) @ self.factor.T


def normal_classes(
    classes: Sequence[ClassStatistics], *, prior: float, sphere_examples: float = 0.0
) -> tuple[NormalClass, ...]:
    """Return the normal distribution of each class, its covariance drawn to that of all.

    Args:
        classes: Of one width and kind, each with an example.
        prior: Examples, as a multiple of the width, that the covariance within all classes counts for.
        sphere_examples: Examples of each class, ``s``, with which a sphere of the mean variance is half of that
            covariance; with ``n`` it is ``s^2 / (s^2 + n^2)``. With 5 examples a class it is hardly known in which
            directions classes vary, and angles to means do best; with 100 a sphere hides those in which classes vary
            least, and so differ most.

    Raises:
        DataError: There are no classes, or one has no examples.
    """
    if not classes or min(each.count for each in classes) < 1:
        raise DataError(f"expected classes that all have examples, got {[each.count for each in classes]}")
    within = within_covariance(classes, sphere_examples=sphere_examples)
    weight, slack = prior * len(within), max(each.slack() for each in classes)
    found = []
    for each in classes:
        mixed = (weight * within + (each.count - 1) * each.covariance()) / (weight + each.count - 1)
        found.append(NormalClass(each.count, each.mean(), cholesky(mixed, slack=slack)))
    return tuple(found)


def gaussian_head(classes: Sequence[ClassStatistics], *, prior: float, sphere_examples: float = 0.0) -> GaussianHead:
    """Return the head for some classes; see :func:`normal_classes`.

    Raises:
        DataError: There are no classes, or one has no examples.
    """
    normal = normal_classes(classes, prior=prior, sphere_examples=sphere_examples)
    eye = torch.eye(len(normal[0].centre), dtype=torch.float64)
    whitenings = [torch.linalg.solve_triangular(each.factor, eye, upper=False) for each in normal]
    return GaussianHead(torch.stack([each.centre for each in normal]), torch.stack(whitenings))


def within_covariance(classes: Sequence[ClassStatistics], *, sphere_examples: float = 0.0) -> Tensor:
    """Return the shrunk covariance within all classes, ``(width, width)`` float64, positive definite.

    With one example of each class, when nothing is known of it, it is the unit sphere.
    """
    width, freedom = len(classes[0].total), sum(each.count - 1 for each in classes)
    eye = torch.eye(width, dtype=torch.float64)
    pooled = sum(((each.count - 1) * each.covariance() for each in classes), torch.zeros_like(eye))
    if not bool(pooled.any()):
        return eye
    estimate = shrunk(pooled / freedom, freedom)
    examples = sum(each.count for each in classes) / len(classes)
    share = sphere_examples**2 / (sphere_examples**2 + examples**2)
    return (1 - share) * estimate + share * (estimate.trace() / width) * eye
