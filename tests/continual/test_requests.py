"""What was learned task after task forgets a class, keeps the others, and moves its statistics with its features."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.continual import requests
from pomona.continual.editing import Examples
from pomona.continual.encoder import FrozenEncoder
from pomona.continual.knowledge import Knowledge, nothing_known
from pomona.continual.learner import data_of_tasks
from pomona.continual.mos import learn_task, predict
from pomona.continual.moves import ClassMove, moved_statistics
from pomona.continual.requests import MetRequest, forget_in_knowledge
from pomona.continual.statistics import ClassStatistics
from pomona.continual.tasks import Task
from pomona.datasets import load_dataset
from pomona.forget_settings import ForgetSettings
from pomona.mos_settings import AlignmentSettings, MosSettings

TASKS = (Task(1, ("animal", "food")), Task(2, ("tool", "weather")))
BUDGET = ForgetSettings(rank=4, steps=40, batch_size=12, forget_batch_size=6, learning_rate=1e-2)


@cache
def encoder_of(model: Path) -> FrozenEncoder:
    return FrozenEncoder(model)


def learned(model: Path, data: Path, settings: MosSettings) -> tuple[Knowledge, Examples, Examples]:
    """Return the knowledge of two tasks, and all examples of both splits in learning order."""
    encoder, parts = encoder_of(model), []
    knowledge = nothing_known(encoder.width, settings)
    for split in ("train", "validation"):
        rows = load_dataset(data, split="train" if split == "train" else "validation")
        found = data_of_tasks(TASKS, rows.labels, encoder.of_texts(rows.texts, max_length=16))
        states = found[0].states + found[1].states
        parts.append(Examples(states, torch.cat([each.targets for each in found])))
        for each in found if split == "train" else ():
            knowledge = learn_task(encoder, knowledge, each, settings)
    return knowledge, parts[0], parts[1]


def accuracy(model: Path, knowledge: Knowledge, test: Examples, label: str) -> float:
    one = test.subset(test.targets == ("animal", "food", "tool", "weather").index(label))
    answers = predict(encoder_of(model), knowledge, one.states).tolist()
    return sum(bool(knowledge.classes[answer] == label) for answer in answers) / len(one)


@pytest.mark.parametrize("head", ["combined", "aligned", "ridge"])
def test_a_class_goes_with_its_statistics_and_the_others_stay(
    tiny_bert: Path, toy_data: Path, head: Literal["combined", "aligned", "ridge"]
) -> None:
    alignment = AlignmentSettings(epochs=60, learning_rate=0.3)  # 48 features a task take the default nowhere
    known, train, test = learned(
        tiny_bert, toy_data, MosSettings(head=head, rank=4, ridge_dimensions=64, alignment=alignment)
    )
    assert accuracy(tiny_bert, known, test, "food") > 0.8
    met = forget_in_knowledge(encoder_of(tiny_bert), known, train, ["food"], settings=BUDGET, seed=0)
    assert accuracy(tiny_bert, met.edited, test, "food") <= 0.1
    assert met.left.classes == ("animal", "tool", "weather")
    kept = [accuracy(tiny_bert, met.left, test, label) for label in met.left.classes]
    before = [accuracy(tiny_bert, known, test, label) for label in met.left.classes]
    assert sum(kept) >= sum(before) - 0.3
    assert met.stale == ()
    assert len(met.left.edits) == 1
    assert known.edits == ()


def test_statistics_that_stay_behind_answer_for_features_that_are_no_more(tiny_bert: Path, toy_data: Path) -> None:
    """What goes wrong without moving them, where the edit is strong."""
    known, train, test = learned(tiny_bert, toy_data, MosSettings(head="gaussian", rank=4))
    strong = BUDGET.model_copy(update={"learning_rate": 3e-2, "sparsity": 0.0})
    met: MetRequest = forget_in_knowledge(encoder_of(tiny_bert), known, train, ["food"], settings=strong, seed=0)
    behind = replace(known, edits=met.edited.edits).without(["food"])

    def mean(knowledge: Knowledge) -> float:
        return sum(accuracy(tiny_bert, knowledge, test, label) for label in met.left.classes) / 3

    assert mean(met.left) > mean(behind) - 1e-9
    assert mean(met.left) >= mean(known) - 0.1


def test_a_head_that_is_sure_is_asked_less_sharply(
    tiny_bert: Path, toy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong without: where a cross-entropy is zero to the last digit, nothing pushes the class away."""
    known, train, test = learned(tiny_bert, toy_data, MosSettings(head="gaussian", rank=4, temperature=0.01))
    assert accuracy(tiny_bert, known, test, "food") > 0.8

    def after() -> float:
        met = forget_in_knowledge(encoder_of(tiny_bert), known, train, ["food"], settings=BUDGET, seed=0)
        return accuracy(tiny_bert, met.edited, test, "food")

    assert after() <= 0.1
    monkeypatch.setattr(requests, "CONFIDENCE", float("inf"))
    assert after() > 0.8


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 500), at_hand=st.integers(0, 12), diagonal=st.booleans())
def test_moved_statistics_have_the_moved_mean_and_the_old_spread(seed: int, at_hand: int, diagonal: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(12, 4, generator=generator)
    after = before + torch.randn(4, generator=generator)  # everything moves alike
    kept = ClassStatistics.of(before, moments="diagonal" if diagonal else "full")
    move = ClassMove.of(before[:at_hand], after[:at_hand], moments=kept.moments)
    found = moved_statistics(kept, move)
    expected = ClassStatistics.of(after if at_hand else before, moments=kept.moments)
    assert found.count == 12
    assert found.moments == kept.moments
    torch.testing.assert_close(found.mean(), expected.mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.covariance(), kept.covariance(), atol=1e-4, rtol=1e-4)
    if at_hand == 12:
        assert torch.equal(found.total, expected.total)


def test_ridge_sums_of_which_some_examples_are_missing_are_named(tiny_bert: Path, toy_data: Path) -> None:
    known, train, _ = learned(tiny_bert, toy_data, MosSettings(head="ridge", rank=4, ridge_dimensions=16))
    some = train.subset(torch.arange(0, len(train), 2))
    short = BUDGET.model_copy(update={"steps": 2})
    met = forget_in_knowledge(encoder_of(tiny_bert), known, some, ["food"], settings=short, seed=0)
    assert met.stale == ("the ridge sums of task 1", "the ridge sums of task 2")
