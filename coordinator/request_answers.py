"""What clients answer to a request to forget: read, and believed in nothing that can be checked.

How many of its answers were right only a client can count, on rows that only it has: that is believed, as long as it is
no more than there are rows.
"""

from collections.abc import Mapping, Sequence

from pomona.aggregation.verify import Enrolment
from pomona.continual.edit_rounds import EditState, GradientShare
from pomona.continual.knowledge import Knowledge
from pomona.continual.moves import TaskMoves
from pomona.continual.moves_payload import MovesFacts, decode_moves
from pomona.continual.request_payload import GradientFacts, RequestFacts, decode_gradients, decode_scores
from pomona.continual.scores import Scores
from pomona.coordinator.task_answers import Asked
from pomona.errors import PayloadError, UpdateRejected


def check_scores(
    payload: bytes, asked: Asked, enrolment: Enrolment, *, number: int, classes: Sequence[str], sets: int
) -> tuple[Scores, ...]:
    """Return scores on the rows that a client holds out.

    Raises:
        UpdateRejected: They cannot be used.
    """
    try:
        facts, scores = decode_scores(payload, classes, sets=sets, max_rows=_most(asked, enrolment))
    except PayloadError as error:
        raise UpdateRejected(enrolment.client, str(error)) from error
    _check_facts(facts, asked, enrolment, number=number)
    return scores


def check_gradients(
    payload: bytes, asked: Asked, enrolment: Enrolment, *, state: EditState, before: tuple[int, int] | None
) -> tuple[GradientFacts, GradientShare]:
    """Return a client's share of a step.

    Args:
        payload: What it sent.
        asked: What is the same in all answers.
        enrolment: What it joined with.
        state: Where the edit is.
        before: Its rows to keep and to forget, by what it sent before; None: it sent nothing.

    Raises:
        UpdateRejected: It cannot be used.
    """
    try:
        facts, share = decode_gradients(payload, state, most=asked.max_update_norm, max_rows=_most(asked, enrolment))
    except PayloadError as error:
        raise UpdateRejected(enrolment.client, str(error)) from error
    _check_facts(facts, asked, enrolment, number=state.number)
    rows = facts.retained, facts.forgotten
    if sum(rows) > _most(asked, enrolment) or (before is not None and rows != before):
        expected = f"{before[0]} and {before[1]}, as before" if before else f"at most {_most(asked, enrolment)} in all"
        raise UpdateRejected(enrolment.client, f"expected rows to keep and to forget: {expected}; got {rows}")
    return facts, share


def check_moves(
    payload: bytes,
    asked: Asked,
    enrolment: Enrolment,
    *,
    number: int,
    known: tuple[Knowledge, Sequence[str]],
    retained: int,
) -> tuple[MovesFacts, tuple[TaskMoves, ...]]:
    """Return how the features of a client's rows to keep moved.

    Args:
        payload: What it sent.
        asked: What is the same in all answers.
        enrolment: What it joined with.
        number: Steps that were taken.
        known: Before the request, and the classes to forget.
        retained: Its rows to keep, by its gradients.

    Raises:
        UpdateRejected: They cannot be used.
    """
    try:
        facts, moves = decode_moves(payload, *known, max_rows=_most(asked, enrolment))
    except PayloadError as error:
        raise UpdateRejected(enrolment.client, str(error)) from error
    _check_facts(facts, asked, enrolment, number=number)
    rows = sum(each.after.count for task in moves for each in task.first)
    if rows != retained:
        raise UpdateRejected(enrolment.client, f"expected moves of its {retained} rows to keep, got {rows}")
    return facts, moves


def _most(asked: Asked, enrolment: Enrolment) -> int:
    return min(asked.max_examples, enrolment.num_examples)


def _check_facts(facts: RequestFacts, asked: Asked, enrolment: Enrolment, *, number: int) -> None:
    pairs: Mapping[str, tuple[object, object]] = {
        "client": (facts.client, enrolment.client),
        "parent": (facts.parent, asked.parent),
        "base model": (facts.base_sha256, asked.invitation.base_sha256),
        "step": (facts.number, number),
    }
    for name, (got, expected) in pairs.items():
        if got != expected:
            raise UpdateRejected(enrolment.client, f"expected {name} {expected!r}, got {got!r}")
