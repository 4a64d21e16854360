"""What is known after some tasks: one frozen record per task, and what follows from all of them.

A record of a task never changes when later tasks are learned, so a store may keep each once. What does change, the head
over all classes, is small. Nothing in a record is an example, but statistics are of people where examples are.

As tensors, one flat mapping: ``task.<number>.<name>`` and ``edit.<number>.<name>`` for the parts, ``head.weight`` and
``head.bias`` for the rest; what is no tensor is a mapping that JSON can carry. A part by itself has the same names
without the prefix, and its factors those of every other payload: ``lora_A.<layer>``, ``lora_B.<layer>``.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.continual.encoder import NO_ADAPTER, Adapter
from pomona.continual.heads import CosineHead, LinearHead, RidgeSums
from pomona.continual.packing import (
    adapter_from_tensors,
    adapter_to_tensors,
    ridge_from_tensors,
    ridge_to_tensors,
    statistics_from_tensors,
    statistics_to_tensors,
    within,
)
from pomona.continual.statistics import ClassStatistics
from pomona.continual.tasks import Task
from pomona.continual.training import stacked
from pomona.errors import DataError, PayloadError
from pomona.mos_settings import MosSettings

Facts = dict[str, object]
Parts = tuple[dict[str, Tensor], Facts]

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class TaskKnowledge:
    """What is known of one task.

    Attributes:
        number: Place in the stream, from 1.
        classes: Those of the task that were not forgotten; may be none.
        adapter: Its own; scales are 1.
        head: Of its classes alone, over features under its adapter.
        statistics: Of each class under its adapter.
        first: Of each class under the first task's adapter.
        ridge: Sums of random features with one column for each class; None where no ridge head is wanted.
    """

    number: int
    classes: tuple[str, ...]
    adapter: Adapter
    head: LinearHead
    statistics: tuple[ClassStatistics, ...]
    first: tuple[ClassStatistics, ...]
    ridge: RidgeSums | None = None

    def __post_init__(self) -> None:
        columns = {self.head.classes, len(self.statistics), len(self.first)}
        columns |= {self.ridge.classes} if self.ridge is not None else set()
        if columns != {len(self.classes)}:
            raise ValueError(f"expected all there is of each of {len(self.classes)} classes, got {sorted(columns)}")

    @property
    def task(self) -> Task:
        """Its number and classes, of which there must be one."""
        return Task(self.number, self.classes)

    def __add__(self, other: "TaskKnowledge") -> "TaskKnowledge":
        """Return the knowledge of the same task from other examples too; adapter and head must be the same."""
        if (self.number, self.classes) != (other.number, other.classes) or (self.ridge is None) != (
            other.ridge is None
        ):
            raise DataError(
                f"expected knowledge of task {self.number} {self.classes}, got {other.number} {other.classes}"
            )
        pairs = zip(self.statistics, other.statistics, strict=True), zip(self.first, other.first, strict=True)
        statistics, first = (tuple(one + two for one, two in each) for each in pairs)
        ridge = None if self.ridge is None or other.ridge is None else self.ridge + other.ridge
        return dataclasses.replace(self, statistics=statistics, first=first, ridge=ridge)

    def without(self, classes: Sequence[str]) -> "TaskKnowledge":
        """Return the knowledge without some classes: their statistics, prototypes and rows are gone.

        Columns of ridge sums are gone too, but the Gram matrix still counts the examples until their sums are
        subtracted; the other statistics are as if the class had never come.
        """
        gone = {i for i, label in enumerate(self.classes) if label in set(classes)}
        kept = [i for i in range(len(self.classes)) if i not in gone]
        return TaskKnowledge(
            number=self.number,
            classes=tuple(self.classes[i] for i in kept),
            adapter=self.adapter,
            head=self.head.without(gone),
            statistics=tuple(self.statistics[i] for i in kept),
            first=tuple(self.first[i] for i in kept),
            ridge=None if self.ridge is None else self.ridge.without(gone),
        )

    def to_tensors(self) -> Parts:
        """Return the record as tensors and facts."""
        tensors = {**adapter_to_tensors(self.adapter), "head.weight": self.head.weight, "head.bias": self.head.bias}
        sums, counts = ridge_to_tensors(self.ridge)
        for name, packed in (
            ("statistics", statistics_to_tensors(self.statistics)),
            ("first", statistics_to_tensors(self.first)),
            ("ridge", sums),
        ):
            tensors |= {f"{name}.{key}": value for key, value in packed.items()}
        facts: Facts = {"number": self.number, "classes": list(self.classes), "ridge": counts}
        return {key: value.contiguous() for key, value in tensors.items() if value.numel()}, facts

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> "TaskKnowledge":
        """Read what :meth:`to_tensors` gave.

        Raises:
            PayloadError: Something is missing, or has another shape.
        """
        try:
            return _read_task(tensors, facts)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise PayloadError(f"expected the knowledge of a task: {error}") from error


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What is known after some tasks.

    Attributes:
        settings: Of the stream.
        tasks: In learning order.
        head: Of all classes, aligned.
        edits: Adapters of forget requests, each stacked on every task's adapter and on the edits before it.
    """

    settings: MosSettings
    tasks: tuple[TaskKnowledge, ...]
    head: LinearHead
    edits: tuple[Adapter, ...] = ()

    def __post_init__(self) -> None:
        if self.head.classes != len(self.classes) or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"expected a row for each of distinct classes, got {self.head.classes} for {self.classes}")

    @property
    def classes(self) -> tuple[str, ...]:
        """All classes that are known, in learning order."""
        return tuple(label for task in self.tasks for label in task.classes)

    @property
    def task_of(self) -> Tensor:
        """Position of the task of each class, ``(classes,)`` int64."""
        return torch.tensor([i for i, task in enumerate(self.tasks) for _ in task.classes], dtype=torch.long)

    @property
    def statistics(self) -> tuple[ClassStatistics, ...]:
        """Of each class under its task's adapter."""
        return tuple(each for task in self.tasks for each in task.statistics)

    @property
    def first(self) -> tuple[ClassStatistics, ...]:
        """Of each class under the first task's adapter."""
        return tuple(each for task in self.tasks for each in task.first)

    @property
    def edit(self) -> Adapter:
        """All edits together, as one adapter."""
        edit = NO_ADAPTER
        for each in self.edits:
            edit = stacked(edit, each)
        return edit

    def adapter(self, position: int) -> Adapter:
        """Return the adapter of a task with the edits on it, as features are taken under it."""
        return stacked(self.tasks[position].adapter, self.edit) if self.edits else self.tasks[position].adapter

    def prototypes(self) -> CosineHead:
        """Return the mean of each class under the first adapter, as a cosine classifier."""
        return CosineHead(torch.stack([each.mean() for each in self.first]).float())

    def without(self, classes: Sequence[str]) -> "Knowledge":
        """Return the knowledge without some classes; see :meth:`TaskKnowledge.without`.

        Raises:
            DataError: One is not known.
        """
        if unknown := sorted(set(classes) - set(self.classes)):
            raise DataError(f"expected classes out of {', '.join(self.classes)}, got {', '.join(unknown)}")
        gone = [i for i, label in enumerate(self.classes) if label in set(classes)]
        tasks = tuple(task.without(classes) for task in self.tasks)
        return dataclasses.replace(self, tasks=tasks, head=self.head.without(gone))

    def to_tensors(self) -> Parts:
        """Return the whole as one flat mapping of tensors, and facts that JSON can carry."""
        tensors, facts = self.current()
        tasks = []
        for task in self.tasks:
            own, known = task.to_tensors()
            tensors |= {f"task.{task.number}.{key}": value for key, value in own.items()}
            tasks.append(known)
        for number, edit in enumerate(self.edits, start=1):
            tensors |= {f"edit.{number}.{key}": value for key, value in adapter_to_tensors(edit).items()}
        return tensors, {**facts, "tasks": tasks, "edits": len(self.edits)}

    def current(self) -> Parts:
        """Return what changes with every task, without the tasks: the head, and the settings as facts."""
        tensors = {"head.weight": self.head.weight, "head.bias": self.head.bias} if self.head.classes else {}
        width = self.head.weight.shape[1]
        return tensors, {"format": _FORMAT, "width": width, "settings": self.settings.model_dump(mode="json")}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> "Knowledge":
        """Read what :meth:`to_tensors` gave.

        Raises:
            PayloadError: Something is missing, or is of another version.
        """
        try:
            listed, edits = _listed(facts)
            tasks = [TaskKnowledge.from_tensors(within(tensors, f"task.{each['number']}."), each) for each in listed]
            adapters = [adapter_from_tensors(within(tensors, f"edit.{n}.")) for n in range(1, edits + 1)]
            return cls.of_parts(tasks, adapters, (dict(tensors), dict(facts)))
        except (KeyError, ValueError, TypeError) as error:
            raise PayloadError(f"expected what was known after some tasks: {error}") from error

    @classmethod
    def of_parts(cls, tasks: Sequence[TaskKnowledge], edits: Sequence[Adapter], current: Parts) -> "Knowledge":
        """Put together what was kept in parts.

        Args:
            tasks: Of all tasks so far.
            edits: Of all forget requests so far.
            current: What :meth:`current` gave after the last of them.

        Raises:
            PayloadError: It is of another version of the format, or parts do not fit.
        """
        tensors, facts = current
        if facts.get("format") != _FORMAT:
            raise PayloadError(f"expected knowledge in format {_FORMAT}, got {facts.get('format')}; update pomona")
        width = facts["width"]
        if not isinstance(width, int):
            raise PayloadError(f"expected a width, got {width!r}")
        try:
            head = LinearHead(
                tensors.get("head.weight", torch.zeros(0, width)), tensors.get("head.bias", torch.zeros(0))
            )
            return cls(MosSettings.model_validate(facts["settings"]), tuple(tasks), head, tuple(edits))
        except (KeyError, ValueError) as error:
            raise PayloadError(f"the parts of what is known do not fit: {error}") from error


