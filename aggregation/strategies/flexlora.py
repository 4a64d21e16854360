"""FlexLoRA: average the products, give each client the largest components that fit its rank.

::

    G' = truncate(sum_k p_k s_k B_k A_k),      client k starts from  B = U S / s_k, A = V^T  of the first r_k

The paper forms the dense sum and its SVD; here both come from the stacked factors, which is the same matrix.

Cost: ``O((out + in) R^2)`` per layer; down and up ``r_k (out + in)`` numbers.
Known flaw: it replaces instead of adding, so what a small client never received counts as removed. With ranks
64,32,16,16,8,8,4,4,4,4 a round of clients that change nothing cuts the norm of a flat spectrum to 43 %: rank collapse.
``rank_partitioned`` (raFLoRA) averages component ``i`` over those clients alone that have one::

    G' = sum_i (sum_{k: r_k >= i} p_k s_k b_{k,i} a_{k,i}) / (sum_{k: r_k >= i} p_k)

Reference: Bai et al., FlexLoRA, NeurIPS 2024, section 3 (https://arxiv.org/abs/2402.11505); rank collapse and
partitioned weights: raFLoRA, 2026 (https://arxiv.org/abs/2602.13486).
"""

from collections.abc import Sequence

import torch

from pomona.adapters import LoraFactors
from pomona.aggregation.strategies.contract import (
    Assignment,
    Contribution,
    Layers,
    Rules,
    folded,
    leading,
    truncated_sum,
)
from pomona.seeds import seed_of


def assign(state: Layers, *, rank: int, round_number: int, rules: Rules) -> Assignment:
    """Give the client the largest components of the average, singular values in B."""
    del round_number
    layers = {
        name: _singular_values_in_b(leading(factors, rules.layer_rank(name, rank))) for name, factors in state.items()
    }
    return Assignment(layers=layers, rank=rank, trainable=rank, adapter_seed=seed_of(rules.seed, "A"))


def aggregate(
    state: Layers, contributions: Sequence[Contribution], *, round_number: int, rules: Rules
) -> tuple[dict[str, LoraFactors], dict[str, float]]:
    """Return the truncated average; the old state is replaced."""
    del state, round_number
    weights = [each.weight for each in contributions]
    updates = [dict(each.layers) for each in contributions]
    if rules.rank_partitioned:
        updates = [
            {name: _over_holders(factors, name, contributions) for name, factors in each.layers.items()}
            for each in contributions
        ]
    return truncated_sum({}, updates, weights=weights, rules=rules)


def holders(name: str, contributions: Sequence[Contribution]) -> torch.Tensor:
    """Return ``w_i = sum_{k: r_k >= i} p_k`` for every component, float64 ``(largest rank,)``."""
    held = torch.zeros(max(each.layers[name].rank for each in contributions), dtype=torch.float64)
    for each in contributions:
        held[: each.layers[name].rank] += each.weight
    return held


def _over_holders(factors: LoraFactors, name: str, contributions: Sequence[Contribution]) -> LoraFactors:
    held = holders(name, contributions)[: factors.rank, None]
    return LoraFactors(a=factors.a.double() / held, b=factors.b.double(), scale=factors.scale)


def _singular_values_in_b(factors: LoraFactors) -> LoraFactors:
    lengths = factors.a.double().norm(dim=1)
    lengths = lengths.where(lengths > 0.0, 1.0)
    return folded(factors.a.double() / lengths[:, None], factors.b.double() * lengths)
