"""Other ways to forget: each forgets, each does what its formula says, and the oracle has never seen the class."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.continual.taught import TRAINING, Taught, bytes_of, same_bytes, taught
from torch.nn.functional import cross_entropy, softmax

from pomona.adapters import LoraFactors
from pomona.continual.editing import Classifier, Examples, few_of_each
from pomona.continual.forget_baselines.distillation import (
    DistillationSettings,
    divergence_from,
    forget_by_distillation,
)  # fmt: skip
from pomona.continual.forget_baselines.negative_gradient import NegativeGradientSettings, forget_by_negative_gradient
from pomona.continual.forget_baselines.retrain import RetrainSettings, retrain_without, train_classifier
from pomona.continual.forget_baselines.scrub import ScrubSettings, forget_by_scrubbing
from pomona.continual.forget_baselines.wrong_labels import (
    WrongLabelSettings,
    fisher_information,
    forget_by_wrong_labels,
    wrong_labels,
)  # fmt: skip
from pomona.continual.forgetting import Forgotten, forget_classes
from pomona.errors import DataError
from pomona.forget_settings import EditSettings, ForgetSettings
from pomona.mos_settings import LoopSettings

BUDGET = {"rank": 4, "steps": 40, "batch_size": 12, "forget_batch_size": 6, "learning_rate": 1e-2}
METHODS: dict[str, Callable[..., Forgotten]] = {
    "l2": partial(forget_by_wrong_labels, settings=WrongLabelSettings.model_validate(BUDGET)),
    "ewc": partial(
        forget_by_wrong_labels,
        settings=WrongLabelSettings.model_validate({**BUDGET, "anchor": "ewc", "fisher_examples": 8}),
    ),
    "lwf": partial(forget_by_distillation, settings=DistillationSettings.model_validate({**BUDGET, "weight": 0.3})),
    "scrub": partial(forget_by_scrubbing, settings=ScrubSettings.model_validate(BUDGET)),
    "negative gradient": partial(
        forget_by_negative_gradient, settings=NegativeGradientSettings.model_validate(BUDGET)
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def known(tiny_bert: Path, toy_data: Path) -> Taught:
    return taught(tiny_bert, toy_data)


@pytest.mark.parametrize("method", METHODS)
def test_every_way_forgets_the_class_and_keeps_most_of_the_others(known: Taught, method: str) -> None:
    kept = bytes_of(known.classifier.adapters[0])
    after = known.accuracies(METHODS[method](known.encoder, known.classifier, known.train, ["food"], seed=0).classifier)
    assert after["food"] <= 0.35
    assert after["animal"] + after["tool"] + after["weather"] >= 2.1
    assert same_bytes(kept, bytes_of(known.classifier.adapters[0]))


def test_without_a_bound_the_loss_of_the_forgotten_has_no_end(known: Taught) -> None:
    """What goes wrong without the bound: the ascent never has enough."""
    fast = {**BUDGET, "learning_rate": 3e-2, "steps": 60}
    unbounded = forget_by_negative_gradient(
        known.encoder, known.classifier, known.train, ["food"],
        settings=NegativeGradientSettings.model_validate({**fast, "weight": 1.0}), seed=0,
    )  # fmt: skip
    bounded = forget_classes(
        known.encoder, known.classifier, known.train, ["food"], settings=ForgetSettings.model_validate(fast), seed=0
    )
    food = known.classifier.classes.index("food")
    rows = known.train.subset(known.train.targets == food)

    def loss(classifier: Classifier) -> float:
        with torch.no_grad():
            logits = classifier.logits(known.encoder.features(rows.states, classifier.adapters[0]).cpu())
        return float(cross_entropy(logits, rows.targets))

    assert loss(unbounded.classifier) > loss(bounded.classifier) + 2.0 > 4.0
    assert unbounded.losses[-1] < -10.0 < 0.0 <= bounded.losses[-1]


def test_wrong_labels_are_retained_classes_and_touch_nothing_else(known: Taught) -> None:
    labels = wrong_labels(known.train, (1, 2), classes=4, seed=0)
    gone = known.train.of([1, 2])
    assert torch.equal(labels[~gone], known.train.targets[~gone])
    assert set(labels[gone].tolist()) == {0, 3}
    assert not torch.equal(labels, wrong_labels(known.train, (1, 2), classes=4, seed=1))


def test_the_fisher_information_is_the_mean_squared_gradient_of_single_examples(known: Taught) -> None:
    few = few_of_each(known.train, 1, seed=0)
    found = fisher_information(known.encoder, known.classifier, few, limit=10, seed=0)
    name = next(iter(found))
    below = known.classifier.adapters[0]

    def loss(dense: torch.Tensor, one: Examples) -> torch.Tensor:
        merged = LoraFactors(a=torch.eye(dense.shape[1]), b=below[name].delta() + dense)
        features = known.encoder.features(one.states, {**below, name: merged})
        return cross_entropy(known.classifier.logits(features), one.targets)

    expected = torch.zeros_like(found[name])
    for row in range(len(few)):
        dense = torch.zeros_like(expected, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(dense, few.subset(torch.tensor([row]))), dense)
        expected += gradient.square()
    torch.testing.assert_close(found[name] / found[name].sum(), expected / expected.sum(), rtol=1e-3, atol=1e-7)
    sizes = sum(each.numel() for each in found.values())
    assert sum(float(each.sum()) for each in found.values()) / sizes == pytest.approx(1.0, rel=1e-4)
    with pytest.raises(DataError, match="none has a gradient"):
        fisher_information(
            known.encoder, known.classifier, few.subset(torch.tensor([], dtype=torch.long)), limit=1, seed=0
        )


def test_the_divergence_from_a_teacher_is_its_sum() -> None:
    old, new = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    p, q = softmax(old / 2, 1), softmax(new / 2, 1)
    expected = float((p * (p / q).log()).sum()) / 4 * 4
    assert float(divergence_from(old, new, temperature=2.0)) == pytest.approx(expected)
    assert float(divergence_from(old, old)) == pytest.approx(0.0, abs=1e-12)


def test_the_oracle_is_a_function_of_the_retained_examples_alone(known: Taught) -> None:
    """Exact by construction: other examples of the class, or none, give the same bytes."""
    food = known.classifier.classes.index("food")
    without = known.train.subset(known.train.targets != food)
    relabelled = Examples(known.train.states, known.train.targets)
    short = TRAINING.model_copy(update={"training": LoopSettings(epochs=1, min_steps=10, batch_size=16)})
    one, other = (
        retrain_without(known.encoder, known.classifier, each, ["food"], settings=short, seed=0)
        for each in (relabelled, without)
    )
    assert one.classes == ("animal", "tool", "weather")
    assert one.logits(torch.zeros(1, known.encoder.width)).shape == (
        1,
        3,
    )
    assert same_bytes(bytes_of(one.adapters[0]), bytes_of(other.adapters[0]))


def test_the_oracle_tells_the_retained_classes(known: Taught) -> None:
    oracle = retrain_without(known.encoder, known.classifier, known.train, ["food"], settings=TRAINING, seed=1)
    after = known.accuracies(oracle)
    assert after.pop("food") == 0.0
    assert min(after.values()) > 0.8


def test_nothing_to_train_on_is_refused(known: Taught) -> None:
    nothing = known.train.subset(torch.tensor([], dtype=torch.long))
    with pytest.raises(DataError, match="examples to train on"):
        train_classifier(known.encoder, nothing, known.classifier.classes, settings=RetrainSettings(), seed=0)
    assert issubclass(ScrubSettings, EditSettings)
