"""FedIT: average both factors, separately.

::

    A' = sum_k p_k A_k,    B' = sum_k p_k B_k        so that  B' A' != sum_k p_k B_k A_k

Clients go on from the averaged factors, all of one rank. The mean of products is not the product of the means: with
independent starts the error is nearly the whole update, so everybody starts from one A here, drawn once per run.

Cost: ``O(K r (out + in))`` per layer; down and up ``r (out + in)`` numbers.
Known flaw: cross terms ``B_i A_j`` between clients, which grow with how far the clients drift apart in a round.

Reference: Zhang et al., FedIT, ICASSP 2024 (https://arxiv.org/abs/2305.05644), which is FedAvg (McMahan et al. 2017,
algorithm 1) on the factors.
"""

from collections.abc import Sequence

from pomona.adapters import LoraFactors
from pomona.aggregation.strategies.contract import Assignment, Contribution, Layers, Rules, folded, mean_factors
from pomona.seeds import seed_of


def assign(state: Layers, *, rank: int, round_number: int, rules: Rules) -> Assignment:
    """Let the client go on from the averaged factors, at the rank of the run."""
    del rank, round_number
    return Assignment(layers=state, rank=rules.rank, trainable=rules.rank, adapter_seed=seed_of(rules.seed, "A"))


def aggregate(
    state: Layers, contributions: Sequence[Contribution], *, round_number: int, rules: Rules
) -> tuple[dict[str, LoraFactors], dict[str, float]]:
    """Return the averaged factors, scale folded into B.

    Raises:
        ValueError: The clients' ranks differ.
    """
    del state, round_number
    check_equal_ranks(contributions)
    layers = {name: folded(*mean_factors(contributions, name)) for name in rules.shapes}
    return layers, dict.fromkeys(layers, 1.0)


def check_equal_ranks(contributions: Sequence[Contribution]) -> None:
    """Check that one rank was trained in each layer; layers may differ.

    Raises:
        ValueError: The clients' ranks differ.
    """
    for name in contributions[0].layers:
        ranks = sorted({each.layers[name].rank for each in contributions})
        if len(ranks) != 1:
            raise ValueError(f"expected clients of one rank, got ranks {ranks}")
