"""What `forgetting.py` compares: the classifier that is to forget, and ways to forget with grids of equal size."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from forgetting_data import Material
from torch import Tensor

from pomona.continual.editing import Classifier, Examples, few_of_each
from pomona.continual.encoder import FrozenEncoder
from pomona.continual.erasure import without_rows
from pomona.continual.forget_baselines.distillation import DistillationSettings, forget_by_distillation
from pomona.continual.forget_baselines.negative_gradient import NegativeGradientSettings, forget_by_negative_gradient
from pomona.continual.forget_baselines.retrain import RetrainSettings, retrain_without, train_classifier
from pomona.continual.forget_baselines.scrub import ScrubSettings, forget_by_scrubbing
from pomona.continual.forget_baselines.wrong_labels import WrongLabelSettings, forget_by_wrong_labels
from pomona.continual.forgetting import Forgotten, forget_classes
from pomona.forget_settings import EditSettings, ForgetSettings
from pomona.mos_settings import LoopSettings

LEARNED = 150  # examples of each class that the classifier, and the oracle, learn from
REPLAY = 30  # of them, examples of each class that are at hand when a request comes
TRAINING = RetrainSettings()
REPLAY_TRAINING = tuple(
    RetrainSettings(training=LoopSettings(epochs=epochs, min_steps=100, learning_rate=2e-3)) for epochs in (6, 12, 24)
)
STEPS = 80

Edits = Callable[..., Forgotten]


@dataclass(frozen=True, slots=True)
class Method:
    """A way to forget, and the settings that validation may choose among, the same number for each."""

    edit: Edits
    settings: type[EditSettings]
    grid: tuple[Mapping[str, Any], ...]
    fixed: Mapping[str, Any]

    def configured(self, choice: int, *, rank: int) -> EditSettings:
        """Return one setting of the grid."""
        return self.settings.model_validate({"steps": STEPS, "rank": rank, **self.fixed, **self.grid[choice]})


_BOUNDS = ({"beta": 0.3, "margin": 3.0}, {"beta": 1.0, "margin": 3.0}, {"beta": 0.3, "margin": 1.0})
METHODS = {
    "GS-LoRA": Method(forget_classes, ForgetSettings, _BOUNDS, {"retention": "labels"}),
    "GS-LoRA++": Method(
        forget_classes,
        ForgetSettings,
        ({"push": 0.1, "pull": 0.1}, {"push": 0.3, "pull": 0.3}, {"push": 0.3, "pull": 1.0}),
        {"retention": "labels"},
    ),
    "LoRA (no groups)": Method(forget_classes, ForgetSettings, _BOUNDS, {"retention": "labels", "sparsity": 0.0}),
    "L2": Method(
        forget_by_wrong_labels, WrongLabelSettings, ({"penalty": 1e-4}, {"penalty": 1e-3}, {"penalty": 1e-2}), {}
    ),
    "EWC": Method(
        forget_by_wrong_labels,
        WrongLabelSettings,
        ({"penalty": 1e-4}, {"penalty": 1e-3}, {"penalty": 1e-2}),
        {"anchor": "ewc"},
    ),
    "LwF": Method(
        forget_by_distillation, DistillationSettings, ({"weight": 0.1}, {"weight": 0.3}, {"weight": 1.0}), {}
    ),
    "SCRUB": Method(
        forget_by_scrubbing,
        ScrubSettings,
        ({"weight": 0.1}, {"weight": 1.0}, {"weight": 0.1, "parting": 0.25}),
        {},
    ),
    "negative gradient": Method(
        forget_by_negative_gradient, NegativeGradientSettings, ({"weight": 0.03}, {"weight": 0.1}, {"weight": 0.3}), {}
    ),
}
ON_REPLAY, ORACLE = "retrain on replay", "retrain (oracle)"
RETRAINED = (ON_REPLAY, ORACLE)
CHOICES = {**{name: len(way.grid) for name, way in METHODS.items()}, ON_REPLAY: len(REPLAY_TRAINING), ORACLE: 1}


@dataclass(frozen=True)
class Bench:
    """Some material, and a classifier of all its classes for each seed."""

    seed: int
    material: Material

    @property
    def encoder(self) -> FrozenEncoder:
        """The base model."""
        return self.material.encoder

    @property
    def names(self) -> tuple[str, ...]:
        """All classes."""
        return self.material.names

    @cached_property
    def learned(self) -> Examples:
        """What the classifier learned from."""
        return few_of_each(self.material.examples["train"], LEARNED, seed=self.seed)

    @cached_property
    def replay(self) -> Examples:
        """What is at hand of it when a request comes."""
        return few_of_each(self.learned, REPLAY, seed=self.seed + 1)

    @property
    def validation(self) -> Examples:
        """What settings are chosen on."""
        return self.material.examples["validation"]

    @property
    def test(self) -> Examples:
        """What is reported on."""
        return self.material.examples["test"]

    @cached_property
    def classifier(self) -> Classifier:
        """An adapter of rank 8 and a linear head, trained on all classes."""
        return train_classifier(self.encoder, self.learned, self.names, settings=TRAINING, seed=self.seed)

    def of(self, examples: Examples, classes: Sequence[str]) -> Tensor:
        """Return which examples are of some classes."""
        return examples.of([self.names.index(each) for each in classes])

    def logits(self, classifier: Classifier, examples: Examples) -> tuple[Tensor, Tensor]:
        """Return features and logits."""
        features = self.encoder.all_features(examples.states, classifier.adapters[0])
        with torch.no_grad():
            return features, classifier.logits(features)


@dataclass(frozen=True, slots=True)
class Result:
    """What a method made of a request.

    Attributes:
        kept: The classifier with the head's rows kept, where the method keeps them.
        removed: Without the rows of all classes forgotten so far.
        facts: Blocks changed, seconds, parameters.
    """

    kept: Classifier
    removed: Classifier
    facts: dict[str, object]


def forget(
    bench: Bench,
    method: str,
    classifier: Classifier,
    request: Sequence[str],
    *,
    earlier: Sequence[str],
    choice: int,
    replay: Examples,
) -> Result:
    """Meet one request over the classifier that the requests before left."""
    started, cpu = time.perf_counter(), time.process_time()
    gone, available = [*earlier, *request], replay.subset(~bench.of(replay, earlier)) if earlier else replay
    facts: dict[str, object] = {}
    if method in RETRAINED:
        rows, training = (bench.learned, TRAINING) if method == ORACLE else (replay, REPLAY_TRAINING[choice])
        kept = removed = retrain_without(
            bench.encoder, bench.classifier, rows, gone, settings=training, seed=bench.seed + len(earlier)
        )
        trained = sum(each.numel() for factors in kept.adapters[0].values() for each in (factors.a, factors.b))
    else:
        way = METHODS[method]
        found = way.edit(
            bench.encoder, classifier, available, request,
            settings=way.configured(choice, rank=bench.material.rank), seed=bench.seed + len(earlier),
        )  # fmt: skip
        kept, removed = found.classifier, without_rows(found.classifier, gone)
        trained = sum(each.numel() for factors in found.adapter.values() for each in (factors.a, factors.b))
        facts = {"groups_total": found.groups_total, "groups_changed": list(found.groups_changed)}
    times = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    trains = {"trained_parameters": trained, "parameters": bench.encoder.parameter_count}
    return Result(kept, removed, {**facts, **times, **trains})
