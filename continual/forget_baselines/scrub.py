"""Part from a teacher on what should go, follow it on what should stay, in turns: SCRUB (Kurmanji et al. 2023).

::

    max step   L = - KL( softmax(z_old) || softmax(z) )                       on forgotten, in the first steps only
    min step   L = weight KL( softmax(z_old) || softmax(z) ) + CE(z, y)       on retained

Reference: Towards unbounded machine unlearning, NeurIPS 2023 (arXiv:2302.09880). The teacher is the classifier before.

What is wrong with it: the max step has no bound, so the two kinds of steps oscillate; when the max steps end, what was
forgotten may come back, and when they go on, what is retained suffers.
"""

from collections.abc import Collection
from functools import partial
from typing import Annotated

from pydantic import Field, NonNegativeFloat
from torch import Tensor
from torch.nn.functional import cross_entropy

from pomona.continual.editing import Classifier, Examples, Step, edit, features_of
from pomona.continual.encoder import FrozenEncoder
from pomona.continual.forget_baselines.distillation import divergence_from
from pomona.continual.forgetting import Forgotten, forgotten_by
from pomona.forget_settings import EditSettings


class ScrubSettings(EditSettings):
    """How teacher and student part.

    Attributes:
        weight: Of the retained examples' divergence from the teacher; their cross-entropy has weight 1.
        parting: Share of the steps in which every other one is a max step.
    """

    weight: NonNegativeFloat = 0.1
    parting: Annotated[float, Field(gt=0, le=1)] = 0.5


def forget_by_scrubbing(
    encoder: FrozenEncoder,
    classifier: Classifier,
    examples: Examples,
    forget: Collection[str],
    *,
    settings: ScrubSettings,
    seed: int,
) -> Forgotten:
    """Train in max and min steps; arguments and errors as of ``forget_classes``."""
    old = classifier.logits(features_of(encoder, classifier, examples)).detach()
    loss = partial(_loss, old=old, settings=settings)
    return forgotten_by(edit(encoder, classifier, examples, forget, loss=loss, settings=settings, seed=seed))


def _loss(step: Step, *, old: Tensor, settings: ScrubSettings) -> Tensor:
    gone, teacher = step.forgotten, old[step.rows]
    if step.number % 2 == 0 and step.number < settings.parting * settings.steps:
        return -divergence_from(teacher[gone], step.logits[gone])
    kept = ~gone
    followed = divergence_from(teacher[kept], step.logits[kept])
    return settings.weight * followed + cross_entropy(step.logits[kept], step.targets[kept])
