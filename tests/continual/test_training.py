"""One task's adapter is trained on what it is told to train, by as many steps, and starts are left alone."""

from pathlib import Path

import pytest
import torch

from pomona.continual.encoder import Adapter, FrozenEncoder
from pomona.continual.heads import LinearHead
from pomona.continual.training import fresh_adapter, stacked, train_adapter
from pomona.errors import ConfigError
from pomona.mos_settings import LoopSettings

TEXTS = ["the cat", "a hammer", "a small dog", "the old saw", "wolf and sheep"]
TARGETS = torch.tensor([0, 1, 0, 1, 0])
LOOP = LoopSettings(epochs=1, min_steps=5, batch_size=2, learning_rate=0.05)


@pytest.fixture(scope="module")
def encoder(tiny_bert: Path) -> FrozenEncoder:
    return FrozenEncoder(tiny_bert, adapted_blocks=1)


def test_few_examples_are_passed_more_often_and_many_not_for_ever() -> None:
    loop = LoopSettings(epochs=3, min_steps=20, max_steps=100, batch_size=10)
    assert [loop.steps(examples) for examples in (1, 10, 101, 10_000)] == [20, 20, 33, 100]


def test_the_sum_of_two_adapters_is_the_sum_of_their_updates(encoder: FrozenEncoder) -> None:
    one, other = (fresh_adapter(encoder, rank=rank, alpha=4.0, seed=rank) for rank in (2, 3))
    for factors in (*one.values(), *other.values()):
        factors.b.normal_(generator=torch.Generator().manual_seed(1))
    name, *_ = one
    both = stacked(one, {name: other[name]})
    torch.testing.assert_close(both[name].delta(), one[name].delta() + other[name].delta())
    assert all(torch.equal(both[each].delta(), one[each].delta()) for each in one if each != name)


@pytest.mark.parametrize("trains", ["b", "both"])
def test_only_what_is_trained_changes_and_the_start_does_not(encoder: FrozenEncoder, trains: str) -> None:
    states = encoder.of_texts(TEXTS, max_length=16)
    start, head = fresh_adapter(encoder, rank=2, alpha=4.0, seed=0), LinearHead.zeros(2, encoder.width)
    seen: list[Adapter] = []

    def look(adapter: Adapter) -> Adapter:
        seen.append(adapter)
        return adapter

    adapter, trained = train_adapter(
        encoder, states, TARGETS, start=start, head=head, settings=LOOP, seed=1,
        trains="both" if trains == "both" else "b", after_step=look,
    )  # fmt: skip
    assert len(seen) == 5
    assert not any(factors.b.any() for factors in start.values())
    assert not head.weight.any()
    assert all(torch.equal(factors.a, start[name].a) == (trains == "b") for name, factors in adapter.items())
    assert any(factors.b.any() for factors in adapter.values())
    features = encoder.all_features(states, adapter)
    assert torch.equal(trained.logits(features).argmax(1), TARGETS)


def test_a_batch_may_be_larger_than_any_data(encoder: FrozenEncoder) -> None:
    """Passes were counted by examples, so that this took hours before the first step."""
    states, start = encoder.of_texts(TEXTS, max_length=16), fresh_adapter(encoder, rank=2, alpha=4.0, seed=0)
    found = []
    for size in (len(TEXTS), 10**9):
        settings, head = LOOP.model_copy(update={"batch_size": size}), LinearHead.zeros(2, encoder.width)
        found.append(train_adapter(encoder, states, TARGETS, start=start, head=head, settings=settings, seed=1))
    assert torch.equal(found[0][1].weight, found[1][1].weight)


def test_what_a_step_returns_is_gone_on_with(encoder: FrozenEncoder) -> None:
    states, start = encoder.of_texts(TEXTS, max_length=16), fresh_adapter(encoder, rank=2, alpha=4.0, seed=0)
    head = LinearHead.zeros(2, encoder.width)
    adapter, _ = train_adapter(
        encoder, states, TARGETS, start=start, head=head, settings=LOOP, seed=1, after_step=lambda _: start
    )
    assert not any(factors.b.any() for factors in adapter.values())


def test_a_loss_that_is_not_finite_is_refused(encoder: FrozenEncoder) -> None:
    states, start = encoder.of_texts(TEXTS, max_length=16), fresh_adapter(encoder, rank=2, alpha=4.0, seed=0)
    wild = LinearHead(torch.full((2, encoder.width), torch.nan), torch.zeros(2))
    with pytest.raises(ConfigError, match="lower learning_rate"):
        train_adapter(encoder, states, TARGETS, start=start, head=wild, settings=LOOP, seed=1)
