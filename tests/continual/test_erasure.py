"""What is stored of a class leaves with it, to the last digit where that can be; otherwise it comes back."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.continual.taught import Taught, taught

from pomona.continual.editing import Classifier
from pomona.continual.erasure import subtract_classes, without_rows
from pomona.continual.forgetting import forget_classes
from pomona.continual.heads import (
    CosineHead,
    LinearHead,
    RidgeSums,
    class_means,
    random_projection,
    ridge_head,
    ridge_sums,
)
from pomona.errors import DataError
from pomona.forget_settings import ForgetSettings

PROJECTION = random_projection(6, 20, seed=0)
NAMES = ("animal", "food", "tool", "weather")


@pytest.fixture(scope="module")
def known(tiny_bert: Path, toy_data: Path) -> Taught:
    return taught(tiny_bert, toy_data)


def rows_of(seed: int, *, count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(count, 6, generator=generator), dim=1)
    targets = torch.cat([torch.arange(4), torch.randint(4, (count - 4,), generator=generator)])
    return features, targets


def sums_of(features: torch.Tensor, targets: torch.Tensor, classes: int = 4) -> RidgeSums:
    return ridge_sums(features, targets, projection=PROJECTION, classes=classes)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 500), gone=st.sets(st.integers(0, 3), min_size=1, max_size=3))
def test_what_is_left_is_what_would_be_had_the_classes_never_come(seed: int, gone: set[int]) -> None:
    features, targets = rows_of(seed)
    out = torch.isin(targets, torch.tensor(sorted(gone)))
    left = subtract_classes(
        sums_of(features, targets), features[out], targets[out], sorted(gone), projection=PROJECTION
    )
    kept = [i for i in range(4) if i not in gone]
    never = sums_of(features[~out], torch.tensor([kept.index(t) for t in targets[~out].tolist()]), len(kept))
    for found, expected in ((left.total, never.total), (left.held_out, never.held_out)):
        torch.testing.assert_close(found.gram, expected.gram, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(found.cross, expected.cross, atol=1e-9, rtol=1e-9)
        assert found.count == expected.count
    torch.testing.assert_close(
        ridge_head(left, projection=PROJECTION, regularization=1.0).weight,
        ridge_head(never, projection=PROJECTION, regularization=1.0).weight, atol=1e-9, rtol=1e-9,
    )  # fmt: skip


def test_examples_that_are_not_those_of_the_sums_are_refused() -> None:
    features, targets = rows_of(0)
    sums, food = sums_of(features, targets), targets == 1
    for wrong in (features[food][1:], features[food] + 0.01):
        with pytest.raises(DataError, match="expected all examples of the classes to forget"):
            subtract_classes(sums, wrong, torch.ones(len(wrong)).long(), [1], projection=PROJECTION)


def test_an_edited_adapter_alone_leaves_the_class_in_the_prototypes(known: Taught) -> None:
    """What goes wrong without erasure: another part of the system tells the class as well as before."""
    features = known.encoder.all_features(known.train.states)
    prototypes = CosineHead(class_means(features, known.train.targets, classes=4))
    general = Classifier(known.classifier.classes, ({},), prototypes)
    budget = {"rank": 4, "steps": 40, "batch_size": 12, "forget_batch_size": 6, "learning_rate": 1e-2}
    edited = forget_classes(
        known.encoder, known.classifier, known.train, ["food"],
        settings=ForgetSettings.model_validate(budget), seed=0,
    ).classifier  # fmt: skip
    assert known.accuracies(edited)["food"] <= 0.1
    assert known.accuracies(general)["food"] > 0.8  # the prototypes were made without the adapter, and still tell it
    moved = known.encoder.all_features(known.train.states, edited.adapters[0])
    again = CosineHead(class_means(moved, known.train.targets, classes=4))
    renewed = Classifier(edited.classes, edited.adapters, again)
    assert known.accuracies(renewed)["food"] > 0.3  # renewed with its examples
    after = known.accuracies(without_rows(general, ["food"]))
    assert after.pop("food") == 0.0
    assert min(after.values()) > 0.8


def test_rows_leave_a_classifier_with_their_routes(known: Taught) -> None:
    several = Classifier(NAMES, ({}, {}), LinearHead.zeros(4, known.encoder.width), routes=(0, 1, 0, 1))
    left = without_rows(several, ["animal"])
    assert left.classes == NAMES[1:]
    assert left.routes == (1, 0, 1)
    assert left.head.logits(torch.ones(1, 16)).shape == (1, 3)
    ridge = ridge_head(sums_of(*rows_of(0)), projection=PROJECTION)
    with pytest.raises(DataError, match="a linear or a cosine head"):
        without_rows(replace(several, head=ridge), ["animal"])
