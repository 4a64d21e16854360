"""FLoRA as published: stack, add to what is merged, start afresh; the whole stack goes to everybody.

::

    W_{t+1} = W_t + [B_1 ... B_K] [p_1 s_1 A_1; ...; p_K s_K A_K]

The published code merges the stack into the base model in place. Here the base never changes: what would have been
merged is kept as one adapter, stacked and never truncated, until its rank reaches ``min(out, in)`` of a layer, where
an exact factorisation of that rank takes its place. A client that joins late would otherwise need the history.

Cost: concatenation; down ``R_t (out + in)`` numbers with ``R_t = sum over rounds and clients of r_k`` (the published
clients, who keep their merged base, download the last round's ``sum_k r_k``).
Known flaw: download grows with the number of clients; every client sees the factors of every other.

Reference: Wang et al., FLoRA, NeurIPS 2024, eq. 5 and algorithm 1 (https://arxiv.org/abs/2409.05976).
"""

from collections.abc import Sequence

from pomona.adapters import LoraFactors
from pomona.aggregation.flora import recompress, stack
from pomona.aggregation.strategies.contract import Assignment, Contribution, Layers, Rules, folded
from pomona.seeds import seed_of


def assign(state: Layers, *, rank: int, round_number: int, rules: Rules) -> Assignment:
    """Give the client everything that was ever stacked, frozen, under a fresh adapter."""
    return Assignment(layers=state, rank=rank, adapter_seed=seed_of(rules.seed, round_number))


def aggregate(
    state: Layers, contributions: Sequence[Contribution], *, round_number: int, rules: Rules
) -> tuple[dict[str, LoraFactors], dict[str, float]]:
    """Return the stack on top of what there was; nothing is lost."""
    del round_number
    layers = {name: _stacked(state.get(name), name, contributions, shape) for name, shape in rules.shapes.items()}
    return layers, dict.fromkeys(layers, 1.0)


def _stacked(
    current: LoraFactors | None, name: str, contributions: Sequence[Contribution], shape: tuple[int, int]
) -> LoraFactors:
    blocks = [(each.layers[name], each.weight) for each in contributions]
    if current is not None:
        blocks = [(current, 1.0), *blocks]
    whole = stack([factors for factors, _ in blocks], weights=[weight for _, weight in blocks])
    if whole.rank >= min(shape):
        whole, _ = recompress(whole, rank=min(shape))
    return folded(whole.a, whole.b)
