"""Groups of LoRA factors that become exactly zero together: one group for each transformer block.

::

    prox:  theta_g <- theta_g * max(0, 1 - t / ||theta_g||),     t = learning rate * lambda * sqrt(p_g)

``theta_g`` are all factors of block ``g`` and ``p_g`` is their number, so this is the proximal step of the group lasso
(Yuan and Lin 2006). GS-LoRA (Zhao et al. 2024) adds ``alpha sum_g ||theta_g||`` to the loss of AdamW instead, without
``sqrt(p_g)``; all groups are of one size there, so its ``alpha`` is ``lambda sqrt(p_g)`` here. A gradient of a norm
never ends at zero, a proximal step does. With the size in it, ``lambda`` is in units of what Adam can do: it moves a
number by about the learning rate, so a group by about the learning rate times ``sqrt(p_g)``.
"""

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pomona.adapters import LoraFactors

_BLOCK = re.compile(r"^(.*?\.\d+)(?:\.|$)")


def block_of(layer: str) -> str:
    """Return the transformer block that a layer belongs to; a layer outside of any is a block of its own.

    Example:
        >>> block_of("bert.encoder.layer.4.output.dense")
        'bert.encoder.layer.4'
    """
    found = _BLOCK.match(layer)
    return found[1] if found else layer


def groups_of(layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the layers of each block, both in the order given."""
    found: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        found[block_of(layer)] = (*found.get(block_of(layer), ()), layer)
    return found


def changed_groups(adapter: Mapping[str, LoraFactors]) -> tuple[str, ...]:
    """Return the blocks whose update is not exactly zero, that is where some layer has neither factor zero."""
    return tuple(
        group
        for group, layers in groups_of(adapter).items()
        if any(bool(adapter[layer].a.any()) and bool(adapter[layer].b.any()) for layer in layers)
    )


def shrink_groups(
    adapter: Mapping[str, LoraFactors], *, strength: float, learning_rate: float
) -> dict[str, LoraFactors]:
    """Return the factors after the proximal step on every block by itself; what is given is left as it is.

    A block that is zero has no gradient, but an optimiser's momentum would move it again: whoever steps on must leave
    it out.

    Args:
        adapter: Factors in training.
        strength: ``lambda``; 0 changes nothing, and from about 1 on no group can grow under Adam.
        learning_rate: Of the step that was just taken.
    """
    kept: dict[str, float] = {}
    for layers in groups_of(adapter).values():
        factors = _factors(adapter, layers)
        threshold = learning_rate * strength * math.sqrt(sum(each.numel() for each in factors))
        norm = float(_norm(factors))
        kept |= dict.fromkeys(layers, max(0.0, 1.0 - threshold / norm) if norm > 0 else 0.0)
    return {
        layer: LoraFactors(a=each.a.detach() * kept[layer], b=each.b.detach() * kept[layer], scale=each.scale)
        for layer, each in adapter.items()
    }


def _factors(adapter: Mapping[str, LoraFactors], layers: Iterable[str]) -> list[Tensor]:
    return [factor for layer in layers for factor in (adapter[layer].a, adapter[layer].b)]


def _norm(factors: Iterable[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack([each.detach().double().norm() for each in factors]))
    return norm
