"""Partitions lose nothing, repeat nothing, follow their seed, and are as skewed as they claim."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pomona.datasets import Dataset
from pomona.errors import DataError
from pomona.partition import Indices, partition, partition_by_column, partition_dirichlet, partition_iid
from pomona.settings import DataSettings

LABELS = [f"class {i % 10}" for i in range(4000)]


def assert_each_index_once(parts: Sequence[Indices], n: int) -> None:
    assert all(part.dtype == np.int64 for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert all((np.diff(part) > 0).all() for part in parts)


def same(left: Sequence[Indices], right: Sequence[Indices]) -> bool:
    return len(left) == len(right) and all(map(np.array_equal, left, right))


def total_variation(parts: Sequence[Indices], labels: Sequence[str]) -> float:
    """Return the mean distance of a client's label mix from the mix of all, in ``[0, 1]``."""
    names = sorted(set(labels))
    everything = Counter(labels)
    whole = np.array([everything[name] / len(labels) for name in names])
    mixes = [Counter(labels[i] for i in part) for part in parts]
    return float(
        np.mean([0.5 * np.abs(np.array([mix[n] for n in names]) / mix.total() - whole).sum() for mix in mixes])
    )


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """Draw a number of clients and a number of examples that is enough for them."""
    clients = draw(st.integers(1, 40))
    return clients, draw(st.integers(clients, 300))


@st.composite
def populations(draw: st.DrawFn) -> tuple[int, int, list[str]]:
    """Draw a number of clients, what each must have, and the labels of barely to amply enough examples."""
    clients, least, classes = draw(st.integers(1, 40)), draw(st.integers(0, 4)), draw(st.integers(1, 12))
    n = clients * max(least, 1) + draw(st.integers(0, 100))
    return clients, least, [f"class {i * i % classes}" for i in range(n)]


