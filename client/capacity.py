"""Choose a LoRA rank by what a machine can carry: free memory, and the time that a round may take.

For a rank ``r`` a client holds, for every adapted layer of ``(out, in)``, the factors, their gradients, two moments of
Adam and the copy that is sent, five numbers for each of ``r (out + in)``. The base model, activations and the frozen
global adapter take what they take whatever the rank, and so does nearly all of the time: a lower rank saves memory and
bytes, hardly any computing. So the time of a step is measured, at rank 1 and at the largest rank that fits, and taken
as a straight line between them.
"""

import bisect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil
import torch

from pomona.adapters import AdapterWeights
from pomona.batches import Encoded
from pomona.client.train import train_locally
from pomona.errors import ConfigError
from pomona.lora_model import AdaptedModel
from pomona.ranks import layer_rank
from pomona.settings import TrainingSettings

_FLOAT32_BYTES = 4
_COPIES = 5
_TRIAL_STEPS = 3
_MOST = 4096  # as the protocol has it

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a client may spend.

    Attributes:
        memory_share: Share of the free memory that the adapter and its training state may take.
        round_s: Seconds that the local training of one round may take; None: any.
    """

    memory_share: float = 0.5
    round_s: float | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A rank, and why it is not larger."""

    rank: int
    reason: str


def choose_rank(
    model: AdaptedModel,
    data: Encoded,
    *,
    training: TrainingSettings,
    min_rank: int,
    max_rank: int,
    budget: Budget,
    free_bytes: Callable[[], int] | None = None,
) -> Choice:
    """Return the largest rank that fits the free memory and the time of a round.

    Args:
        model: The base model; left with adapters attached.
        data: The client's examples.
        training: How a round trains.
        min_rank: The smallest rank that the run takes.
        max_rank: The largest.
        budget: What may be spent.
        free_bytes: Measures the free memory of the device; None: by psutil or CUDA.

    Raises:
        ConfigError: Not even ``min_rank`` fits.
    """
    free = (free_bytes or free_memory)()
    shapes = model.manifest.layers
    choice = Choice(max_rank, f"the run takes no rank above {max_rank}")
    fits = rank_for_memory(shapes, free_bytes=int(free * budget.memory_share), training=training)
    if fits < choice.rank:
        choice = Choice(fits, f"{free / 1e9:.1f} GB are free, and {budget.memory_share:.0%} of that may be used")
    if budget.round_s is not None and choice.rank >= min_rank:
        choice = _within_time(model, data, training, choice, budget.round_s)
    if choice.rank < min_rank:
        raise ConfigError(
            f"this machine can train rank {choice.rank}, the run needs at least {min_rank}: {choice.reason}; "
            "free memory, raise the budget, or give --rank"
        )
    return choice


def rank_for_memory(shapes: Shapes, *, free_bytes: int, training: TrainingSettings | None = None) -> int:
    """Return the largest rank whose factors and training state fit, 0 if none does.

    Example:
        >>> rank_for_memory({"query": (60, 40)}, free_bytes=16_000)
        8
    """
    pattern = training.rank_pattern if training else ()
    largest = free_bytes // (_FLOAT32_BYTES * _COPIES)

    def numbers(rank: int) -> int:
        return sum(layer_rank(pattern, name, rank) * (out + in_) for name, (out, in_) in shapes.items())

    return bisect.bisect_right(range(1, _MOST + 1), largest, key=numbers)


def rank_for_time(*, seconds: float, at_rank_1: float, at_rank: tuple[int, float]) -> int:
    """Return the largest rank whose round takes no longer, on the line through two measurements; 0 if none does.

    Example:
        >>> rank_for_time(seconds=15.0, at_rank_1=10.0, at_rank=(11, 20.0))
        6
    """
    rank, longest = at_rank
    if longest <= seconds or (rank == 1 and at_rank_1 <= seconds):
        return rank
    if at_rank_1 > seconds:
        return 0
    slope = (longest - at_rank_1) / (rank - 1)
    return min(rank, 1 + int((seconds - at_rank_1) / slope))


def steps_of(training: TrainingSettings, examples: int) -> int:
    """Return the optimiser steps of a round."""
    steps = training.local_epochs * -(-examples // training.batch_size)
    return min(steps, training.max_steps) if training.max_steps else steps


def free_memory() -> int:
    """Return the free memory in bytes of the device that trains."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def _within_time(
    model: AdaptedModel, data: Encoded, training: TrainingSettings, choice: Choice, round_s: float
) -> Choice:
    steps = steps_of(training, len(data))
    shortest, longest = (steps * _step_s(model, data, training, rank) for rank in (1, choice.rank))
    rank = rank_for_time(seconds=round_s, at_rank_1=shortest, at_rank=(choice.rank, max(shortest, longest)))
    if rank >= choice.rank:
        return choice
    measured = f"{shortest:.1f} s at rank 1 and {longest:.1f} s at rank {choice.rank}"
    return Choice(rank, f"a round of {steps} steps takes {measured}, and may take {round_s:g} s")


def _step_s(model: AdaptedModel, data: Encoded, training: TrainingSettings, rank: int) -> float:
    """Return the median time of a training step; the first one, which warms up, is left out."""
    trial = training.model_copy(update={"local_epochs": 1, "max_steps": 1})
    start = AdapterWeights(heads=model.initial_heads(seed=0))
    times = []
    for number in range(_TRIAL_STEPS + 1):
        began = time.perf_counter()
        train_locally(model, data, start=start, rank=rank, training=trial, adapter_seed=0, batch_seed=number)
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[_TRIAL_STEPS // 2]
