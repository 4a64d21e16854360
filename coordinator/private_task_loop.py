"""A run that learns task after task and hides its clients: each round of a task is a release, and so are its sums.

::

    open the task -> rounds_per_task times: reserve, draw a cohort, sum, noise -> the next adapter and head
                  -> reserve, draw a cohort, sum features, noise -> statistics, alignment -> publish the version

A round of training moves ``B`` and the head, over an ``A`` that is public, frozen and the same for all::

    (B, head) += ( sum_i clip((B_i - B, head_i - head), C) + N(0, sigma^2 C^2 I) ) / (q N)

and the sums at the end are those of :mod:`pomona.privacy.class_sums`, under a bound of their own and the same
``sigma``. All clients weigh the same, whatever they have. What follows from noised sums, the task's statistics and the
head that is aligned over all classes, is post-processing.

Releases are numbered through the run, and each is paid, drawn and written down as in :mod:`.private_loop`. What a round
released lies in the registry's blobs under the hash that the ledger has, so a run that was killed goes on after its
last release. The last release of a task is the payload of its version.

Who was asked, who has rows of the task and who was silent is written down nowhere: one that has none, or sends what
cannot be used, counts as zero, and where all do, noise is released.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from flwr.app import Message
from torch import Tensor

from pomona.adapters import AdapterWeights
from pomona.continual.encoder import Adapter
from pomona.continual.heads import LinearHead
from pomona.continual.knowledge import Knowledge, TaskKnowledge
from pomona.continual.mos import with_task
from pomona.continual.noised_statistics import plausible_statistics
from pomona.continual.packing import square, statistics_to_tensors
from pomona.continual.share import TaskStart
from pomona.continual.share_payload import decode_factors_b, encode_factors_b
from pomona.continual.statistics import ClassStatistics
from pomona.continual.tasks import Task
from pomona.coordinator.increments import NOTHING, apply_increment, encode_increment
from pomona.coordinator.memory import knowledge_of, state_of
from pomona.coordinator.releasing import Paid, paid_by, poisson_cohort, release, released_before
from pomona.coordinator.replies import Reply
from pomona.coordinator.task_answers import Summing, check_trained, claimed_sums, payload_of
from pomona.coordinator.task_exchange import TaskInMaking
from pomona.coordinator.task_loop import TaskLoop
from pomona.errors import PayloadError
from pomona.failpoints import reach
from pomona.logs import bind
from pomona.manifest import HEAD, LORA_B
from pomona.privacy.class_sums import COUNT, FIRST, MOMENT, OWN, TOTAL, SumsLayout
from pomona.privacy.contributions import contribution
from pomona.privacy.dylora import moved
from pomona.privacy.gaussian_sum import GaussianSum
from pomona.privacy.plan import PrivacyPlan, plan_of
from pomona.privacy.randomness import SecureRandom
from pomona.protocol import SUMS, TASK
from pomona.storage.records import LedgerEntry, NewVersion, Version
from pomona.wire import digest


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asking:
    """What a release asks for.

    Attributes:
        message_type: Of what is sent.
        kind: Of the answers that count.
        sent: To each of the cohort.
        shapes: Of what one client contributes, by name.
        bound: On its norm.
        contribution: What a client's payload contributes, before it is clipped; raises PayloadError where it is none.
    """

    message_type: str
    kind: str
    sent: tuple[str, str, bytes]
    shapes: dict[str, tuple[int, ...]]
    bound: float
    contribution: Callable[[str, bytes], dict[str, Tensor]]


@dataclass(slots=True)
class _Tally:
    """The sum of a release, and to whom the message at each position went."""

    total: GaussianSum
    names: list[str] = field(default_factory=list)


class PrivateTaskLoop(TaskLoop):
    """One run whose clients are hidden while it learns task after task, for as long as this process has it."""

    _paid: Paid

    def _prepare(self) -> None:
        super()._prepare()
        self._plan: PrivacyPlan = plan_of(self._settings)
        self._coins, self._noise = SecureRandom(), SecureRandom()
        self._roster.limit = self._plan.population_size

    def _wait_again(self, last_cohort: Sequence[str]) -> None:
        """Wait for as many as a run begins with: who was asked last is written down nowhere."""
        del last_cohort
        self._wait_for_clients()

    def _cohort(self, task: Task) -> Sequence[str]:
        """Return nobody: a cohort is drawn for each release, and is recorded by none."""
        del task
        return ()

    def _learned(self, task: Task) -> Version:
        self._make_sure()
        bind(round=task.number)
        work = self._opened(task)
        reach("round-opened")
        with self._failing(task.number):
            start, last = self._start(task), self._number(task) + self._rounds_of(task) + 1
            self._paid = self._before(last) or self._summed(work, self._through_rounds(work, start), last)
            before, source = self._memory.state if self._memory else NOTHING, f"what {work.called} released"
            state = apply_increment(before, self._paid.payload, source=source)
            self._make_sure()
            version = self._publish(work, knowledge_of(state), state)
            reach("version-published")
        return version

    # Releases

    def _number(self, task: Task) -> int:
        """Return how many releases of the run come before those of a task."""
        return sum(self._rounds_of(each) + 1 for each in self._tasks[: task.number - 1])

    def _before(self, number: int) -> Paid | None:
        return released_before(self._registry, self._plan, run_id=self._invitation.run_id, number=number)

    def _released(self, number: int, noised: Callable[[LedgerEntry], bytes]) -> Paid:
        self._make_sure()
        run_id = self._invitation.run_id
        return release(self._registry, self._plan, run_id=run_id, number=number, noised=noised)

    def _round(self, work: TaskInMaking, start: TaskStart, number: int) -> TaskStart:
        """Return where a round of training leads: what another process released of it, or what is released now."""
        of_run = self._number(work.task) + number

        def noised(row: LedgerEntry) -> bytes:
            after = self._trained_on(work, start, number)
            facts = {"format": "task-adapter/1", "task_number": work.task.number, "round_number": number}
            told = paid_by(row, self._plan, clip=self._plan.clip)
            return encode_factors_b(after.layers, LinearHead(**after.heads), {**facts, "privacy": told})

        paid = self._before(of_run) or self._released(of_run, noised)
        adapter, head, _ = decode_factors_b(paid.payload, start)
        return replace(start, adapter=adapter, head=head)

    def _summed(self, work: TaskInMaking, start: TaskStart, number: int) -> Paid:
        """Release a task's sums, as what the version with them adds to the one before."""
        before = self._memory.state if self._memory else NOTHING

        def noised(row: LedgerEntry) -> bytes:
            del row  # the version's recipe names it
            knowledge = with_task(self._knowledge, self._known_of(work, start))
            return encode_increment(before, state_of(knowledge, self._forgotten(work)))

        return self._released(number, noised)

    # What is summed

    def _trained_on(self, work: TaskInMaking, start: TaskStart, number: int) -> AdapterWeights:
        """Ask a cohort to train a round, and return the next adapter and head."""
        before = _weights(start.adapter, start.head)
        shapes: dict[str, tuple[int, ...]] = {f"{LORA_B}{name}": each.b.shape for name, each in start.adapter.items()}
        shapes |= {f"{HEAD}{name}": tuple(each.shape) for name, each in before.heads.items()}

        def contributed(client: str, payload: bytes) -> dict[str, Tensor]:
            enrolment = self._roster.members[client]
            _, share = check_trained(client, payload, work.asked, start=start, round_number=number, enrolment=enrolment)
            after = _weights(share.adapter, share.head)
            return contribution("ffa", after, before, scale=1.0, into=shapes)

        asking = _Asking(
            message_type=TASK,
            kind="trained",
            sent=self._training(work, start, number),
            shapes=shapes,
            bound=self._plan.clip,
            contribution=contributed,
        )
        return moved(before, self._mean(work, asking))

    def _known_of(self, work: TaskInMaking, start: TaskStart) -> TaskKnowledge:
        """Ask a cohort for the sums of its features, and return what they come to."""
        trained = digest(encode_factors_b(start.adapter, start.head, {}))
        summing = self._summing(work, start, trained)
        layout = SumsLayout(
            classes=len(work.task.classes),
            width=self._encoder.width,
            moments=self._mos.moments,
            adapters=(OWN,) if summing.is_first else (OWN, FIRST),
        )
        asking = _Asking(
            message_type=SUMS,
            kind="sums",
            sent=self._asking_sums(work, summing),
            shapes=layout.shapes,
            bound=_sums_clip(self._plan),
            contribution=lambda client, payload: self._sums_of(client, payload, work, summing, layout),
        )
        found = statistics_of(self._mean(work, asking), layout, self._plan)
        return TaskKnowledge(
            number=work.numbered.number,
            classes=work.task.classes,
            adapter=start.adapter,
            head=start.head,
            statistics=found[OWN],
            first=found[layout.adapters[-1]],
        )

    def _sums_of(
        self, client: str, payload: bytes, work: TaskInMaking, summing: Summing, layout: SumsLayout
    ) -> dict[str, Tensor]:
        enrolment = self._roster.members[client]
        _, part = claimed_sums(client, payload, work.asked, summing=summing, enrolment=enrolment)
        return layout.contribution(sums_of(part, layout))

    def _mean(self, work: TaskInMaking, asking: _Asking) -> dict[str, Tensor]:
        """Draw a cohort, ask it until the deadline, and return the noised mean; nothing else of it is left."""
        cohort = poisson_cohort(self._roster.members, self._plan, self._coins)
        tally = _Tally(self._nothing(asking))

        def asked() -> list[Message]:
            tally.total, tally.names = self._nothing(asking), [name for name in cohort if name in self._roster.nodes]
            return [self._message(work, name, asking.message_type, asking.sent) for name in tally.names]

        def take(answers: Iterable[tuple[int, Reply]]) -> None:
            for position, reply in answers:
                with suppress(PayloadError):  # it counts as zero, and nobody is told
                    client = tally.names[position]
                    if payload := payload_of(client, reply, work.asked, kind=asking.kind):
                        tally.total.add(asking.contribution(client, payload))

        self._ask_until_deadline(asked, take)
        reach("release-summed")
        return tally.total.release()

    def _nothing(self, asking: _Asking) -> GaussianSum:
        return GaussianSum(
            asking.shapes,
            bound=asking.bound,
            noise_multiplier=self._plan.update_noise_multiplier,
            divisor=self._plan.divisor,
            noise=self._noise,
        )

    # Publishing

    def _new_version(self, work: TaskInMaking, knowledge: Knowledge, payload: bytes) -> NewVersion:
        """Return what a version says of how it was made: the row that paid for it, and nothing of any client."""
        del payload  # it is what was released
        told = paid_by(self._paid.row, self._plan, clip=_sums_clip(self._plan))
        releases = self._rounds_of(work.task) + 1
        return replace(
            super()._new_version(work, knowledge, self._paid.payload),
            exactness="approximate",
            recipe={"privacy": {**told, "plan": self._plan.model_dump(mode="json")}},
            seconds=releases * self._settings.cohort.round_deadline_s,
        )


