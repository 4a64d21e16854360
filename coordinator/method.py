"""How a run turns the updates of a round into the next global adapter: its strategy, defence and server optimiser."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from pomona.adapters import AdapterUpdate, AdapterWeights, LoraFactors
from pomona.aggregation.defence import change, defend
from pomona.aggregation.geometry import add_head_changes
from pomona.aggregation.heads import HeadMean, average_heads
from pomona.aggregation.robust import Defended, trusted
from pomona.aggregation.server_optimizer import OptimizerState, server_step
from pomona.aggregation.strategies import ADDING, BY_NAME
from pomona.aggregation.strategies.contract import Assignment, Contribution, Rules
from pomona.aggregation.strategies.hetlora import by_norm, pruned
from pomona.aggregation.strategies.start import starting_factors
from pomona.aggregation.weights import example_weights
from pomona.errors import ConfigError, NotEnoughClients, PayloadError
from pomona.manifest import AdapterManifest
from pomona.ranks import check_pattern
from pomona.settings import RunSettings
from pomona.wire import Factor, decode_weights, encode_weights

_log = logging.getLogger(__name__)

_STATE_FORMAT = "method/1"
_MOMENTUM = "momentum:"
_MOMENT = "moment:"


@dataclass(frozen=True, slots=True)
class Work:
    """What the clients of one rank start a round from.

    Attributes:
        assignment: What they are given.
        start: Their adapter before its first step, where it is not fresh; else empty.
        scale: What stands in front of ``B A`` on them.
    """

    assignment: Assignment
    start: Mapping[str, LoraFactors]
    scale: float

    @property
    def known_factor(self) -> Factor | None:
        """The factor that is not trained, and so does not travel back."""
        match self.assignment.trains:
            case "a":
                return "b"
            case "b":
                return "a"
            case _:
                return None

    @property
    def known(self) -> dict[str, Tensor]:
        """That factor, by module."""
        if self.known_factor is None:
            return {}
        return {name: getattr(factors, self.known_factor) for name, factors in self.start.items()}


@dataclass(frozen=True, slots=True)
class Trained:
    """A verified update and what its client had started from."""

    update: AdapterUpdate
    work: Work

    @property
    def layers(self) -> dict[str, LoraFactors]:
        """Its factors with the scale of training."""
        return {name: replace(each, scale=self.work.scale) for name, each in self.update.weights.layers.items()}

    def change(self, heads: Mapping[str, Tensor]) -> AdapterWeights:
        """What it adds to what its client started from; ``heads`` are the global ones."""
        start = self.work.start if self.work.assignment.trainable else {}
        return change(AdapterWeights(layers=self.layers, heads=self.update.weights.heads), start=start, heads=heads)


@dataclass(frozen=True, slots=True)
class Accepted:
    """A verified update that lies in the registry.

    Attributes:
        client: Who sent it.
        num_examples: What it says of its data.
        train_loss: And of its loss.
        load: Reads it.
    """

    client: str
    num_examples: int
    train_loss: float
    load: Callable[[], Trained]


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """What a round gives.

    Attributes:
        weights: The next global adapter.
        client_weights: What every client that counted counts for.
        reduced: Why a client counts for less than its share.
        quarantined: Why a client whose update was accepted counts for nothing.
        retained_energy: Share of the energy that truncation kept, per layer.
        train_loss: Weighted mean of what clients report.
    """

    weights: AdapterWeights
    client_weights: Mapping[str, float]
    reduced: Mapping[str, str] = field(default_factory=dict)
    quarantined: Mapping[str, str] = field(default_factory=dict)
    retained_energy: Mapping[str, float]
    train_loss: float


class Method:
    """The aggregation of a run; remembers what its server optimiser does.

    Attributes:
        rules: What holds for all its rounds.
        largest_rank: That a client may train.
    """

    def __init__(self, settings: RunSettings, manifest: AdapterManifest) -> None:
        limits = settings.aggregation
        check_pattern(settings.training.rank_pattern, manifest.layers)
        self.largest_rank = _largest_rank(settings, manifest)
        self._settings = settings
        self._strategy = BY_NAME[limits.strategy]
        self._optimizer_state = OptimizerState()
        self.rules = Rules(
            shapes=manifest.layers,
            seed=settings.seed,
            max_rank=limits.max_rank,
            energy=limits.energy,
            training=settings.training,
            rank=limits.rank or limits.max_rank,
            warm_start=limits.warm_start,
            rank_partitioned=limits.rank_partitioned,
            self_pruning=limits.self_pruning,
        )
        self._pruned_ranks: dict[str, int] = {}

    def state(self) -> bytes:
        """Return what this remembers between rounds, ``b""`` where that is nothing."""
        kept = self._optimizer_state
        if not (kept.momentum.layers or kept.momentum.heads or self._pruned_ranks):
            return b""
        heads = {f"{_MOMENTUM}{name}": head for name, head in kept.momentum.heads.items()}
        heads |= {f"{_MOMENT}{name}": head for name, head in kept.head_moments.items()}
        facts = {
            "format": _STATE_FORMAT,
            "layer_moments": dict(kept.layer_moments),
            "pruned_ranks": dict(self._pruned_ranks),
        }
        return encode_weights(AdapterWeights(layers=kept.momentum.layers, heads=heads), metadata=facts)

    def restore(self, state: bytes) -> None:
        """Remember what :meth:`state` returned.

        Raises:
            PayloadError: It is not what that returns.
        """
        if not state:
            return
        weights, facts = decode_weights(state)
        try:
            kept = _StateFacts.model_validate(facts)
        except ValidationError as error:
            raise PayloadError(f"the state of the aggregation is malformed: {error}") from error
        self._pruned_ranks = dict(kept.pruned_ranks)
        self._optimizer_state = OptimizerState(
            momentum=AdapterWeights(layers=weights.layers, heads=_with_prefix(weights.heads, _MOMENTUM)),
            layer_moments=kept.layer_moments,
            head_moments=_with_prefix(weights.heads, _MOMENT),
        )

    def rank_of(self, client: str, enrolled: int) -> int:
        """Return the rank that a client has now; it may have given some of it up."""
        return min(enrolled, self._pruned_ranks.get(client, enrolled))

    def work(self, weights: AdapterWeights, *, rank: int, round_number: int) -> Work:
        """Return what clients that enrolled with a rank start a round from."""
        rank = min([rank, self.largest_rank, *self._cap(round_number)])
        assignment = self._strategy.assign(weights.layers, rank=rank, round_number=round_number, rules=self.rules)
        fresh = assignment.trainable == 0 and assignment.trains == "both"
        start = {} if fresh else starting_factors(assignment, self.rules)
        return Work(assignment, start, self.rules.scale(assignment.rank))

    def combine(
        self,
        weights: AdapterWeights,
        accepted: Sequence[Accepted],
        *,
        round_number: int,
        trusted_change: AdapterWeights | None = None,
    ) -> Combined:
        """Return the next global adapter; a function of the updates in the order given.

        Strategies that add changes read the updates one by one, so that all of them never sit in memory together;
        the other strategies, and defences, hold them all.

        Args:
            weights: The global adapter.
            accepted: The updates of the round.
            round_number: From 1.
            trusted_change: What the coordinator learned itself, where the defence wants it.

        Raises:
            NotEnoughClients: The defence of the run leaves none of them.
        """
        shares = self._shares(accepted)
        adding = ADDING.get(self._settings.aggregation.strategy)
        if adding and self._settings.defence.kind == "none":
            heads = HeadMean()
            made = adding.aggregate(
                weights.layers, _one_by_one(accepted, shares, heads), round_number=round_number, rules=self.rules
            )
            return self._told(accepted, shares, trusted(shares), weights, made, heads.result(), round_number)
        trained = [self._without_tail(each.load()) for each in accepted]
        defended = self._defended(weights, trained, shares, trusted_change)
        counted = [(each, weight) for each, weight in zip(trained, defended.weights, strict=True) if weight > 0.0]
        if not counted:
            return self._unchanged(accepted, shares, defended, weights, round_number)
        contributions = [Contribution(layers=each.layers, weight=weight) for each, weight in counted]
        made = self._strategy.aggregate(weights.layers, contributions, round_number=round_number, rules=self.rules)
        told = self._told(accepted, shares, defended, weights, made, self._heads(weights, counted), round_number)
        if self._settings.aggregation.strategy != "hetlora":
            return told
        used = [each.weight for each in by_norm(contributions)]  # it weighs by norm, not by examples
        return replace(told, client_weights=dict(zip([each.client for each in accepted], used, strict=True)))

    def _unchanged(
        self,
        accepted: Sequence[Accepted],
        shares: Sequence[float],
        defended: Defended,
        weights: AdapterWeights,
        round_number: int,
    ) -> Combined:
        """Return the global adapter as it is, where nobody is trusted."""
        if not weights.layers:
            raise NotEnoughClients(
                f"round {round_number}: the defence trusts none of {len(accepted)} updates, and there is no adapter "
                "yet to go on with"
            )
        made = dict(weights.layers), dict.fromkeys(weights.layers, 1.0)
        return self._told(accepted, shares, defended, weights, made, dict(weights.heads), round_number)

    def _told(
        self,
        accepted: Sequence[Accepted],
        shares: Sequence[float],
        defended: Defended,
        before: AdapterWeights,
        made: tuple[dict[str, LoraFactors], dict[str, float]],
        heads: dict[str, Tensor],
        round_number: int,
    ) -> Combined:
        layers, energy = made
        after, energy = self.optimized(before, AdapterWeights(layers=layers, heads=heads), energy)
        names = [each.client for each in accepted]
        client_weights = {name: weight for name, weight in zip(names, defended.weights, strict=True) if weight > 0.0}
        reasons = {name: reason for name, reason in zip(names, defended.reasons, strict=True) if reason}
        for client, reason in reasons.items():
            _log.warning("round %d: %s: %s", round_number, client, reason)
        return Combined(
            weights=after,
            client_weights=client_weights,
            reduced={client: reason for client, reason in reasons.items() if client in client_weights},
            quarantined={client: reason for client, reason in reasons.items() if client not in client_weights},
            retained_energy=energy,
            train_loss=sum(share * each.train_loss for each, share in zip(accepted, shares, strict=True)),
        )

    def _without_tail(self, trained: Trained) -> Trained:
        if self.rules.self_pruning is None:
            return trained
        weights, rank = trained.update.weights, trained.work.assignment.rank
        kept, layers = pruned(trained.work.start, weights.layers, rank=rank, rules=self.rules)
        if kept < rank:
            _log.info("%s gives up the rank that it did not use: %d, was %d", trained.update.client, kept, rank)
            self._pruned_ranks[trained.update.client] = kept
        return replace(trained, update=replace(trained.update, weights=replace(weights, layers=layers)))

    def _cap(self, round_number: int) -> list[int]:
        """Return the rank of the schedule that holds in a round, if one does."""
        schedule = self._settings.aggregation.rank_schedule
        return [rank for number, rank in schedule if number <= round_number][-1:]

    def _shares(self, accepted: Sequence[Accepted]) -> list[float]:
        alike = self._settings.defence.equal_weights
        return example_weights([1 if alike else each.num_examples for each in accepted])

    def _defended(
        self,
        weights: AdapterWeights,
        trained: Sequence[Trained],
        shares: Sequence[float],
        trusted_change: AdapterWeights | None,
    ) -> Defended:
        if self._settings.defence.kind == "none":
            return trusted(shares)
        changes = [each.change(weights.heads) for each in trained]
        return defend(changes, weights=shares, settings=self._settings.defence, trusted_change=trusted_change)

    def _heads(self, weights: AdapterWeights, counted: Sequence[tuple[Trained, float]]) -> dict[str, Tensor]:
        heads, shares = [each.update.weights.heads for each, _ in counted], [weight for _, weight in counted]
        if self._settings.defence.kind == "none":
            return average_heads(heads, weights=shares)
        return add_head_changes(weights.heads, heads, weights=shares)

    def optimized(
        self, before: AdapterWeights, after: AdapterWeights, energy: dict[str, float]
    ) -> tuple[AdapterWeights, dict[str, float]]:
        """Return what the server optimiser makes of a round's step, and the share of energy that is kept, per layer."""
        limits = self._settings.aggregation
        if limits.server_optimizer.kind == "fedavg" and limits.server_optimizer.step == 1.0:
            return after, energy
        weights, self._optimizer_state, kept = server_step(
            before,
            after,
            self._optimizer_state,
            settings=limits.server_optimizer,
            max_rank=limits.max_rank,
            energy=limits.energy,
        )
        return weights, {name: share * kept.get(name, 1.0) for name, share in energy.items()}


