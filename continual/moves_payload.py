"""How an owner's features moved under an edit, as bytes for the coordinator, who believes of them what can be.

Moves must be such as features of length 1 have: the statistics after the edit are checked as those of a task are, and
what was summed before is no longer than the number of examples. Of classes to forget nothing may be told.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from pomona.continual.knowledge import Knowledge, TaskKnowledge
from pomona.continual.moves import ClassMove, TaskMoves
from pomona.continual.packing import (
    ridge_from_tensors,
    ridge_to_tensors,
    statistics_from_tensors,
    statistics_to_tensors,
    within,
)
from pomona.continual.request_payload import RequestFacts, Rows
from pomona.continual.share_payload import (
    Shapes,
    bytes_of,
    check_tensors,
    decode_tensors,
    encode_tensors,
    read_facts,
    triangle,
)
from pomona.continual.share_verification import check_class, check_ridge
from pomona.errors import PayloadError

_ROUNDING = 1e-4  # features are float32: their lengths are 1 within a few units in the last place
_OWN, _FIRST = "own.", "first."


class MovesFacts(RequestFacts):
    """Of moves.

    Attributes:
        ridge: For each task, examples behind sums of random features, in all and held out; empty where none are kept.
    """

    format: Literal["edit-moves/1"] = "edit-moves/1"
    ridge: list[dict[Literal["total", "held_out"], Rows]]


def encode_moves(moves: Sequence[TaskMoves], facts: RequestFacts) -> bytes:
    """Encode how an owner's features moved, task after task; what is the same under both adapters is sent once."""
    tensors, ridge = dict[str, Tensor](), list[dict[str, int]]()
    for position, each in enumerate(moves):
        sums, counts = ridge_to_tensors(each.ridge)
        ridge.append(counts)
        parts = {_FIRST: each.first} if position == 0 else {_OWN: each.own, _FIRST: each.first}
        for prefix, classes in parts.items():
            tensors |= {f"{position}.{prefix}{key}": value for key, value in _move_tensors(classes).items()}
        tensors |= {f"{position}.ridge.{key}": value for key, value in sums.items()}
    stated = MovesFacts.model_validate({**facts.model_dump(), "ridge": ridge})
    return encode_tensors(tensors, stated.model_dump(mode="json"))


def decode_moves(
    payload: bytes, knowledge: Knowledge, forget: Collection[str], *, max_rows: int
) -> tuple[MovesFacts, tuple[TaskMoves, ...]]:
    """Read what :func:`encode_moves` made of the retained examples, or anything else.

    Args:
        payload: The bytes.
        knowledge: Before the edit.
        forget: The classes to forget; nothing may be told of them.
        max_rows: Retained examples that an owner may have.

    Raises:
        PayloadError: The bytes are not that, or no features can have moved so.
    """
    shapes = _move_shapes(knowledge)
    tensors, stated = decode_tensors(payload, most=bytes_of(shapes))
    check_tensors(tensors, shapes)
    facts = read_facts(MovesFacts, stated)
    wanted = [{"total", "held_out"} if _has_ridge(knowledge, task) else set[str]() for task in knowledge.tasks]
    if [set(each) for each in facts.ridge] != wanted:
        raise PayloadError(f"expected counts of random features of {len(wanted)} tasks as they are kept, got others")
    found = tuple(
        _read_moves(within(tensors, f"{position}."), {str(k): n for k, n in facts.ridge[position].items()}, task)
        for position, task in enumerate(knowledge.tasks)
    )
    for task, moves in zip(knowledge.tasks, found, strict=True):
        _verify(task, moves, forget, knowledge)
    if (rows := sum(each.after.count for moves in found for each in moves.first)) > max_rows:
        raise PayloadError(f"expected at most {max_rows} retained examples, got {rows}")
    return facts, found


def _move_tensors(classes: Sequence[ClassMove]) -> dict[str, Tensor]:
    if not classes:
        return {}
    return {"before": torch.stack([each.before for each in classes])} | statistics_to_tensors(
        [each.after for each in classes]
    )


def _move_shapes(knowledge: Knowledge) -> Shapes:
    settings, width = knowledge.settings, knowledge.head.weight.shape[1]
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for position, task in enumerate(knowledge.tasks):
        count = len(task.classes)
        for prefix in (_FIRST,) if position == 0 else (_OWN, _FIRST):
            at = f"{position}.{prefix}"
            moments = width if settings.moments == "diagonal" else triangle(width)
            sizes = {"before": width, "total": width, "moment": moments}
            shapes |= {f"{at}{key}": (torch.float64, (count, size)) for key, size in sizes.items() if count}
            shapes |= {f"{at}count": (torch.int64, (count,))} if count else {}
        for part in ("total", "held_out") if _has_ridge(knowledge, task) else ():
            side = settings.ridge_dimensions
            shapes[f"{position}.ridge.{part}.gram"] = (torch.float64, (triangle(side),))
            shapes |= {f"{position}.ridge.{part}.cross": (torch.float64, (side, count))} if count else {}
    return shapes


def _has_ridge(knowledge: Knowledge, task: TaskKnowledge) -> bool:
    return task.ridge is not None and knowledge.settings.head == "ridge"


def _read_moves(tensors: Mapping[str, Tensor], ridge: Mapping[str, int], task: TaskKnowledge) -> TaskMoves:
    first = _read_classes(within(tensors, _FIRST))
    own = _read_classes(within(tensors, _OWN)) if any(key.startswith(_OWN) for key in tensors) else first
    if len(first) != len(task.classes):
        raise PayloadError(f"expected moves of {len(task.classes)} classes, got {len(first)}")
    return TaskMoves(own, first, ridge_from_tensors(within(tensors, "ridge."), ridge))


def _read_classes(tensors: Mapping[str, Tensor]) -> tuple[ClassMove, ...]:
    if not tensors:
        return ()
    if int(tensors["count"].min()) < 0:
        raise PayloadError("expected counts of at least 0, got a negative one")
    return tuple(map(ClassMove, tensors["before"], statistics_from_tensors(tensors)))


def _verify(task: TaskKnowledge, moves: TaskMoves, forget: Collection[str], knowledge: Knowledge) -> None:
    counts = [each.after.count for each in moves.first]
    if counts != [each.after.count for each in moves.own]:
        raise PayloadError(f"expected the same examples of task {task.number} under both adapters")
    for label, own, first in zip(task.classes, moves.own, moves.first, strict=True):
        if label in forget and first.after.count:
            raise PayloadError(f"expected nothing of {label!r}, which is to be forgotten; got {first.after.count} rows")
        for each in (own, first):
            check_class(label, each.after)
            if not float(each.before.norm()) <= each.after.count * (1 + _ROUNDING):
                raise PayloadError(
                    f"expected features of length 1, the sum before of {each.after.count} examples of {label!r} has "
                    f"length {float(each.before.norm()):g}"
                )
    if moves.ridge is not None:
        check_ridge(moves.ridge, counts, knowledge.settings, width=knowledge.head.weight.shape[1])
