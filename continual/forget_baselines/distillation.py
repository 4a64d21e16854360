"""Unlearn by wrong labels while the old answers are kept: learning without forgetting (LwF) for forgetting.

::

    L = CE(retained, y) + CE(forgotten, y~) + lambda T^2 KL( softmax(z_old / T) || softmax(z / T) )    on retained

Reference: Li and Hoiem 2016 (arXiv:1606.09282), as GS-LoRA's comparison uses it.

What is wrong with it: as with wrong labels, something false is learned about the forgotten examples; and the old
answers tell how like each retained example is to the forgotten class, so they teach that class again.
"""

from collections.abc import Collection
from functools import partial

from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from pomona.continual.editing import Classifier, Examples, Step, edit, features_of
from pomona.continual.encoder import FrozenEncoder
from pomona.continual.forget_baselines.wrong_labels import wrong_labels
from pomona.continual.forgetting import Forgotten, forgotten_by
from pomona.forget_settings import EditSettings


class DistillationSettings(EditSettings):
    """How old answers are kept.

    Attributes:
        weight: ``lambda``.
        temperature: ``T``.
    """

    weight: NonNegativeFloat = 1.0
    temperature: PositiveFloat = 2.0


def forget_by_distillation(
    encoder: FrozenEncoder,
    classifier: Classifier,
    examples: Examples,
    forget: Collection[str],
    *,
    settings: DistillationSettings,
    seed: int,
) -> Forgotten:
    """Train on wrong labels and old answers; arguments and errors as of ``forget_classes``."""
    labels = wrong_labels(examples, classifier.indices(forget), classes=len(classifier.classes), seed=seed)
    old = classifier.logits(features_of(encoder, classifier, examples)).detach()
    loss = partial(_loss, labels=labels, old=old, settings=settings)
    return forgotten_by(edit(encoder, classifier, examples, forget, loss=loss, settings=settings, seed=seed))


def divergence_from(old: Tensor, new: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return ``T^2 KL(softmax(old / T) || softmax(new / T))``, the mean over examples."""
    wanted, found = (each / temperature for each in (old, new))
    distance = kl_div(found.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")
    return distance * temperature**2


def _loss(step: Step, *, labels: Tensor, old: Tensor, settings: DistillationSettings) -> Tensor:
    losses, gone = cross_entropy(step.logits, labels[step.rows], reduction="none"), step.forgotten
    kept = divergence_from(old[step.rows][~gone], step.logits[~gone], temperature=settings.temperature)
    return losses[~gone].mean() + losses[gone].mean() + settings.weight * kept
