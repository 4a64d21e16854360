"""RoLoRA: train B in odd rounds and A in even ones, so that every mean is exact.

::

    odd:   B' = sum_k p_k B_k,  A' = A        even:  A' = sum_k p_k A_k,  B' = B

One factor is frozen and the same on all clients, so the mean of the other is the mean of the products. The paper
alternates from the first round on, with B first, because B starts at zero and gives A no gradient.

Cost: ``O(K r (out + in))`` per layer; up ``r out`` or ``r in`` numbers, down both factors, as clients keep nothing
between rounds (the paper's clients keep the factor that was frozen, and download half).
Known flaw: half the capacity in each round; equal ranks only.

Reference: Chen et al., RoLoRA, NeurIPS 2025, algorithm 1 (https://arxiv.org/abs/2409.02346).
"""

from collections.abc import Sequence

from pomona.adapters import LoraFactors
from pomona.aggregation.strategies.contract import Assignment, Contribution, Layers, Rules, folded, mean_factors
from pomona.aggregation.strategies.fedit import check_equal_ranks
from pomona.seeds import seed_of


def assign(state: Layers, *, rank: int, round_number: int, rules: Rules) -> Assignment:
    """Let the client go on from the averaged factors and train the one whose turn it is."""
    del rank
    return Assignment(
        layers=state,
        rank=rules.rank,
        trainable=rules.rank,
        trains="b" if round_number % 2 else "a",
        adapter_seed=seed_of(rules.seed, "A"),
    )


def aggregate(
    state: Layers, contributions: Sequence[Contribution], *, round_number: int, rules: Rules
) -> tuple[dict[str, LoraFactors], dict[str, float]]:
    """Return the frozen factor as it is and the mean of the other, scale folded into B.

    Raises:
        ValueError: The clients' ranks differ.
    """
    check_equal_ranks(contributions)
    layers = {}
    for name in rules.shapes:
        a, b = mean_factors(contributions, name)
        if round_number % 2:
            a = contributions[0].layers[name].a
        elif name in state:
            b = state[name].b
        layers[name] = folded(a, b)
    return layers, dict.fromkeys(layers, 1.0)
