"""Edit what a classifier knows with a fresh adapter over those it has: what every way to forget shares.

::

    W = W_0 + [B_1 ... B_n  B] [A_1; ...; A_n; A]         B = 0 at first; only B and A are trained

Neither the base model nor an earlier adapter is written: the fresh factors are stacked on theirs, so the edit can be
kept, shown or taken away as one more adapter, and the next edit is stacked on this one. Methods differ in their loss.
:func:`edit` trains the ones that GS-LoRA is compared with. GS-LoRA takes the same steps on the same rows in rounds
(:mod:`pomona.continual.edit_rounds`), so that its examples may be spread over owners.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pomona.adapters import LoraFactors
from pomona.batches import batch_indices
from pomona.continual.encoder import Adapter, FrozenEncoder, States
from pomona.continual.training import stacked
from pomona.errors import ConfigError, DataError
from pomona.forget_settings import EditSettings
from pomona.seeds import fresh_a, seed_of


class Head(Protocol):
    """What turns features into logits; :mod:`pomona.continual.heads` has three."""

    def logits(self, features: Tensor) -> Tensor:
        """Return ``(examples, classes)`` of features ``(examples, width)``, with gradient to them."""
        ...


@dataclass(frozen=True, slots=True)
class Classifier:
    """One or several adapters of a frozen encoder, and a head over the features.

    Attributes:
        classes: In the order of the head's logits.
        adapters: What the features are made with.
        head: Logits of features, the same head under every adapter.
        routes: For each class the position of the adapter that its examples are trained under; empty: always the
            first.
        sharpness: What logits are multiplied with before a softmax: 1 for a linear head, more for cosines and for
            scores of a ridge head, which lie between 0 and 1.
    """

    classes: tuple[str, ...]
    adapters: tuple[Adapter, ...]
    head: Head
    routes: tuple[int, ...] = ()
    sharpness: float = 1.0

    def __post_init__(self) -> None:
        if not self.adapters or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"expected an adapter and distinct classes, got {len(self.adapters)} and {self.classes}")
        if self.routes and len(self.routes) != len(self.classes):
            raise ValueError(f"expected a route for each of {len(self.classes)} classes, got {len(self.routes)}")

    def logits(self, features: Tensor) -> Tensor:
        """Return logits that a softmax may be taken of, ``(examples, classes)``."""
        return self.head.logits(features) * self.sharpness

    def routed(self, targets: Tensor) -> Tensor:
        """Return the position of the adapter for examples of some classes, like ``targets``."""
        return torch.tensor(self.routes)[targets] if self.routes else torch.zeros_like(targets)

    def indices(self, classes: Collection[str]) -> tuple[int, ...]:
        """Return the indices of some classes, ascending.

        Raises:
            DataError: One is unknown, or none is left besides them.
        """
        if unknown := sorted(set(classes) - set(self.classes)):
            raise DataError(f"expected classes out of {', '.join(self.classes)}, got {', '.join(unknown)}")
        if not classes or len(set(classes)) == len(self.classes):
            raise DataError(f"expected some but not all of {len(self.classes)} classes, got {len(set(classes))}")
        return tuple(sorted(self.classes.index(each) for each in set(classes)))


@dataclass(frozen=True, slots=True)
class Examples:
    """Labelled examples.

    Attributes:
        states: One for each example.
        targets: Class indices ``(examples,)`` int64.
    """

    states: States
    targets: Tensor

    def __len__(self) -> int:
        return len(self.states)

    def subset(self, chosen: Tensor) -> "Examples":
        """Return the examples at some positions, or where a mask is true."""
        positions = chosen.nonzero()[:, 0] if chosen.dtype == torch.bool else chosen
        return Examples(self.states.subset(positions.tolist()), self.targets[positions])

    def of(self, classes: Collection[int]) -> Tensor:
        """Return which examples are of some classes, ``(examples,)`` bool."""
        return torch.isin(self.targets, torch.tensor(sorted(classes), dtype=torch.long))


def few_of_each(examples: Examples, count: int, *, seed: int) -> Examples:
    """Return at most ``count`` examples of each class, drawn by seed: a replay buffer, or the few-shot setting."""
    generator = torch.Generator().manual_seed(seed_of("few", seed))
    order = torch.randperm(len(examples), generator=generator)
    targets = examples.targets[order]
    chosen = [order[targets == each][:count] for each in sorted(set(targets.tolist()))]
    return examples.subset(torch.cat(chosen).sort().values)


@dataclass(frozen=True, slots=True)
class Step:
    """What a loss may look at.

    Attributes:
        number: From 0.
        features: ``(examples, width)``, with gradient.
        logits: ``(examples, classes)``, with gradient.
        targets: True classes ``(examples,)``.
        rows: Positions among all examples ``(examples,)``.
        forgotten: Which are of the forgotten classes ``(examples,)`` bool.
        adapter: The factors in training.
    """

    number: int
    features: Tensor
    logits: Tensor
    targets: Tensor
    rows: Tensor
    forgotten: Tensor
    adapter: Adapter


Loss = Callable[[Step], Tensor]


@dataclass(frozen=True, slots=True)
class Edited:
    """What an edit gives.

    Attributes:
        adapter: The fresh factors alone.
        classifier: With the fresh factors stacked on each of its adapters; head and classes as they were.
        losses: Of each step.
    """

    adapter: Adapter
    classifier: Classifier
    losses: tuple[float, ...]


def edit(
    encoder: FrozenEncoder,
    classifier: Classifier,
    examples: Examples,
    forget: Collection[str],
    *,
    loss: Loss,
    settings: EditSettings,
    seed: int,
) -> Edited:
    """Train a fresh adapter over those of a classifier; what is given is left as it is.

    An example goes through the adapter of its class. Where there are several adapters, examples to forget go through
    each of them in turn, because at prediction they may be sent through any.

    Args:
        encoder: The frozen encoder.
        classifier: What to edit.
        examples: Retained ones and those of the forgotten classes together.
        forget: The classes to forget.
        loss: To be made small.
        settings: Rank, steps, batches, learning rate.
        seed: Decides the first factors and the order of examples; nothing else is random.

    Raises:
        DataError: A class is unknown, or there are no examples of the forgotten or of the other classes.
        ConfigError: The loss became NaN or infinite.
    """
    forgotten = to_forget(classifier, examples, forget)
    adapter = trainable_adapter(encoder, rank=settings.rank, seed=seed)
    parameters = [factor for each in adapter.values() for factor in (each.a, each.b)]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    losses: list[float] = []
    for number, rows in enumerate(drawn_rows(examples, forgotten, settings, seed=seed)):
        rate = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * number / settings.steps))
        optimizer.param_groups[0]["lr"] = rate
        value = loss(step_of(encoder, classifier, examples, adapter, rows, forgotten[rows], number))
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
        if not math.isfinite(losses[-1]):
            raise ConfigError(f"forgetting diverged at step {number}, its loss is {losses[-1]}; lower learning_rate")
    kept = {name: LoraFactors(a=f.a.detach(), b=f.b.detach(), scale=f.scale) for name, f in adapter.items()}
    return Edited(kept, with_adapter(classifier, kept), tuple(losses))


def to_forget(classifier: Classifier, examples: Examples, forget: Collection[str]) -> Tensor:
    """Return which examples are to be forgotten, ``(examples,)`` bool.

    Raises:
        DataError: A class is unknown, all classes would go, or there are no examples of one kind.
    """
    forgotten = examples.of(classifier.indices(forget))
    if not 0 < int(forgotten.sum()) < len(examples):
        raise DataError(
            f"expected examples of the classes to forget and of others, "
            f"got {int(forgotten.sum())} and {int((~forgotten).sum())}"
        )
    return forgotten


def trainable_adapter(encoder: FrozenEncoder, *, rank: int, seed: int) -> dict[str, LoraFactors]:
    """Return factors to train for every layer of an encoder, whose product is zero."""
    return {
        name: LoraFactors(
            a=fresh_a(name, rank, inputs, seed=seed).requires_grad_(),
            b=torch.zeros(outputs, rank, requires_grad=True),
            scale=2.0,
        )
        for name, (outputs, inputs) in encoder.manifest.layers.items()
    }


def with_adapter(classifier: Classifier, adapter: Adapter) -> Classifier:
    """Return a classifier with an adapter stacked on each of its own."""
    adapters = tuple(stacked(each, adapter) for each in classifier.adapters)
    return Classifier(classifier.classes, adapters, classifier.head, classifier.routes, classifier.sharpness)


def features_of(encoder: FrozenEncoder, classifier: Classifier, examples: Examples) -> Tensor:
    """Return features ``(examples, width)`` without gradient, each example under the adapter of its class."""
    return _by_route(classifier.routed(examples.targets), len(classifier.adapters), lambda position, chosen: (
        encoder.all_features(examples.states.subset(chosen), classifier.adapters[position])
    ))  # fmt: skip


def step_of(
    encoder: FrozenEncoder,
    classifier: Classifier,
    examples: Examples,
    adapter: Mapping[str, LoraFactors],
    rows: Tensor,
    forgotten: Tensor,
    number: int,
) -> Step:
    """Return what a loss may look at.

    Args:
        encoder: The frozen encoder.
        classifier: What is edited.
        examples: All that there are.
        adapter: The factors in training.
        rows: Positions of the step's examples among all.
        forgotten: Which of the step's examples are to be forgotten.
        number: Of the step, from 0.
    """
    targets, count = examples.targets[rows], len(classifier.adapters)
    routes = torch.where(forgotten, number % count, classifier.routed(targets))
    features = _by_route(routes, count, lambda position, chosen: (
        encoder.features(examples.states.subset(rows[chosen].tolist()), stacked(classifier.adapters[position], adapter))
    )).cpu()  # fmt: skip
    return Step(number, features, classifier.logits(features), targets, rows, forgotten, adapter)


def _by_route(routes: Tensor, count: int, features: Callable[[int, Sequence[int]], Tensor]) -> Tensor:
    """Return features in the order of ``routes``, made one adapter at a time."""
    chosen = [(routes == position).nonzero()[:, 0] for position in range(count)]
    parts = [features(position, rows.tolist()) for position, rows in enumerate(chosen) if len(rows)]
    return torch.cat(parts)[torch.argsort(torch.cat(chosen))]


def drawn_rows(examples: Examples, forgotten: Tensor, settings: EditSettings, *, seed: int) -> Iterator[Tensor]:
    """Yield the positions of each step's examples, retained ones before forgotten ones."""
    lengths = [len(row) for row in examples.states.rows]
    retained = endless_rows(lengths, ~forgotten, settings.batch_size, seed_of("retained", seed))
    unwanted = endless_rows(lengths, forgotten, settings.forget_batch_size, seed_of("forgotten", seed))
    for _ in range(settings.steps):
        yield torch.cat([next(retained), next(unwanted)])


def endless_rows(lengths: Sequence[int], wanted: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield the positions of batches of the wanted examples, of which there must be one, pass after pass."""
    rows, generator = wanted.nonzero()[:, 0], np.random.default_rng(seed)
    while True:
        sizes = [lengths[row] for row in rows.tolist()]
        for chosen in batch_indices(sizes, batch_size=batch_size, generator=generator):
            yield rows[torch.from_numpy(chosen)]
