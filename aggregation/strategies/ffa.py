"""FFA-LoRA: freeze A where it was drawn, train and average B.

::

    B' = sum_k p_k B_k,    B' A == sum_k p_k B_k A       exact, because A is one and the same

Only B travels, in both directions: every client draws A from the seed of the run. What the server does is a plain sum,
so noise for differential privacy and secure aggregation fit.

Cost: ``O(K r out)`` per layer; down and up ``r out`` numbers.
Known flaw: the update can never leave the row space of the random A; equal ranks only.

Reference: Sun et al., FFA-LoRA, ICLR 2024, section 3 (https://arxiv.org/abs/2403.12313).
"""

from collections.abc import Sequence

from pomona.adapters import LoraFactors
from pomona.aggregation.strategies.contract import Assignment, Contribution, Layers, Rules, folded, mean_factors
from pomona.aggregation.strategies.fedit import check_equal_ranks
from pomona.seeds import seed_of


def assign(state: Layers, *, rank: int, round_number: int, rules: Rules) -> Assignment:
    """Let the client go on from the averaged B, over an A that it draws itself."""
    del rank, round_number
    return Assignment(
        layers=state,
        rank=rules.rank,
        trainable=rules.rank,
        trains="b",
        adapter_seed=seed_of(rules.seed, "A"),
        draws_a=True,
    )


def aggregate(
    state: Layers, contributions: Sequence[Contribution], *, round_number: int, rules: Rules
) -> tuple[dict[str, LoraFactors], dict[str, float]]:
    """Return A as it is and the averaged B, scale folded in.

    Raises:
        ValueError: The clients' ranks differ.
    """
    del state, round_number
    check_equal_ranks(contributions)
    layers = {}
    for name in rules.shapes:
        _, b = mean_factors(contributions, name)
        layers[name] = folded(contributions[0].layers[name].a, b)
    return layers, dict.fromkeys(layers, 1.0)
