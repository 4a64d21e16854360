"""Baselines that train: what each does to earlier tasks, and that the arithmetic of merging is the paper's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pomona.adapters import LoraFactors
from pomona.continual.baselines.first_session import FirstSession
from pomona.continual.baselines.joint import JointTraining
from pomona.continual.baselines.ranpac import RanPac
from pomona.continual.baselines.sequential import SequentialFineTuning
from pomona.continual.baselines.simple_cil import SimpleCil
from pomona.continual.baselines.slao import Slao, merge_over_time, orthogonal_start
from pomona.continual.baselines.slca import Slca
from pomona.continual.encoder import Adapter, FrozenEncoder, States
from pomona.continual.learner import Learner, TaskData, data_of_tasks, run_stream
from pomona.continual.metrics import last_accuracy
from pomona.continual.tasks import tasks_by_size
from pomona.datasets import load_dataset
from pomona.errors import DataError
from pomona.mos_settings import AlignmentSettings, LoopSettings

SETTINGS = LoopSettings(
    epochs=1, min_steps=25, max_steps=25, batch_size=16, learning_rate=1e-2, head_learning_rate=5e-2
)
ALIGNMENT = AlignmentSettings(epochs=5)
RANK = 2

Stream = tuple[TaskData, ...]
Make = Callable[[FrozenEncoder], Learner]


@pytest.fixture(scope="module")
def encoder(tiny_bert: Path) -> FrozenEncoder:
    return FrozenEncoder(tiny_bert, adapted_blocks=1)


@pytest.fixture(scope="module")
def stream(encoder: FrozenEncoder, toy_data: Path) -> tuple[Stream, Stream]:
    """Two tasks of two classes, to learn and to be scored on."""
    train, held_out = load_dataset(toy_data, split="train"), load_dataset(toy_data, split="validation")
    tasks = tasks_by_size(train.labels, classes_per_task=2, seed=0)
    first, second = (
        data_of_tasks(tasks, data.labels, encoder.of_texts(data.texts, max_length=16)) for data in (train, held_out)
    )
    return first, second


def sequential(encoder: FrozenEncoder) -> SequentialFineTuning:
    return SequentialFineTuning(encoder, settings=SETTINGS, rank=RANK)


def local(encoder: FrozenEncoder) -> SequentialFineTuning:
    return SequentialFineTuning(encoder, settings=SETTINGS, loss="local", rank=RANK)


def joint(encoder: FrozenEncoder) -> JointTraining:
    return JointTraining(encoder, settings=SETTINGS, rank=RANK)


def slca(encoder: FrozenEncoder) -> Slca:
    slow = SETTINGS.model_copy(update={"learning_rate": 1e-3})
    return Slca(encoder, settings=slow, alignment=ALIGNMENT, rank=RANK)


def slao(encoder: FrozenEncoder) -> Slao:
    return Slao(encoder, settings=SETTINGS, alignment=ALIGNMENT, rank=RANK)


def first_session(encoder: FrozenEncoder) -> FirstSession:
    return FirstSession(
        encoder, lambda adapter: RanPac(encoder, adapter=adapter, dimensions=48), settings=SETTINGS, rank=RANK
    )


@pytest.mark.parametrize("make", [joint, slca, slao, first_session])
def test_what_is_learned_stays(make: Make, encoder: FrozenEncoder, stream: tuple[Stream, Stream]) -> None:
    matrix = run_stream(make(encoder), *stream)
    assert last_accuracy(matrix) > 0.6  # chance is 0.25
    assert matrix[1, 0] > 0.4


def test_fine_tuning_over_all_classes_forgets_the_first_task(
    encoder: FrozenEncoder, stream: tuple[Stream, Stream]
) -> None:
    seen, unaligned = run_stream(sequential(encoder), *stream), run_stream(local(encoder), *stream)
    assert seen[0, 0] > 0.8
    assert seen[1, 1] > 0.8
    assert seen[1, 0] < 0.1  # old classes are never answered again
    assert unaligned[1, 0] > 0.3  # what a softmax over the task's own classes alone already saves


@pytest.mark.parametrize("make", [sequential, slca, slao])
def test_the_same_seed_learns_the_same(make: Make, encoder: FrozenEncoder, stream: tuple[Stream, Stream]) -> None:
    found = []
    for _ in range(2):
        learner = make(encoder)
        for data in stream[0]:
            learner.learn(data)
        found.append(learner)
    assert torch.equal(found[0].head.weight, found[1].head.weight)  # type: ignore[attr-defined]


def test_statistics_are_of_the_task_s_own_time_and_the_head_is_aligned_from_the_second_task(
    encoder: FrozenEncoder, stream: tuple[Stream, Stream]
) -> None:
    learner = slca(encoder)
    learner.learn(stream[0][0])
    adapter, first = learner.adapter, learner.statistics
    assert torch.equal(learner.head.weight, learner.unaligned_head.weight)
    features = encoder.all_features(stream[0][0].states, adapter)
    torch.testing.assert_close(
        first[1].mean(), features[stream[0][0].targets == 1].double().mean(0), rtol=1e-6, atol=1e-6
    )
    learner.learn(stream[0][1])
    assert all(torch.equal(a.moment, b.moment) for a, b in zip(first, learner.statistics, strict=False))
    assert not torch.equal(learner.head.weight, learner.unaligned_head.weight)


def test_joint_training_trains_when_it_is_asked_and_once(encoder: FrozenEncoder, stream: tuple[Stream, Stream]) -> None:
    learner = joint(encoder)
    with pytest.raises(DataError, match="nothing was learned"):
        learner.predict(States(()))
    learner.learn(stream[0][0])
    states = stream[1][0].states
    before = learner.predict(states)
    assert torch.equal(learner.predict(states), before)
    learner.learn(stream[0][1])
    assert int(learner.predict(stream[1][1].states).max()) > 1


def test_an_orthogonal_start_spans_the_same_rows_in_the_same_directions(encoder: FrozenEncoder) -> None:
    adapter = random_adapter(encoder, seed=1)
    for name, started in orthogonal_start(adapter).items():
        a = adapter[name].a
        torch.testing.assert_close(started.a @ started.a.T, torch.eye(RANK), rtol=0, atol=1e-6)
        torch.testing.assert_close((a @ started.a.T) @ started.a, a, rtol=1e-5, atol=1e-6)  # the row space
        # with a row turned round, the update that B was trained for would start with the wrong sign
        assert float(a[0] @ started.a[0]) > 0
        assert torch.equal(started.b, adapter[name].b)
    again = orthogonal_start(orthogonal_start(adapter))
    for name, started in orthogonal_start(adapter).items():
        torch.testing.assert_close(again[name].a, started.a, rtol=0, atol=1e-6)


def test_merging_over_time_weighs_task_i_by_its_root(encoder: FrozenEncoder) -> None:
    tasks = [random_adapter(encoder, seed=seed) for seed in range(5)]
    merged, expected = tasks[0], {name: each.b.double() for name, each in tasks[0].items()}
    for number, trained in enumerate(tasks[1:], start=2):
        before = {name: each.b.clone() for name, each in merged.items()}
        found = merge_over_time(merged, trained, task=number)
        assert all(torch.equal(merged[name].b, before[name]) for name in merged)
        for name, each in trained.items():
            expected[name] = expected[name] + (each.b - expected[name]) / number**0.5
            assert torch.equal(found[name].a, each.a)
            torch.testing.assert_close(found[name].b, expected[name].float())
        merged = found
    alone = merge_over_time(tasks[0], tasks[1], task=1)
    assert all(torch.equal(alone[name].b, tasks[1][name].b) for name in alone)


def test_what_one_merged_adapter_takes_does_not_grow(encoder: FrozenEncoder, stream: tuple[Stream, Stream]) -> None:
    learner = slao(encoder)
    sizes = []
    for data in stream[0]:
        learner.learn(data)
        sizes.append(sum(each.a.numel() + each.b.numel() for each in learner.adapter.values()))
    assert sizes[0] == sizes[1]


def test_after_the_first_session_nothing_is_trained(encoder: FrozenEncoder, stream: tuple[Stream, Stream]) -> None:
    taken: list[Adapter] = []

    def make(adapter: Adapter) -> Learner:
        taken.append(adapter)
        return SimpleCil(encoder, adapter=adapter)

    learner = FirstSession(encoder, make, settings=SETTINGS, rank=RANK)
    with pytest.raises(DataError, match="nothing was learned"):
        learner.predict(States(()))
    for data in stream[0]:
        learner.learn(data)
    assert len(taken) == 1
    plain = SimpleCil(encoder, adapter=taken[0])
    for data in stream[0]:
        plain.learn(data)
    assert torch.equal(learner.predict(stream[1][0].states), plain.predict(stream[1][0].states))
    features: Tensor = encoder.all_features(stream[1][0].states)
    assert not torch.allclose(encoder.all_features(stream[1][0].states, taken[0]), features, atol=1e-3)


def random_adapter(encoder: FrozenEncoder, *, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraFactors(
            a=torch.randn(RANK, inputs, generator=generator), b=torch.randn(outputs, RANK, generator=generator)
        )
        for name, (outputs, inputs) in encoder.manifest.layers.items()
    }
