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

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from pomona.adapters import LoraFactors
from pomona.aggregation.flora import stack
from pomona.aggregation.strategies.contract import Assignment, Contribution, Layers, Rules, truncated_sum
from pomona.aggregation.strategies.folding import fold
from pomona.aggregation.verify import update_norm
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
    state: Layers, contributions: Iterable[Contribution], *, round_number: int, rules: Rules
) -> tuple[dict[str, LoraFactors], dict[str, float]]:
    """Return the truncated sum; reads the contributions once, one by one."""
    del round_number
    held = {name: torch.zeros(factors.rank, dtype=torch.float64) for name, factors in state.items()}
    update, kept = fold(_noting(contributions, held), rules)
    current: Mapping[str, LoraFactors] = state
    if rules.warm_start:
        current = {name: _left_in_place(factors, held[name]) for name, factors in state.items()}
    layers, retained = truncated_sum(current, [update], weights=[1.0], rules=rules)
    return layers, {
        name: share * _kept_of_whole(current.get(name), update[name], kept[name]) for name, share in retained.items()
    }


def _noting(contributions: Iterable[Contribution], held: Mapping[str, Tensor]) -> Iterator[Contribution]:
    """Pass contributions on, and sum up for each component the weights of those who have it."""
    for each in contributions:
        for name, total in held.items():
            total[: each.layers[name].rank] += each.weight
        yield each
        del each  # before the next is read


def _kept_of_whole(current: LoraFactors | None, update: LoraFactors, kept: float) -> float:
    """Return the share of ``G + update`` that was kept, given that of the update; what was lost leans on neither."""
    if current is None or kept in {0.0, 1.0}:
        return kept
    lost = update_norm({"": update}, {}) ** 2 * (1.0 - kept) / kept
    whole = update_norm({"": stack([current, update], weights=[1.0, 1.0])}, {}) ** 2
    return whole / (whole + lost)


def _left_in_place(factors: LoraFactors, held: Tensor) -> LoraFactors:
    return LoraFactors(a=(1.0 - held)[:, None] * factors.a.double(), b=factors.b.double())
