"""Figures are checked against counting, and against classifiers that do and do not hold what they look for."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.continual.taught import TRAINING, Taught, logits_of, taught

from pomona.continual.editing import Examples, features_of
from pomona.continual.erasure import without_rows
from pomona.continual.exactness import exactness_of
from pomona.continual.forget_baselines.retrain import retrain_without
from pomona.continual.relearning import RelearnSettings, relearning_steps
from pomona.continual.verification import (
    accuracy_of_classes,
    assess,
    confidence,
    membership_auc,
    probe_accuracy,
)  # fmt: skip
from pomona.errors import DataError


@pytest.fixture(scope="module")
def known(tiny_bert: Path, toy_data: Path) -> Taught:
    return taught(tiny_bert, toy_data)


scores = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(seen=scores, unseen=scores)
def test_the_auc_is_a_count_over_pairs(seen: list[float], unseen: list[float]) -> None:
    pairs = [(s > u) + 0.5 * (s == u) for s in seen for u in unseen]
    found = membership_auc(torch.tensor(seen), torch.tensor(unseen))
    assert found == pytest.approx(sum(pairs) / len(pairs))
    assert membership_auc(torch.tensor(unseen), torch.tensor(seen)) == pytest.approx(1 - found)


def test_the_auc_has_power_both_ways() -> None:
    draws = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))
    assert membership_auc(draws[0], draws[1]) == pytest.approx(0.5, abs=0.03)
    assert membership_auc(draws[0] + 0.5, draws[2]) == pytest.approx(0.638, abs=0.03)  # Phi(0.5 / sqrt 2)
    for wrong in (torch.tensor([]), torch.tensor([float("nan")])):
        with pytest.raises(DataError, match="finite scores"):
            membership_auc(wrong, draws[0])


def test_confidence_needs_no_label() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    assert confidence(logits)[0] == confidence(logits)[1] > confidence(logits)[2]


def test_accuracies_are_by_name_also_of_a_classifier_that_knows_less(known: Taught) -> None:
    names = known.classifier.classes
    for classifier in (known.classifier, without_rows(known.classifier, ["animal"])):
        expected = known.accuracies(classifier)
        logits = logits_of(known.encoder, classifier, known.test.states)
        found = accuracy_of_classes(logits, classifier.classes, known.test.targets, names)
        assert found == pytest.approx(expected)
    assert expected["animal"] == 0.0


def test_an_assessment_weighs_examples() -> None:
    before = {"a": 0.8, "b": 0.6, "c": 1.0, "d": 0.9}
    after = {"a": 0.1, "b": 0.6, "c": 0.9, "d": 0.2}
    counts = {"a": 10, "b": 30, "c": 10, "d": 5}
    found = assess(before, after, counts, ["a"], ["d"])
    assert (found.acc_forget, found.acc_forgotten_earlier) == (0.1, 0.2)
    assert found.acc_retain == pytest.approx((30 * 0.6 + 10 * 0.9) / 40)
    assert found.h_mean == pytest.approx(2 * 0.675 * 0.7 / (0.675 + 0.7))
    assert assess(before, before, counts, ["a"]).h_mean == 0.0
    for forget, earlier in ((["e"], []), (["a"], ["a"]), (["a", "b", "c", "d"], [])):
        with pytest.raises(DataError, match="expected test examples"):
            assess(before, after, counts, forget, earlier)


def test_a_probe_reads_what_the_features_hold_and_nothing_else(known: Taught) -> None:
    train, test = (
        (features_of(known.encoder, known.classifier, each), each.targets) for each in (known.train, known.test)
    )
    assert probe_accuracy(train, test, [1]) > 0.8
    noise = torch.nn.functional.normalize(
        torch.randn(len(train[0]), 16, generator=torch.Generator().manual_seed(0)), dim=1
    )
    other = torch.nn.functional.normalize(
        torch.randn(len(test[0]), 16, generator=torch.Generator().manual_seed(1)), dim=1
    )
    assert probe_accuracy((noise, train[1]), (other, test[1]), [0, 1, 2, 3]) < 0.5
    kept = train[1] != 1
    with pytest.raises(DataError, match="classes to probe for"):
        probe_accuracy((train[0][kept], train[1][kept]), test, [1])


def test_a_hidden_class_is_learned_again_faster_than_a_new_one(known: Taught) -> None:
    food, new = known.classifier.classes.index("food"), 3
    moved = torch.tensor([{food: new}.get(i, i - (i > food)) for i in range(4)])
    examples = Examples(known.train.states, moved[known.train.targets])
    held_out = known.test.subset(known.test.targets == food)
    held_out = Examples(held_out.states, torch.full((len(held_out),), new))
    budget = RelearnSettings(rank=2, steps=40, batch_size=12, forget_batch_size=6, every=1, learning_rate=5e-3)
    hidden = without_rows(known.classifier, ["food"])
    never = retrain_without(known.encoder, known.classifier, known.train, ["food"], settings=TRAINING, seed=0)
    steps = [
        relearning_steps(known.encoder, each, examples, held_out, accuracy_before=1.0, settings=budget, seed=0)
        for each in (hidden, never)
    ]
    assert steps[0] is not None
    assert steps[1] is None or steps[0] < steps[1]
    with pytest.raises(DataError, match="a linear head and held-out examples"):
        relearning_steps(
            known.encoder, hidden, examples, known.test, accuracy_before=1.0, settings=budget, seed=0
        )  # fmt: skip


@pytest.mark.parametrize(
    ("given_facts", "word"),
    [
        ({}, "exact"),
        ({"adapters": ["task 1"]}, "exact-given-frozen-features"),
        ({"adapters": ["task 1"], "heads": ["linear head"]}, "behavioural"),
        ({"heads": ["linear head"]}, "behavioural"),
        ({"adapters": ["task 1"], "heads": ["linear head"], "privacy": (2.0, 1e-5)}, "certified-DP"),
        ({"privacy": (2.0, 1e-5)}, "exact"),
        ({"sums": ["ridge sums"], "privacy": (2.0, 1e-5)}, "behavioural"),
        ({"adapters": ["task 1"], "sums": ["ridge sums"]}, "behavioural"),
    ],
)
def test_no_more_is_claimed_than_holds(given_facts: dict[str, object], word: str) -> None:
    verdict = exactness_of(**given_facts)  # type: ignore[arg-type]
    assert verdict.exactness == word
    names = [name for key in ("adapters", "heads", "sums") for name in given_facts.get(key, [])]  # type: ignore[attr-defined]
    assert not names or any(name in verdict.why for name in names)
