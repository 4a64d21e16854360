"""Server optimisers on the change that a round makes, as stacked blocks.

With the global adapter ``G``, what the strategy made of it ``S(G)``, and ``D = S(G) - G``::

    M' = beta_1 M + D                                          FedAvgM      (Hsu et al. 2019, section 3)
    M' = beta_1 M + (1 - beta_1) D                             FedAdam      (Reddi et al. 2021, algorithm 2)
    v' = beta_2 v + (1 - beta_2) mean(D^2)                     per layer
    G' = truncate(G + eta M')          or      truncate(G + eta M' / (sqrt(v') + tau))

``M`` is an adapter itself: momentum is one more block of the stack, recompressed to the same bound. The second moment
of the published FedAdam is one number per weight, which has no low rank; here it is one per layer, the mean square of
the change, so that each layer gets its own step size. Parameters trained whole get one per parameter, as published.

References: Hsu et al. 2019 (https://arxiv.org/abs/1909.06335); Reddi et al., ICLR 2021 (https://arxiv.org/abs/2003.00295).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pomona.adapters import AdapterWeights, LoraFactors
from pomona.aggregation.flora import aggregate_layers
from pomona.aggregation.verify import update_norm
from pomona.aggregation_settings import ServerOptimizerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerState:
    """What a server optimiser remembers; empty before the first round.

    Attributes:
        momentum: ``M``, layers as factors of scale 1.
        layer_moments: ``v`` of each layer.
        head_moments: ``v`` of each parameter that is trained whole.
    """

    momentum: AdapterWeights = field(default_factory=AdapterWeights)
    layer_moments: Mapping[str, float] = field(default_factory=dict)
    head_moments: Mapping[str, Tensor] = field(default_factory=dict)


def server_step(
    before: AdapterWeights,
    after: AdapterWeights,
    state: OptimizerState,
    *,
    settings: ServerOptimizerSettings,
    max_rank: int,
    energy: float,
) -> tuple[AdapterWeights, OptimizerState, dict[str, float]]:
    """Return the next global adapter, what is remembered, and the share of energy kept per layer.

    Args:
        before: ``G``.
        after: ``S(G)``.
        state: Of the round before.
        settings: Kind, ``eta``, ``beta_1``, ``beta_2``, ``tau``; ``fedavg`` with ``eta = 1`` gives ``after`` itself.
        max_rank: Of the result and of the momentum.
        energy: Share of the energy that truncation keeps.
    """
    adam = settings.kind == "fedadam"
    beta = 0.0 if settings.kind == "fedavg" else settings.momentum
    fresh = 1.0 - beta if adam else 1.0
    momentum = _momentum(before, after, state.momentum, beta=beta, fresh=fresh, max_rank=max_rank)
    changes = {name: tensor - before.heads[name] for name, tensor in after.heads.items()}
    layer_moments = _layer_moments(before, after, state, settings) if adam else {}
    head_moments = {
        name: settings.beta_2 * state.head_moments.get(name, torch.zeros_like(change))
        + (1.0 - settings.beta_2) * change.square()
        for name, change in changes.items()
        if adam
    }
    sized = {
        name: _times(factors, settings.step / _divisor(layer_moments.get(name), settings))
        for name, factors in momentum.layers.items()
    }
    layers, kept = aggregate_layers(before.layers, [sized], weights=[1.0], max_rank=max_rank, energy=energy)
    heads = {
        name: before.heads[name] + settings.step * step / (head_moments[name].sqrt() + settings.tau if adam else 1.0)
        for name, step in momentum.heads.items()
    }
    remembered = OptimizerState(momentum=momentum, layer_moments=layer_moments, head_moments=head_moments)
    return AdapterWeights(layers=layers, heads=heads), remembered, kept


def _momentum(
    before: AdapterWeights, after: AdapterWeights, old: AdapterWeights, *, beta: float, fresh: float, max_rank: int
) -> AdapterWeights:
    layers, _ = aggregate_layers(
        {}, [old.layers, after.layers, before.layers], weights=[beta, fresh, -fresh], max_rank=max_rank, energy=1.0
    )
    heads = {
        name: beta * old.heads.get(name, torch.zeros_like(tensor)) + fresh * (tensor - before.heads[name])
        for name, tensor in after.heads.items()
    }
    return AdapterWeights(layers=layers, heads=heads)


def _layer_moments(
    before: AdapterWeights, after: AdapterWeights, state: OptimizerState, settings: ServerOptimizerSettings
) -> dict[str, float]:
    change, _ = aggregate_layers({}, [after.layers, before.layers], weights=[1.0, -1.0], max_rank=1 << 30, energy=1.0)
    moments = {}
    for name, factors in change.items():
        mean_square = update_norm({name: factors}, {}) ** 2 / (factors.b.shape[0] * factors.a.shape[1])
        old = state.layer_moments.get(name, 0.0)
        moments[name] = settings.beta_2 * old + (1.0 - settings.beta_2) * mean_square
    return moments


def _divisor(moment: float | None, settings: ServerOptimizerSettings) -> float:
    return 1.0 if settings.kind != "fedadam" else (moment or 0.0) ** 0.5 + settings.tau


def _times(factors: LoraFactors, number: float) -> LoraFactors:
    return LoraFactors(a=factors.a, b=factors.b, scale=factors.scale * number)
