"""A user's files as a stream of tasks: which rows are learned, which are held out, and in which order classes come."""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pomona.continual.tasks import Task, learning_order, tasks_by_column, tasks_by_size
from pomona.datasets import Dataset, check_labels, class_names, load_dataset
from pomona.errors import ConfigError, DataError

COLUMN = "task"

_MOST = 5  # classes that a message names


@dataclass(frozen=True, slots=True)
class Past:
    """What an adapter has been through, as far as a new stream has to know.

    Attributes:
        classes: That it can tell apart, in the order in which it learned them.
        forgotten: That it was asked to forget and has not learned again.
        tasks: How many it learned.
    """

    classes: tuple[str, ...] = ()
    forgotten: tuple[str, ...] = ()
    tasks: int = 0


@dataclass(frozen=True, slots=True)
class Stream:
    """Tasks to learn, with their examples.

    Attributes:
        tasks: Numbered from 1 in this stream.
        train: What is learned.
        test: What is scored; also of classes learned earlier, and forgotten ones, where the file has them.
    """

    tasks: tuple[Task, ...]
    train: Dataset
    test: Dataset

    def sha256(self) -> str:
        """Return a hash of the tasks and of every text and label, in their order."""
        parts: list[object] = [[task.number, *task.classes] for task in self.tasks]
        parts += [[data.texts, data.labels] for data in (self.train, self.test)]
        return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()


def load_stream(data: str, test: str | None, *, classes_per_task: int | None, seed: int) -> Stream:
    """Read what is to be learned, and cut it into tasks.

    Args:
        data: A ``.csv`` or ``.jsonl`` file, or ``wordnet-nouns``.
        test: Another one, all of which is held out; None: the test split of ``data`` is, and the rest is learned.
        classes_per_task: For data without a column ``task``.
        seed: Of the order of classes, and of the split.

    Raises:
        DataError: A file is empty or malformed, or a task has no rows to score it by.
        ConfigError: The tasks are given twice, or not at all.
    """
    train, held_out = read_split(data, test, seed=seed)
    return Stream(_tasks(train, held_out, classes_per_task, seed), train, held_out)


def check_stream(stream: Stream, past: Past, *, relearn: Collection[str] = ()) -> None:
    """Do nothing if a stream can be learned after what was learned before.

    Args:
        stream: What is to be learned.
        past: What the adapter knows.
        relearn: Forgotten classes that may be learned again.

    Raises:
        DataError: There is a single class, a class was learned before, or was forgotten and is not among ``relearn``,
            or a class of the test rows is unknown.
    """
    classes = class_names(stream.train)
    _check_classes(stream.train, past, relearn)
    check_labels(stream.test, (*classes, *past.classes, *past.forgotten))


def read_split(data: str, test: str | None, *, seed: int) -> tuple[Dataset, Dataset]:
    """Return the rows to learn and the rows to score; one text is on one side.

    Args:
        data: A file, or ``wordnet-nouns``.
        test: Another one; None: the test split of ``data``.
        seed: Of the split.

    Raises:
        DataError: A file is missing, empty or malformed, or has no rows of one side.
    """
    if test is not None:
        return load_dataset(data, split=None), load_dataset(test, split=None)
    everything = load_dataset(data, split=None)
    try:
        held_out = load_dataset(data, split="test", seed=seed)
    except DataError as error:
        raise DataError(
            f"{data} has {len(everything)} rows, and none is held out to score by; add rows or name another file by "
            "--test"
        ) from error
    kept = set(held_out.texts)  # the same text lies on one side
    chosen = [i for i, text in enumerate(everything.texts) if text not in kept]
    if not chosen:
        raise DataError(
            f"{data} has {len(everything)} rows, and all are held out; add rows or name another file by --test"
        )
    return everything.subset(chosen), held_out


def _check_classes(train: Dataset, past: Past, relearn: Collection[str]) -> None:
    classes = class_names(train)
    if len({*classes, *past.classes}) < 2:
        raise DataError(f"{train.source} has the single class {classes[0]!r}; expected at least two to tell apart")
    if known := [each for each in classes if each in past.classes]:
        raise DataError(
            f"{train.source} has classes that were learned before: {_listed(known)}; drop their rows, or learn under "
            "another name"
        )
    if back := [each for each in classes if each in past.forgotten and each not in relearn]:
        raise DataError(
            f"{train.source} has classes that were to be forgotten: {_listed(back)}; drop their rows, or say that they "
            f"are wanted again by {' '.join(f'--relearn {each}' for each in back[:_MOST])}"
        )
    if strange := sorted(set(relearn) - set(classes)):
        raise DataError(f"{_listed(strange)} is to be learned again, but {train.source} has no such class")


def _tasks(train: Dataset, test: Dataset, classes_per_task: int | None, seed: int) -> tuple[Task, ...]:
    column = train.columns.get(COLUMN)
    if column is not None and classes_per_task is not None:
        raise ConfigError(
            f"{train.source} has a column {COLUMN!r}, and --classes-per-task {classes_per_task} was given; drop one"
        )
    if column is not None:
        tasks = tasks_by_column(train.labels, column)
    elif classes_per_task is not None:
        tasks = tasks_by_size(train.labels, classes_per_task=classes_per_task, seed=seed)
    else:
        raise ConfigError(
            f"expected --classes-per-task, or a column {COLUMN!r} in {train.source}, to know what is learned together"
        )
    for task in tasks:
        if not set(task.classes) & set(test.labels):
            raise DataError(
                f"{test.source} has no rows of task {task.number} ({_listed(task.classes)}) to score it by; add some, "
                "or name a file that has them by --test"
            )
    assert set(learning_order(tasks)) == set(train.labels)
    return tasks


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(map(repr, names[:_MOST])) + more
