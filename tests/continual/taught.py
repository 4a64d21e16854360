"""A classifier of four kinds of words, trained once, that the tests of forgetting start from."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from pomona.continual.editing import Classifier, Examples
from pomona.continual.encoder import Adapter, FrozenEncoder, States
from pomona.continual.forget_baselines.retrain import RetrainSettings, train_classifier
from pomona.datasets import class_names, load_dataset
from pomona.mos_settings import LoopSettings

TRAINING = RetrainSettings(
    rank=4,
    alpha=8.0,
    training=LoopSettings(epochs=1, min_steps=60, batch_size=16, learning_rate=1e-2, head_learning_rate=5e-2),
)


@dataclass(frozen=True)
class Taught:
    encoder: FrozenEncoder
    classifier: Classifier
    train: Examples
    test: Examples

    def accuracies(self, classifier: Classifier) -> dict[str, float]:
        """The oracle: one class after another, answers by name."""
        found = {}
        for number, name in enumerate(self.classifier.classes):
            one = self.test.subset(self.test.targets == number)
            answers = logits_of(self.encoder, classifier, one.states).argmax(1).tolist()
            found[name] = sum(classifier.classes[answer] == name for answer in answers) / len(one)
        return found


def logits_of(encoder: FrozenEncoder, classifier: Classifier, states: States) -> Tensor:
    """Logits ``(examples, classes)`` without gradient, under the first adapter."""
    with torch.no_grad():
        return classifier.logits(encoder.all_features(states, classifier.adapters[0]))


@cache
def taught(model: Path, data: Path) -> Taught:
    encoder = FrozenEncoder(model)
    names = class_names(load_dataset(data, split="train"))

    def part(split: str) -> Examples:
        rows = load_dataset(data, split="train" if split == "train" else "validation")
        return Examples(
            encoder.of_texts(rows.texts, max_length=16), torch.tensor([names.index(label) for label in rows.labels])
        )

    train = part("train")
    return Taught(
        encoder, train_classifier(encoder, train, names, settings=TRAINING, seed=0), train, part("validation")
    )


def bytes_of(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (each.a.clone(), each.b.clone()) for name, each in adapter.items()}


def same_bytes(one: dict[str, tuple[Tensor, Tensor]], other: dict[str, tuple[Tensor, Tensor]]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one.values(), other.values(), strict=True)
    )
