"""What clients start from under client-level privacy, and what the noised mean changes: four mechanisms, one sum.

==========  ================================================
mechanism   next global adapter, of the noised mean ``u``
==========  ================================================
dp-lora     ``A + u_A``, ``B + u_B``, ``head + u_head``
dp-dylora   likewise; the components beyond ``b_t`` stay
ffa         ``B + u_B`` over the ``A`` of the run
ffa-nested  ``truncate(G + u_B A_t)``, ``head + u_head``
==========  ================================================

What is summed is in :mod:`pomona.privacy.contributions`; the formulas and papers are in :mod:`pomona.privacy.dylora`
and :mod:`pomona.aggregation.strategies.ffa_nested`. All that is done with the mean is post-processing.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from pomona.adapters import AdapterWeights, LoraFactors
from pomona.aggregation.strategies.contract import Assignment, truncated_sum
from pomona.aggregation.strategies.start import starting_factors
from pomona.coordinator.method import Method, Trained, Work
from pomona.manifest import HEAD, LORA_B, AdapterManifest
from pomona.privacy import contributions
from pomona.privacy.dylora import moved, prefix, rank_of_round
from pomona.privacy.plan import PrivacyPlan
from pomona.protocol import SumMechanism
from pomona.settings import RunSettings


class PrivateMethod(Method):
    """The mechanism of a run, made from its plan."""

    def __init__(self, settings: RunSettings, manifest: AdapterManifest, plan: PrivacyPlan) -> None:
        super().__init__(settings, manifest)
        assert plan.mechanism != "dp-sgd"  # which sums nothing over clients, and neither does the next
        assert plan.mechanism != "local-gaussian"
        assert plan.mechanism != "ffa-tasks"  # which has a loop of its own
        self._manifest, self._plan, self._seed = manifest, plan, settings.seed
        self._mechanism: SumMechanism = plan.mechanism

    def rank_of_round(self, round_number: int) -> int | None:
        """Return the rank that all clients train in a round; None: each its own."""
        if self._plan.ranks is not None:
            return rank_of_round(self._plan.ranks, seed=self._seed, round_number=round_number)
        return None if self._plan.mechanism == "ffa-nested" else self.rules.rank

    def widest_rank(self, round_number: int) -> int:
        """Return the rank of what is summed in a round: the largest that a client may train in it."""
        return self.rank_of_round(round_number) or self.largest_rank

    def begin(self, weights: AdapterWeights) -> AdapterWeights:
        """Return the global adapter that the first round starts from: fresh rows of A, and B = 0.

        Components that a round leaves out must be the same in all later ones, so the server draws them.
        """
        if weights.layers or self._plan.mechanism == "ffa-nested":
            return weights
        whole = super().work(weights, rank=self.rules.rank, round_number=1).assignment
        drawn = starting_factors(replace(whole, layers={}), self.rules)
        return AdapterWeights(layers={name: _folded(each) for name, each in drawn.items()}, heads=weights.heads)

    def work(self, weights: AdapterWeights, *, rank: int, round_number: int) -> Work:
        """Return what clients that enrolled with a rank start a round from."""
        common = self.rank_of_round(round_number)
        if self._plan.mechanism != "dp-dylora" or common is None:
            return super().work(weights, rank=rank, round_number=round_number)
        nested = prefix(self._as_trained(weights), common)
        scale = self.rules.scale(common)
        whole = super().work(weights, rank=rank, round_number=round_number).assignment
        assignment = Assignment(
            layers={name: _folded(replace(each, scale=scale)) for name, each in nested.layers.items()},
            rank=common,
            trainable=common,
            adapter_seed=whole.adapter_seed,
        )
        return Work(assignment, starting_factors(assignment, self.rules), scale)

    def shapes(self, round_number: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a contribution in a round, by payload key."""
        training, rank = self.rules.training, self.widest_rank(round_number)
        return contributions.shapes(self._mechanism, self._manifest, training=training, rank=rank)

    def contribution(self, trained: Trained, weights: AdapterWeights, *, round_number: int) -> dict[str, Tensor]:
        """Return what a client contributes before it is clipped, float64, by payload key.

        Args:
            trained: A verified update.
            weights: The global adapter that it was asked with.
            round_number: From 1.
        """
        before, scale = AdapterWeights(layers=trained.work.start, heads=weights.heads), trained.work.scale
        into = self.shapes(round_number)
        return contributions.contribution(self._mechanism, trained.update.weights, before, scale=scale, into=into)

    def apply(
        self, weights: AdapterWeights, mean: Mapping[str, Tensor], *, round_number: int
    ) -> tuple[AdapterWeights, dict[str, float]]:
        """Return the next global adapter, and the share of energy that its truncation kept, per layer.

        Args:
            weights: The global adapter of the round.
            mean: The noised mean, by payload key.
            round_number: From 1.
        """
        if self._plan.mechanism != "ffa-nested":
            after = moved(self._as_trained(weights), mean)
            layers = {name: _folded(each) for name, each in after.layers.items()}
            return AdapterWeights(layers=layers, heads=after.heads), dict.fromkeys(layers, 1.0)
        drawn = super().work(weights, rank=self.largest_rank, round_number=round_number).assignment
        widest = starting_factors(replace(drawn, rank=self.largest_rank), self.rules)
        update = {name: LoraFactors(a=each.a.double(), b=mean[f"{LORA_B}{name}"]) for name, each in widest.items()}
        layers, energy = truncated_sum(weights.layers, [update], weights=[1.0], rules=self.rules)
        heads = {name: (head.double() + mean[f"{HEAD}{name}"]).float() for name, head in weights.heads.items()}
        return self.optimized(weights, AdapterWeights(layers=layers, heads=heads), energy)

    def _as_trained(self, weights: AdapterWeights) -> AdapterWeights:
        """Return the global adapter in the clients' own parameters, the scale of its whole rank beside them."""
        scale = self.rules.scale(self.rules.rank)
        layers = {
            name: LoraFactors(a=each.a, b=each.b * (each.scale / scale), scale=scale)
            for name, each in weights.layers.items()
        }
        return AdapterWeights(layers=layers, heads=weights.heads)


def _folded(factors: LoraFactors) -> LoraFactors:
    return LoraFactors(a=factors.a.contiguous(), b=(factors.scale * factors.b).contiguous())
