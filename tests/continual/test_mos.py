"""MOS learns a stream, forgets little, is a function of its arguments, and answers without changing a byte."""

import dataclasses
import hashlib
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from pomona.continual.alignment import aligned_head
from pomona.continual.discriminant import gaussian_head
from pomona.continual.encoder import FrozenEncoder, States
from pomona.continual.heads import LinearHead
from pomona.continual.knowledge import Knowledge, nothing_known
from pomona.continual.learner import TaskData, accuracy, data_of_tasks, run_stream
from pomona.continual.merging import share_a
from pomona.continual.metrics import last_accuracy
from pomona.continual.mos import Mos, learn_task, predict, scores, task_knowledge, train_task, with_task
from pomona.continual.tasks import Task, learning_order
from pomona.datasets import Dataset, load_dataset
from pomona.errors import ConfigError, DataError
from pomona.mos_settings import HeadKind, LoopSettings, MosSettings
from pomona.seeds import generator_of

TASKS = (Task(1, ("animal", "food")), Task(2, ("tool",)), Task(3, ("weather",)))
PAIRS = (Task(1, ("animal", "food")), Task(2, ("tool", "weather")))
LOOP = LoopSettings(epochs=1, min_steps=12, learning_rate=0.02, batch_size=16)


def settings_of(head: HeadKind = "combined", **given: object) -> MosSettings:
    return MosSettings.model_validate(
        {"head": head, "adapted_blocks": 1, "rank": 2, "alpha": 4.0, "training": LOOP, "ridge_dimensions": 60} | given
    )


@pytest.fixture(scope="module")
def encoder(tiny_bert: Path) -> FrozenEncoder:
    return FrozenEncoder(tiny_bert, adapted_blocks=1)


@pytest.fixture(scope="module")
def splits(encoder: FrozenEncoder, toy_data: Path) -> tuple[tuple[Dataset, States], tuple[Dataset, States]]:
    train, test = (load_dataset(toy_data, split=split) for split in ("train", "validation"))
    return (train, encoder.of_texts(train.texts, max_length=16)), (test, encoder.of_texts(test.texts, max_length=16))


Splits = tuple[tuple[Dataset, States], tuple[Dataset, States]]


def streams(splits: Splits, tasks: Sequence[Task]) -> tuple[tuple[TaskData, ...], tuple[TaskData, ...]]:
    found = [data_of_tasks(tasks, data.labels, states) for data, states in splits]
    return found[0], found[1]


def learned(encoder: FrozenEncoder, train: Sequence[TaskData], settings: MosSettings) -> Knowledge:
    known = nothing_known(encoder.width, settings)
    for data in train:
        known = learn_task(encoder, known, data, settings)
    return known


