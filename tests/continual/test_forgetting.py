"""Classes are forgotten and the others kept, block by block, request after request."""

import math
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.continual.taught import Taught, bytes_of, same_bytes, taught

from pomona.continual.edit_rounds import start_edit
from pomona.continual.editing import Classifier, Examples, Head, few_of_each
from pomona.continual.forgetting import (
    Forgotten,
    bounded_loss,
    chance_bound,
    divergence,
    forget_classes,
    forget_owner,
)  # fmt: skip
from pomona.continual.heads import CosineHead, class_means, random_projection, ridge_head, ridge_sums
from pomona.forget_settings import ForgetSettings

TINY = ForgetSettings(rank=4, steps=40, batch_size=12, forget_batch_size=6, learning_rate=1e-2)


@pytest.fixture(scope="module")
def known(tiny_bert: Path, toy_data: Path) -> Taught:
    return taught(tiny_bert, toy_data)


def forget(known: Taught, names: list[str], settings: ForgetSettings = TINY, *, seed: int = 0) -> Forgotten:
    return forget_classes(known.encoder, known.classifier, known.train, names, settings=settings, seed=seed)


@pytest.mark.parametrize("plus", [{}, {"push": 0.1, "pull": 0.1}], ids=["gs-lora", "gs-lora++"])
def test_a_class_goes_and_the_others_stay(known: Taught, plus: dict[str, float]) -> None:
    before = known.accuracies(known.classifier)
    assert min(before.values()) > 0.8
    after = known.accuracies(forget(known, ["food"], TINY.model_copy(update=plus)).classifier)
    assert after.pop("food") <= 0.1
    assert sum(after.values()) / 3 >= sum(before[name] for name in after) / 3 - 0.1


def test_the_same_seed_gives_the_same_bytes(known: Taught) -> None:
    short = TINY.model_copy(update={"steps": 5})
    one, again, other = (forget(known, ["tool"], short, seed=seed) for seed in (1, 1, 2))
    assert same_bytes(bytes_of(one.adapter), bytes_of(again.adapter))
    assert one.losses == again.losses
    assert not same_bytes(bytes_of(one.adapter), bytes_of(other.adapter))


def test_whole_blocks_are_exactly_zero_and_named(known: Taught) -> None:
    dense = forget(known, ["food"], TINY.model_copy(update={"sparsity": 0.0, "steps": 20}))
    assert dense.groups_total == 2
    assert len(dense.groups_changed) == 2
    for name, each in dense.adapter.items():
        assert bool(each.a.any())
        assert bool(each.b.any())
        assert name.startswith(dense.groups_changed)
    nothing = forget(known, ["food"], TINY.model_copy(update={"sparsity": 5.0, "warm_up": 0.0}))
    assert nothing.groups_changed == ()
    assert len(nothing.losses) < TINY.steps
    assert not any(bool(each.a.any()) or bool(each.b.any()) for each in nothing.adapter.values())
    assert known.accuracies(nothing.classifier) == known.accuracies(known.classifier)


def test_requests_follow_each_other_each_with_its_own_adapter(known: Taught) -> None:
    first = forget(known, ["food"])
    kept = bytes_of(first.classifier.adapters[0])
    rest = known.train.subset(~known.train.of([known.classifier.classes.index("food")]))
    second = forget_classes(known.encoder, first.classifier, rest, ["weather"], settings=TINY, seed=1)
    assert same_bytes(kept, bytes_of(first.classifier.adapters[0]))
    ranks = [
        next(iter(each.adapters[0].values())).rank for each in (known.classifier, first.classifier, second.classifier)
    ]
    assert ranks == [4, 8, 12]
    after = known.accuracies(second.classifier)
    assert after["food"] <= 0.2
    assert after["weather"] <= 0.1
    assert min(after["animal"], after["tool"]) >= 0.7


def test_a_few_examples_of_some_classes_do(known: Taught) -> None:
    """Few-shot, and a retained class that has no example at all."""
    few = few_of_each(known.train, 4, seed=0)
    present = few.subset(few.targets != known.classifier.classes.index("animal"))
    after = known.accuracies(
        forget_classes(known.encoder, known.classifier, present, ["food"], settings=TINY, seed=0).classifier
    )
    assert after["food"] <= 0.2
    assert min(after["tool"], after["weather"]) >= 0.7


def test_retention_is_the_cross_entropy_from_the_answers_before_the_edit(known: Taught) -> None:
    every = TINY.model_copy(update={"batch_size": 1000, "forget_batch_size": 1000})
    food, targets = known.classifier.classes.index("food"), known.train.targets
    kept = targets != food
    with torch.no_grad():
        features = known.encoder.all_features(known.train.states, known.classifier.adapters[0])
        logits = known.classifier.logits(features)[kept].double()
    others = [i for i in range(len(known.classifier.classes)) if i != food]
    wanted = torch.zeros_like(logits).index_copy(1, torch.tensor(others), logits[:, others].softmax(1))
    expected = {
        "answers": float(-(wanted * logits.log_softmax(1)).sum(1).mean()),
        "labels": float(-logits.log_softmax(1)[torch.arange(len(logits)), targets[kept]].mean()),
    }
    for retention, value in expected.items():
        chosen = ForgetSettings.model_validate({**every.model_dump(), "retention": retention})
        owner = forget_owner(known.encoder, known.classifier, known.train, ["food"], settings=chosen, seed=0)
        share = owner.share(0, start_edit(known.encoder, rank=4, seed=0).adapter)
        assert share.retained is not None
        assert share.retained.loss == pytest.approx(value, rel=1e-4)


