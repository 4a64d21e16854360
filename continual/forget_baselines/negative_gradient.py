"""Descend on what should stay and ascend on what should go: NegGrad+ of the unlearning literature.

::

    L = CE(retained, y) - weight CE(forgotten, y)

References: the comparison of Kurmanji et al. 2023 (arXiv:2302.09880), after Golatkar et al. 2020 (arXiv:1911.04933).

What is wrong with it: the second term has no bound, so in the end all of the loss is about making it ever larger, and
the features of everything are bent for that. The bound of GS-LoRA is the cure.
"""

from collections.abc import Collection
from functools import partial

from pydantic import PositiveFloat
from torch import Tensor
from torch.nn.functional import cross_entropy

from pomona.continual.editing import Classifier, Examples, Step, edit
from pomona.continual.encoder import FrozenEncoder
from pomona.continual.forgetting import Forgotten, forgotten_by
from pomona.forget_settings import EditSettings


class NegativeGradientSettings(EditSettings):
    """How much the ascent weighs.

    Attributes:
        weight: Of the forgotten examples.
    """

    weight: PositiveFloat = 0.3


def forget_by_negative_gradient(
    encoder: FrozenEncoder,
    classifier: Classifier,
    examples: Examples,
    forget: Collection[str],
    *,
    settings: NegativeGradientSettings,
    seed: int,
) -> Forgotten:
    """Train with the sign of the loss turned where to forget; arguments and errors as of ``forget_classes``."""
    loss = partial(_loss, weight=settings.weight)
    return forgotten_by(edit(encoder, classifier, examples, forget, loss=loss, settings=settings, seed=seed))


def _loss(step: Step, *, weight: float) -> Tensor:
    losses, gone = cross_entropy(step.logits, step.targets, reduction="none"), step.forgotten
    return losses[~gone].mean() - weight * losses[gone].mean()