@given(sizes(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_iid_gives_each_index_once_in_equal_parts(size: tuple[int, int], seed: int) -> None:
    clients, n = size
    parts = partition_iid(n, clients, seed=seed)
    assert len(parts) == clients
    assert_each_index_once(parts, n)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert same(parts, partition_iid(n, clients, seed=seed))


@given(populations(), st.floats(1e-300, 1e300), st.integers(0, 2**32))
@example((40, 1, ["class 0"] * 40), 1e-300, 0)
@settings(deadline=None, max_examples=100)
def test_dirichlet_gives_each_index_once_and_enough_to_everyone(
    population: tuple[int, int, list[str]], alpha: float, seed: int
) -> None:
    clients, least, labels = population
    parts = partition_dirichlet(labels, clients, alpha=alpha, seed=seed, min_examples=least)
    assert len(parts) == clients
    assert_each_index_once(parts, len(labels))
    assert min(map(len, parts)) >= least
    assert same(parts, partition_dirichlet(labels, clients, alpha=alpha, seed=seed, min_examples=least))


@pytest.mark.parametrize("alpha", [1e-12, 0.01, 0.5, 100.0])
def test_dirichlet_serves_more_clients_than_there_are_examples_to_spare(alpha: float) -> None:
    labels = [f"class {i % 3}" for i in range(1200)]
    parts = partition_dirichlet(labels, 1000, alpha=alpha, seed=0)
    assert_each_index_once(parts, 1200)
    assert min(map(len, parts)) >= 1


def test_a_large_alpha_is_near_iid_and_a_small_one_is_skewed() -> None:
    def distance(alpha: float) -> float:
        return total_variation(partition_dirichlet(LABELS, 20, alpha=alpha, seed=0), LABELS)

    iid = total_variation(partition_iid(len(LABELS), 20, seed=0), LABELS)
    assert 0.02 < iid < 0.12  # 200 examples of 10 classes scatter by chance
    assert distance(1e4) < iid
    assert 0.15 < distance(1.0) < 0.45
    assert distance(0.05) > 0.7
    assert distance(1e4) < distance(10.0) < distance(1.0) < distance(0.1) < distance(0.01)


def test_dirichlet_proportions_have_the_variance_of_their_distribution() -> None:
    clients, alpha, n = 5, 0.7, 2000
    shares = [
        len(part) / n for seed in range(400) for part in partition_dirichlet([""] * n, clients, alpha=alpha, seed=seed)
    ]
    variance = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert np.mean(shares) == pytest.approx(1 / clients)
    assert np.var(shares) == pytest.approx(variance, rel=0.1)


def test_small_classes_do_not_all_go_to_the_same_clients() -> None:
    labels = [f"class {i % 24}" for i in range(24 * 100)]
    parts = partition_dirichlet(labels, 300, alpha=1e6, seed=0)
    assert max(map(len, parts)) < 20  # 8 on average; plain rounding would give 24 to some and none to others


def test_another_seed_is_another_partition() -> None:
    assert not same(partition_iid(100, 4, seed=0), partition_iid(100, 4, seed=1))
    first, second = (partition_dirichlet(LABELS, 4, alpha=1.0, seed=seed) for seed in (0, 1))
    assert not same(first, second)


def test_the_global_generator_is_left_alone() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    partition_iid(100, 4, seed=0)
    partition_dirichlet(LABELS, 4, alpha=1.0, seed=0)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]


@given(st.lists(st.sampled_from(["ann", "bob", "eve", "Zoë"])))
def test_every_user_gets_their_own_examples(values: list[str]) -> None:
    users = partition_by_column(values)
    assert list(users) == sorted(set(values))
    for name, indices in users.items():
        assert indices.dtype == np.int64
        assert indices.tolist() == [i for i, value in enumerate(values) if value == name]


DATASET = Dataset(
    texts=tuple(f"text {i}" for i in range(7)),
    labels=("a", "b") * 3 + ("a",),
    columns={"user": ("eve", "bob", "ann", "bob", "eve", "ann", "carl"), "gap": ("x", "", *"xxxxx")},
    source="notes.csv",
)


def by(column: str) -> DataSettings:
    return DataSettings(partition="column", partition_column=column)


def test_the_settings_choose_the_partition() -> None:
    assert same(partition(DATASET, DataSettings(partition="iid"), 3, 5), partition_iid(7, 3, seed=5))
    chosen = DataSettings(partition="dirichlet", dirichlet_alpha=0.3)
    assert same(partition(DATASET, chosen, 3, 5), partition_dirichlet(DATASET.labels, 3, alpha=0.3, seed=5))
    everyone = partition(DATASET, by("user"), 4, 5)
    assert [part.tolist() for part in everyone] == [[2, 5], [1, 3], [6], [0, 4]]  # ann, bob, carl, eve


def test_fewer_clients_than_users_are_the_largest_ones_by_name() -> None:
    assert [part.tolist() for part in partition(DATASET, by("user"), 2, 0)] == [[2, 5], [1, 3]]


def test_too_few_examples_say_both_numbers() -> None:
    with pytest.raises(DataError, match="3 examples are too few for 4 clients with at least 1 each"):
        partition_iid(3, 4, seed=0)
    with pytest.raises(DataError, match="7 examples are too few for 4 clients with at least 2 each"):
        partition_dirichlet(["a"] * 7, 4, alpha=1.0, seed=0, min_examples=2)


def test_too_few_users_say_both_numbers() -> None:
    with pytest.raises(
        DataError, match=r"'user' of notes\.csv names 4 users, too few for 5 clients; ask for at most 4"
    ):
        partition(DATASET, by("user"), 5, 0)


def test_a_missing_column_says_which_there_are() -> None:
    with pytest.raises(
        DataError, match=r"notes\.csv has no column 'usr' to partition by; its columns are 'gap', 'user'"
    ):
        partition(DATASET, by("usr"), 2, 0)


def test_an_example_without_a_user_is_named() -> None:
    with pytest.raises(DataError, match="example 2 of 7 names no user"):
        partition(DATASET, by("gap"), 1, 0)


@pytest.mark.parametrize("clients", [0, -1])
def test_no_clients_are_a_mistake_of_the_caller(clients: int) -> None:
    with pytest.raises(ValueError, match=f"expected at least 1 client, got {clients}"):
        partition_iid(5, clients, seed=0)
    with pytest.raises(ValueError, match=f"expected at least 1 client, got {clients}"):
        partition(DATASET, by("user"), clients, 0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan")])
def test_an_alpha_out_of_range_is_a_mistake_of_the_caller(alpha: float) -> None:
    with pytest.raises(ValueError, match="expected alpha > 0"):
        partition_dirichlet(["a"], 1, alpha=alpha, seed=0)
