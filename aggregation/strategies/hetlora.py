"""HetLoRA: pad smaller ranks with zeros, average the factors, truncate for each client.

::

    A' = sum_k q_k pad(A_k),   B' = sum_k q_k pad(B_k),   q_k = ||B_k A_k|| / sum_j ||B_j A_j||

Client ``k`` goes on from the first ``r_k`` components. All start from nested rows of one A and B = 0. The paper weighs
clients by the norm of their update, so that those with much to say are not drowned by padding.

Cost: ``O(K r (out + in))`` per layer; down and up ``r_k (out + in)`` numbers.
Known flaw: it averages factors (see :mod:`.fedit`), and rows that few clients have are diluted by the zeros of the
others: in a round in which nobody changes anything they shrink by ``w_i`` in each factor. ``rank_partitioned`` averages
row ``i`` over those clients alone that have one (RBLA, https://arxiv.org/abs/2408.08699; raFLoRA), which mends that.

Self-pruning: a client of rank ``r`` trains ``loss + penalty * sum_layers ||B[:, k:]|| ||A[k:]||`` with ``k = decay r``;
where that made its tail smaller than it was, it goes on with rank ``k``. The paper prunes on the client. Here the
coordinator does, which has both factors before and after, so the ranks are known where they are decided.

Reference: Cho et al., HetLoRA, EMNLP 2024, section 4 (https://arxiv.org/abs/2401.06432).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from pomona.adapters import LoraFactors
from pomona.aggregation.strategies.contract import Assignment, Contribution, Layers, Rules, folded, leading
from pomona.aggregation.strategies.flexlora import holders
from pomona.aggregation.verify import update_norm
from pomona.seeds import seed_of


def assign(state: Layers, *, rank: int, round_number: int, rules: Rules) -> Assignment:
    """Give the client the first components of the averaged factors."""
    del round_number
    layers = {name: leading(factors, rules.layer_rank(name, rank)) for name, factors in state.items()}
    pruning = rules.self_pruning
    return Assignment(
        layers=layers,
        rank=rank,
        trainable=rank,
        adapter_seed=seed_of(rules.seed, "A"),
        tail_from=kept_rank(rank, rules) if pruning else 0,
        tail_penalty=pruning.penalty if pruning else 0.0,
    )


def aggregate(
    state: Layers, contributions: Sequence[Contribution], *, round_number: int, rules: Rules
) -> tuple[dict[str, LoraFactors], dict[str, float]]:
    """Return the mean of the padded factors, scale folded into B."""
    del state, round_number
    weighed = by_norm(contributions)
    layers = {name: _padded_mean(weighed, name, partitioned=rules.rank_partitioned) for name in rules.shapes}
    return layers, dict.fromkeys(layers, 1.0)


def kept_rank(rank: int, rules: Rules) -> int:
    """Return the rank that a client has without its tail, at least 1."""
    return max(1, math.floor(rules.self_pruning.decay * rank + 1e-9)) if rules.self_pruning else rank


def pruned(start: Layers, trained: Layers, *, rank: int, rules: Rules) -> tuple[int, Layers]:
    """Return the rank that a client goes on with, and what it trained at that rank.

    The tail goes where training, under its penalty, made it smaller: ``t' < t`` with
    ``t = sum_layers ||B[:, kept:]|| ||A[kept:]||``. A tail that has no B yet has nothing to lose and stays.

    Args:
        start: What the client started from.
        trained: What it trained.
        rank: Of the client.
        rules: Of the run.
    """
    kept = kept_rank(rank, rules)
    if kept == rank or not tail_norm(trained, kept, rules) < tail_norm(start, kept, rules):
        return rank, trained
    return kept, {name: _first(factors, rules.layer_rank(name, kept)) for name, factors in trained.items()}


def tail_norm(layers: Layers, kept: int, rules: Rules) -> float:
    """Return ``sum_layers ||B[:, kept:]|| ||A[kept:]||``, factors unscaled."""
    tails = [(factors, rules.layer_rank(name, kept)) for name, factors in layers.items()]
    return math.fsum(float(f.b[:, k:].double().norm() * f.a[k:].double().norm()) for f, k in tails)


def _first(factors: LoraFactors, rank: int) -> LoraFactors:
    return LoraFactors(a=factors.a[:rank], b=factors.b[:, :rank], scale=factors.scale)


def by_norm(contributions: Sequence[Contribution]) -> list[Contribution]:
    """Return the contributions weighed by the norm of their update; as they are where all norms are zero."""
    norms = [update_norm(each.layers, {}) for each in contributions]
    total = math.fsum(norms)
    if total == 0.0:
        return list(contributions)
    return [replace(each, weight=norm / total) for each, norm in zip(contributions, norms, strict=True)]


def _padded_mean(contributions: Sequence[Contribution], name: str, *, partitioned: bool) -> LoraFactors:
    rank = max(each.layers[name].rank for each in contributions)
    first = contributions[0].layers[name]
    a = torch.zeros(rank, first.a.shape[1], dtype=torch.float64)
    b = torch.zeros(first.b.shape[0], rank, dtype=torch.float64)
    for each in contributions:
        factors = each.layers[name]
        a[: factors.rank] += each.weight * factors.a.double()
        b[:, : factors.rank] += each.weight * factors.scale * factors.b.double()
    if partitioned:
        held = holders(name, contributions)
        held = held.where(held > 0.0, 1.0)
        a, b = a / held[:, None], b / held
    return folded(a, b)
