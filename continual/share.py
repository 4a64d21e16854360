"""One owner's share of a task, and what the shares of all owners come to: training is averaged, sums add up.

::

    round:  theta_k, W_k = train(theta, W; rows of k)       A is the same everywhere and frozen, so
            B = sum_k n_k B_k / sum_k n_k                   is the average of the updates B_k A, exactly
    then:   n, s, S = sum_k n_k, s_k, S_k                   under the task's adapter and the first one's

An owner needs nothing of what is known but adapters: where to start, the mean of the earlier ones that the adapter is
merged towards after every step, and the first one. It sees no statistics of anybody. Merging is linear, so the average
of merged adapters is the average merged.

With one owner and one round, all of this is what :func:`pomona.continual.mos.learn_task` does, to the byte.
"""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pomona.adapters import LoraFactors
from pomona.continual.encoder import Adapter, FrozenEncoder, States
from pomona.continual.heads import LinearHead, RidgeSums, random_projection, ridge_sums
from pomona.continual.knowledge import Knowledge, TaskKnowledge
from pomona.continual.merging import mean_adapter, merge, share_a
from pomona.continual.published import steps_weight
from pomona.continual.statistics import class_statistics
from pomona.continual.tasks import Task
from pomona.continual.training import AfterStep, fresh_adapter, train_adapter
from pomona.errors import ConfigError
from pomona.mos_settings import MosSettings
from pomona.seeds import seed_of


@dataclass(frozen=True, slots=True)
class TaskStart:
    """Where the training of a task starts, and all that it needs of earlier tasks.

    Attributes:
        adapter: To train on.
        head: Of the task's classes.
        towards: Mean of the earlier adapters, with the same ``A``; None: nothing to merge towards.
        edit: What else changes the layers and is not trained.
    """

    adapter: Adapter
    head: LinearHead
    towards: Adapter | None = None
    edit: Adapter = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrainedShare:
    """What one owner trained.

    Attributes:
        examples: Of the task, at least 1.
        adapter: With the ``A`` of the start.
        head: Of the task's classes.
    """

    examples: int
    adapter: Adapter
    head: LinearHead


def task_start(encoder: FrozenEncoder, knowledge: Knowledge, *, classes: int) -> TaskStart:
    """Return where the next task starts: at the adapter before it, or at one that changes nothing.

    A task of a single class has nothing to tell apart: where all share ``A``, it starts, and stays, at the mean of the
    earlier adapters.

    Args:
        encoder: The one that all tasks are learned with.
        knowledge: What is known before.
        classes: Of the task.
    """
    settings, earlier = knowledge.settings, [task.adapter for task in knowledge.tasks]
    head = LinearHead.zeros(classes, encoder.width)
    start = (
        earlier[-1]
        if earlier and settings.start == "warm"
        else fresh_adapter(encoder, rank=settings.rank, alpha=settings.alpha, seed=settings.seed)
    )
    if classes == 1 and earlier and share_a(earlier):
        start = mean_adapter(earlier)
    together = bool(earlier) and share_a([start, *earlier])
    return TaskStart(start, head, mean_adapter(earlier) if together else None, knowledge.edit)


def train_share(
    encoder: FrozenEncoder,
    start: TaskStart,
    states: States,
    targets: Tensor,
    *,
    settings: MosSettings,
    seed: int,
) -> tuple[Adapter, LinearHead]:
    """Train on from a start, on some of a task's examples; a task of one class is not trained.

    Args:
        encoder: Gives the features.
        start: Where to start; is not changed.
        states: The examples.
        targets: Row of the head for each, ``(examples,)`` int64.
        settings: Of the stream.
        seed: Of the order of examples, see :func:`round_seed`.

    Raises:
        ConfigError: Training diverged.
    """
    if start.head.classes == 1:
        return start.adapter, start.head
    merging = start.towards is not None and settings.merge_weight > 0
    return train_adapter(
        encoder,
        states,
        targets,
        start=start.adapter,
        head=start.head,
        settings=settings.training,
        seed=seed,
        frozen=start.edit,
        after_step=_merging(start.towards, settings) if merging and start.towards is not None else None,
    )


def round_seed(settings: MosSettings, *, task: int, round_number: int = 1) -> int:
    """Return the seed of one round of a task's training, both counted from 1; that of the first is that of the task."""
    return seed_of("mos", settings.seed, task, *([round_number] if round_number > 1 else []))


def summed_share(
    own: Tensor,
    first: Tensor,
    targets: Tensor,
    *,
    task: Task,
    trained: tuple[Adapter, LinearHead],
    settings: MosSettings,
) -> TaskKnowledge:
    """Return what some examples say of a task; the parts of several owners add up.

    Args:
        own: Features under the task's adapter, ``(examples, width)``.
        first: Features under the first task's adapter, likewise.
        targets: Place of each among the task's classes, ``(examples,)`` int64.
        task: The task.
        trained: Its adapter and head.
        settings: Of the stream.
    """
    count = len(task.classes)
    ridge: RidgeSums | None = None
    if settings.keeps_ridge_sums:
        projection = random_projection(own.shape[1], settings.ridge_dimensions, seed=settings.seed)
        features = own if settings.head == "ridge-own" else first
        ridge = ridge_sums(features, targets, projection=projection, classes=count)
    return TaskKnowledge(
        number=task.number,
        classes=task.classes,
        adapter=trained[0],
        head=trained[1],
        statistics=class_statistics(own, targets, range(count), moments=settings.moments),
        first=class_statistics(first, targets, range(count), moments=settings.moments),
        ridge=ridge,
    )


def averaged(start: TaskStart, shares: Sequence[TrainedShare]) -> TaskStart:
    """Return where the next round starts: the mean over examples of what owners trained, in their order.

    Computed in float64, so that a single share comes out as it went in.

    Raises:
        ConfigError: There are no shares.
    """
    if not shares:
        raise ConfigError("expected what at least one owner trained, got nothing")
    adapter = {
        name: LoraFactors(a=factors.a, b=_mean([(each.examples, each.adapter[name].b) for each in shares]))
        for name, factors in start.adapter.items()
    }
    head = LinearHead(
        _mean([(each.examples, each.head.weight) for each in shares]),
        _mean([(each.examples, each.head.bias) for each in shares]),
    )
    return TaskStart(adapter, head, start.towards, start.edit)


def pooled(parts: Sequence[TaskKnowledge]) -> TaskKnowledge:
    """Add the sums of several owners, in their order; adapter and head are the same in all.

    Raises:
        ConfigError: There are none.
    """
    if not parts:
        raise ConfigError("expected the sums of at least one owner, got none")
    return functools.reduce(operator.add, parts)


def _mean(weighted: Sequence[tuple[int, Tensor]]) -> Tensor:
    total = torch.zeros_like(weighted[0][1], dtype=torch.float64)
    for examples, tensor in weighted:
        total += examples * tensor.double()
    return (total / sum(examples for examples, _ in weighted)).float()


def _merging(towards: Adapter, settings: MosSettings) -> AfterStep:
    weight = settings.merge_weight
    if settings.official_compat:
        weight = steps_weight(weight, settings.adapted_blocks + 1)
    return lambda adapter: merge(adapter, towards, weight=weight)
