"""Put forgotten classes back, in memory, to see whether what is known now would tell them again.

::

    z_c(x; theta, E),    theta, E: adapters and edits of now;    rows and statistics of c: the last that there were

A class that lost its rows and statistics is never answered, whatever later tasks and edits do to the features; with its
rows kept it is answered as soon as an edit that hid it is undone. GS-LoRA measures the same: its heads keep the rows of
forgotten classes, and ``Acc_o`` is the accuracy on all examples of the classes of earlier requests (Zhao et al. 2024,
arXiv:2403.11530).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from pomona.adapters import LoraFactors
from pomona.continual.encoder import Adapter
from pomona.continual.heads import LinearHead
from pomona.continual.knowledge import Knowledge, TaskKnowledge


def restored(knowledge: Knowledge, earlier: Mapping[str, Knowledge]) -> Knowledge:
    """Return some knowledge as it would be, had some classes kept their rows of heads and their statistics.

    Adapters, edits, and all there is of the other classes are those of now. The exception is a ridge head: one Gram
    matrix counts the examples of all classes of a task, so the sums of a task with a restored class are those of then,
    for its other classes too.

    Args:
        knowledge: Of now; is not changed, not even by scoring what is returned.
        earlier: What was last known of each class that is to be put back; of another class nothing is read. A class
            that is known goes on as it is known.

    Returns:
        The knowledge with these classes at their places in their tasks. A class whose task is gone stays out.
    """
    wanted = {label: known for label, known in earlier.items() if label not in knowledge.classes}
    tasks = tuple(_grown(task, wanted) for task in knowledge.tasks)
    rows = {label: (known.head, known.classes.index(label)) for label, known in wanted.items()}
    rows |= {label: (knowledge.head, place) for place, label in enumerate(knowledge.classes)}
    head = _head_of([rows[label] for task in tasks for label in task.classes])
    if knowledge.settings.official_compat:  # which overwrites adapters when it answers
        tasks = tuple(replace(task, adapter=_copied(task.adapter)) for task in tasks)
    return replace(knowledge, tasks=tasks, head=knowledge.head if head is None else head)


def _grown(task: TaskKnowledge, earlier: Mapping[str, Knowledge]) -> TaskKnowledge:
    before = {label: each for label, known in earlier.items() for each in known.tasks if _was(each, task, label)}
    if not before:
        return task
    fullest = max(before.values(), key=lambda each: len(each.classes))  # classes only leave a task
    sources = {**before, **dict.fromkeys(task.classes, task)}
    classes = tuple(label for label in fullest.classes if label in sources)
    parts = [(sources[label], sources[label].classes.index(label)) for label in classes]
    left_out = [place for place, label in enumerate(fullest.classes) if label not in sources]
    return replace(
        task,
        classes=classes,
        head=_head_of([(source.head, place) for source, place in parts]) or task.head,
        statistics=tuple(source.statistics[place] for source, place in parts),
        first=tuple(source.first[place] for source, place in parts),
        ridge=None if fullest.ridge is None else fullest.ridge.without(left_out),
    )


def _was(earlier: TaskKnowledge, task: TaskKnowledge, label: str) -> bool:
    return earlier.number == task.number and label in earlier.classes


def _head_of(rows: Sequence[tuple[LinearHead, int]]) -> LinearHead | None:
    """Return a head of rows of others; None where there are none."""
    if not rows:
        return None
    return LinearHead(
        torch.stack([head.weight[place] for head, place in rows]),
        torch.stack([head.bias[place] for head, place in rows]),
    )


def _copied(adapter: Adapter) -> Adapter:
    return {name: LoraFactors(a=each.a.clone(), b=each.b.clone(), scale=each.scale) for name, each in adapter.items()}
