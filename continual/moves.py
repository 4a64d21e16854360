"""Move the statistics of retained classes along with the features that an edit moves, by sums that owners add up.

::

    mu'_c = mu_c + ( sum_i f'(x_i) - sum_i f(x_i) ) / n_c          over the n_c examples of class c that are at hand

An edit changes the features of retained classes too, a little; statistics of the features before would then answer for
features that are no more. Where as many examples of a class are at hand as were learned from, its statistics are taken
anew; else its mean is moved by how far these moved, which is far less noisy than a mean of a few, and its covariance is
kept.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pomona.continual.editing import Examples
from pomona.continual.encoder import FrozenEncoder
from pomona.continual.heads import RidgeSums, random_projection, ridge_sums
from pomona.continual.knowledge import Knowledge, TaskKnowledge
from pomona.continual.statistics import ClassStatistics
from pomona.errors import DataError
from pomona.mos_settings import Moments


@dataclass(frozen=True, slots=True)
class ClassMove:
    """How the features of some examples of one class moved.

    Attributes:
        before: Sum of the features before, ``(width,)`` float64.
        after: Statistics of them after.
    """

    before: Tensor
    after: ClassStatistics

    @classmethod
    def of(cls, before: Tensor, after: Tensor, *, moments: Moments) -> "ClassMove":
        """Sum features before and after, ``(examples, width)`` each; there may be none."""
        return cls(before.double().sum(0), ClassStatistics.of(after, moments=moments))

    def __add__(self, other: "ClassMove") -> "ClassMove":
        """Return the move of both sets of examples together."""
        return ClassMove(self.before + other.before, self.after + other.after)


@dataclass(frozen=True, slots=True)
class TaskMoves:
    """How the retained examples of one task moved.

    Attributes:
        own: Of each class under the task's adapter; zero for classes to forget.
        first: Of each class under the first task's adapter.
        ridge: Sums of random features after the edit; None where no head takes them under the first adapter.
    """

    own: tuple[ClassMove, ...]
    first: tuple[ClassMove, ...]
    ridge: RidgeSums | None = None

    def __add__(self, other: "TaskMoves") -> "TaskMoves":
        """Return the moves of the examples of both."""
        if (len(self.own), self.ridge is None) != (len(other.own), other.ridge is None):
            raise DataError("expected moves of the same task, got those of two")
        own, first = (
            tuple(one + two for one, two in zip(*pair, strict=True))
            for pair in ((self.own, other.own), (self.first, other.first))
        )
        return TaskMoves(own, first, None if self.ridge is None or other.ridge is None else self.ridge + other.ridge)


def moves_of(
    encoder: FrozenEncoder, before: Knowledge, after: Knowledge, examples: Examples, forget: Collection[str]
) -> tuple[TaskMoves, ...]:
    """Return how the features of one owner's retained examples moved, for each task.

    Args:
        encoder: The one that all tasks were learned with.
        before: What was known before the edit.
        after: The same with the edit's adapter.
        examples: Of the owner; those of the classes to forget are left out.
        forget: The classes to forget.
    """
    found, start = [], 0
    for position, task in enumerate(before.tasks):
        kept = [i for i, label in enumerate(task.classes, start) if label not in forget]
        rows = examples.subset(examples.of(kept))
        targets, start = rows.targets - start, start + len(task.classes)
        first = [encoder.all_features(rows.states, each.adapter(0)) for each in (before, after)]
        own = first
        if position:
            own = [encoder.all_features(rows.states, each.adapter(position)) for each in (before, after)]
        moments, count = before.settings.moments, len(task.classes)
        found.append(
            TaskMoves(
                _class_moves(own[0], own[1], targets, moments, classes=count),
                _class_moves(first[0], first[1], targets, moments, classes=count),
                _ridge(task, first[1], targets, before),
            )
        )
    return tuple(found)


def summed_moves(parts: Sequence[tuple[TaskMoves, ...]]) -> tuple[TaskMoves, ...]:
    """Add the moves of several owners, of which there must be one, in their order."""
    found, *others = parts
    for each in others:
        found = tuple(one + two for one, two in zip(found, each, strict=True))
    return found


def renewed(
    knowledge: Knowledge, moves: Sequence[TaskMoves], forget: Collection[str]
) -> tuple[Knowledge, tuple[str, ...]]:
    """Return edited knowledge with its statistics moved along, and the names of sums that stay behind.

    The statistics of what is to be forgotten are left as they are until they are removed (:meth:`Knowledge.without`):
    moved, they would tell the class again. Its ridge sums go.

    Args:
        knowledge: With the edit's adapter.
        moves: Of all owners, for each task.
        forget: The classes to forget.
    """
    tasks, stale = [], []
    for task, move in zip(knowledge.tasks, moves, strict=True):
        moved = replace(
            task,
            statistics=tuple(map(moved_statistics, task.statistics, move.own)),
            first=tuple(map(moved_statistics, task.first, move.first)),
        )
        ridge = None if task.ridge is None or move.ridge is None else _whole(task, move, forget)
        if task.ridge is not None and ridge is None:
            stale.append(f"the ridge sums of task {task.number}")
        tasks.append(moved if ridge is None else replace(moved, ridge=ridge))
    return replace(knowledge, tasks=tuple(tasks)), tuple(stale)


def moved_statistics(kept: ClassStatistics, move: ClassMove) -> ClassStatistics:
    """Return the statistics of a class after its features moved.

    Args:
        kept: Of all examples of the class, before.
        move: Of those at hand; there may be none.
    """
    if not move.after.count:
        return kept
    if move.after.count == kept.count:
        return move.after
    shift = (move.after.total - move.before) / move.after.count
    mean, moved = kept.mean(), kept.mean() + shift
    outer = kept.count * (torch.outer(moved, moved) - torch.outer(mean, mean))
    moment = kept.moment + (outer if kept.moment.ndim == 2 else outer.diagonal())
    return ClassStatistics(kept.count, kept.total + kept.count * shift, moment)


def _class_moves(
    before: Tensor, after: Tensor, targets: Tensor, moments: Moments, *, classes: int
) -> tuple[ClassMove, ...]:
    chosen = [targets == i for i in range(classes)]
    return tuple(ClassMove.of(before[rows], after[rows], moments=moments) for rows in chosen)


def _ridge(task: TaskKnowledge, features: Tensor, targets: Tensor, knowledge: Knowledge) -> RidgeSums | None:
    settings = knowledge.settings
    if task.ridge is None or settings.head != "ridge":
        return None
    if not len(targets):
        return task.ridge - task.ridge
    projection = random_projection(features.shape[1], settings.ridge_dimensions, seed=settings.seed)
    return ridge_sums(features, targets, projection=projection, classes=len(task.classes))


def _whole(task: TaskKnowledge, move: TaskMoves, forget: Collection[str]) -> RidgeSums | None:
    """Return a task's ridge sums over retained examples alone, where all of those are at hand; else None."""
    wanted = [0 if label in forget else each.count for label, each in zip(task.classes, task.first, strict=True)]
    return move.ridge if [each.after.count for each in move.first] == wanted else None
