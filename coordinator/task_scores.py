"""How well everything learned so far is told, on held-out rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pomona.continual.answering import Answerer
from pomona.continual.encoder import FrozenEncoder, States
from pomona.continual.knowledge import Knowledge
from pomona.continual.learner import accuracy
from pomona.continual.metrics import AccuracyMatrix, average_accuracy, forgetting, last_accuracy
from pomona.continual.tasks import Task
from pomona.coordinator.memory import StreamRecord
from pomona.datasets import Dataset


@dataclass(frozen=True, slots=True)
class Rows:
    """The states of some examples, and their classes by name."""

    states: States
    labels: Sequence[str]


def encoded(encoder: FrozenEncoder, data: Dataset, *, max_length: int) -> Rows:
    """Return what the frozen blocks make of some data."""
    return Rows(encoder.of_texts(data.texts, max_length=max_length), data.labels)


def task_accuracies(
    encoder: FrozenEncoder, knowledge: Knowledge, tasks: Sequence[Task], test: Rows
) -> tuple[float, ...]:
    """Return the accuracy on each task, of the classes that are not forgotten."""
    found, answerer = [], Answerer(encoder, knowledge)
    for task in tasks:
        places = [i for i, label in enumerate(test.labels) if label in task.classes and label in knowledge.classes]
        targets = torch.tensor([knowledge.classes.index(test.labels[i]) for i in places])
        found.append(accuracy(answerer.scores(test.states.subset(places)).argmax(1), targets) if places else 0.0)
    return tuple(found)


def stream_metrics(record: StreamRecord) -> dict[str, float]:
    """Return what a version states of how well it tells all learned so far.

    Args:
        record: With the accuracies after its task.
    """
    matrix = AccuracyMatrix(rows=record.rows, examples=record.examples)
    return {
        "accuracy": last_accuracy(matrix),
        "average_accuracy": average_accuracy(matrix),
        "forgetting": forgetting(matrix),
    }
