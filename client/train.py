"""Local LoRA training on one client: the global adapter stays frozen, a fresh one is trained. Knows no network."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from pomona.adapters import AdapterWeights
from pomona.batches import Encoded, batches
from pomona.errors import ConfigError
from pomona.lora_model import AdaptedModel
from pomona.protocol import Initial, Trains
from pomona.settings import TrainingSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What local training gives.

    Attributes:
        weights: The fresh adapter's factors, unscaled, and the heads.
        before: The same before the first step.
        loss: Mean training loss over the steps.
        steps: Optimiser steps taken.
    """

    weights: AdapterWeights
    before: AdapterWeights
    loss: float
    steps: int


def train_locally(
    model: AdaptedModel,
    data: Encoded,
    *,
    start: AdapterWeights,
    rank: int,
    training: TrainingSettings,
    adapter_seed: int,
    batch_seed: int,
    trainable: int = 0,
    trains: Trains = "both",
    initial: Initial = "uniform",
    tail: tuple[int, float] = (0, 0.0),
) -> Trained:
    """Train an adapter over the frozen global one, or over a part of it from the rest.

    The same arguments give the same bytes on the same machine.

    Args:
        model: The base model; left with the trained adapters attached.
        data: The client's examples.
        start: Global adapter and heads, scale folded in.
        rank: Rank of the fresh adapter.
        training: Epochs, batch size, learning rates, scale.
        adapter_seed: Shared by all clients of the round; decides the fresh A.
        batch_seed: The client's own; decides the order of examples.
        trainable: Leading components of the global adapter that are trained on.
        trains: The factors that are trained.
        initial: How fresh rows of A are drawn.
        tail: First component of the trainable adapter's tail, and weight of its norms in the loss
            (HetLoRA's self-pruning).

    Raises:
        PayloadError: The global adapter does not fit the model.
        ConfigError: The loss became NaN or infinite.
    """
    model.attach(
        start,
        rank=rank,
        alpha=training.alpha_of(rank),
        rslora=training.rslora,
        rank_pattern=training.rank_pattern,
        seed=adapter_seed,
        trainable=trainable,
        trains=trains,
        initial=initial,
    )
    before = model.local_weights()
    lora, heads = model.parameters()
    optimizer = torch.optim.AdamW(
        [
            {"params": lora, "lr": training.learning_rate},
            {"params": heads, "lr": training.head_learning_rate},
        ],
        weight_decay=training.weight_decay,
        fused=True,
    )
    generator = np.random.default_rng(batch_seed)
    epochs = (batches(data, batch_size=training.batch_size, generator=generator) for _ in range(training.local_epochs))
    losses: list[float] = []
    for batch in itertools.islice(itertools.chain.from_iterable(epochs), training.max_steps or None):
        loss = model.loss(batch)
        if tail[1]:
            loss = loss + tail[1] * model.tail_norm(tail[0])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    mean = float(np.mean(losses))
    if not math.isfinite(mean):
        raise ConfigError(f"training diverged, its mean loss is {mean}; lower the learning rates of the run")
    return Trained(weights=model.local_weights(), before=before, loss=mean, steps=len(losses))
