"""What clients answer when they work on a task: read, and believed in nothing that can be checked.

An answer is what was asked for, that there are no examples of the task here, or something else, which is rejected with
its reason and harms nobody but its sender.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Message
from pydantic import ValidationError

from pomona.aggregation.verify import Enrolment
from pomona.continual.knowledge import TaskKnowledge
from pomona.continual.share import TaskStart, TrainedShare
from pomona.continual.share_payload import ShareFacts, SumsFacts, decode_sums, decode_trained
from pomona.continual.share_verification import verify_adapter, verify_sums
from pomona.continual.tasks import Task
from pomona.coordinator.replies import Reply
from pomona.errors import PayloadError, UpdateRejected
from pomona.messages import unpack
from pomona.mos_settings import MosSettings
from pomona.protocol import Invitation, NoExamples, Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is the same in all answers to the work on one task.

    Attributes:
        invitation: Of the run.
        task_number: Place of the task in the run, from 1.
        parent: Reference of the version that is learned on, empty before the first task.
        max_update_norm: Largest Frobenius norm of an adapter and its head.
        max_examples: Largest number of examples that a client may claim.
    """

    invitation: Invitation
    task_number: int
    parent: str
    max_update_norm: float
    max_examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summing:
    """What sums are asked for.

    Attributes:
        task: With its number in all that is known.
        start: The task's adapter and head, as they are now.
        trained_sha256: Names them.
        settings: Of the stream.
        is_first: Whether the task's adapter is the first one.
    """

    task: Task
    start: TaskStart
    trained_sha256: str
    settings: MosSettings
    is_first: bool


def payload_of(client: str, reply: Reply, asked: Asked, *, kind: str) -> bytes | None:
    """Return the payload of an answer, None where the client has no examples of the task.

    Args:
        client: Who answers.
        reply: What came.
        asked: What was asked.
        kind: Of the answer that was asked for.

    Raises:
        UpdateRejected: It is neither.
    """
    if isinstance(reply, PayloadError):
        raise UpdateRejected(client, str(reply))
    return _payload(client, reply, asked, kind)


def check_trained(
    client: str, payload: bytes, asked: Asked, *, start: TaskStart, round_number: int, enrolment: Enrolment
) -> tuple[ShareFacts, TrainedShare]:
    """Return what a client trained in one round of a task.

    Raises:
        UpdateRejected: It cannot be used.
    """
    try:
        facts, share = decode_trained(payload, start)
        verify_adapter(share.adapter, share.head, most=asked.max_update_norm)
    except PayloadError as error:
        raise UpdateRejected(client, str(error)) from error
    _check_facts(facts, asked, enrolment)
    _check_same(client, {"round": (facts.round_number, round_number)})
    return facts, share


def check_sums(
    client: str, payload: bytes, asked: Asked, *, summing: Summing, enrolment: Enrolment
) -> tuple[SumsFacts, TaskKnowledge]:
    """Return the sums of a client.

    Raises:
        UpdateRejected: They cannot be used.
    """
    facts, part = claimed_sums(client, payload, asked, summing=summing, enrolment=enrolment)
    try:
        verify_sums(part, num_examples=facts.num_examples, settings=summing.settings)
    except PayloadError as error:
        raise UpdateRejected(client, str(error)) from error
    return facts, part


def claimed_sums(
    client: str, payload: bytes, asked: Asked, *, summing: Summing, enrolment: Enrolment
) -> tuple[SumsFacts, TaskKnowledge]:
    """Return sums of the right names, shapes and dtypes, finite, that anybody may have made up.

    Raises:
        UpdateRejected: They are not that.
    """
    try:
        facts, part = read_sums(payload, summing)
    except PayloadError as error:
        raise UpdateRejected(client, str(error)) from error
    _check_facts(facts, asked, enrolment)
    _check_same(client, {"adapter": (facts.trained_sha256, summing.trained_sha256)})
    return facts, part


def read_sums(payload: bytes, summing: Summing) -> tuple[SumsFacts, TaskKnowledge]:
    """Read sums, which were verified when they came if they come from the registry.

    Raises:
        PayloadError: The bytes are no sums of this task.
    """
    return decode_sums(
        payload,
        task=summing.task,
        adapter=summing.start.adapter,
        head=summing.start.head,
        settings=summing.settings,
        is_first=summing.is_first,
    )


def _payload(client: str, reply: Message, asked: Asked, kind: str) -> bytes | None:
    if reply.has_error():
        raise UpdateRejected(client, f"no answer (Flower error {reply.error.code}): {reply.error.reason}"[:500])
    try:
        answered, json, payload = unpack(reply)
        told = NoExamples.model_validate_json(json) if answered == "nothing" else None
        refused = Refusal.model_validate_json(json).error if answered == "refusal" else ""
    except (PayloadError, ValidationError) as error:
        raise UpdateRejected(client, f"its answer is malformed: {error}"[:500]) from error
    if told is not None:
        names = {"client": (told.name, client), "run": (told.run_id, asked.invitation.run_id)}
        _check_same(client, {**names, "task": (told.task_number, asked.task_number)})
        return None
    if refused:
        raise UpdateRejected(client, f"the client refused: {refused}")
    if answered != kind or not payload:
        raise UpdateRejected(client, f"expected an answer {kind!r} with a payload, got {answered[:80]!r}")
    return payload


def _check_facts(facts: ShareFacts, asked: Asked, enrolment: Enrolment) -> None:
    _check_same(
        enrolment.client,
        {
            "client": (facts.client, enrolment.client),
            "run": (facts.run_id, asked.invitation.run_id),
            "task": (facts.task_number, asked.task_number),
            "parent": (facts.parent, asked.parent),
            "base model": (facts.base_sha256, asked.invitation.base_sha256),
        },
    )
    if facts.num_examples > (most := min(enrolment.num_examples, asked.max_examples)):
        raise UpdateRejected(enrolment.client, f"expected at most {most} examples of a task, got {facts.num_examples}")


def _check_same(client: str, pairs: Mapping[str, tuple[object, object]]) -> None:
    for name, (got, expected) in pairs.items():
        if got != expected:
            raise UpdateRejected(client, f"expected {name} {expected!r}, got {got!r}")
