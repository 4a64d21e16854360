"""Which classes are learned together, and in which order.

The *learning order* of classes is the concatenation of the tasks' classes; a class is known by its place in it, which
no later task moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pomona.errors import ConfigError, DataError
from pomona.seeds import seed_of

_MOST_DIGITS = 4000  # Python reads no number of many more


@dataclass(frozen=True, slots=True)
class Task:
    """Classes that are learned together.

    Attributes:
        number: Place in the stream, from 1.
        classes: Distinct, at least one.
    """

    number: int
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.number < 1 or not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"expected a number from 1 and distinct classes, got {self.number} and {self.classes}")


def tasks_by_size(labels: Sequence[str], *, classes_per_task: int, seed: int) -> tuple[Task, ...]:
    """Cut the classes of some data into tasks of one size, in an order drawn by seed.

    The order depends on the set of classes and the seed alone, not on the order of rows.

    Args:
        labels: The class of each example.
        classes_per_task: Of every task but the last, which may be smaller.
        seed: Of the order.

    Raises:
        DataError: There are no labels.
        ConfigError: ``classes_per_task`` is below 1.

    Example:
        >>> [task.classes for task in tasks_by_size("abcab", classes_per_task=2, seed=0)]
        [('a', 'c'), ('b',)]
    """
    if classes_per_task < 1:
        raise ConfigError(f"expected at least 1 class per task, got {classes_per_task}")
    if not labels:
        raise DataError("expected labelled examples, got none")
    order = sorted(set(labels), key=lambda label: (seed_of("learning order", seed, label), label))
    cuts = range(0, len(order), classes_per_task)
    return tuple(Task(n, tuple(order[at : at + classes_per_task])) for n, at in enumerate(cuts, start=1))


def tasks_by_column(labels: Sequence[str], values: Sequence[str]) -> tuple[Task, ...]:
    """Make one task of the classes that a column of the data puts together.

    Tasks are in the order of their numbers where all values are whole numbers, else in that of first appearance;
    classes within a task are sorted.

    Args:
        labels: The class of each example.
        values: The task of each example.

    Raises:
        DataError: There are no examples, not one value for each, one is empty, or a class is in two tasks.

    Example:
        >>> tasks_by_column(["dog", "oak", "cat"], ["2", "1", "2"])
        (Task(number=1, classes=('oak',)), Task(number=2, classes=('cat', 'dog')))
    """
    if not labels or len(labels) != len(values):
        raise DataError(f"expected one task for each of one or more examples, got {len(values)} for {len(labels)}")
    task_of: dict[str, str] = {}
    for label, value in zip(labels, values, strict=True):
        if not value.strip():
            raise DataError(f"an example of class {label!r} has no task; every row needs one")
        if task_of.setdefault(label, value.strip()) != value.strip():
            raise DataError(
                f"class {label!r} is in the tasks {task_of[label]!r} and {value.strip()!r}; expected one task per class"
            )
    names = _in_order(tuple(dict.fromkeys(task_of.values())))
    return tuple(
        Task(n, tuple(sorted(label for label, value in task_of.items() if value == name)))
        for n, name in enumerate(names, start=1)
    )


def learning_order(tasks: Sequence[Task]) -> tuple[str, ...]:
    """Return the classes of all tasks in the order in which they are learned.

    Raises:
        DataError: A class is in two tasks.
    """
    classes = tuple(label for task in tasks for label in task.classes)
    if len(set(classes)) != len(classes):
        twice = next(label for label in classes if classes.count(label) > 1)
        raise DataError(f"class {twice!r} is in two tasks; expected one task per class")
    return classes


def _in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    if all(name.isascii() and name.removeprefix("-").isdigit() and len(name) <= _MOST_DIGITS for name in names):
        return tuple(sorted(names, key=int))
    return names
