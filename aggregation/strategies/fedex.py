"""FedEx-LoRA: average the factors, and add what that gets wrong as a frozen residual.

::

    A' = sum_k p_k A_k,   B' = sum_k p_k B_k,   E = sum_k p_k s B_k A_k - s B' A',   G' = s B' A' + (residuals + E)

Clients go on from the averaged factors as in FedIT, above the sum of all residuals, so every round is exact. The paper
adds the residual to the base model; here the base never changes, and the residual is stacked behind the factors. Its
rank is bounded by ``min(out, in)``, where an exact factorisation takes its place.

State: the first ``rank`` components of a layer are the averaged factors, the rest is the residual.

Cost: ``O((out + in) R^2)`` per layer; up ``r (out + in)`` numbers, down the residual besides, of rank up to
``(K - 1) r`` a round, as ``E = sum_k p_k s (B_k - B') (A_k - A')``. The published code averages without weights; this
one uses ``p_k``.
Known flaw: download grows with clients and rounds; equal ranks only.

Reference: Singhal et al., FedEx-LoRA, ACL 2025, eq. 4 to 6 (https://arxiv.org/abs/2410.09432).
"""

import math
from collections.abc import Sequence

import torch

from pomona.adapters import LoraFactors
from pomona.aggregation.flora import recompress, stack
from pomona.aggregation.strategies.contract import (
    Assignment,
    Contribution,
    Layers,
    Rules,
    folded,
    mean_factors,
    trailing,
)
from pomona.aggregation.strategies.fedit import check_equal_ranks
from pomona.aggregation.verify import update_norm
from pomona.seeds import seed_of

_ROUNDING = 16 * torch.finfo(torch.float32).eps


def assign(state: Layers, *, rank: int, round_number: int, rules: Rules) -> Assignment:
    """Let the client go on from the averaged factors, over the frozen residual."""
    del rank, round_number
    return Assignment(layers=state, rank=rules.rank, trainable=rules.rank, adapter_seed=seed_of(rules.seed, "A"))


def aggregate(
    state: Layers, contributions: Sequence[Contribution], *, round_number: int, rules: Rules
) -> tuple[dict[str, LoraFactors], dict[str, float]]:
    """Return the averaged factors with the residual stacked behind them.

    Raises:
        ValueError: The clients' ranks differ.
    """
    del round_number
    check_equal_ranks(contributions)
    layers = {}
    for name, shape in rules.shapes.items():
        mean = folded(*mean_factors(contributions, name))
        residual = _residual(state.get(name), mean, name, contributions, limit=min(shape))
        layers[name] = LoraFactors(a=torch.cat([mean.a, residual.a]), b=torch.cat([mean.b, residual.b], dim=1))
    return layers, dict.fromkeys(layers, 1.0)


def _residual(
    current: LoraFactors | None,
    mean: LoraFactors,
    name: str,
    contributions: Sequence[Contribution],
    *,
    limit: int,
) -> LoraFactors:
    blocks = [(each.layers[name], each.weight) for each in contributions] + [(mean, -1.0)]
    if current is not None:
        blocks.append((trailing(current, mean.rank), 1.0))
    wide = [LoraFactors(a=f.a.double(), b=f.b.double(), scale=f.scale) for f, _ in blocks]
    exact, _ = recompress(stack(wide, weights=[weight for _, weight in blocks]), rank=limit)
    sizes = exact.a.norm(dim=1) * exact.b.norm(dim=0)  # the singular values
    whole = math.fsum(abs(weight) * update_norm({name: factors}, {}) for factors, weight in blocks)
    kept = int((sizes > _ROUNDING * whole).sum())  # what is left is the rounding of the mean, which has full rank
    return folded(exact.a[:kept], exact.b[:, :kept])
