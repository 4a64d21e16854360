"""Learning task after task into the registry: one version for each task, resumable wherever it was cut off.

A task is learned from the version before it, its own examples and the settings, by a function without other inputs. So
what was killed is learned again to the same bytes, and nothing but versions has to be remembered: the newest one says
which task of which stream it is.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from pomona.base_model import base_model_sha256, public_name
from pomona.continual.encoder import FrozenEncoder
from pomona.continual.knowledge import Knowledge, nothing_known
from pomona.continual.learner import TaskData
from pomona.continual.metrics import AccuracyMatrix, accuracy_after, average_accuracy, forgetting, last_accuracy
from pomona.continual.mos import learn_task
from pomona.continual.tasks import Task
from pomona.coordinator.continual_settings import ContinualSettings
from pomona.coordinator.increments import NOTHING, encode_increment
from pomona.coordinator.memory import (
    Memory,
    StreamRecord,
    feature_adapter,
    find_base,
    newest,
    open_encoder,
    recipe,
    state_of,
    threads,
)
from pomona.coordinator.reemergence import Recheck, recheck, recheck_of
from pomona.coordinator.streams import Past, Stream, check_stream, load_stream
from pomona.coordinator.task_scores import Rows, encoded, stream_metrics, task_accuracies
from pomona.datasets import Dataset
from pomona.errors import VersionConflict
from pomona.failpoints import reach
from pomona.storage.learned import NewLearned
from pomona.storage.records import Parent
from pomona.storage.registry import Registry, check_name

Show = Callable[["Learned"], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnRequest:
    """What ``pomona learn`` was asked for.

    Attributes:
        name: Of the adapter.
        data: What to learn: a ``.csv`` or ``.jsonl`` file, or ``wordnet-nouns``.
        test: What to score; None: part of ``data`` is held out.
        classes_per_task: For data without a column ``task``.
        seed: Of the order of classes, of what is held out, and of training.
        base: Folder or packaged name of the base model; None: the one that was learned on before, or the packaged one.
        relearn: Forgotten classes that may be learned again.
        settings: Of the encoder and of learning.
        threads: Of the CPU. The same number gives the same bytes.
    """

    name: str
    data: str
    test: str | None = None
    classes_per_task: int | None = None
    seed: int = 0
    base: str | None = None
    relearn: Sequence[str] = ()
    settings: ContinualSettings = field(default_factory=ContinualSettings)
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What was learned so far.

    Attributes:
        adapter: Reference of the newest version.
        tasks: The tasks of the stream.
        matrix: Accuracy on each task after each task, as far as there are any.
        seconds: Of this call.
        reappeared: Classes of earlier requests to forget that would be told again, had they kept their rows of heads.
        unchecked: Why it could not be looked whether others would.
    """

    adapter: str
    tasks: Sequence[Task]
    matrix: AccuracyMatrix
    seconds: float
    reappeared: Sequence[str] = ()
    unchecked: Mapping[str, str] = field(default_factory=dict)

    @property
    def average_accuracy(self) -> float:
        """Mean over tasks of the accuracy on all classes seen by then."""
        return average_accuracy(self.matrix)

    @property
    def last_accuracy(self) -> float:
        """Accuracy on all classes after the last task."""
        return last_accuracy(self.matrix)

    def accuracy_after(self, tasks: int) -> float:
        """Return the accuracy on all classes seen after so many tasks."""
        return accuracy_after(self.matrix, tasks - 1)

    @property
    def forgetting(self) -> float:
        """By how much earlier tasks are below their best, on average."""
        return forgetting(self.matrix)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A stream, where it begins, and how far it is."""

    stream: Stream
    memory: Memory | None
    record: StreamRecord

    @property
    def done(self) -> bool:
        return self.record.done == len(self.stream.tasks)


def learn(registry: Registry, request: LearnRequest, *, show: Show = lambda _learned: None) -> Learned:
    """Learn the tasks of a stream, or those that are left of it, and publish a version after each.

    Asked for once more what is learned already, it returns what was found then.

    Args:
        registry: Open for writing.
        request: What to learn.
        show: Called after each task with what was learned so far.

    Raises:
        ConfigError: The name is malformed, or the tasks are given twice or not at all.
        DataError: The data are malformed, or do not fit what was learned before.
        BaseModelError: The base model is not there, or is another one than before.
        VersionConflict: The name has versions that were not learned, or a stream of other data or settings that is not
            learned to its end; or somebody else published meanwhile.
        BlobWriteError: A version could not be written; those before it are there.
    """
    began = time.monotonic()
    check_name(request.name)
    memory = newest(registry, request.name)
    source, path = find_base(registry, memory.version if memory else None, request.base)
    plan = _plan(registry, request, memory)
    if not plan.done:
        with threads(request.threads):
            plan = _learn_on(registry, request, plan, source, path, show)
    assert plan.memory is not None
    return replace(_learned(plan.memory, plan.stream), seconds=time.monotonic() - began)


def _plan(registry: Registry, request: LearnRequest, memory: Memory | None) -> _Plan:
    stream = load_stream(request.data, request.test, classes_per_task=request.classes_per_task, seed=request.seed)
    begun = None if memory is None else memory.stream
    if memory is not None and begun is not None:
        if not (other := _differences(request, stream, begun)):
            return _Plan(stream, memory, begun)
        if begun.done < len(begun.classes) or "settings" in other:
            raise VersionConflict(_refusal(memory, other))
    check_stream(stream, memory.past if memory else Past(), relearn=request.relearn)
    record = StreamRecord(
        sha256=stream.sha256(),
        seed=request.seed,
        max_length=request.settings.encoder.max_length,
        mos=memory.knowledge.settings if memory else request.settings.mos.model_copy(update={"seed": request.seed}),
        start=memory.version.ref if memory else None,
        done=0,
        classes=tuple(task.classes for task in stream.tasks),
        rows=(),
        examples=tuple(sum(label in task.classes for label in stream.test.labels) for task in stream.tasks),
    )
    return _Plan(stream, memory, record)


def _differences(request: LearnRequest, stream: Stream, begun: StreamRecord) -> list[str]:
    """Return in what a request is another one than the stream that was learned last."""
    mos = request.settings.mos.model_copy(update={"seed": begun.mos.seed})
    same = {
        "data": stream.sha256() == begun.sha256,
        "seed": request.seed == begun.seed,
        "settings": (request.settings.encoder.max_length, mos) == (begun.max_length, begun.mos),
    }
    return [name for name, is_same in same.items() if not is_same]


def _refusal(memory: Memory, other: Sequence[str]) -> str:
    begun = memory.stream
    return (
        f"{memory.version.ref} has learned {begun.done} of {len(begun.classes)} tasks with other "
        f"{' and '.join(other)}; go on with what it was begun with, or learn under another name"
    )


def _learn_on(registry: Registry, request: LearnRequest, plan: _Plan, source: str, path: Path, show: Show) -> _Plan:
    encoder = open_encoder(path, plan.record.mos)
    encode = partial(encoded, encoder, max_length=plan.record.max_length)
    test = encode(plan.stream.test)
    memory, record = plan.memory, plan.record
    for task in plan.stream.tasks[record.done :]:
        rows = encode(_of_classes(plan.stream.train, task.classes))
        knowledge = _learn_task(encoder, memory.knowledge if memory else _nothing(encoder, record), task, rows)
        reach("task-learned")
        scores = task_accuracies(encoder, knowledge, plan.stream.tasks[: task.number], test)
        record = record.model_copy(update={"done": task.number, "rows": (*record.rows, scores)})
        told = recheck(registry, memory, encoder, knowledge, test, relearned=task.classes)
        memory = _publish(registry, request, memory, knowledge, record, told, source, path)
        reach("version-published")
        show(_learned(memory, plan.stream))
    return _Plan(plan.stream, memory, record)


def _learn_task(encoder: FrozenEncoder, knowledge: Knowledge, task: Task, rows: Rows) -> Knowledge:
    index = {label: place for place, label in enumerate((*knowledge.classes, *task.classes))}
    numbered = Task(max((each.number for each in knowledge.tasks), default=0) + 1, task.classes)
    data = TaskData(numbered, rows.states, torch.tensor([index[label] for label in rows.labels]))
    return learn_task(encoder, knowledge, data, knowledge.settings)


def _nothing(encoder: FrozenEncoder, record: StreamRecord) -> Knowledge:
    return nothing_known(encoder.width, record.mos)


def _publish(
    registry: Registry,
    request: LearnRequest,
    memory: Memory | None,
    knowledge: Knowledge,
    record: StreamRecord,
    told: Recheck,
    source: str,
    path: Path,
) -> Memory:
    task = knowledge.tasks[-1]
    forgotten = tuple(each for each in (memory.forgotten if memory else ()) if each not in task.classes)
    state = state_of(knowledge, forgotten)
    before = memory.state if memory else NOTHING
    head = memory.version.ref if memory else ""
    version = registry.publish_learned(
        NewLearned(
            adapter=request.name,
            payload=encode_increment(before, state),
            base_sha256=base_model_sha256(path),
            base_model=public_name(source),
            base_source=source,
            rank=feature_adapter(knowledge).rank,
            kind="task",
            exactness=memory.version.exactness if memory else "exact",
            recipe={**recipe(knowledge, record, method="mos"), **told.facts()},
            metrics={**stream_metrics(record), **told.metrics(forgotten)},
            expected_head=head,
            parents=[Parent(ref=head, kind="task")] if head else [],
        )
    )
    return Memory(version=version, state=state, knowledge=knowledge, forgotten=forgotten, stream=record)


def _learned(memory: Memory, stream: Stream) -> Learned:
    record = memory.stream
    matrix = AccuracyMatrix(rows=record.rows, examples=record.examples)
    told = recheck_of(memory.version)
    return Learned(
        adapter=memory.version.ref,
        tasks=stream.tasks,
        matrix=matrix,
        seconds=0.0,
        reappeared=told.reappeared,
        unchecked=told.unchecked,
    )


def _of_classes(data: Dataset, classes: Sequence[str]) -> Dataset:
    return data.subset([i for i, label in enumerate(data.labels) if label in classes])
