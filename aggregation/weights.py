"""How much each client counts.

``p_k = n_k / sum_j n_j`` over the clients whose updates were accepted, ``n_k`` the number of examples they
trained on. Reference: McMahan et al., FedAvg, AISTATS 2017, algorithm 1 (https://arxiv.org/abs/1602.05629).
Under differential privacy at client level these weights are not allowed: each depends on the others' data.
"""

from collections.abc import Sequence


def example_weights(counts: Sequence[int]) -> list[float]:
    """Return each client's share of the examples.

    Args:
        counts: Number of training examples per client, each at least 1, of any size.

    Returns:
        One weight per client, correctly rounded from the exact quotient of integers.

    Raises:
        ValueError: There are no clients, or a count is not an integer of at least 1.

    Example:
        >>> example_weights([1, 3])
        [0.25, 0.75]
    """
    if not counts:
        raise ValueError("expected at least one client, got none")
    for count in counts:
        if type(count) is not int or count < 1:  # True is an int in Python
            raise ValueError(f"expected integers of at least 1, got {count!r}")
    total = sum(counts)
    return [count / total for count in counts]
