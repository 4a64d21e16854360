"""Bounded FLoRA: stack exactly on top of the global adapter, then truncate optimally.

::

    G' = truncate(G + sum_k p_k s_k B_k A_k)                                        cold start
    G' = truncate(G + sum_k p_k (s_k B_k A_k - G_{1..r_k}))                         warm start

Cold: the client trains a fresh adapter over the frozen ``G``. Warm: it goes on from the ``r_k`` largest components of
``G``, frozen above the rest, and what it changed is what counts. ``G = U S V^T`` is kept in the order of its singular
values and truncations are nested, so all the subtracted parts together are one block::

    G - sum_k p_k G_{1..r_k}  ==  U diag(S_i (1 - w_i)) V^T,    w_i = sum_{k: r_k >= i} p_k

Either way a round in which nobody changes anything leaves ``G`` as it is. Download is at most
``max_rank (out + in)`` numbers however many clients there are.

Cost: ``O((out + in) R^2)`` per layer for a stack of rank ``R``.
Known flaw: what exceeds ``max_rank`` is lost, optimally, and reported. Cold starts spend the first steps of a round on
growing B from zero.

Reference: Wang et al., FLoRA, NeurIPS 2024, eq. 5 (https://arxiv.org/abs/2409.05976); Eckart and Young 1936.
"""

from collections.abc import Mapping, Sequence

import torch

from pomona.adapters import LoraFactors
from pomona.aggregation.strategies.contract import Assignment, Contribution, Layers, Rules, truncated_sum
from pomona.seeds import seed_of


def assign(state: Layers, *, rank: int, round_number: int, rules: Rules) -> Assignment:
    """Give the client the global adapter: all frozen, or (warm) its largest components to go on from."""
    return Assignment(
        layers=state,
        rank=rank,
        trainable=rank if rules.warm_start else 0,
        adapter_seed=seed_of(rules.seed, round_number),
    )


def aggregate(
    state: Layers, contributions: Sequence[Contribution], *, round_number: int, rules: Rules
) -> tuple[dict[str, LoraFactors], dict[str, float]]:
    """Return the truncated sum."""
    del round_number
    current: Mapping[str, LoraFactors] = state
    if rules.warm_start:
        current = {name: _left_in_place(factors, name, contributions) for name, factors in state.items()}
    weights = [each.weight for each in contributions]
    return truncated_sum(current, [each.layers for each in contributions], weights=weights, rules=rules)


def _left_in_place(factors: LoraFactors, name: str, contributions: Sequence[Contribution]) -> LoraFactors:
    held = torch.zeros(factors.rank, dtype=torch.float64)
    for each in contributions:
        held[: each.layers[name].rank] += each.weight
    rest = (1.0 - held)[:, None]
    return LoraFactors(a=rest * factors.a.double(), b=factors.b.double())
