"""The tasks of a run that learns one after another, and the record of how far it is."""

import hashlib
import json
from collections.abc import Sequence

from pomona.continual.tasks import Task, tasks_by_size
from pomona.coordinator.memory import Memory, StreamRecord
from pomona.datasets import Dataset
from pomona.errors import ConfigError, DataError, VersionConflict
from pomona.mos_settings import MosSettings
from pomona.settings import RunSettings


def tasks_of(settings: RunSettings, labels: Sequence[str]) -> tuple[Task, ...]:
    """Return the tasks of a run.

    Args:
        settings: Of the run.
        labels: The classes, where the settings do not name them task by task.

    Raises:
        ConfigError: The run does not learn task after task.
    """
    if settings.continual is None:
        raise ConfigError("expected a run with [continual], which says what is learned task after task")
    if settings.continual.tasks:
        return tuple(Task(number, classes) for number, classes in enumerate(settings.continual.tasks, start=1))
    return tasks_by_size(labels, classes_per_task=settings.continual.classes_per_task or 1, seed=settings.seed)


def stream_record(
    settings: RunSettings, *, run_id: str, mos: MosSettings, tasks: Sequence[Task], test: Dataset, memory: Memory | None
) -> StreamRecord:
    """Return how far a run is, from the newest version of its adapter.

    Args:
        settings: Of the run.
        run_id: Its id, which is a part of what the stream is called: its data are nowhere in one place.
        mos: How tasks are learned, with the run's seed.
        tasks: Of the run.
        test: The coordinator's held-out rows.
        memory: The newest version, None where there is none.

    Raises:
        VersionConflict: The newest version was learned otherwise, so that this run cannot go on from it.
        DataError: A class was learned before or was to be forgotten, or there is a single class.
    """
    parts = [run_id, [[task.number, *task.classes] for task in tasks], test.texts, test.labels]
    sha256 = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if memory is not None and memory.stream.sha256 == sha256:
        return memory.stream
    _check_fits(tasks, memory)
    if memory is not None and (memory.knowledge.settings, memory.stream.max_length) != (mos, settings.model.max_length):
        raise VersionConflict(
            f"{memory.version.ref} was learned with other settings or another seed; go on with those in "
            "[continual.mos], model.max_length and seed, or learn under another name"
        )
    return StreamRecord(
        sha256=sha256,
        seed=settings.seed,
        max_length=settings.model.max_length,
        mos=mos,
        start=memory.version.ref if memory else None,
        done=0,
        classes=tuple(task.classes for task in tasks),
        rows=(),
        examples=tuple(sum(label in task.classes for label in test.labels) for task in tasks),
    )


def _check_fits(tasks: Sequence[Task], memory: Memory | None) -> None:
    classes = [label for task in tasks for label in task.classes]
    known, forgotten = (memory.past.classes, memory.past.forgotten) if memory else ((), ())
    if memory is not None and memory.stream.done < len(memory.stream.classes):
        raise VersionConflict(
            f"{memory.version.ref} has learned {memory.stream.done} of {len(memory.stream.classes)} tasks of another "
            "stream; go on with that one first, or learn under another name"
        )
    if again := [label for label in classes if label in known]:
        raise DataError(f"{again[0]!r} was learned before; a class is learned once")
    if back := [label for label in classes if label in forgotten]:
        raise DataError(f"{back[0]!r} was to be forgotten; learn it again by `pomona learn --relearn`, or leave it out")
    if len({*classes, *known}) < 2:
        raise DataError(f"the run has the single class {classes[0]!r}; expected at least two to tell apart")
