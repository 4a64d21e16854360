"""How fast a forgotten class comes back: steps of training until it is told as well as before, or nearly.

::

    steps = min { n : accuracy of the class after n steps >= share * accuracy before forgetting }

A classifier that merely hides a class learns it again faster than one that never knew it. So the figure is to be read
beside that of a classifier trained without the class; both start from a head row of zeros and a fresh adapter.

Reference: relearning time of Golatkar et al. 2020 (arXiv:1911.04933), in steps of fixed batches.
"""

from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch.nn.functional import cross_entropy

from pomona.aggregation_settings import Fraction
from pomona.continual.editing import Classifier, Examples, drawn_rows, trainable_adapter
from pomona.continual.encoder import FrozenEncoder
from pomona.continual.heads import LinearHead
from pomona.continual.training import stacked
from pomona.errors import DataError
from pomona.forget_settings import EditSettings


class RelearnSettings(EditSettings):
    """How a class is learned again.

    Attributes:
        share: Of the old accuracy that has to be reached.
        every: Steps between two looks at the accuracy.
        head_rate: Learning rate of the head.
    """

    steps: PositiveInt = 60
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    head_rate: Annotated[float, Field(gt=0)] = 5e-3
    share: Fraction = 0.9
    every: PositiveInt = 2


def relearning_steps(
    encoder: FrozenEncoder,
    classifier: Classifier,
    examples: Examples,
    held_out: Examples,
    *,
    accuracy_before: float,
    settings: RelearnSettings,
    seed: int,
) -> int | None:
    """Return after how many steps one class is told again, to within ``settings.every``; None if it is not.

    Args:
        encoder: The frozen encoder.
        classifier: With a linear head that has no row for the class; left as it is.
        examples: Of the class, whose target is the number of the classifier's classes, and of all others.
        held_out: Of the class alone.
        accuracy_before: On ``held_out``, before the class was forgotten.
        settings: Steps, batches, learning rates.
        seed: Decides the first factors and the order of examples.

    Raises:
        DataError: The head is not linear, or ``held_out`` has none or others than the class.
    """
    new = len(classifier.classes)
    if not isinstance(classifier.head, LinearHead) or not len(held_out) or bool((held_out.targets != new).any()):
        raise DataError(f"expected a linear head and held-out examples with target {new} alone")
    adapter = trainable_adapter(encoder, rank=settings.rank, seed=seed)
    grown = classifier.head.grown(new + 1)
    head = LinearHead(grown.weight.clone().requires_grad_(), grown.bias.clone().requires_grad_())
    layers = [factor for each in adapter.values() for factor in (each.a, each.b)]
    optimizer = torch.optim.Adam(
        [
            {"params": layers, "lr": settings.learning_rate},
            {"params": [head.weight, head.bias], "lr": settings.head_rate},
        ]
    )
    for number, rows in enumerate(drawn_rows(examples, examples.of([new]), settings, seed=seed), start=1):
        both = stacked(classifier.adapters[0], adapter)
        features = encoder.features(examples.states.subset(rows.tolist()), both).cpu()
        loss = cross_entropy(head.logits(features), examples.targets[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if number % settings.every == 0:
            with torch.no_grad():
                both = stacked(classifier.adapters[0], adapter)
                found = head.logits(encoder.all_features(held_out.states, both)).argmax(1)
            if float((found == new).double().mean()) >= settings.share * accuracy_before:
                return number
    return None
