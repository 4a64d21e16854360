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
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0.0):
            raise ValueError(f"expected finite weights that are not negative, got {weight}")
    names = sorted({name for update in updates for name in update})
    return {name: _average(name, updates, weights) for name in names}


def _average(name: str, updates: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Tensor:
    held = [(update[name], weight) for update, weight in zip(updates, weights, strict=True) if name in update]
    shapes = {tuple(tensor.shape) for tensor, _ in held}
    if len(shapes) != 1:
        raise ValueError(f"expected one shape of {name!r}, got {sorted(shapes)}")
    total = math.fsum(weight for _, weight in held)
    if total == 0.0:
        raise ValueError(f"the clients that hold {name!r} have weight 0 together")
    mean = torch.zeros_like(held[0][0], dtype=torch.float64)
    for tensor, weight in held:
        mean += (weight / total) * tensor.detach().double()
    return mean.float()