def sums_of(part: TaskKnowledge, layout: SumsLayout) -> dict[str, Tensor]:
    """Return the sums that a client sent by the names of a layout; its rows are counted once, whatever the adapter."""
    packed = {OWN: statistics_to_tensors(part.statistics), FIRST: statistics_to_tensors(part.first)}
    found = {COUNT: packed[OWN]["count"]}
    for name in layout.adapters:
        found |= {f"{name}.{TOTAL}": packed[name]["total"], f"{name}.{MOMENT}": packed[name]["moment"]}
    return found


def statistics_of(
    mean: dict[str, Tensor], layout: SumsLayout, plan: PrivacyPlan
) -> dict[str, tuple[ClassStatistics, ...]]:
    """Return the statistics of each class under each adapter, of a released mean."""
    sums = layout.sums(mean, divisor=plan.divisor)
    noise = layout.noise(noise_multiplier=plan.update_noise_multiplier, bound=_sums_clip(plan))

    def known(count: Tensor, total: Tensor, moment: Tensor) -> ClassStatistics:
        return plausible_statistics(
            float(count),
            total,
            moment if layout.moments == "diagonal" else square(moment),
            total_noise=noise.total,
            moment_noise=noise.moment,
        )

    return {
        name: tuple(map(known, sums[COUNT], sums[f"{name}.{TOTAL}"], sums[f"{name}.{MOMENT}"]))
        for name in layout.adapters
    }


def _weights(adapter: Adapter, head: LinearHead) -> AdapterWeights:
    return AdapterWeights(layers=adapter, heads={"weight": head.weight, "bias": head.bias})


def _sums_clip(plan: PrivacyPlan) -> float:
    assert plan.sums_clip is not None  # as its mechanism is ffa-tasks
    return plan.sums_clip