def nothing_known(width: int, settings: MosSettings) -> Knowledge:
    """Return what is known before the first task, over features of ``width`` dimensions."""
    return Knowledge(settings, (), LinearHead.zeros(0, width))


def _listed(facts: Mapping[str, object]) -> tuple[list[dict[str, object]], int]:
    tasks, edits = facts["tasks"], facts["edits"]
    if not isinstance(tasks, list) or not isinstance(edits, int):
        raise TypeError("tasks should be a list and edits a number")
    return tasks, edits


def _read_task(tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> TaskKnowledge:
    number, classes, counts = facts["number"], facts["classes"], facts["ridge"]
    if not isinstance(number, int) or not isinstance(classes, list) or not isinstance(counts, dict):
        raise TypeError("number, classes and ridge should be a number, a list and a mapping")
    head = LinearHead(tensors["head.weight"], tensors["head.bias"]) if classes else LinearHead.zeros(0, 0)
    return TaskKnowledge(
        number=number,
        classes=tuple(map(str, classes)),
        adapter=adapter_from_tensors(tensors),
        head=head,
        statistics=statistics_from_tensors(within(tensors, "statistics.")),
        first=statistics_from_tensors(within(tensors, "first.")),
        ridge=ridge_from_tensors(within(tensors, "ridge."), counts),
    )
