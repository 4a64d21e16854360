"""What is known survives the way through tensors and JSON, adds up over clients, and lets go of a class whole."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pomona.adapters import LoraFactors
from pomona.continual.encoder import Adapter
from pomona.continual.heads import LinearHead, random_projection, ridge_sums
from pomona.continual.knowledge import Knowledge, TaskKnowledge, nothing_known
from pomona.continual.statistics import class_statistics
from pomona.errors import DataError, PayloadError
from pomona.mos_settings import Moments, MosSettings

WIDTH = 4


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter_of(seed: int) -> Adapter:
    return {name: LoraFactors(a=randn(2, 3, seed=seed), b=randn(5, 2, seed=seed + 1)) for name in ("up", "down")}


def task_of(
    number: int, classes: str, *, moments: Moments = "full", ridge: bool = False, seed: int = 0
) -> TaskKnowledge:
    features, targets = randn(12, WIDTH, seed=number + seed), torch.arange(12) % max(1, len(classes))
    kept = class_statistics(features, targets, range(len(classes)), moments=moments)
    projection = random_projection(WIDTH, 6, seed=0)
    sums = ridge_sums(features, targets, projection=projection, classes=max(1, len(classes)))
    sums = sums if classes else sums.without([0])
    head = LinearHead(randn(len(classes), WIDTH, seed=number), randn(len(classes), seed=number))
    return TaskKnowledge(number, tuple(classes), adapter_of(number), head, kept, kept, sums if ridge else None)


def knowledge_of(*tasks: TaskKnowledge, edits: int = 0) -> Knowledge:
    count = sum(len(task.classes) for task in tasks)
    head = LinearHead(randn(count, WIDTH, seed=9), randn(count, seed=9))
    return Knowledge(MosSettings(), tasks, head, tuple(adapter_of(50 + n) for n in range(edits)))


def same(one: Knowledge, other: Knowledge) -> bool:
    (tensors, facts), (others, other_facts) = one.to_tensors(), other.to_tensors()
    return facts == other_facts and tensors.keys() == others.keys() and all(
        torch.equal(tensors[key], others[key]) and tensors[key].dtype == others[key].dtype for key in tensors
    )  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(
    classes=st.lists(st.sampled_from(["ab", "c", "def", ""]), max_size=3, unique=True),
    moments=st.sampled_from(["full", "diagonal"]),
    ridge=st.booleans(),
    edits=st.integers(0, 2),
)
def test_tensors_and_json_there_and_back(classes: list[str], moments: Moments, ridge: bool, edits: int) -> None:
    tasks = [task_of(n, each, moments=moments, ridge=ridge) for n, each in enumerate(classes, start=1)]
    known = knowledge_of(*tasks, edits=edits)
    tensors, facts = known.to_tensors()
    assert all(value.numel() and value.is_contiguous() for value in tensors.values())
    assert same(Knowledge.from_tensors(tensors, json.loads(json.dumps(facts))), known)
    parts = [TaskKnowledge.from_tensors(*task.to_tensors()) for task in known.tasks]
    assert same(Knowledge.of_parts(parts, known.edits, known.current()), known)


def test_a_record_of_a_task_does_not_grow_with_the_stream() -> None:
    sizes = []
    for count in (1, 5):
        known = knowledge_of(*(task_of(n, "abcdefghij"[2 * n - 2 : 2 * n]) for n in range(1, count + 1)))
        sizes.append(sum(value.numel() for value in known.tasks[0].to_tensors()[0].values()))
    assert sizes[0] == sizes[1]


def test_what_clients_know_of_a_task_adds_up() -> None:
    one, other = (task_of(1, "ab", ridge=True, seed=seed) for seed in (0, 100))
    both = one + other
    features = torch.cat([randn(12, WIDTH, seed=1), randn(12, WIDTH, seed=101)])
    whole = class_statistics(features, torch.arange(24) % 2, range(2))
    assert [each.count for each in both.statistics] == [12, 12]
    for found, expected in zip(both.statistics, whole, strict=True):
        torch.testing.assert_close(found.moment, expected.moment, rtol=0, atol=1e-12)
    assert both.ridge is not None
    assert both.ridge.total.count == 24
    with pytest.raises(DataError, match="knowledge of task 1"):
        one + task_of(2, "ab", ridge=True)


def test_a_forgotten_class_is_gone_from_every_part() -> None:
    known = knowledge_of(task_of(1, "ab", ridge=True), task_of(2, "cd", ridge=True))
    left = known.without(["b", "c", "d"])
    assert left.classes == ("a",)
    assert left.tasks[1].classes == ()
    assert torch.equal(left.head.weight, known.head.weight[:1])
    assert (len(left.statistics), len(left.first), left.prototypes().classes) == (1, 1, 1)
    assert left.task_of.tolist() == [0]
    gone = known.statistics[1].total
    tensors = left.to_tensors()[0]
    assert not any(value.shape[-1:] == gone.shape and (value == gone).all(-1).any() for value in tensors.values())
    assert known.classes == ("a", "b", "c", "d")
    with pytest.raises(DataError, match="expected classes out of a, b, c, d, got z"):
        known.without(["z"])


def test_edits_are_stacked_on_every_adapter() -> None:
    known = knowledge_of(task_of(1, "a"), task_of(2, "b"), edits=2)
    for position, task in enumerate(known.tasks):
        for name, factors in known.adapter(position).items():
            expected = sum((each[name].delta() for each in (task.adapter, *known.edits)), torch.zeros(5, 3))
            torch.testing.assert_close(factors.delta(), expected)


def test_what_is_no_knowledge_is_refused() -> None:
    known = knowledge_of(task_of(1, "ab"))
    tensors, facts = known.to_tensors()
    with pytest.raises(PayloadError, match="expected the knowledge of a task"):
        Knowledge.from_tensors({k: v for k, v in tensors.items() if not k.endswith("moment")}, facts)
    with pytest.raises(PayloadError, match="in format 1, got 2; update pomona"):
        Knowledge.from_tensors(tensors, {**facts, "format": 2})
    with pytest.raises(PayloadError, match="'tasks'"):
        Knowledge.from_tensors(tensors, {})
    with pytest.raises(PayloadError, match="do not fit"):
        Knowledge.of_parts((), (), known.current())
    with pytest.raises(ValueError, match="each of 2 classes"):
        dataclasses.replace(known.tasks[0], first=())
    assert nothing_known(WIDTH, MosSettings()).classes == ()
