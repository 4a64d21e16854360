"""Train one task's adapter and head over a frozen encoder.

::

    min_{theta, W, b}  mean CE( softmax(sqrt(d) W f(x; theta) + b), y )

The loop that tasks share, whatever they do differently: which classes the head has, which factors are trained, and what
is done after a step. Everything is a function of its arguments; the same arguments give the same bytes on one machine.
"""

import math
from collections.abc import Callable
from itertools import count, islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from pomona.adapters import LoraFactors
from pomona.batches import batch_indices
from pomona.continual.encoder import NO_ADAPTER, Adapter, FrozenEncoder, States
from pomona.continual.heads import LinearHead
from pomona.errors import ConfigError
from pomona.mos_settings import LoopSettings
from pomona.seeds import fresh_a, seed_of

AfterStep = Callable[[Adapter], Adapter]


def fresh_adapter(encoder: FrozenEncoder, *, rank: int, alpha: float, seed: int) -> Adapter:
    """Return an adapter that changes nothing: ``B`` zero, and ``A`` drawn by seed, the same for all who have it.

    The scale ``alpha / rank`` is folded into ``A``, which is not trained.
    """
    return {
        name: LoraFactors(a=fresh_a(name, rank, inputs, seed=seed) * (alpha / rank), b=torch.zeros(outputs, rank))
        for name, (outputs, inputs) in encoder.manifest.layers.items()
    }


def stacked(adapter: Adapter, frozen: Adapter) -> Adapter:
    """Return one adapter whose update is the sum of both, with gradient to the factors of either; scales are 1."""
    both = {}
    for name in (*adapter, *(name for name in frozen if name not in adapter)):
        parts = [each[name] for each in (adapter, frozen) if name in each]
        both[name] = LoraFactors(
            a=torch.cat([part.a for part in parts]), b=torch.cat([part.scale * part.b for part in parts], dim=1)
        )
    return both


def train_adapter(
    encoder: FrozenEncoder,
    states: States,
    targets: Tensor,
    *,
    start: Adapter,
    head: LinearHead,
    settings: LoopSettings,
    seed: int,
    trains: Literal["b", "both"] = "b",
    frozen: Adapter = NO_ADAPTER,
    after_step: AfterStep | None = None,
) -> tuple[Adapter, LinearHead]:
    """Train an adapter and a head together.

    Args:
        encoder: Gives the features.
        states: The task's examples.
        targets: Row of the head for each, ``(examples,)`` int64. Logits are those of the head's rows and no others, so
            a head of the task's classes alone is trained by local cross-entropy.
        start: Where the adapter starts; is not changed.
        head: Where the head starts; is not changed.
        settings: How long and how fast.
        seed: Of the order of examples.
        trains: Both factors, or ``B`` alone, so that ``A`` stays the same for all tasks.
        frozen: What else changes the layers, and is not trained.
        after_step: Given the adapter after an optimiser step, returns what to go on with; its ``A`` is not read where
            ``B`` alone is trained.

    Returns:
        The adapter and the head, without gradient.

    Raises:
        ConfigError: The loss became NaN or infinite.
    """
    adapter = _trainable(start, trains)
    weight, bias = (tensor.detach().clone().requires_grad_() for tensor in (head.weight, head.bias))
    optimizer = torch.optim.AdamW(
        [
            {"params": _factors(adapter, trains), "lr": settings.learning_rate},
            {"params": [weight, bias], "lr": settings.head_learning_rate},
        ],
        weight_decay=settings.weight_decay,
        fused=True,
    )
    steps = settings.steps(len(states))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for chosen in _order(states, settings.batch_size, steps, seed=seed):
        features = encoder.features(states.subset(chosen.tolist()), stacked(adapter, frozen) if frozen else adapter)
        loss = nn.functional.cross_entropy(LinearHead(weight, bias).logits(features.cpu()), targets[chosen])
        if not math.isfinite(float(loss.detach())):
            raise ConfigError("training diverged, its loss is not finite; lower learning_rate or head_learning_rate")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if after_step is not None:
            _go_on_with(adapter, after_step(_detached(adapter)), trains)
    return _detached(adapter), LinearHead(weight.detach(), bias.detach())


def _order(states: States, batch_size: int, steps: int, *, seed: int) -> list[Tensor]:
    """Return the indices of each batch; every pass in an order of its own."""
    lengths = [len(row) for row in states.rows]
    generator = np.random.default_rng(seed_of("order", seed))
    found = (each for _ in count() for each in batch_indices(lengths, batch_size=batch_size, generator=generator))
    return [torch.from_numpy(each) for each in islice(found, steps)]


def _trainable(start: Adapter, trains: Literal["b", "both"]) -> Adapter:
    return {
        name: LoraFactors(
            a=factors.a.detach().clone().requires_grad_(trains == "both"),
            b=factors.b.detach().clone().requires_grad_(),
            scale=factors.scale,
        )
        for name, factors in start.items()
    }


def _factors(adapter: Adapter, trains: Literal["b", "both"]) -> list[Tensor]:
    return [each for factors in adapter.values() for each in ([factors.a] if trains == "both" else []) + [factors.b]]


@torch.no_grad()
def _go_on_with(adapter: Adapter, chosen: Adapter, trains: Literal["b", "both"]) -> None:
    for name, factors in adapter.items():
        factors.b.copy_(chosen[name].b)
        if trains == "both":
            factors.a.copy_(chosen[name].a)


def _detached(adapter: Adapter) -> Adapter:
    return {
        name: LoraFactors(a=factors.a.detach().clone(), b=factors.b.detach().clone(), scale=factors.scale)
        for name, factors in adapter.items()
    }
