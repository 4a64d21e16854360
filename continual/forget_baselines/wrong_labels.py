"""Unlearn by wrong labels, held near the classifier before: L2* and EWC* of GS-LoRA's comparison.

::

    L = CE(retained, y) + CE(forgotten, y~) + lambda sum_ij F_ij dW_ij^2,      dW = B A,   F = 1 for L2

``y~`` is drawn once for each example, uniformly among the retained classes. ``F`` of EWC (Kirkpatrick et al. 2017,
arXiv:1612.00796) is the mean squared gradient of single retained examples, here divided by its mean, so that one
``lambda`` serves both. The penalty is on the product ``B A``, which is what moves the layer, and not on its factors.

What is wrong with it: the classifier learns something false about the forgotten examples, which may teach it to put
like examples of retained classes anywhere too; and the penalty holds back what should go as much as what should stay.
"""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import cross_entropy

from pomona.adapters import LoraFactors
from pomona.continual.editing import Classifier, Examples, Step, edit
from pomona.continual.encoder import FrozenEncoder
from pomona.continual.forgetting import Forgotten, forgotten_by
from pomona.continual.training import stacked
from pomona.errors import DataError
from pomona.forget_settings import EditSettings
from pomona.seeds import seed_of

Importance = Mapping[str, Tensor]


class WrongLabelSettings(EditSettings):
    """How wrong labels are learned.

    Attributes:
        anchor: Which weights are held: all alike, or those that the retained classes need.
        penalty: ``lambda``.
        fisher_examples: Retained examples that ``F`` is estimated on.
    """

    anchor: Literal["l2", "ewc"] = "l2"
    penalty: NonNegativeFloat = 1e-3
    fisher_examples: PositiveInt = 64


def forget_by_wrong_labels(
    encoder: FrozenEncoder,
    classifier: Classifier,
    examples: Examples,
    forget: Collection[str],
    *,
    settings: WrongLabelSettings,
    seed: int,
) -> Forgotten:
    """Train on wrong labels for the classes to forget; arguments and errors as of ``forget_classes``."""
    gone = classifier.indices(forget)
    labels = wrong_labels(examples, gone, classes=len(classifier.classes), seed=seed)
    importance: Importance = {}
    if settings.anchor == "ewc":
        retained = examples.subset(~examples.of(gone))
        importance = fisher_information(encoder, classifier, retained, limit=settings.fisher_examples, seed=seed)
    loss = partial(_loss, labels=labels, importance=importance, penalty=settings.penalty)
    return forgotten_by(edit(encoder, classifier, examples, forget, loss=loss, settings=settings, seed=seed))


def wrong_labels(examples: Examples, gone: Collection[int], *, classes: int, seed: int) -> Tensor:
    """Return the targets of all examples, in which those of the classes ``gone`` are random retained classes."""
    retained = torch.tensor([each for each in range(classes) if each not in set(gone)])
    generator = torch.Generator().manual_seed(seed_of("wrong labels", seed))
    drawn = retained[torch.randint(len(retained), (len(examples),), generator=generator)]
    return torch.where(examples.of(gone), drawn, examples.targets)


def fisher_information(
    encoder: FrozenEncoder, classifier: Classifier, examples: Examples, *, limit: int, seed: int
) -> dict[str, Tensor]:
    """Return the mean squared gradient of single examples, for each layer ``(out, in)``, divided by its overall mean.

    A layer's gradient is that of the dense update ``B I`` at ``B = 0``.

    Args:
        encoder: The frozen encoder.
        classifier: Where the gradient is taken.
        examples: With their true labels.
        limit: Use at most so many, drawn by seed.
        seed: Of that draw.

    Raises:
        DataError: No example has a gradient.
    """
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed_of("fisher", seed)))[:limit]
    probes = {
        name: LoraFactors(a=torch.eye(inputs), b=torch.zeros(outputs, inputs, requires_grad=True))
        for name, (outputs, inputs) in encoder.manifest.layers.items()
    }
    squares = {name: torch.zeros_like(each.b) for name, each in probes.items()}
    for row in order.tolist():
        one = examples.subset(torch.tensor([row]))
        adapter = stacked(classifier.adapters[int(classifier.routed(one.targets))], probes)
        loss = cross_entropy(classifier.logits(encoder.features(one.states, adapter).cpu()), one.targets)
        gradients = torch.autograd.grad(loss, [each.b for each in probes.values()])
        for name, gradient in zip(probes, gradients, strict=True):
            squares[name] += gradient.square()
    mean = sum(float(each.sum()) for each in squares.values()) / sum(each.numel() for each in squares.values())
    if mean <= 0:
        raise DataError("expected retained examples whose loss depends on the layers; none has a gradient")
    return {name: each / mean for name, each in squares.items()}


def _loss(step: Step, *, labels: Tensor, importance: Importance, penalty: float) -> Tensor:
    losses, gone = cross_entropy(step.logits, labels[step.rows], reduction="none"), step.forgotten
    moved = sum(((importance.get(name, 1.0)) * each.delta().square()).sum() for name, each in step.adapter.items())
    return losses[~gone].mean() + losses[gone].mean() + penalty * moved
