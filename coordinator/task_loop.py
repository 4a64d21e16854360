"""A run that learns task after task from clients: rounds of training for each, then one that sums features up.

In the registry a task is one round of the run, and its version one of kind ``task``, as ``pomona learn`` makes them::

    open the round -> rounds_per_task times: train, average -> write the adapter -> sums of each client, recorded as
        they come -> add them up by client name -> align -> publish the version and close the round

What is killed while it trains is trained again. Sums that were recorded are not asked for again: they name the adapter
that they were taken under, which lies in the registry's blobs with the names of those that trained it.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pomona.base_model import find_base_model
from pomona.continual.knowledge import Knowledge, TaskKnowledge, nothing_known
from pomona.continual.mos import with_task
from pomona.continual.share import TaskStart, TrainedShare, averaged, task_start
from pomona.continual.share_payload import (
    decode_factors_b,
    encode_factors_b,
    encode_start,
    encode_under,
)
from pomona.continual.tasks import Task
from pomona.coordinator.beginning import load_held_out
from pomona.coordinator.enrolment import choose_cohort
from pomona.coordinator.increments import NOTHING, State, encode_increment
from pomona.coordinator.memory import Memory, StreamRecord, feature_adapter, newest, open_encoder, recipe, state_of
from pomona.coordinator.recovery import committed_rounds, known_members, unfinished_round, waiting_submissions
from pomona.coordinator.reemergence import recheck
from pomona.coordinator.task_answers import Asked, Summing, check_sums, check_trained, read_sums
from pomona.coordinator.task_exchange import TRAINED_ONLY, TaskExchange, TaskInMaking
from pomona.coordinator.task_scores import encoded, stream_metrics, task_accuracies
from pomona.coordinator.task_stream import stream_record, tasks_of
from pomona.errors import ConfigError, DataError, NotEnoughClients, UpdateRejected, VersionConflict
from pomona.failpoints import reach
from pomona.logs import bind
from pomona.protocol import SUMS, TASK, TaskSums, TaskTraining
from pomona.storage.records import NewVersion, Parent, Version

_log = logging.getLogger(__name__)


class TaskLoop(TaskExchange):
    """One run that learns task after task, for as long as this process has it."""

    def _prepare(self) -> None:
        settings, invitation = self._settings, self._invitation
        if settings.continual is None or invitation.continual is None:
            raise ConfigError("expected a run with [continual]; a bug of the coordinator's")
        self._mos, self._stream = invitation.continual, settings.continual
        self._encoder = open_encoder(find_base_model(settings.model.base), self._mos)
        held_out = load_held_out(settings)
        self._tasks = tasks_of(settings, held_out.labels)
        self._test = encoded(self._encoder, held_out.dataset, max_length=settings.model.max_length)
        self._memory = newest(self._registry, settings.name)
        self._record: StreamRecord = stream_record(
            settings,
            run_id=invitation.run_id,
            mos=self._mos,
            tasks=self._tasks,
            test=held_out.dataset,
            memory=self._memory,
        )

    def run(self) -> list[Version]:
        """Learn the tasks that are left and return the versions of all, oldest first.

        Raises:
            As :func:`pomona.coordinator.federation.run_federation`.
        """
        run_id = self._invitation.run_id
        self._roster.members |= known_members(self._registry, run_id, self._settings.training)
        rounds = committed_rounds(self._registry, run_id)
        if rounds:
            self._wait_again(rounds[-1].cohort)
        else:
            self._wait_for_clients()
            self._registry.set_initial_metrics(run_id, {"accuracy": 0.0})  # no class of the run is known
        published = [each.version for each in rounds if each.version is not None]
        return [*published, *(self._learned(task) for task in self._tasks[self._record.done :])]

    def _wait_again(self, last_cohort: Sequence[str]) -> None:
        """Wait for those who were there when the run was cut off."""
        self._wait_for_enough(last_cohort)

    @property
    def _knowledge(self) -> Knowledge:
        return self._memory.knowledge if self._memory else nothing_known(self._encoder.width, self._mos)

    def _learned(self, task: Task) -> Version:
        """Learn one task and publish it."""
        self._make_sure()
        bind(round=task.number)
        work = self._opened(task)
        reach("round-opened")
        with self._failing(task.number):
            start = self._start(task)
            summing = self._taken_up(work, start) or self._trained(work, start)
            reach("task-trained")
            self._sum_up(work, summing)
            self._make_sure()
            self._registry.freeze_round(self._invitation.run_id, task.number)
            reach("round-frozen")
            knowledge = with_task(self._knowledge, self._total(work, summing))
            reach("task-learned")
            self._make_sure()
            version = self._publish(work, knowledge, state_of(knowledge, self._forgotten(work)))
            reach("version-published")
        return version

    def _start(self, task: Task) -> TaskStart:
        start = task_start(self._encoder, self._knowledge, classes=len(task.classes))
        if start.towards is None and self._knowledge.tasks:
            raise VersionConflict("the adapters of earlier tasks differ in A, so what clients train has no average")
        return start

    def _opened(self, task: Task) -> TaskInMaking:
        """Open the round of a task, with the cohort that it was begun with, where it was."""
        run_id, parent = self._invitation.run_id, self._memory.version.ref if self._memory else ""
        cohort = self._cohort(task)
        self._registry.open_round(run_id, task.number, parent=parent or None, cohort=cohort)
        number = max((each.number for each in self._knowledge.tasks), default=0) + 1
        limits = self._settings.aggregation
        asked = Asked(
            invitation=self._invitation,
            task_number=task.number,
            parent=parent,
            max_update_norm=limits.max_update_norm,
            max_examples=limits.max_examples,
        )
        return TaskInMaking(
            number=task.number,
            called=f"task {task.number}",
            cohort=cohort,
            asked=asked,
            began=time.monotonic(),
            task=task,
            numbered=Task(number, task.classes),
        )

    def _cohort(self, task: Task) -> Sequence[str]:
        """Return who may be asked for a task: those that were, where it was begun before."""
        begun = unfinished_round(self._registry, self._invitation.run_id, task.number)
        if begun is None:
            return self._wait_for_enough()
        if begun.frozen_at is None:
            here = {each.client for each in waiting_submissions(self._registry, self._invitation.run_id, task.number)}
            self._wait_for_enough(set(begun.cohort) - here)
        return begun.cohort

    # Training

    def _trained(self, work: TaskInMaking, start: TaskStart) -> Summing:
        """Train a task's adapter and head in rounds, and put them on disk."""
        start = self._through_rounds(work, start)
        facts = {"format": "task-adapter/1", "task_number": work.task.number, "clients": work.trained}
        payload = encode_factors_b(start.adapter, start.head, facts)
        return self._summing(work, start, self._registry.blobs.put(payload))

    def _rounds_of(self, task: Task) -> int:
        return self._stream.rounds_of(len(task.classes))

    def _through_rounds(self, work: TaskInMaking, start: TaskStart) -> TaskStart:
        for number in range(1, self._rounds_of(work.task) + 1):
            start = self._round(work, start, number)
        return start

    def _round(self, work: TaskInMaking, start: TaskStart, number: int) -> TaskStart:
        """Run one round of training; where nobody who was asked has examples of the task, ask others."""
        shares: dict[str, TrainedShare] = {}
        while not shares:
            absent = len(work.absent)
            pool = [name for name in work.cohort if name not in work.absent]
            if not pool:
                raise DataError(
                    f"no client has examples of task {work.task.number} ({', '.join(work.task.classes[:5])}); join one "
                    "that has, or leave its classes out"
                )
            of_run = (work.task.number - 1) * self._stream.rounds_per_task + number
            cohort = choose_cohort(pool, self._settings.cohort, seed=self._settings.seed, round_number=of_run)
            shares = self._shares(work, start, number, cohort)
            if not shares and len(work.absent) == absent:
                raise NotEnoughClients(
                    f"round {number} of task {work.task.number} got nothing that can be used from {', '.join(cohort)}"
                )
        self._check_enough(work, f"round {number}", len(shares))
        work.trained |= {name: share.examples for name, share in shares.items()}
        return averaged(start, [shares[name] for name in sorted(shares)])

    def _shares(
        self, work: TaskInMaking, start: TaskStart, number: int, cohort: Sequence[str]
    ) -> dict[str, TrainedShare]:
        shares: dict[str, TrainedShare] = {}
        nonces: set[str] = set()

        def take(client: str, payload: bytes) -> None:
            enrolment = self._roster.members[client]
            facts, share = check_trained(
                client, payload, work.asked, start=start, round_number=number, enrolment=enrolment
            )
            self._check_count(client, facts.num_examples, work)
            if facts.nonce in nonces:
                raise UpdateRejected(client, "a second copy of an update that has been counted")
            nonces.add(facts.nonce)
            shares[client] = share

        self._ask(work, TASK, "trained", cohort, self._training(work, start, number), take)
        return shares

    def _training(self, work: TaskInMaking, start: TaskStart, number: int) -> tuple[str, str, bytes]:
        """Return what clients are sent to train a round."""
        request = TaskTraining(
            invitation=self._invitation,
            task_number=work.task.number,
            classes=work.task.classes,
            parent=work.asked.parent,
            round_number=number,
            seed_number=work.numbered.number,
        )
        return "task", request.model_dump_json(), encode_start(start)

    # Sums

    def _summing(self, work: TaskInMaking, start: TaskStart, trained_sha256: str) -> Summing:
        return Summing(
            task=work.numbered,
            start=start,
            trained_sha256=trained_sha256,
            settings=self._mos,
            is_first=not self._knowledge.tasks,
        )

    def _taken_up(self, work: TaskInMaking, start: TaskStart) -> Summing | None:
        """Return what another process had trained, if sums of it lie in the registry, and count those."""
        run_id, number = self._invitation.run_id, work.task.number
        here = waiting_submissions(self._registry, run_id, number)
        recorded = [each for each in here if not each.nonce.startswith(TRAINED_ONLY)]
        if not recorded:
            return None
        blobs = self._registry.blobs
        first, _ = read_sums(blobs.get(recorded[0].sha256), self._summing(work, start, ""))
        adapter, head, told = decode_factors_b(blobs.get(first.trained_sha256), start)
        work.trained = {str(name): int(count) for name, count in dict(told["clients"]).items()}  # type: ignore[call-overload]
        work.summed = {each.client: (each.sha256, each.num_examples or 0) for each in recorded}
        return self._summing(work, replace(start, adapter=adapter, head=head), first.trained_sha256)

    def _sum_up(self, work: TaskInMaking, summing: Summing) -> None:
        """Ask everybody who may have examples of the task for their sums, and record them."""
        (begun,) = self._registry.rounds(self._invitation.run_id, work.task.number)
        if begun.frozen_at is not None:
            return

        def take(client: str, payload: bytes) -> None:
            enrolment = self._roster.members[client]
            facts, _ = check_sums(client, payload, work.asked, summing=summing, enrolment=enrolment)
            self._check_count(client, facts.num_examples, work)
            new = self._submission(work, client, payload, "accepted", nonce=facts.nonce, examples=facts.num_examples)
            try:
                recorded = self._registry.record_submission(new)
            except VersionConflict as error:
                raise UpdateRejected(client, str(error)) from error
            work.summed[client] = recorded.sha256, facts.num_examples

        names = [name for name in work.cohort if name not in work.absent and name not in work.summed]
        self._ask(work, SUMS, "sums", names, self._asking_sums(work, summing), take)
        reach("round-closing")
        self._check_enough(work, "the sums", len(work.summed))
        for client in sorted(work.trained.keys() - work.summed.keys()):
            self._record_trainer(work, client)

    def _asking_sums(self, work: TaskInMaking, summing: Summing) -> tuple[str, str, bytes]:
        """Return what clients are sent to sum up their features."""
        request = TaskSums(
            invitation=self._invitation,
            task_number=work.task.number,
            classes=work.task.classes,
            parent=work.asked.parent,
            trained_sha256=summing.trained_sha256,
        )
        known = self._knowledge
        grown = replace(known, tasks=(*known.tasks, _without_classes(work, summing)))
        own = grown.adapter(len(known.tasks))
        payload = encode_under(own, None if summing.is_first else grown.adapter(0))
        return "sums", request.model_dump_json(), payload

    def _total(self, work: TaskInMaking, summing: Summing) -> TaskKnowledge:
        """Add up what was recorded, in the order of names, whatever the order in which it came."""
        total: TaskKnowledge | None = None
        for client in sorted(work.summed):
            _, part = read_sums(self._registry.blobs.get(work.summed[client][0]), summing)
            total = part if total is None else total + part
        if total is None:
            raise NotEnoughClients(f"task {work.task.number} has the sums of no client")
        return total

    # Publishing

    def _forgotten(self, work: TaskInMaking) -> tuple[str, ...]:
        before = self._memory.forgotten if self._memory else ()
        return tuple(each for each in before if each not in work.task.classes)

    def _publish(self, work: TaskInMaking, knowledge: Knowledge, state: State) -> Version:
        """Score what is known and publish it, and close the round."""
        before = self._memory
        scores = task_accuracies(self._encoder, knowledge, self._tasks[: work.task.number], self._test)
        record = self._record.model_copy(update={"done": work.task.number, "rows": (*self._record.rows, scores)})
        told = recheck(self._registry, before, self._encoder, knowledge, self._test, relearned=work.task.classes)
        told.log(_log)
        forgotten = self._forgotten(work)
        new = self._new_version(work, knowledge, encode_increment(before.state if before else NOTHING, state))
        made = {**recipe(knowledge, record, method="federated-mos"), **told.facts(), **new.recipe}
        metrics = {**stream_metrics(record), **told.metrics(forgotten)}
        version = self._registry.publish_round(replace(new, recipe=made, metrics=metrics))
        self._memory = Memory(version=version, state=state, knowledge=knowledge, forgotten=forgotten, stream=record)
        self._record = record
        return version

    def _new_version(self, work: TaskInMaking, knowledge: Knowledge, payload: bytes) -> NewVersion:
        """Return what a version says of how clients made it."""
        head = self._memory.version.ref if self._memory else ""
        return NewVersion(
            run_id=self._invitation.run_id,
            round_number=work.task.number,
            adapter=self._settings.name,
            payload=payload,
            base_sha256=self._invitation.base_sha256,
            rank=feature_adapter(knowledge).rank,
            kind="task",
            exactness=self._memory.version.exactness if self._memory else "exact",
            recipe={"clients": _clients(work)},
            weights=_weights(work),
            reduced=dict.fromkeys(work.trained.keys() - work.summed.keys(), "its sums did not come"),
            bytes_down=work.bytes_down,
            bytes_up=work.bytes_up,
            seconds=time.monotonic() - work.began,
            expected_head=head,
            parents=[Parent(ref=head, kind="task")] if head else [],
        )


def _without_classes(work: TaskInMaking, summing: Summing) -> TaskKnowledge:
    """Return a task's adapter as a part of what is known, before there is anything else of the task."""
    head = summing.start.head.without(range(summing.start.head.classes))
    return TaskKnowledge(work.numbered.number, (), summing.start.adapter, head, (), ())


def _clients(work: TaskInMaking) -> Mapping[str, object]:
    """Return who trained the adapter and whose features were summed."""
    return {"trained": sorted(work.trained), "summed": sorted(work.summed)}


def _weights(work: TaskInMaking) -> dict[str, float]:
    """Return the share of each client in the examples that went into the adapter or the sums."""
    examples = {**work.trained, **{name: count for name, (_, count) in work.summed.items()}}
    return {name: count / sum(examples.values()) for name, count in sorted(examples.items())}
