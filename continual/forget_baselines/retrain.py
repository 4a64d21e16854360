"""Train anew without the classes: on all retained examples the oracle of forgetting, on a few the cheap imitation.

::

    L = CE(retained, y)           a fresh adapter on the frozen base, a fresh linear head

The result has never seen the forgotten examples, so what it can still do with them is what the base model can: every
other way to forget is measured against it. It is exact, and it needs all retained examples and the time to train.

On a replay buffer alone it is as free of the forgotten examples, and loses what the buffer does not hold. With a
pretrained encoder that may be little, so it has to be shown beside every other way.
"""

from collections.abc import Collection

import torch
from pydantic import PositiveFloat, PositiveInt

from pomona.aggregation_settings import Section
from pomona.continual.editing import Classifier, Examples
from pomona.continual.encoder import FrozenEncoder
from pomona.continual.heads import LinearHead
from pomona.continual.training import fresh_adapter, train_adapter
from pomona.errors import DataError
from pomona.mos_settings import LoopSettings


class RetrainSettings(Section):
    """How a classifier is trained.

    Attributes:
        rank: Of the adapter.
        alpha: Its update is ``alpha / rank B A``.
        training: Epochs, learning rates.
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    training: LoopSettings = LoopSettings(epochs=3, min_steps=100, learning_rate=2e-3)


def train_classifier(
    encoder: FrozenEncoder, examples: Examples, classes: Collection[str], *, settings: RetrainSettings, seed: int
) -> Classifier:
    """Train an adapter and a linear head together.

    Args:
        encoder: The frozen encoder.
        examples: What to learn; targets are positions in ``classes``.
        classes: Names of the classes.
        settings: Rank, epochs, learning rates.
        seed: The same seed gives the same bytes.

    Raises:
        DataError: There are no examples.
        ConfigError: The loss became NaN or infinite.
    """
    if not len(examples):
        raise DataError("expected examples to train on, got none")
    adapter, head = train_adapter(
        encoder,
        examples.states,
        examples.targets,
        start=fresh_adapter(encoder, rank=settings.rank, alpha=settings.alpha, seed=seed),
        head=LinearHead.zeros(len(classes), encoder.width),
        settings=settings.training,
        seed=seed,
        trains="both",
    )
    return Classifier(tuple(classes), (adapter,), head)


def retrain_without(
    encoder: FrozenEncoder,
    classifier: Classifier,
    examples: Examples,
    forget: Collection[str],
    *,
    settings: RetrainSettings,
    seed: int,
) -> Classifier:
    """Train anew on the retained examples, with a head that has no rows for the classes to forget.

    Args:
        encoder: The frozen encoder.
        classifier: Whose classes these are; nothing else of it is used.
        examples: All that was learned from, for the oracle, or a replay buffer. Those of ``forget`` are not used.
        forget: The classes to forget, those of earlier requests too.
        settings: Rank, epochs, learning rates.
        seed: The same seed gives the same bytes.

    Raises:
        DataError: A class is unknown, all classes would go, or no examples are left.
        ConfigError: The loss became NaN or infinite.
    """
    gone = set(classifier.indices(forget))
    kept = [position for position in range(len(classifier.classes)) if position not in gone]
    renumbered = torch.full((len(classifier.classes),), -1)
    renumbered[kept] = torch.arange(len(kept))
    retained = examples.subset(~examples.of(gone))
    data = Examples(retained.states, renumbered[retained.targets])
    return train_classifier(encoder, data, [classifier.classes[i] for i in kept], settings=settings, seed=seed)
