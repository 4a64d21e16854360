"""The rounds of a run under client-level privacy.

A release is paid for before anybody is asked for it, and is written down before it is published::

    reserve in the ledger -> toss a coin for each enrolled client -> sum what comes until the deadline -> draw noise
        -> write the noised bytes -> ledger: released, with their hash -> publish the version

Wherever a process dies, what was reserved stays spent. Where the release was written down, the same bytes are published
by the next process, for nothing; where it was not, the row is burned, and the round is tried again with other coins and
other noise, as another release. A round lasts until its deadline, whoever has answered, and releases even where nobody
has: neither its length nor its success says anything of a client. Who was asked is known to this process alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from flwr.app import ArrayRecord, ConfigRecord, Message

from pomona.adapters import AdapterWeights
from pomona.coordinator.private_strategy import PrivateStrategy, Released
from pomona.coordinator.releasing import paid_by, poisson_cohort, release, released_before
from pomona.coordinator.replies import Reply
from pomona.coordinator.round_loop import RoundLoop
from pomona.errors import PayloadError
from pomona.failpoints import reach
from pomona.privacy.matrix_factorization import eligible
from pomona.privacy.plan import PrivacyPlan, plan_of
from pomona.privacy.randomness import SecureRandom
from pomona.storage.records import LedgerEntry, Version
from pomona.wire import decode_weights


class PrivateLoop(RoundLoop):
    """One run whose clients are hidden, for as long as this process has it."""

    _strategy: PrivateStrategy

    def _make_strategy(self, weights: AdapterWeights) -> PrivateStrategy:
        self._plan: PrivacyPlan = plan_of(self._settings)
        self._coins = SecureRandom()
        self._roster.limit = self._plan.population_size
        return PrivateStrategy(
            settings=self._settings,
            plan=self._plan,
            invitation=self._invitation,
            manifest=self._model.manifest,
            registry=self._registry,
            roster=self._roster,
            weights=weights,
        )

    def _recover(self) -> list[Version]:
        published = super()._recover()
        if published:
            _, facts = decode_weights(self._registry.payload(published[-1].ref))
            self._strategy.clip = float(_facts(facts)["next_clip"])
            self._wait_for_clients()
        self._strategy.begin()
        return published

    def _expected(self, last_cohort: object) -> tuple[str, ...]:
        """Return nobody: who was asked last is written down nowhere."""
        del last_cohort
        return ()

    def _try_round(self, number: int) -> Version:
        run_id, strategy = self._invitation.run_id, self._strategy
        self._make_sure()
        self._registry.open_round(run_id, number, parent=strategy.parent or None, cohort=[])
        reach("round-opened")
        with self._failing(number):
            payload = self._released_before(number) or self._release(number)
            self._make_sure()
            version = self._publish_release(number, payload)
            reach("version-published")
        strategy.weights, facts = decode_weights(payload)
        strategy.parent, strategy.clip = version.ref, float(_facts(facts)["next_clip"])
        return version

    def _released_before(self, number: int) -> bytes | None:
        """Return what another process released for a round and did not publish; burn what came to nothing."""
        found = released_before(self._registry, self._plan, run_id=self._invitation.run_id, number=number)
        return found.payload if found else None

    def _release(self, number: int) -> bytes:
        run_id = self._invitation.run_id
        made = release(
            self._registry, self._plan, run_id=run_id, number=number, noised=lambda row: self._noised(number, row)
        )
        return made.payload

    def _noised(self, number: int, reserved: LedgerEntry) -> bytes:
        """Ask a cohort, and return the next adapter's bytes, which hold nothing but noised sums and public facts."""
        made = self._made(number, reserved.attempt)
        facts = {
            **paid_by(reserved, self._plan, clip=made.clip),
            "retained_energy": min(made.retained_energy.values(), default=1.0),
            "next_clip": made.next_clip,
        }
        return self._encoded(number, made.weights, privacy=facts)

    def _made(self, number: int, attempt: int) -> Released:
        """Ask a cohort, and return what comes of it."""
        self._sum_up(number, self._chosen(number))
        reach("release-summed")
        return self._strategy.release(fresh=attempt > 1)

    def _chosen(self, number: int) -> list[str]:
        """Return who is asked in a round, of all that are enrolled."""
        members = sorted(self._roster.members)
        if self._plan.factorization is not None:
            return eligible(members, number, bands=self._plan.factorization.bands, seed=self._settings.seed)
        return poisson_cohort(members, self._plan, self._coins)

    def _sum_up(self, number: int, cohort: list[str]) -> None:
        config = ConfigRecord({"cohort": cohort, "frozen": False})

        def asked() -> list[Message]:
            return list(self._strategy.configure_train(number, ArrayRecord(), config, self._grid))

        def take(answers: Sequence[tuple[int, Reply]]) -> None:
            clients = self._strategy.asked
            self._strategy.receive_all([(clients[position], reply) for position, reply in answers])

        self._ask_until_deadline(asked, take)

    def _publish_release(self, number: int, payload: bytes) -> Version:
        """Publish released bytes; scoring them on the coordinator's own data is post-processing."""
        weights, facts = decode_weights(payload)
        told = _facts(facts)
        energy = [float(told["retained_energy"])]
        new = self._new_version(number, weights, payload, energy)
        recipe = {**new.recipe, "privacy": {**told, "plan": self._plan.model_dump(mode="json")}}
        metrics = self._metrics(weights, energy)
        seconds = self._settings.cohort.round_deadline_s
        return self._commit(replace(new, recipe=recipe, metrics=metrics, seconds=seconds))


def _facts(metadata: Mapping[str, object]) -> dict[str, str | float]:
    told = metadata.get("privacy")
    if not isinstance(told, dict):
        raise PayloadError("expected an adapter that was released under privacy, got one without its ledger row")
    return told
