"""What is stored of a class leaves with it, to the last digit where that can be; otherwise it comes back."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.continual.taught import Taught, taught

from pomona.continual.editing import Classifier
from pomona.continual.erasure import (
    Stored,
    erase_stored,
    reappeared,
    renewed_prototypes,
    subtract_classes,
    without_rows,
)  # fmt: skip
from pomona.continual.forgetting import forget_classes
from pomona.continual.heads import CosineHead, LinearHead, class_means, random_projection, ridge_head, ridge_sums
from pomona.continual.statistics import class_statistics
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


def stored_of(features: torch.Tensor, targets: torch.Tensor) -> Stored:
    return Stored(
        classes=NAMES,
        linear=LinearHead(torch.arange(24.0).reshape(4, 6), torch.arange(4.0)),
        prototypes=CosineHead(class_means(features, targets, classes=4)),
        statistics=class_statistics(features, targets, range(4)),
        sums=ridge_sums(features, targets, projection=PROJECTION, classes=4),
        projection=PROJECTION,
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 500), gone=st.sets(st.sampled_from(NAMES), min_size=1, max_size=3))
def test_what_is_left_is_what_would_be_had_the_classes_never_come(seed: int, gone: set[str]) -> None:
    features, targets = rows_of(seed)
    out = torch.isin(targets, torch.tensor([NAMES.index(name) for name in gone]))
    left = erase_stored(stored_of(features, targets), gone, features=features[out], targets=targets[out])
    kept = [i for i, name in enumerate(NAMES) if name not in gone]
    never = ridge_sums(
        features[~out], torch.tensor([kept.index(t) for t in targets[~out].tolist()]),
        projection=PROJECTION, classes=len(kept),
    )  # fmt: skip
    assert left.sums is not None
    assert left.linear is not None
    assert left.prototypes is not None
    for found, expected in ((left.sums.total, never.total), (left.sums.held_out, never.held_out)):
        torch.testing.assert_close(found.gram, expected.gram, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(found.cross, expected.cross, atol=1e-9, rtol=1e-9)
        assert found.count == expected.count
    torch.testing.assert_close(
        ridge_head(left.sums, projection=PROJECTION, regularization=1.0).weight,
        ridge_head(never, projection=PROJECTION, regularization=1.0).weight, atol=1e-9, rtol=1e-9,
    )  # fmt: skip
    assert left.classes == tuple(NAMES[i] for i in kept)
    assert torch.equal(left.linear.weight, torch.arange(24.0).reshape(4, 6)[kept])
    assert torch.equal(left.prototypes.means, class_means(features, targets, classes=4)[kept])
    assert [each.count for each in left.statistics] == [int((targets == i).sum()) for i in kept]
    assert left.ridge().weight.shape == (20, len(kept))


def test_examples_that_are_not_those_of_the_sums_are_refused() -> None:
    features, targets = rows_of(0)
    stored, food = stored_of(features, targets), targets == 1
    assert stored.sums is not None
    for wrong in (features[food][1:], features[food] + 0.01):
        with pytest.raises(DataError, match="expected all examples of the classes to forget"):
            subtract_classes(stored.sums, wrong, torch.ones(len(wrong)).long(), [1], projection=PROJECTION)
    with pytest.raises(DataError, match="expected classes out of"):
        erase_stored(stored, ["plant"], features=None, targets=None)
    with pytest.raises(DataError, match="some but not all"):
        erase_stored(stored, NAMES, features=None, targets=None)
    with pytest.raises(DataError, match="sums of a ridge head"):
        replace(stored, sums=None).ridge()


def test_without_the_examples_the_column_goes_and_the_gram_matrix_still_counts_them() -> None:
    features, targets = rows_of(1)
    stored = stored_of(features, targets)
    left = erase_stored(stored, ["food"], features=None, targets=None)
    assert left.sums is not None
    assert stored.sums is not None
    assert left.sums.classes == 3
    assert torch.equal(left.sums.total.gram, stored.sums.total.gram)


def test_an_edited_adapter_alone_leaves_the_class_in_the_prototypes(known: Taught) -> None:
    """What goes wrong without erasure: another part of the system tells the class as well as before."""
    food = known.classifier.classes.index("food")
    features = known.encoder.all_features(known.train.states)
    prototypes = CosineHead(class_means(features, known.train.targets, classes=4))
    general = Classifier(known.classifier.classes, ({},), prototypes)
    budget = {"rank": 4, "steps": 40, "batch_size": 12, "forget_batch_size": 6, "learning_rate": 1e-2}
    forgotten = forget_classes(
        known.encoder, known.classifier, known.train, ["food"],
        settings=ForgetSettings.model_validate(budget), seed=0,
    )  # fmt: skip
    assert known.accuracies(forgotten.classifier)["food"] <= 0.1
    assert known.accuracies(general)["food"] > 0.8  # the prototypes were made without the adapter, and still tell it
    edited = forgotten.classifier
    kept = known.train.subset(known.train.targets != food)
    again = renewed_prototypes(known.encoder, edited, known.train, prototypes)
    assert (
        known.accuracies(Classifier(edited.classes, edited.adapters, again))["food"] > 0.3
    )  # renewed with its examples
    stored = Stored(classes=general.classes, prototypes=prototypes)
    left = erase_stored(stored, ["food"], features=None, targets=None)
    assert left.prototypes is not None
    assert left.classes == ("animal", "tool", "weather")
    after = known.accuracies(Classifier(left.classes, ({},), left.prototypes))
    assert after.pop("food") == 0.0
    assert min(after.values()) > 0.8
    renewed = renewed_prototypes(known.encoder, edited, kept, prototypes)
    assert torch.equal(renewed.means[food], prototypes.means[food])  # no example, so as before
    assert not torch.allclose(renewed.means[0], prototypes.means[0], atol=1e-3)


def test_rows_leave_a_classifier_with_their_routes(known: Taught) -> None:
    several = Classifier(NAMES, ({}, {}), LinearHead.zeros(4, known.encoder.width), routes=(0, 1, 0, 1))
    left = without_rows(several, ["animal"])
    assert left.classes == NAMES[1:]
    assert left.routes == (1, 0, 1)
    assert left.head.logits(torch.ones(1, 16)).shape == (1, 3)
    ridge = stored_of(*rows_of(0)).ridge()
    with pytest.raises(DataError, match="a linear or a cosine head"):
        without_rows(replace(several, head=ridge), ["animal"])


def test_what_comes_back_raises_the_alarm() -> None:
    accuracies = {"food": 0.3, "tool": 0.01, "animal": 0.9}
    assert reappeared(accuracies, ["food", "tool", "plant"], alarm=0.25) == ("food",)
    assert reappeared(accuracies, [], alarm=0.0) == ()
