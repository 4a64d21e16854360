"""Average the parameters that are trained whole, such as a classification head.

They have no low-rank structure, so the mean over clients is exact and needs no stacking::

    theta = sum_{k holds theta} p_k theta_k / sum_{k holds theta} p_k

Only holders count: a client that does not train a parameter says nothing about it, whereas a missing low-rank
layer is a zero update. Reference: McMahan et al., FedAvg, AISTATS 2017, algorithm 1
(https://arxiv.org/abs/1602.05629).
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def average_heads(updates: Sequence[Mapping[str, Tensor]], *, weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean of each parameter over the clients that hold it.

    Summed in float64 and rounded once, so a parameter that is equal on all clients comes back bit for bit.

    Args:
        updates: One mapping per client, by parameter name.
        weights: One finite weight per client, not negative; they need not sum to one.

    Returns:
        Every parameter that any client holds, float32, in sorted order.

    Raises:
        ValueError: Not one weight per client, a weight is negative or not finite, the holders of a parameter
            weigh nothing, or its shapes differ.

    Example:
        >>> average_heads([{"bias": torch.zeros(2)}, {"bias": torch.ones(2)}, {}], weights=[0.25, 0.25, 0.5])
        {'bias': tensor([0.5000, 0.5000])}
    """
    if len(updates) != len(weights):
        raise ValueError(f"got {len(updates)} updates but {len(weights)} weights")
    mean = HeadMean()
    for update, weight in zip(updates, weights, strict=True):
        mean.add(update, weight)
    return mean.result()


class HeadMean:
    """The mean of :func:`average_heads`, fed one client after another."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, heads: Mapping[str, Tensor], weight: float) -> None:
        """Count a client's parameters in; they are copied.

        Raises:
            ValueError: The weight is negative or not finite, or a parameter has another shape than before.
        """
        if not (math.isfinite(weight) and weight >= 0.0):
            raise ValueError(f"expected finite weights that are not negative, got {weight}")
        for name, head in heads.items():
            total = self._sums.setdefault(name, torch.zeros_like(head, dtype=torch.float64))
            if total.shape != head.shape:
                raise ValueError(f"expected one shape of {name!r}, got {tuple(total.shape)} and {tuple(head.shape)}")
            total.add_(head.detach().double(), alpha=weight)
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def result(self) -> dict[str, Tensor]:
        """Return the means so far, float32, in sorted order.

        Raises:
            ValueError: The holders of a parameter weigh nothing.
        """
        for name, total in self._weights.items():
            if total == 0.0:
                raise ValueError(f"the clients that hold {name!r} have weight 0 together")
        return {name: (self._sums[name] / self._weights[name]).float() for name in sorted(self._sums)}