def test_labels_teach_what_is_at_hand_and_answers_keep_what_was_said(known: Taught) -> None:
    """Rows to retain whose label the classifier does not share: held to labels, it is another one afterwards."""
    tool, weather = (known.classifier.classes.index(name) for name in ("tool", "weather"))
    targets = known.train.targets.clone()
    targets[known.train.targets == tool] = weather
    rows = Examples(known.train.states, targets)
    found = {}
    for retention in ("answers", "labels"):
        chosen = ForgetSettings.model_validate({**TINY.model_dump(), "retention": retention})
        edited = forget_classes(known.encoder, known.classifier, rows, ["food"], settings=chosen, seed=0)
        found[retention] = known.accuracies(edited.classifier)["tool"]
    assert found["answers"] >= 0.8
    assert found["labels"] <= 0.3


def test_heads_without_rows_of_their_own_forget_too(known: Taught) -> None:
    """Through cosines and through a ridge head, whose rows no gradient ever trained."""
    features = known.encoder.all_features(known.train.states, known.classifier.adapters[0])
    names, targets = known.classifier.classes, known.train.targets
    projection = random_projection(known.encoder.width, 64, seed=0)
    sums = ridge_sums(features, targets, projection=projection, classes=len(names))
    heads: dict[float, Head] = {
        16.0: CosineHead(class_means(features, targets, classes=len(names))),
        10.0: ridge_head(sums, projection=projection),
    }
    for sharpness, head in heads.items():
        classifier = Classifier(names, known.classifier.adapters, head, sharpness=sharpness)
        assert known.accuracies(classifier)["food"] > 0.8
        forgotten = forget_classes(known.encoder, classifier, known.train, ["food"], settings=TINY, seed=0)
        after = known.accuracies(forgotten.classifier)
        assert after["food"] <= 0.1
        assert after["animal"] + after["tool"] + after["weather"] >= 2.4


def test_too_few_steps_forget_too_little(known: Taught) -> None:
    """What goes wrong without a budget: the loss has hardly moved, and neither has the class."""
    hasty = forget(known, ["food"], TINY.model_copy(update={"steps": 2, "learning_rate": 1e-3}))
    assert known.accuracies(hasty.classifier)["food"] > 0.5


@settings(max_examples=40, deadline=None)
@given(losses=st.lists(st.floats(0, 20), min_size=1, max_size=6), bound=st.floats(0.1, 15))
def test_the_bounded_loss_is_its_formula(losses: list[float], bound: float) -> None:
    given_losses, mean = torch.tensor(losses, dtype=torch.float64), sum(losses) / len(losses)
    by_batch = float(bounded_loss(given_losses, bound, hinge="batch"))
    by_example = float(bounded_loss(given_losses, bound, hinge="example"))
    assert by_batch == pytest.approx(max(0.0, bound - mean), abs=1e-9)
    assert by_example == pytest.approx(sum(max(0.0, bound - each) for each in losses) / len(losses), abs=1e-9)
    assert by_example >= by_batch - 1e-9  # no example pays for another


def test_beyond_the_bound_nothing_is_pushed() -> None:
    losses = torch.tensor([9.0, 12.0], requires_grad=True)
    hinges: tuple[Literal["example", "batch"], ...] = ("example", "batch")
    for hinge in hinges:
        (gradient,) = torch.autograd.grad(bounded_loss(losses, 8.0, hinge=hinge), losses)
        assert not gradient.any()
    assert chance_bound(77, 0.0) == pytest.approx(4.3438, abs=1e-4)
    assert chance_bound(2, 1.0) == math.log(2) + 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_divergence_is_its_sum_and_zero_only_at_the_prototype(seed: int) -> None:
    rows = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    prototypes, features = torch.nn.functional.normalize(rows, dim=2).unbind()
    found = divergence(prototypes, features)
    for i in range(3):
        p, q = (torch.softmax(each[i] * math.sqrt(5), 0).tolist() for each in (prototypes, features))
        assert float(found[i]) == pytest.approx(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)), abs=1e-9)
    assert bool((found > 0).all())
    assert divergence(features, features).abs().max() < 1e-12


def test_settings_are_closed_and_checked() -> None:
    for wrong in (
        {"bound": 3},
        {"beta": -1.0},
        {"warm_up": 2.0},
        {"hinge": "all"},
        {"retention": "both"},
        {"steps": 0},
        {"steps": 10**6},
        {"margin": math.nan},
    ):
        with pytest.raises(ValidationError):
            ForgetSettings.model_validate(wrong)
