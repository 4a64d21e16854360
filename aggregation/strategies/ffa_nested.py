"""Nested FFA: a public A is drawn for each round, clients train the part of B that their rank allows.

::

    A_t: orthonormal rows, drawn from the seed of the run and the round;   client k trains B_k over A_t[1..r_k]
    G' = truncate(G + (sum_k p_k s_k pad(B_k)) A_t)

Every client's rows are the first rows of one A_t, so padding with zeros is exact here, and the sum of padded B's times
A_t *is* FLoRA's stack. Only B travels up, and what the server needs is a plain sum: client-level noise and secure
aggregation fit, and clipping B is clipping the update, as ``||B A_t|| = ||B||``. Over the rounds the subspaces add up:
each round's update is stacked on the global adapter and truncated as in :mod:`.flora_bounded`.

Cost: ``O((out + in) R^2)`` per layer with ``R`` = max_rank + the largest client's rank; down the global adapter, up
``r_k out`` numbers.
Known flaw: a round can only move within the random row space of A_t.

Reference: Sun et al., FFA-LoRA, ICLR 2024 (https://arxiv.org/abs/2403.12313) for the frozen A; Valipour et al.,
DyLoRA, EACL 2023 (https://arxiv.org/abs/2210.07558) for nested rows.
"""

from collections.abc import Iterable

from pomona.adapters import LoraFactors
from pomona.aggregation.strategies.contract import Assignment, Contribution, Layers, Rules, truncated_sum
from pomona.seeds import seed_of


def assign(state: Layers, *, rank: int, round_number: int, rules: Rules) -> Assignment:
    """Give the client the frozen global adapter, under a B of its rank over the round's public A."""
    return Assignment(
        layers=state,
        rank=rank,
        trains="b",
        adapter_seed=seed_of(rules.seed, round_number),
        initial="orthonormal",
    )


def aggregate(
    state: Layers, contributions: Iterable[Contribution], *, round_number: int, rules: Rules
) -> tuple[dict[str, LoraFactors], dict[str, float]]:
    """Return the truncated sum; reads the contributions once, one by one."""
    del round_number
    update: dict[str, LoraFactors] = {}
    for each in contributions:
        update |= {name: _padded_sum(update.get(name), factors, each.weight) for name, factors in each.layers.items()}
        del each  # before the next is read
    return truncated_sum(state, [update], weights=[1.0], rules=rules)


def _padded_sum(total: LoraFactors | None, factors: LoraFactors, weight: float) -> LoraFactors:
    """Return ``total + p_k s_k pad(B_k) A_t``, float64, at the larger rank of the two."""
    b = weight * factors.scale * factors.b.double()
    if total is None:
        return LoraFactors(a=factors.a.double(), b=b)
    if total.rank < factors.rank:
        b[:, : total.rank] += total.b
        return LoraFactors(a=factors.a.double(), b=b)
    total.b[:, : factors.rank] += b
    return total
