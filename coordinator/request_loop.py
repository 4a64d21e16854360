"""A run that forgets classes with its clients, whose rows stay where they are.

In the registry it is one round of the run, and its version one of kind ``forget``, as ``pomona forget`` makes them::

    open the round -> begin: send what is known, add up scores of it -> steps: send the factors, add up gradients, take
        one step of Adam and the proximal one -> moves: add up how features moved -> end: send what is known after the
        edit, add up scores of it -> publish the version with its certificate and close the round, at once

A client that says what cannot be, or nothing, is left out of all that follows. What is killed before the last line is
begun again, in a round of its own; nothing of the one before goes into it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from pomona.base_model import find_base_model
from pomona.continual.edit_rounds import EditState, GradientShare, is_done, start_edit
from pomona.continual.forgetting import forget_step
from pomona.continual.moves import TaskMoves
from pomona.continual.request_known import encode_known
from pomona.continual.request_payload import encode_edit
from pomona.continual.requests import MetRequest, meet
from pomona.continual.scores import Scores
from pomona.coordinator.edits import Edit, publish_edit
from pomona.coordinator.memory import newest, open_encoder
from pomona.coordinator.recovery import committed_rounds, known_members
from pomona.coordinator.reemergence import rechecked_by_clients
from pomona.coordinator.request_answers import check_gradients, check_moves, check_scores
from pomona.coordinator.request_terms import edited_memory
from pomona.coordinator.task_answers import Asked
from pomona.coordinator.task_exchange import Take, TaskExchange, Work
from pomona.errors import ConfigError, DataError, NotEnoughClients, UpdateRejected, VersionConflict
from pomona.failpoints import reach
from pomona.logs import bind
from pomona.protocol import EDIT, EditRequest, EditStage
from pomona.storage.learned import ClosedRound
from pomona.storage.records import Version


@dataclass(slots=True, kw_only=True)
class RequestInMaking(Work):
    """An attempt at a request.

    Attributes:
        active: Who is asked: all who have rows and have answered so far.
        rows: Rows to keep and to forget, of each client that gave gradients.
        before: Scores of what was known.
    """

    active: list[str]
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    before: dict[str, Scores] = field(default_factory=dict)


class RequestLoop(TaskExchange):
    """One run that forgets, for as long as this process has it."""

    def _prepare(self) -> None:
        settings, invitation = self._settings, self._invitation
        if settings.forget is None or invitation.forget is None or invitation.continual is None:
            raise ConfigError("expected a run with [forget]; a bug of the coordinator's")
        self._terms, self._mos = invitation.forget, invitation.continual
        self._memory = edited_memory(self._registry, settings, run_id=invitation.run_id)

    def run(self) -> list[Version]:
        """Meet the request, unless it is met, and return the version.

        Raises:
            As :func:`pomona.coordinator.federation.run_federation`.
            DataError: No client has rows to forget, or none has rows to keep, or holds out any of either.
            VersionConflict: Somebody else published meanwhile.
        """
        run_id = self._invitation.run_id
        if met := [each.version for each in committed_rounds(self._registry, run_id) if each.version is not None]:
            return met
        self._roster.members |= known_members(self._registry, run_id, self._settings.training)
        if begun := self._registry.rounds(run_id):
            self._wait_for_enough(begun[-1].cohort)
        else:
            self._wait_for_clients()
        work = self._opened()
        bind(round=work.number)
        reach("round-opened")
        with self._failing(work.number):
            self._begin(work)
            state = self._edited(work)
            reach("classes-forgotten")
            met_by = meet(self._memory.knowledge, self._terms.classes, state, self._moves(work, state))
            edit = self._scored(work, state, met_by)
            self._make_sure()
            self._registry.freeze_round(run_id, work.number)
            reach("round-frozen")
            version = self._publish(work, edit)
            reach("version-published")
        return [version]

    def _opened(self) -> RequestInMaking:
        """Open a round; one that was cut off is given up, since its clients may have been others."""
        run_id, parent = self._invitation.run_id, self._memory.version.ref
        head = newest(self._registry, self._settings.name)
        if head is None or head.version.ref != parent:
            raise VersionConflict(f"the run edits {parent}, and somebody published another version; start a new run")
        before = self._registry.rounds(run_id)
        if before and before[-1].state == "open":
            self._registry.fail_round(run_id, before[-1].number, "it was cut off, and the request was begun again")
        number, cohort = len(before) + 1, self._wait_for_enough()
        self._registry.open_round(run_id, number, parent=parent, cohort=cohort)
        limits = self._settings.aggregation
        asked = Asked(
            invitation=self._invitation,
            task_number=number,
            parent=parent,
            max_update_norm=limits.max_update_norm,
            max_examples=limits.max_examples,
        )
        return RequestInMaking(
            number=number,
            called="the request",
            cohort=cohort,
            asked=asked,
            began=time.monotonic(),
            active=list(cohort),
        )

    def _exchange(
        self, work: RequestInMaking, stage: EditStage, kind: str, sent: bytes, take: Take, *, number: int = 0
    ) -> None:
        """Ask all who are active; who gives nothing that can be used is not asked again."""
        request = EditRequest(
            invitation=self._invitation,
            attempt=work.number,
            parent=work.asked.parent,
            stage=stage,
            number=number,
        )
        taken: set[str] = set()

        def counted(client: str, payload: bytes) -> None:
            take(client, payload)
            taken.add(client)

        self._ask(work, EDIT, kind, work.active, ("edit", request.model_dump_json(), sent), counted)
        work.active = sorted(taken)
        if not work.active and work.absent >= set(work.cohort):
            raise DataError(f"no client has rows of {', '.join(self._memory.knowledge.classes[:5])}; join one that has")
        self._check_enough(work, f"step {number}" if stage == "step" else f"the {stage}", len(work.active))
        if not work.active:
            raise NotEnoughClients("the request got nothing that can be used from any client; the log says why")

    def _begin(self, work: RequestInMaking) -> None:
        """Tell all what is known, and have it scored."""
        classes = self._invitation.labels

        def take(client: str, payload: bytes) -> None:
            enrolment = self._roster.members[client]
            (work.before[client],) = check_scores(payload, work.asked, enrolment, number=0, classes=classes, sets=1)

        self._exchange(work, "begin", "scores", encode_known(self._memory.knowledge), take)
        scores = self._summed_scores([work.before[client] for client in work.active])
        known = [label for label in self._memory.knowledge.classes if label in scores.counts]
        self._registry.set_initial_metrics(self._invitation.run_id, {"accuracy": scores.accuracy(known)})

    def _edited(self, work: RequestInMaking) -> EditState:
        """Take all steps of the edit."""
        settings = self._terms.settings
        encoder = open_encoder(find_base_model(self._settings.model.base), self._mos)
        state = start_edit(encoder, rank=settings.rank, seed=self._terms.seed)
        while not is_done(state, settings):
            state = forget_step(state, self._shares(work, state), settings)
        return state

    def _shares(self, work: RequestInMaking, state: EditState) -> Sequence[GradientShare]:
        """Return the gradients of all who are active, in the order of their names."""
        self._make_sure()
        shares: dict[str, GradientShare] = {}

        def take(client: str, payload: bytes) -> None:
            enrolment, before = self._roster.members[client], work.rows.get(client)
            facts, shares[client] = check_gradients(payload, work.asked, enrolment, state=state, before=before)
            work.rows[client] = facts.retained, facts.forgotten
            work.trained[client] = facts.retained + facts.forgotten

        self._exchange(work, "step", "gradients", encode_edit(state.adapter), take, number=state.number)
        found = [shares[client] for client in sorted(shares)]
        for kind in ("retained", "forgotten"):
            if all(getattr(each, kind) is None for each in found):
                what = "to forget" if kind == "forgotten" else "of classes to keep"
                raise DataError(f"no client that is left has rows {what}; join one that has")
        return found

    def _moves(self, work: RequestInMaking, state: EditState) -> Sequence[tuple[TaskMoves, ...]]:
        """Return how features moved, of all who are active, in the order of their names, and record it."""
        moves: dict[str, tuple[TaskMoves, ...]] = {}
        known = self._memory.knowledge, self._terms.classes

        def take(client: str, payload: bytes) -> None:
            facts, found = check_moves(
                payload,
                work.asked,
                self._roster.members[client],
                number=state.number,
                known=known,
                retained=work.rows[client][0],
            )
            examples = work.trained[client]
            new = self._submission(work, client, payload, "accepted", nonce=facts.nonce, examples=examples)
            try:
                recorded = self._registry.record_submission(new)
            except VersionConflict as error:
                raise UpdateRejected(client, str(error)) from error
            moves[client], work.summed[client] = found, (recorded.sha256, examples)

        self._exchange(work, "moves", "moves", encode_edit(state.adapter), take, number=state.number)
        for client in sorted(work.trained.keys() - moves.keys()):
            self._record_trainer(work, client)
        return [moves[client] for client in sorted(moves)]

    def _scored(self, work: RequestInMaking, state: EditState, met: MetRequest) -> Edit:
        """Have the edited knowledge scored, with the classes and without, by those who scored it before."""
        found: dict[str, tuple[Scores, ...]] = {}

        def take(client: str, payload: bytes) -> None:
            enrolment, classes = self._roster.members[client], self._invitation.labels
            scores = check_scores(payload, work.asked, enrolment, number=state.number, classes=classes, sets=2)
            if scores[0].counts != work.before[client].counts:
                raise UpdateRejected(client, "it scores other rows after the edit than it scored before")
            found[client] = scores

        self._exchange(work, "end", "scores", encode_known(met.edited), take, number=state.number)
        names = sorted(found)
        edited = self._summed_scores([found[client][0] for client in names])
        return Edit(
            met=met,
            before=self._summed_scores([work.before[client] for client in names]),
            edited=edited,
            left=self._summed_scores([found[client][1] for client in names]),
            rechecked=rechecked_by_clients(self._memory, self._terms.classes, edited),
        )

    def _summed_scores(self, parts: Sequence[Scores]) -> Scores:
        total = Scores({}, {})
        for each in parts:
            total = total + each
        kept = set(self._memory.knowledge.classes) - set(self._terms.classes)
        missing = [label for label in self._terms.classes if label not in total.counts]
        if missing or not kept & set(total.counts):
            what = ", ".join(map(repr, missing)) or "classes to keep"
            raise DataError(
                f"no client that is left holds out rows of {what}, so nobody could tell whether it was forgotten; join "
                "one with more rows, or choose another seed"
            )
        return total

    def _publish(self, work: RequestInMaking, edit: Edit) -> Version:
        self._make_sure()
        asked = {
            "classes": sorted(self._terms.classes),
            "run": self._invitation.run_id,
            "seed": self._terms.seed,
            "settings": self._terms.settings.model_dump(mode="json"),
        }
        closes = ClosedRound(
            run_id=self._invitation.run_id,
            round_number=work.number,
            weights={name: count / sum(work.trained.values()) for name, count in sorted(work.trained.items())},
            reduced=dict.fromkeys(work.trained.keys() - work.summed.keys(), "how its features moved did not come"),
            bytes_down=work.bytes_down,
            bytes_up=work.bytes_up,
            seconds=time.monotonic() - work.began,
        )
        clients = {"trained": sorted(work.trained), "summed": sorted(work.summed)}
        return publish_edit(
            self._registry, self._memory, self._terms.classes, edit, asked, closes=closes, clients=clients
        )