class _StateFacts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    format: Literal["method/1"]
    layer_moments: dict[str, float]
    pruned_ranks: dict[str, int]


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _largest_rank(settings: RunSettings, manifest: AdapterManifest) -> int:
    """Return the largest rank that a client may train.

    Nested FFA trains orthonormal rows, no more than a layer has inputs; HetLoRA's global adapter is as wide as its
    widest client in every layer.
    """
    most, training, strategy = settings.aggregation.max_rank, settings.training, settings.aggregation.strategy
    room = {name: in_ if strategy == "ffa-nested" else most for name, (_, in_) in manifest.layers.items()}
    if strategy not in {"ffa-nested", "hetlora"}:
        return most
    for rank in range(most, 0, -1):
        if all(training.layer_rank(name, rank) <= room[name] for name in room):
            return rank
    raise ConfigError(
        f"training.rank_pattern makes a layer wider than {strategy} allows even for a client of rank 1: lower it"
    )


def _one_by_one(accepted: Sequence[Accepted], shares: Sequence[float], heads: HeadMean) -> Iterator[Contribution]:
    """Yield each update and let go of it; its heads are counted on the way."""
    for each, share in zip(accepted, shares, strict=True):
        trained = each.load()
        heads.add(trained.update.weights.heads, share)
        yield Contribution(layers=trained.layers, weight=share)
        del trained  # before the next is read
