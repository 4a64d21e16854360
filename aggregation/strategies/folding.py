"""The weighted sum of a round's updates, in memory that does not grow with the number of clients."""

from collections.abc import Iterable, Mapping

import torch

from pomona.aggregation.strategies.contract import Contribution, Layers, Rules
from pomona.aggregation.streaming import StackAccumulator


def guard_rank(max_rank: int) -> int:
    """Return the rank that merges keep: above the bound of the result by a quarter, and by 16 at least."""
    return max_rank + max(16, max_rank // 4)


def fold(contributions: Iterable[Contribution], rules: Rules) -> tuple[Layers, dict[str, float]]:
    """Return ``sum_k p_k s_k B_k A_k`` of each layer as it is held, and the share of its energy that merges have kept.

    The sum is exact up to a stacked rank of twice :func:`guard_rank`; beyond it what merges drop is estimated.

    Args:
        contributions: Read once, one by one, and let go; in sorted order where bytes must be equal.
        rules: Shapes of the layers, and ``max_rank``.
    """
    guard = guard_rank(rules.max_rank)
    sums = {
        name: StackAccumulator(out, in_, guard_rank=guard, dtype=torch.float64)
        for name, (out, in_) in rules.shapes.items()
    }
    for each in contributions:
        _add(sums, each)
        del each  # before the next is read
    layers = {name: total.held() for name, total in sums.items()}
    kept = {name: _kept(total) for name, total in sums.items()}
    return layers, kept


def _add(sums: Mapping[str, StackAccumulator], contribution: Contribution) -> None:
    for name, factors in contribution.layers.items():
        sums[name].add(factors, contribution.weight)


def _kept(total: StackAccumulator) -> float:
    return 1.0 - min(1.0, total.estimated_error) ** 2 if total.error_bound else 1.0
