"""Share one data set among simulated clients.

Every function returns indices, ascending within a client, and gives every example to exactly one client;
randomness comes from the seed alone. Three ways:

* IID: a random permutation, cut into parts whose sizes differ by at most one.
* Dirichlet: each class k is shared by proportions ``p_k ~ Dir(alpha * 1_J)`` over the J clients (Yurochkin et
  al., ICML 2019, arXiv:1905.12022, section 4). Hsu et al. (2019, arXiv:1909.06335, section 3) draw the class
  mix of each client instead, ``q_j ~ Dir(alpha * prior)`` with equal sizes; here sizes are skewed too. Large
  ``alpha`` is IID, small ``alpha`` gives a client few classes.
* By column: the users that are in the data.
"""

import heapq
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pomona.datasets import Dataset
from pomona.errors import DataError
from pomona.settings import DataSettings

Indices = NDArray[np.int64]


def partition(dataset: Dataset, settings: DataSettings, clients: int, seed: int) -> list[Indices]:
    """Share ``dataset`` the way ``settings.partition`` says.

    With ``column`` the ``clients`` users with the most examples take part (ties by name), in the order of
    their names, and the examples of all others are left out; nothing is left out otherwise.

    Args:
        dataset: The examples; without labels (``causal-lm``) ``dirichlet`` skews the sizes alone.
        settings: Which partition, and its parameters.
        clients: Number of clients.
        seed: Of the partition; without effect on ``column``.

    Returns:
        One array of indices per client, none of them empty.

    Raises:
        DataError: There are fewer examples or users than clients, or the column is missing or has gaps.
    """
    if settings.partition == "iid":
        return partition_iid(len(dataset), clients, seed=seed)
    if settings.partition == "dirichlet":
        return partition_dirichlet(dataset.labels, clients, alpha=settings.dirichlet_alpha, seed=seed)
    _check_clients(clients)
    column = settings.partition_column
    if column not in dataset.columns:
        raise DataError(
            f"{dataset.source} has no column {column!r} to partition by; "
            f"its columns are {', '.join(map(repr, sorted(dataset.columns))) or 'text alone'}"
        )
    users = partition_by_column(dataset.columns[column])
    if clients > len(users):
        raise DataError(
            f"the column {column!r} of {dataset.source} names {len(users)} users, "
            f"too few for {clients} clients; ask for at most {len(users)}"
        )
    largest = sorted(users, key=lambda name: (-len(users[name]), name))[:clients]
    return [users[name] for name in sorted(largest)]


def partition_iid(n: int, clients: int, *, seed: int) -> list[Indices]:
    """Share ``n`` examples at random, in parts whose sizes differ by at most one.

    Raises:
        DataError: There are fewer examples than clients.
    """
    _check_enough(n, clients, min_examples=1)
    order = np.random.default_rng(seed).permutation(n)
    return [np.sort(part).astype(np.int64) for part in np.array_split(order, clients)]


def partition_dirichlet(
    labels: Sequence[str], clients: int, *, alpha: float, seed: int, min_examples: int = 1
) -> list[Indices]:
    """Share every class among the clients by proportions drawn from a symmetric Dirichlet distribution.

    The papers redraw until every client has enough, which never ends for many clients or a small ``alpha``.
    Here one draw stands, and a client that has too few receives random examples of whoever has the most.

    Args:
        labels: One per example.
        clients: Number of clients.
        alpha: Concentration, above 0; 0.1 is strongly skewed, 100 is close to IID.
        seed: Of the draw and of what moves.
        min_examples: Every client has at least as many.

    Raises:
        DataError: There are fewer than ``clients * min_examples`` examples.
        ValueError: ``alpha`` or ``min_examples`` is out of range.
    """
    if not (0 < alpha < np.inf) or min_examples < 0:
        raise ValueError(f"expected alpha > 0 and min_examples >= 0, got {alpha=} and {min_examples=}")
    _check_enough(len(labels), clients, min_examples=min_examples)
    rng = np.random.default_rng(seed)
    of_class: defaultdict[str, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        of_class[label].append(index)
    shares: list[list[int]] = [[] for _ in range(clients)]
    for label in sorted(of_class):
        examples = rng.permutation(of_class[label])
        proportions = rng.dirichlet(np.full(clients, alpha))
        # one random offset per class: plain rounding would favour the same clients in every small class
        cuts = np.floor(np.cumsum(proportions)[:-1] * len(examples) + rng.random()).astype(np.int64)
        for share, part in zip(shares, np.split(examples, cuts), strict=True):
            share.extend(part.tolist())
    _fill_up(shares, min_examples, rng)
    return [np.sort(np.asarray(share, dtype=np.int64)) for share in shares]


def partition_by_column(values: Sequence[str]) -> dict[str, Indices]:
    """Return the examples of each user, by name, sorted.

    Args:
        values: The name of the user, one per example.

    Raises:
        DataError: A name is empty.
    """
    users: defaultdict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(values):
        if not name.strip():
            raise DataError(f"example {index + 1} of {len(values)} names no user; fill in the column of the users")
        users[name].append(index)
    return {name: np.asarray(users[name], dtype=np.int64) for name in sorted(users)}


def _fill_up(shares: list[list[int]], least: int, rng: np.random.Generator) -> None:
    """Move random examples from the largest share, ties to the first, until none has fewer than ``least``."""
    richest = [(-len(share), client) for client, share in enumerate(shares)]
    heapq.heapify(richest)
    for poor in [client for client, share in enumerate(shares) if len(share) < least]:
        while len(shares[poor]) < least:
            # a client that was filled up since may lie in the heap as poorer than it is, never as the richest
            _, giver = richest[0]
            shares[poor].append(shares[giver].pop(int(rng.integers(len(shares[giver])))))
            heapq.heapreplace(richest, (-len(shares[giver]), giver))


def _check_enough(examples: int, clients: int, *, min_examples: int) -> None:
    _check_clients(clients)
    least = max(min_examples, 1)
    if clients * least > examples:
        raise DataError(
            f"{examples} examples are too few for {clients} clients with at least {least} each; "
            "lower the number of clients"
        )


def _check_clients(clients: int) -> None:
    if clients < 1:
        raise ValueError(f"expected at least 1 client, got {clients}")
