"""What one client adds to the sums at the end of a task: counts, sums and second moments of classes, as one vector.

::

    u_i = (a n_c,  b s_c,  c tri(S_c))    over the classes of the task, s and S under each of k adapters (1 or 2)
    a^2 + k (b^2 + c^2) = 1

and the mechanism is that of any round, :class:`~pomona.privacy.gaussian_sum.GaussianSum`, with a bound of its own::

    ( sum_i clip(u_i, C) + N(0, sigma^2 C^2 I) ) / (q N)

Adding or removing a client adds or removes one ``clip(u_i, C)``, whose norm is at most ``C`` whatever the client sends,
so the sensitivity is ``C`` and the release costs what one of noise multiplier ``sigma`` does (Dwork and Roth 2014,
https://doi.org/10.1561/0400000042, theorem A.1, for the Gaussian mechanism; McMahan et al. 2018,
https://arxiv.org/abs/1710.06963, for sums over users). The norm is over all of the vector at once. Clipped each to
``C``, the ``1 + 2 k`` tensors could move the release by ``C sqrt(1 + 2 k)``, which the noise would not cover.

A feature ``f`` has length 1, and so has ``f f^T``, as a matrix by Frobenius. ``tri`` keeps the triangle of a symmetric
matrix, what is beside its diagonal times ``sqrt(2)``, so that its norm is that and no entry is noised twice. So a row
has norm 1 (of ``f_j^2`` alone: at most 1), ``m`` rows have norm at most ``m``, and ``C`` is a number of rows. What is
clipped is all of ``u_i`` by one factor: means and second moments of the client's rows stay what they were, and its
counts say how many rows it is counted as.

The weights share the norm of a row among the three kinds. They change no promise, only what is noised how much: of the
mean of a class with ``n`` rows by a vector of norm ``sigma C sqrt(d) / (b n)``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.mos_settings import Moments

COUNT, TOTAL, MOMENT = "count", "total", "moment"
OWN, FIRST = "own", "first"  # adapters: a task's, and the first task's
_SHARES = {COUNT: 0.1, TOTAL: 0.6, MOMENT: 0.3}  # of the square of a row's norm


@dataclass(frozen=True, slots=True, kw_only=True)
class SumsNoise:
    """Standard deviations of the noise on the sums of a release, in rows.

    Attributes:
        count: On the number of rows of a class.
        total: On each number of the sum of its features.
        moment: On each number of its second moments, where what is beside the diagonal is taken times ``sqrt(2)``.
    """

    count: float
    total: float
    moment: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SumsLayout:
    """Which sums there are of a task.

    Attributes:
        classes: Of the task.
        width: Of features.
        moments: All second moments, or squares alone.
        adapters: Names of those that features are taken under.
    """

    classes: int
    width: int
    moments: Moments
    adapters: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a contribution by name: ``count``, and ``<adapter>.total`` and ``<adapter>.moment`` of each."""
        entries = self.width if self.moments == "diagonal" else self.width * (self.width + 1) // 2
        found: dict[str, tuple[int, ...]] = {COUNT: (self.classes,)}
        for name in self.adapters:
            found[f"{name}.{TOTAL}"] = (self.classes, self.width)
            found[f"{name}.{MOMENT}"] = (self.classes, entries)
        return found

    @property
    def dimensions(self) -> int:
        """How many numbers a contribution has."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def weight(self, kind: str) -> float:
        """Return ``a``, ``b`` or ``c``."""
        return math.sqrt(_SHARES[kind] / (1 if kind == COUNT else len(self.adapters)))

    def contribution(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what a client contributes before it is clipped, float64.

        Args:
            sums: Of its rows, of any dtype, by the names and of the shapes of :attr:`shapes`; of all second moments
                the upper triangle, row by row.

        Raises:
            ValueError: Names or shapes are others.
        """
        if (got := {name: tuple(tensor.shape) for name, tensor in sums.items()}) != self.shapes:
            raise ValueError(f"expected sums {self.shapes}, got {got}")
        return {name: self._scale(name) * tensor.to(torch.float64) for name, tensor in sums.items()}

    def sums(self, mean: Mapping[str, Tensor], *, divisor: float) -> dict[str, Tensor]:
        """Return the noised sums over the cohort, float64, of a released mean; the divisor is public."""
        return {name: divisor * tensor / self._scale(name) for name, tensor in mean.items()}

    def noise_of_class(self, *, noise_multiplier: float, divisor: float) -> dict[str, float]:
        """Return the expected norm of the noise on what is known of a class, over its own norm, kind by kind.

        As if all of an expected cohort contributed as much as their bound allows, evenly over the classes. Above 1 the
        noise is larger than what it is on; fewer rows, or of fewer clients, have as many times more.

        Args:
            noise_multiplier: ``sigma``.
            divisor: The expected size of the cohort.
        """
        entries = {COUNT: 1, TOTAL: self.width, MOMENT: self.shapes[f"{self.adapters[0]}.{MOMENT}"][1]}
        rows = divisor / self.classes
        return {kind: noise_multiplier * math.sqrt(n) / (self.weight(kind) * rows) for kind, n in entries.items()}

    def noise(self, *, noise_multiplier: float, bound: float) -> SumsNoise:
        """Return how large the noise on the sums is, which is public."""
        scale = noise_multiplier * bound
        return SumsNoise(**{kind: scale / self.weight(kind) for kind in (COUNT, TOTAL, MOMENT)})

    def _scale(self, name: str) -> Tensor:
        """Return what the numbers of a tensor are multiplied with, as a scalar or ``(entries,)``."""
        kind = name.rpartition(".")[2]
        weight = torch.tensor(self.weight(kind), dtype=torch.float64)
        if kind != MOMENT or self.moments == "diagonal":
            return weight
        rows, columns = torch.triu_indices(self.width, self.width)
        return torch.where(rows == columns, weight, math.sqrt(2.0) * weight)
