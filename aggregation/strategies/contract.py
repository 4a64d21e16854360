"""What every strategy takes and gives. A strategy is a module with two functions, ``assign`` and ``aggregate``.

The state that a strategy sees is the global adapter, one :class:`LoraFactors` of scale 1 per layer. What a server
optimiser or self-pruning remember besides is the coordinator's, and kept beside each version. Where a strategy keeps
several parts in it (what clients train on, and what stays frozen), the parts are stacked, and their order is part of
its contract.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from pomona.adapters import LoraFactors
from pomona.aggregation.flora import aggregate_layers
from pomona.aggregation_settings import SelfPruningSettings
from pomona.protocol import Initial, Trains
from pomona.settings import TrainingSettings

Layers = Mapping[str, LoraFactors]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What holds for all rounds of a run.

    Attributes:
        shapes: ``(out, in)`` of every adapted layer.
        seed: Of the run.
        max_rank: Largest rank of a client, and of the global adapter where it is bounded.
        energy: Share of the energy that a truncation keeps, within ``max_rank``.
        training: Of the clients; it decides their scales.
        rank: That all clients train, where a strategy needs equal ranks.
        warm_start: Clients go on from the largest components of the global adapter.
        rank_partitioned: Weights are normalised per component over the clients that have it.
        self_pruning: Clients give up components that they do not use.
    """

    shapes: Mapping[str, tuple[int, int]]
    seed: int = 0
    max_rank: int = 64
    energy: float = 1.0
    training: TrainingSettings = field(default_factory=TrainingSettings)
    rank: int = 8
    warm_start: bool = False
    rank_partitioned: bool = False
    self_pruning: SelfPruningSettings | None = None

    def scale(self, rank: int) -> float:
        """Return what stands in front of ``B A`` on a client of this rank."""
        return self.training.scale_of(rank)

    def layer_rank(self, name: str, rank: int) -> int:
        """Return the rank of one layer on a client of this rank."""
        return self.training.layer_rank(name, rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What one client is given in one round.

    Attributes:
        layers: The global adapter as this client gets it, scales folded in.
        rank: Rank of the adapter that it trains.
        trainable: So many leading components of each layer are what it starts from, its own scale divided out of
            ``b``; the rest stays frozen under it. What is missing up to ``rank`` starts from fresh rows of A and B = 0.
        trains: Which factors get gradients and travel back.
        adapter_seed: Of the fresh rows of A.
        initial: How the fresh rows of A are drawn.
        draws_a: A does not travel: the client draws that of the leading components from ``adapter_seed``.
        tail_from: The first component of the tail, whose norms the client's loss penalises.
        tail_penalty: Weight of that penalty; 0: none.
    """

    layers: Layers = field(default_factory=dict)
    rank: int
    trainable: int = 0
    trains: Trains = "both"
    adapter_seed: int
    initial: Initial = "uniform"
    draws_a: bool = False
    tail_from: int = 0
    tail_penalty: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """What one client trained, verified.

    Attributes:
        layers: Its factors, with the scale of its training; both factors, also where only one was trained.
        weight: ``p_k``; the weights of a round sum to 1.
    """

    layers: Layers
    weight: float

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(factors.rank for factors in self.layers.values())


class Strategy(Protocol):
    """The two functions of a strategy's module."""

    def assign(self, state: Layers, *, rank: int, round_number: int, rules: Rules) -> Assignment:
        """Return what a client that can train ``rank`` is given."""
        ...

    def aggregate(
        self, state: Layers, contributions: Sequence[Contribution], *, round_number: int, rules: Rules
    ) -> tuple[dict[str, LoraFactors], dict[str, float]]:
        """Return the next global adapter, and the share of energy that its truncation kept, per layer."""
        ...


class AddingStrategy(Strategy, Protocol):
    """A strategy whose result is the old global adapter plus a sum, which it takes one by one."""

    def aggregate(
        self, state: Layers, contributions: Iterable[Contribution], *, round_number: int, rules: Rules
    ) -> tuple[dict[str, LoraFactors], dict[str, float]]:
        """Return the same as any strategy; the contributions are gone through once, and none is kept."""
        ...


def mean_factors(contributions: Sequence[Contribution], name: str) -> tuple[Tensor, Tensor]:
    """Return ``sum_k p_k A_k`` and ``sum_k p_k s_k B_k`` of a layer, float64; for factors of one shape."""
    parts = [(each.layers[name], each.weight) for each in contributions]
    mean_a = sum(weight * factors.a.double() for factors, weight in parts)
    mean_b = sum(weight * factors.scale * factors.b.double() for factors, weight in parts)
    assert isinstance(mean_a, Tensor)
    assert isinstance(mean_b, Tensor)
    return mean_a, mean_b


def leading(factors: LoraFactors, rank: int) -> LoraFactors:
    """Return the first components of an adapter of scale 1, at most ``rank``."""
    return LoraFactors(a=factors.a[:rank].contiguous(), b=factors.b[:, :rank].contiguous())


def trailing(factors: LoraFactors, rank: int) -> LoraFactors:
    """Return the components of an adapter of scale 1 after the first ``rank``."""
    return LoraFactors(a=factors.a[rank:].contiguous(), b=factors.b[:, rank:].contiguous())


def truncated_sum(
    current: Layers, updates: Sequence[Layers], *, weights: Sequence[float], rules: Rules
) -> tuple[dict[str, LoraFactors], dict[str, float]]:
    """Return ``truncate(current + sum_k w_k update_k)`` in float32, and the share of energy kept, per layer."""
    layers, kept = aggregate_layers(current, updates, weights=weights, max_rank=rules.max_rank, energy=rules.energy)
    return {name: folded(factors.a, factors.scale * factors.b) for name, factors in layers.items()}, kept


def folded(a: Tensor, b: Tensor) -> LoraFactors:
    """Return float32 factors of scale 1."""
    return LoraFactors(a=a.float().contiguous(), b=b.float().contiguous())
