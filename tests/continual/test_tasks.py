"""Every class is in one task; the order is a function of classes and seed alone."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomona.continual.tasks import Task, learning_order, tasks_by_column, tasks_by_size
from pomona.errors import ConfigError, DataError

LABELS = st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=30)


@given(labels=LABELS, size=st.integers(1, 7), seed=st.integers(0, 5), shuffle=st.randoms())
def test_tasks_of_one_size_hold_each_class_once(
    labels: list[str], size: int, seed: int, shuffle: random.Random
) -> None:
    tasks = tasks_by_size(labels, classes_per_task=size, seed=seed)
    assert sorted(learning_order(tasks)) == sorted(set(labels))
    assert [task.number for task in tasks] == list(range(1, len(tasks) + 1))
    assert all(len(task.classes) == size for task in tasks[:-1])
    turned = list(labels)
    shuffle.shuffle(turned)
    assert tasks_by_size(turned, classes_per_task=size, seed=seed) == tasks


def test_another_seed_gives_another_order() -> None:
    orders = {learning_order(tasks_by_size("abcdefgh", classes_per_task=2, seed=seed)) for seed in range(20)}
    assert len(orders) == 20
    assert {order[0] for order in orders} > {"a", "b", "c"}


def test_a_column_of_numbers_gives_their_order_and_one_of_words_that_of_appearance() -> None:
    labels = ["dog", "oak", "cat", "dog", "tin"]
    assert tasks_by_column(labels, ["10", "9", "10", " 10", "-1"]) == (
        Task(1, ("tin",)), Task(2, ("oak",)), Task(3, ("cat", "dog")),
    )  # fmt: skip
    assert learning_order(tasks_by_column(labels, ["x", "9", "x", "x", "a"])) == ("cat", "dog", "oak", "tin")
    assert learning_order(tasks_by_column(labels[1:3], ["9" * 5000, "1"])) == ("oak", "cat")


def test_what_is_no_stream_is_refused() -> None:
    with pytest.raises(DataError, match="class 'dog' is in the tasks '1' and '2'"):
        tasks_by_column(["dog", "dog"], ["1", "2"])
    with pytest.raises(DataError, match="'cat' has no task"):
        tasks_by_column(["dog", "cat"], ["1", " "])
    with pytest.raises(DataError, match="got 1 for 2"):
        tasks_by_column(["dog", "cat"], ["1"])
    with pytest.raises(DataError, match="got none"):
        tasks_by_size([], classes_per_task=1, seed=0)
    with pytest.raises(ConfigError, match="at least 1 class per task, got 0"):
        tasks_by_size(["dog"], classes_per_task=0, seed=0)
    with pytest.raises(DataError, match="'dog' is in two tasks"):
        learning_order([Task(1, ("dog",)), Task(2, ("cat", "dog"))])
    with pytest.raises(ValueError, match="distinct classes"):
        Task(1, ("dog", "dog"))
