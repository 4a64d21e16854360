"""Asking clients to work on a task, and taking what they answer: one request to many, each answer by itself."""

import json
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from pomona.continual.tasks import Task
from pomona.coordinator.membership import Membership
from pomona.coordinator.replies import Reply, collect
from pomona.coordinator.task_answers import Asked, payload_of
from pomona.errors import NotEnoughClients, RegistryError, UpdateRejected
from pomona.messages import pack
from pomona.storage.records import NewSubmission, SubmissionStatus
from pomona.wire import digest

_log = logging.getLogger(__name__)

_SENDINGS = 3  # of a round's work
_TTL_MARGIN_S = 30.0  # a straggler is late by the coordinator's clock, not an error of Flower's
TRAINED_ONLY = "trained-"  # begins the nonce of a record that a client trained, where its sums did not come

Take = Callable[[str, bytes], None]


@dataclass(slots=True, kw_only=True)
class Work:
    """What clients work on together, a task or a request to forget, and how far it is.

    Attributes:
        number: Of the round that it is in the registry.
        called: What it is called in messages.
        cohort: Who may be asked.
        asked: What their answers must say.
        began: When, by the monotonic clock.
        trained: Examples of each client that trained the adapter.
        summed: Hash of the sums that a client sent, and its number of examples.
        absent: Who has no examples of it.
        bytes_down: Sent to clients.
        bytes_up: Received from them.
    """

    number: int
    called: str
    cohort: Sequence[str]
    asked: Asked
    began: float
    trained: dict[str, int] = field(default_factory=dict)
    summed: dict[str, tuple[str, int]] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(slots=True, kw_only=True)
class TaskInMaking(Work):
    """One task in the making.

    Attributes:
        task: With its number in the run.
        numbered: The same with its number in all that is known.
    """

    task: Task
    numbered: Task


class TaskExchange(Membership):
    """The clients of a run that learns task after task, or forgets, and what passes between it and them."""

    def _ask(
        self,
        work: Work,
        message_type: str,
        kind: str,
        clients: Sequence[str],
        sent: tuple[str, str, bytes],
        take: Take,
    ) -> None:
        """Send some clients the same request, and hand over what each answers that has examples of the task."""
        heard: set[str] = set()
        for sending in range(1, _SENDINGS + 1):
            names = [name for name in clients if name in self._roster.nodes and name not in heard]
            work.bytes_down += len(sent[2]) * len(names)
            messages = [self._message(work, name, message_type, sent) for name in names]
            try:
                deadline_s = self._settings.cohort.round_deadline_s
                for group in collect(self._puller, messages, deadline_s=deadline_s, idle=self._enrol_newcomers):
                    for position, reply in group:
                        heard.add(names[position])
                        self._taken(work, names[position], reply, kind, take)
                break
            except ObjectPushError:
                if sending == _SENDINGS:
                    raise
                _log.warning("%s: not all of the work got to the server; sending it again", work.called)
        self._drop_silent(work, set(clients) - heard)

    def _taken(self, work: Work, client: str, reply: Reply, kind: str, take: Take) -> None:
        payload = b""
        try:
            payload = payload_of(client, reply, work.asked, kind=kind) or b""
            work.bytes_up += len(payload)
            if payload:
                take(client, payload)
            else:
                _count_absent(work, client)
        except UpdateRejected as error:
            said = "%s: the answer of %s does not count: %s"
            _log.warning(said, work.called, client, error.reason, extra={"client": client})
            self._registry.record_submission(self._submission(work, client, payload, "rejected", reason=error.reason))
            self._tell([client], error.reason, number=work.number)

    def _message(self, work: Work, client: str, message_type: str, sent: tuple[str, str, bytes]) -> Message:
        return Message(
            pack(*sent),
            dst_node_id=self._roster.nodes[client],
            message_type=message_type,
            ttl=self._settings.cohort.round_deadline_s + _TTL_MARGIN_S,
            group_id=str(work.number),
        )

    def _drop_silent(self, work: Work, clients: Collection[str]) -> None:
        reason = f"it did not answer within {self._settings.cohort.round_deadline_s:g} s"
        late = [self._submission(work, client, b"", "late", reason=reason) for client in sorted(clients)]
        for recorded in self._registry.record_submissions(late):
            if isinstance(recorded, RegistryError):
                raise recorded
        self._tell(sorted(clients), reason, number=work.number)

    def _check_count(self, client: str, examples: int, work: Work) -> None:
        before = work.trained.get(client, examples)
        if before != examples:
            raise UpdateRejected(client, f"it had {before} examples of {work.called} before, and now states {examples}")

    def _check_enough(self, work: Work, what: str, counted: int) -> None:
        """Do nothing if so many answers that count, with those who have no examples, let a round close."""
        wanted = self._settings.cohort.min_replies
        if counted + len(work.absent) < wanted:
            raise NotEnoughClients(
                f"{what} of {work.called} needs {wanted} answers that can be used, got {counted}, and "
                f"{len(work.absent)} of {len(work.cohort)} clients have no examples of it; the log says why"
            )

    def _record_trainer(self, work: Work, client: str) -> None:
        """Record a client that trained and whose sums did not come: it has a part in the version."""
        told = {"format": "trainer/1", "client": client, "examples": work.trained[client]}
        payload = json.dumps(told, sort_keys=True).encode()
        nonce = f"{TRAINED_ONLY}{digest(f'{work.number}/{client}'.encode())[:32]}"
        new = self._submission(work, client, payload, "accepted", nonce=nonce, examples=work.trained[client])
        self._registry.record_submission(new)

    def _submission(
        self,
        work: Work,
        client: str,
        payload: bytes,
        status: SubmissionStatus,
        *,
        reason: str = "",
        nonce: str = "",
        examples: int = 0,
    ) -> NewSubmission:
        member = self._roster.members.get(client)
        return NewSubmission(
            run_id=self._invitation.run_id,
            round_number=work.number,
            client=client,
            rank=member.rank if member else 0,
            alpha=member.alpha if member else 0.0,
            num_examples=examples,
            nonce=nonce or f"none-{work.number}-{client}"[:64],
            status=status,
            reason=reason,
            payload=payload,
        )


def _count_absent(work: Work, client: str) -> None:
    if client in work.trained or client in work.summed:
        raise UpdateRejected(client, f"it had examples of {work.called} before, and says that it has none")
    work.absent.add(client)