def digest(known: Knowledge) -> str:
    found = hashlib.sha256()
    for key, value in sorted(known.to_tensors()[0].items()):
        found.update(key.encode() + value.numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("head", ["combined", "gaussian", "aligned", "ridge", "ridge-own"])
def test_every_head_learns_a_stream_with_single_class_tasks(
    encoder: FrozenEncoder, splits: Splits, head: HeadKind
) -> None:
    learner = Mos(encoder, settings_of(head))
    matrix = run_stream(learner, *streams(splits, TASKS))
    assert last_accuracy(matrix) > 0.8
    assert learner.knowledge.classes == learning_order(TASKS)
    assert share_a([task.adapter for task in learner.knowledge.tasks])


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(encoder: FrozenEncoder, splits: Splits) -> None:
    train, test = streams(splits, PAIRS)
    one, again, other = (learned(encoder, train, settings_of("aligned", seed=seed)) for seed in (0, 0, 1))
    assert digest(one) == digest(again) != digest(other)
    restored = Knowledge.from_tensors(*one.to_tensors())
    assert torch.equal(scores(encoder, restored, test[0].states), scores(encoder, one, test[0].states))
    resumed = learn_task(encoder, learned(encoder, train[:1], settings_of("aligned")), train[1], settings_of("aligned"))
    assert digest(resumed) == digest(one)


@pytest.mark.parametrize("head", ["combined", "aligned"])
def test_answering_changes_no_byte_and_depends_on_no_other_example(
    encoder: FrozenEncoder, splits: Splits, head: HeadKind
) -> None:
    train, test = streams(splits, PAIRS)
    known, states = learned(encoder, train, settings_of(head)), test[0].states + test[1].states
    before, weights, whole = digest(known), encoder.digest(), scores(encoder, known, states)
    shuffle = random.Random(0)
    for _ in range(20):
        chosen = shuffle.sample(range(len(states)), 7)
        found = scores(encoder, known, states.subset(chosen))
        torch.testing.assert_close(found, whole[chosen], rtol=1e-4, atol=1e-5)
    assert (digest(known), encoder.digest()) == (before, weights)
    torch.testing.assert_close(whole.sum(1), torch.ones(len(states)))


def test_the_published_code_changes_what_it_predicts_with_by_predicting(encoder: FrozenEncoder, splits: Splits) -> None:
    train, test = streams(splits, PAIRS)
    known = learned(encoder, train, settings_of("aligned", official_compat=True, merge_weight=0.3))
    first, before = known.tasks[0].adapter, digest(known)
    apart = [
        sum(float((factors.b - first[name].b).norm()) for name, factors in known.tasks[1].adapter.items())
        for _ in range(6)
        if scores(encoder, known, test[1].states) is not None
    ]
    assert digest(known) != before
    assert all(later < 0.8 * earlier for earlier, later in itertools.pairwise(apart))


def test_merging_keeps_adapters_together(encoder: FrozenEncoder, splits: Splits) -> None:
    train, _ = streams(splits, PAIRS)
    distances = []
    for weight in (0.0, 0.1, 0.5):
        known = learned(encoder, train, settings_of(merge_weight=weight))
        one, other = (task.adapter for task in known.tasks)
        distances.append(sum(float((other[name].b - one[name].b).norm()) for name in one))
    assert distances[0] > distances[1] > distances[2] > 0


def test_what_clients_know_adds_up_to_what_one_owner_would(encoder: FrozenEncoder, splits: Splits) -> None:
    train, _ = streams(splits, PAIRS)
    settings = settings_of()
    known = nothing_known(encoder.width, settings)
    adapter, head = train_task(encoder, known, train[0])
    shares = [train[0].subset(range(start, len(train[0]), 3)) for start in range(3)]
    parts = [task_knowledge(encoder, known, share, adapter=adapter, head=head) for share in shares]
    together = with_task(known, parts[0] + parts[1] + parts[2])
    alone = learn_task(encoder, known, train[0], settings)
    for found, expected in zip(together.first, alone.first, strict=True):
        assert found.count == expected.count
        torch.testing.assert_close(found.moment, expected.moment, rtol=0, atol=1e-6)


def test_an_adapter_from_elsewhere_is_merged_by_its_product(encoder: FrozenEncoder, splits: Splits) -> None:
    train, test = streams(splits, PAIRS)
    settings = settings_of(start="fresh")
    known = learned(encoder, train[:1], settings)
    foreign = learned(encoder, train[:1], settings_of(seed=9, rank=3, start="fresh")).tasks[0]
    known = dataclasses.replace(known, tasks=(dataclasses.replace(known.tasks[0], adapter=foreign.adapter),))
    after = learn_task(encoder, known, train[1], settings)
    assert not share_a([task.adapter for task in after.tasks])
    assert all(factors.rank <= settings.rank for factors in after.tasks[1].adapter.values())
    assert accuracy(predict(encoder, after, test[1].states), test[1].targets) > 0.8


def test_edits_are_under_what_is_learned_after_them(encoder: FrozenEncoder, splits: Splits) -> None:
    train, test = streams(splits, PAIRS)
    known = learned(encoder, train[:1], settings_of())
    edit = learned(encoder, train[:1], settings_of(seed=5)).tasks[0].adapter
    edited = learn_task(encoder, dataclasses.replace(known, edits=(edit,)), train[1], settings_of())
    assert edited.edits == (edit,)
    assert accuracy(predict(encoder, edited, test[1].states), test[1].targets) > 0.8
    unedited = dataclasses.replace(edited, edits=())
    assert not torch.equal(scores(encoder, edited, test[1].states), scores(encoder, unedited, test[1].states))


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_the_combined_answer_is_its_formula(encoder: FrozenEncoder, splits: Splits, experts: int) -> None:
    """The slow oracle goes example by example, through each of the likeliest tasks by itself."""
    train, test = streams(splits, TASKS)
    given = settings_of(experts=experts, expert_weight=0.7, temperature=3.0)
    known, states = learned(encoder, train, given), test[0].states + test[1].states
    head = gaussian_head(known.first, prior=given.prior, sphere_examples=given.sphere_examples)
    first = encoder.all_features(states, known.adapter(0))
    general = (head.logits(first) / 3.0).log_softmax(1)
    for row, found in zip(range(len(states)), scores(encoder, known, states), strict=True):
        shares = {t: float(general[row].exp()[known.task_of == t].sum()) for t in range(3)}
        logits = torch.full((4,), -torch.inf, dtype=torch.float64)
        for task in sorted(shares, key=shares.__getitem__)[-experts:]:
            feature = encoder.all_features(states.subset([row]), known.adapter(task))
            own = known.tasks[task].head.logits(feature)[0].double().log_softmax(0)
            logits[known.task_of == task] = general[row][known.task_of == task] + 0.7 * own
        torch.testing.assert_close(found, logits.softmax(0).float(), rtol=1e-4, atol=1e-5)


def test_the_head_is_aligned_from_the_second_task_on(encoder: FrozenEncoder, splits: Splits) -> None:
    train, _ = streams(splits, PAIRS)
    heads: tuple[tuple[HeadKind, bool], ...] = (("aligned", True), ("combined", False))
    for head, changes in heads:
        known = learned(encoder, train, settings_of(head))
        apart = torch.cat([task.head.weight for task in known.tasks])
        assert torch.equal(known.head.weight, apart) is not changes


def test_features_to_align_with_can_be_of_low_rank_and_a_diagonal(encoder: FrozenEncoder, splits: Splits) -> None:
    train, _ = streams(splits, PAIRS)
    whole = learned(encoder, train, settings_of("aligned", regularized_replay=False))
    settings = settings_of("aligned", regularized_replay=False, replay_directions=2)
    start = torch.cat([task.head.weight for task in whole.tasks]), torch.cat([task.head.bias for task in whole.tasks])
    expected = aligned_head(
        LinearHead(*start),
        [each.compressed(2) for each in whole.statistics],
        settings=settings.alignment,
        generator=generator_of("alignment", settings.seed, 4),
    )
    found = learned(encoder, train, settings).head
    assert torch.equal(found.weight, expected.weight)
    assert not torch.equal(found.weight, whole.head.weight)


@pytest.mark.parametrize("given", [{}, {"head": "aligned"}, {"head": "aligned", "moments": "diagonal"}])
def test_directions_of_replay_are_refused_where_they_change_nothing(given: dict[str, object]) -> None:
    regularized = "moments" not in given
    with pytest.raises(ValidationError, match="replay_directions would change nothing"):
        MosSettings.model_validate({"replay_directions": 2, "regularized_replay": regularized, **given})


def test_a_forgotten_class_is_never_the_answer(encoder: FrozenEncoder, splits: Splits) -> None:
    train, test = streams(splits, PAIRS)
    known = learned(encoder, train, settings_of()).without(["animal", "food"])
    assert scores(encoder, known, test[0].states).shape[1] == 2
    assert accuracy(predict(encoder, known, test[1].states), test[1].targets - 2) > 0.8


@pytest.mark.parametrize("head", ["combined", "gaussian", "aligned", "ridge", "ridge-own"])
def test_what_was_read_back_answers_where_a_task_has_no_class_left(
    encoder: FrozenEncoder, splits: Splits, head: HeadKind
) -> None:
    """Read from tensors, a head without rows has no width either."""
    train, test = streams(splits, TASKS)
    known = learned(encoder, train, settings_of(head)).without(["tool"])
    restored, states = Knowledge.from_tensors(*known.to_tensors()), test[0].states + test[2].states
    assert torch.equal(scores(encoder, restored, states), scores(encoder, known, states))
    assert accuracy(predict(encoder, restored, test[2].states), test[2].targets - 1) > 0.8


def test_what_cannot_be_learned_is_refused(encoder: FrozenEncoder, splits: Splits) -> None:
    train, test = streams(splits, PAIRS)
    settings = settings_of()
    nothing = nothing_known(encoder.width, settings)
    known = learn_task(encoder, nothing, train[0], settings)
    with pytest.raises(DataError, match="nothing is known yet"):
        predict(encoder, nothing, test[0].states)
    with pytest.raises(DataError, match="'animal' is known already"):
        learn_task(encoder, known, train[0], settings)
    with pytest.raises(DataError, match="targets from 0 to 1"):
        learn_task(encoder, nothing, train[1], settings)
    with pytest.raises(ConfigError, match="start a new stream"):
        learn_task(encoder, known, train[1], settings_of(seed=1))
    half = train[1].subset([i for i, c in enumerate(train[1].targets.tolist()) if c == 2])
    with pytest.raises(DataError, match="'weather' of task 2 has no examples"):
        learn_task(encoder, known, half, settings)
    for given in ({"official_compat": True}, {"head": "gaussian", "experts": 2}, {"rank": 0}, {"colour": "red"}):
        with pytest.raises(ValidationError):
            MosSettings.model_validate(given)
    assert predict(encoder, known, States(())).shape == (0,)
