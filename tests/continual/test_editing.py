"""An edit trains a fresh adapter over the others, and changes nothing that it was given."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.continual.taught import Taught, bytes_of, same_bytes, taught
from torch import Tensor
from torch.nn.functional import cross_entropy

from pomona.continual.editing import (
    Classifier,
    Examples,
    Step,
    _by_route,
    edit,
    few_of_each,
    trainable_adapter,
)  # fmt: skip
from pomona.continual.encoder import NO_ADAPTER, Adapter
from pomona.continual.training import stacked
from pomona.errors import ConfigError, DataError
from pomona.forget_settings import EditSettings

SHORT = EditSettings(rank=2, steps=4, batch_size=8, forget_batch_size=4)


@pytest.fixture(scope="module")
def known(tiny_bert: Path, toy_data: Path) -> Taught:
    return taught(tiny_bert, toy_data)


def learn(step: Step) -> Tensor:
    return cross_entropy(step.logits, step.targets)


def random_adapter(known: Taught, seed: int) -> Adapter:
    adapter = trainable_adapter(known.encoder, rank=2, seed=seed)
    with torch.no_grad():
        for each in adapter.values():
            each.b.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
    return adapter


def test_the_same_seed_gives_the_same_bytes_and_nothing_given_is_changed(known: Taught) -> None:
    before, weights = bytes_of(known.classifier.adapters[0]), known.encoder.digest()
    one, again, other = (
        edit(known.encoder, known.classifier, known.train, ["food"], loss=learn, settings=SHORT, seed=seed)
        for seed in (3, 3, 4)
    )
    assert same_bytes(bytes_of(one.adapter), bytes_of(again.adapter))
    assert one.losses == again.losses
    assert not same_bytes(bytes_of(one.adapter), bytes_of(other.adapter))
    assert same_bytes(before, bytes_of(known.classifier.adapters[0]))
    assert known.encoder.digest() == weights
    assert not any(each.a.requires_grad or each.b.requires_grad for each in one.adapter.values())
    for name, factors in one.classifier.adapters[0].items():
        expected = known.classifier.adapters[0][name].delta() + one.adapter[name].delta()
        torch.testing.assert_close(factors.delta(), expected)
        assert factors.rank == known.classifier.adapters[0][name].rank + 2


def test_a_stack_is_a_sum_also_over_nothing(known: Taught) -> None:
    one, other = random_adapter(known, 1), random_adapter(known, 2)
    name = next(iter(one))
    torch.testing.assert_close(stacked(one, other)[name].delta(), one[name].delta() + other[name].delta())
    for both in (stacked(NO_ADAPTER, one), stacked(one, {})):
        torch.testing.assert_close(both[name].delta(), one[name].delta())


def test_a_step_holds_what_it_says(known: Taught) -> None:
    seen: list[Step] = []

    def look(step: Step) -> Tensor:
        seen.append(step)
        return learn(step)

    edit(known.encoder, known.classifier, known.train, ["tool"], loss=look, settings=SHORT, seed=0)
    tool = known.classifier.classes.index("tool")
    assert [step.number for step in seen] == [0, 1, 2, 3]
    for step in seen:
        assert step.forgotten.sum() == 4
        assert len(step.rows) == 12
        assert torch.equal(step.targets, known.train.targets[step.rows])
        assert torch.equal(step.forgotten, step.targets == tool)
    first = known.train.subset(seen[0].rows)
    plain = known.encoder.all_features(first.states, known.classifier.adapters[0])
    torch.testing.assert_close(seen[0].features.detach(), plain, atol=1e-5, rtol=1e-4)


def test_each_example_goes_through_the_adapter_of_its_class_and_one_to_forget_through_all(known: Taught) -> None:
    adapters = (known.classifier.adapters[0], random_adapter(known, 5))
    several = Classifier(known.classifier.classes, adapters, known.classifier.head, routes=(0, 1, 0, 1))
    seen: list[Step] = []

    def look(step: Step) -> Tensor:
        seen.append(step)
        return step.features.sum() * 0.0

    edit(known.encoder, several, known.train, ["animal"], loss=look, settings=SHORT, seed=0)
    for step in seen[:2]:
        for at, row in enumerate(step.rows.tolist()):
            route = step.number % 2 if step.forgotten[at] else several.routes[int(step.targets[at])]
            one = known.encoder.all_features(known.train.states.subset([row]), adapters[route])[0]
            torch.testing.assert_close(step.features[at].detach(), one, atol=1e-5, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(routes=st.lists(st.integers(0, 2), min_size=1, max_size=9))
def test_features_keep_their_order_whatever_the_routes(routes: list[int]) -> None:
    found = _by_route(
        torch.tensor(routes), 3, lambda position, rows: torch.tensor([[float(row), float(position)] for row in rows])
    )
    assert found.tolist() == [[float(row), float(position)] for row, position in enumerate(routes)]


def test_a_few_of_each_class_are_drawn(known: Taught) -> None:
    few = few_of_each(known.train, 3, seed=1)
    assert few.targets.bincount().tolist() == [3, 3, 3, 3]
    assert torch.equal(few.targets, few_of_each(known.train, 3, seed=1).targets)
    assert len(few_of_each(known.train, 1000, seed=1)) == len(known.train)
    drawn = [tuple(map(len, few_of_each(known.train, 3, seed=seed).states.rows)) for seed in range(4)]
    assert len(set(drawn)) > 1


def test_bad_requests_are_refused(known: Taught) -> None:
    def request(forget: list[str], examples: Examples = known.train) -> None:
        edit(known.encoder, known.classifier, examples, forget, loss=learn, settings=SHORT, seed=0)

    with pytest.raises(DataError, match="expected classes out of animal, food, tool, weather, got plant"):
        request(["plant"])
    for nobody in ([], list(known.classifier.classes)):
        with pytest.raises(DataError, match="some but not all"):
            request(nobody)
    for one_sided in (known.train.of([0]), ~known.train.of([0])):
        with pytest.raises(DataError, match="examples of the classes to forget and of others"):
            request(["animal"], known.train.subset(one_sided))
    with pytest.raises(ConfigError, match="diverged at step 0"):
        edit(
            known.encoder, known.classifier, known.train, ["food"],
            loss=lambda step: step.features.sum() * float("nan"), settings=SHORT, seed=0,
        )  # fmt: skip
    with pytest.raises(ValueError, match="distinct classes"):
        Classifier(("a", "a"), (NO_ADAPTER,), known.classifier.head)
    with pytest.raises(ValueError, match="a route for each"):
        Classifier(("a", "b"), (NO_ADAPTER,), known.classifier.head, routes=(0,))
