"""One federated run, from the first handshake to the last version: the round loop of the coordinator.

Flower's own ``Strategy.start`` waits for everybody, always starts at round 1, and has no deadline for one client.
This loop takes replies as they come, closes a round at its deadline, lets clients join between rounds, and publishes
every round to the registry before the next one begins.
"""

import contextlib
import logging
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from pomona.adapters import AdapterWeights
from pomona.base_model import find_base_model
from pomona.batches import Encoded
from pomona.coordinator.beginning import load_held_out
from pomona.coordinator.enrolment import choose_cohort
from pomona.coordinator.membership import Membership
from pomona.coordinator.recovery import committed_rounds, known_members, unfinished_round, waiting_submissions
from pomona.coordinator.replies import collect
from pomona.coordinator.strategy import Aggregate, LoraStrategy
from pomona.coordinator.trusted import TrustedTrainer
from pomona.errors import (
    RunFailed,
)
from pomona.failpoints import reach
from pomona.lora_model import AdaptedModel, Scores
from pomona.settings import RunSettings
from pomona.storage.records import Exactness, NewVersion, Version
from pomona.strategies import BY_NAME as FACTS
from pomona.wire import decode_weights, encode_weights

_log = logging.getLogger(__name__)

_SENDINGS = 3  # of a round's work


class RoundLoop(Membership):
    """One run, for as long as this process has it."""

    def _prepare(self) -> None:
        settings, invitation = self._settings, self._invitation
        self._model = AdaptedModel(
            find_base_model(settings.model.base),
            task=settings.task,
            labels=invitation.labels,
            target_modules=settings.model.target_modules,
        )
        held_out = load_held_out(settings).dataset
        self._held_out: Encoded = self._model.encode(
            held_out.texts, held_out.labels, max_length=settings.model.max_length
        )
        self._strategy = self._make_strategy(AdapterWeights(heads=self._model.initial_heads(seed=settings.seed)))

    def _make_strategy(self, weights: AdapterWeights) -> LoraStrategy:
        settings, invitation = self._settings, self._invitation
        return LoraStrategy(
            settings=settings,
            invitation=invitation,
            manifest=self._model.manifest,
            registry=self._registry,
            roster=self._roster,
            weights=weights,
            trusted=TrustedTrainer(settings, invitation, self._model) if settings.defence.trusted_data else None,
        )

    def run(self) -> list[Version]:
        """Run the rounds that are left and return the versions of all, oldest first.

        Raises:
            As :func:`pomona.coordinator.federation.run_federation`.
        """
        self._strategy.summary()
        published = self._recover()
        if not published:
            self._wait_for_clients()
            scores = self._score(self._strategy.weights)
            initial = {"accuracy": scores.accuracy, "loss": scores.loss}
            self._registry.set_initial_metrics(self._invitation.run_id, initial)
        return [*published, *(self._round(number) for number in range(len(published) + 1, self._settings.rounds + 1))]

    def _recover(self) -> list[Version]:
        """Take up what an earlier process of this run has published; return it."""
        run_id = self._invitation.run_id
        self._roster.members |= known_members(self._registry, run_id, self._settings.training)
        rounds = committed_rounds(self._registry, run_id)
        published = [each.version for each in rounds if each.version]
        if published:
            last = published[-1]
            weights, _ = decode_weights(self._registry.payload(last.ref))
            kept = str(last.recipe.get("method_state", ""))
            self._strategy.recover(last.ref, weights, self._registry.blobs.get(kept) if kept else b"")
            _log.info("run %s goes on after round %d, from %s", run_id, len(published), last.ref)
            self._wait_for_enough(self._expected(rounds[-1].cohort))
        return published

    def _expected(self, last_cohort: Sequence[str]) -> Collection[str]:
        """Return whom a run that was cut off waits for: who was there last, and everybody where cohorts are drawn.

        From fewer clients another cohort would be drawn than from those that were there.
        """
        cohort = self._settings.cohort
        drawn = cohort.size is not None or cohort.fraction is not None
        return set(self._roster.members) if drawn else last_cohort

    def _cohort(self, number: int) -> list[str]:
        """Return who is asked in a round: those that were, where it was begun before."""
        begun = unfinished_round(self._registry, self._invitation.run_id, number)
        if begun is None:
            present = self._wait_for_enough()
            return choose_cohort(present, self._settings.cohort, seed=self._settings.seed, round_number=number)
        if begun.frozen_at is not None:
            return list(begun.cohort)
        here = {each.client for each in waiting_submissions(self._registry, self._invitation.run_id, number)}
        self._wait_for_enough(set(begun.cohort) - here)
        return list(begun.cohort)

    def _round(self, number: int) -> Version:
        """Run a round, and ask again where the server stood still so long that it forgot what was being sent to it.

        Who has answered is not asked again; an answer to what was sent first counts for nothing.
        """
        for _ in range(_SENDINGS - 1):
            with contextlib.suppress(ObjectPushError):
                return self._try_round(number)
            _log.warning("round %d: not all of the work got to the server; sending it again", number)
        return self._try_round(number)

    def _try_round(self, number: int) -> Version:
        run_id, strategy = self._invitation.run_id, self._strategy
        self._make_sure()
        cohort = self._cohort(number)
        opened = self._registry.open_round(run_id, number, parent=strategy.parent or None, cohort=cohort)
        reach("round-opened")
        with self._failing(number):
            config = ConfigRecord({"cohort": cohort, "frozen": opened.frozen_at is not None})
            messages = list(strategy.configure_train(number, ArrayRecord(), config, self._grid))
            self._collect(number, messages)
            reach("round-closing")
            self._make_sure()
            if strategy.enough:
                self._registry.freeze_round(run_id, number)
                reach("round-frozen")
            self._drop_silent(number, cohort)
            aggregate = strategy.close()
            reach("round-aggregated")
            self._make_sure()
            version = self._publish(number, aggregate)
            reach("version-published")
        strategy.weights, strategy.parent = aggregate.combined.weights, version.ref
        return version

    def _collect(self, number: int, messages: Sequence[Message]) -> None:
        deadline_s = self._settings.cohort.round_deadline_s
        asked = self._strategy.asked
        for group in collect(self._puller, messages, deadline_s=deadline_s, idle=self._enrol_newcomers):
            answers = [(asked[position], reply) for position, reply in group]
            for (client, _), reason in zip(answers, self._strategy.receive_all(answers), strict=True):
                if reason:
                    self._tell([client], reason, number=number)

    def _drop_silent(self, number: int, cohort: Sequence[str]) -> None:
        """Record who has not answered, and tell them; what they send later is read by nobody."""
        heard = {each.client for each in self._registry.submissions(self._invitation.run_id, number)}
        silent = sorted(set(cohort) - heard)
        self._strategy.missed(silent)
        self._tell(silent, f"it did not come within {self._settings.cohort.round_deadline_s:g} s", number=number)

    def _publish(self, number: int, aggregate: Aggregate) -> Version:
        made = aggregate.combined
        energy = list(made.retained_energy.values()) or [1.0]
        return self._commit(
            replace(
                self._new_version(number, made.weights, self._encoded(number, made.weights), energy),
                exactness=exactness_of(self._settings, min(energy)),
                metrics={**self._metrics(made.weights, energy), "train_loss": made.train_loss},
                weights=made.client_weights,
                reduced=made.reduced,
                quarantined=made.quarantined,
                bytes_down=aggregate.bytes_down,
                bytes_up=aggregate.bytes_up,
                seconds=aggregate.seconds,
            )
        )

    def _commit(self, new: NewVersion) -> Version:
        return self._registry.publish_round(new)

    def _encoded(self, number: int, weights: AdapterWeights, **facts: object) -> bytes:
        """Return the payload of a round's version.

        Raises:
            RunFailed: It is not finite.
        """
        _check_finite(weights, number)
        known = {"format": "adapter/1", "base_sha256": self._invitation.base_sha256}
        return encode_weights(weights, metadata={**known, "run_id": self._invitation.run_id, "round": number, **facts})

    def _new_version(self, number: int, weights: AdapterWeights, payload: bytes, energy: Sequence[float]) -> NewVersion:
        settings = self._settings
        return NewVersion(
            run_id=self._invitation.run_id,
            round_number=number,
            adapter=settings.name,
            payload=payload,
            base_sha256=self._invitation.base_sha256,
            rank=weights.rank,
            exactness="approximate",
            retained_energy=min(energy),
            recipe={
                "strategy": settings.aggregation.strategy,
                "task": settings.task,
                "labels": list(self._invitation.labels),
                "max_rank": settings.aggregation.max_rank,
                "energy": settings.aggregation.energy,
                "max_length": settings.model.max_length,
                "seed": settings.seed,
                **_options(settings),
                **self._kept_state(),
            },
        )

    def _metrics(self, weights: AdapterWeights, energy: Sequence[float]) -> dict[str, float]:
        scores = self._score(weights)
        return {
            "accuracy": scores.accuracy,
            "loss": scores.loss,
            "retained_energy_mean": float(np.mean(energy)),
            "retained_energy_min": min(energy),
        }

    def _kept_state(self) -> dict[str, str]:
        """Keep what the aggregation remembers between rounds, and say in the recipe where."""
        state = self._strategy.method_state
        return {"method_state": self._registry.blobs.put(state)} if state else {}

    def _score(self, weights: AdapterWeights) -> Scores:
        self._model.attach(weights)
        return self._model.score(self._held_out)


def _options(settings: RunSettings) -> dict[str, object]:
    """Return what a run chose besides its strategy."""
    limits = settings.aggregation.model_dump(mode="json", exclude_defaults=True)
    names = ("warm_start", "rank_partitioned", "self_pruning", "server_optimizer", "rank_schedule")
    chosen: dict[str, object] = {name: limits[name] for name in names if name in limits}
    return chosen | ({"defence": settings.defence.kind} if settings.defence.kind != "none" else {})


def _check_finite(weights: AdapterWeights, number: int) -> None:
    tensors = [tensor for each in weights.layers.values() for tensor in (each.a, each.b)]
    if not all(bool(tensor.isfinite().all()) for tensor in (*tensors, *weights.heads.values())):
        raise RunFailed(f"the aggregate of round {number} has NaN or an infinity; lower aggregation.max_update_norm")


def exactness_of(settings: RunSettings, energy: float) -> Exactness:
    """Return what can be said of an aggregate that kept this share of its energy, in the layer that kept least."""
    limits = settings.aggregation
    plain = limits.server_optimizer.kind == "fedavg" and limits.server_optimizer.step == 1.0
    if not FACTS[limits.strategy].exact or limits.rank_partitioned or settings.defence.kind != "none" or not plain:
        return "approximate"
    return "exact" if energy >= 1.0 else "truncated"
