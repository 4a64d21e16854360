"""Heads and weights: means that are exact where they can be."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from pomona.aggregation.heads import HeadMean, average_heads
from pomona.aggregation.weights import example_weights


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_mean_over_all_clients() -> None:
    heads = [randn(3, 4, seed=seed) for seed in range(3)]
    weights = [0.5, 0.25, 0.25]
    mean = average_heads([{"w": head} for head in heads], weights=weights)["w"]
    expected = 0.5 * heads[0].double() + 0.25 * heads[1].double() + 0.25 * heads[2].double()
    assert mean.dtype == torch.float32
    assert torch.equal(mean, expected.float())


def test_weights_are_shared_out_among_the_holders_of_each_parameter() -> None:
    one, other, third = (randn(2, seed=seed) for seed in range(3))
    updates = [{"w": one, "b": one}, {"w": other}, {"b": third}]
    mean = average_heads(updates, weights=[0.2, 0.3, 0.5])
    assert list(mean) == ["b", "w"]
    assert_close(mean["w"], 0.4 * one + 0.6 * other)
    assert_close(mean["b"], (0.2 * one + 0.5 * third) / 0.7)


@pytest.mark.parametrize("clients", [1, 3, 10, 97])
def test_a_parameter_that_nobody_changed_comes_back_bit_for_bit(clients: int) -> None:
    head = randn(50) * 10.0 ** randn(50, seed=1)
    weights = example_weights(list(range(1, clients + 1)))
    assert torch.equal(average_heads([{"w": head}] * clients, weights=weights)["w"], head)


def test_sums_in_float64() -> None:
    updates = [{"w": torch.tensor([value])} for value in (1e8, 1.0, -1e8)]
    assert average_heads(updates, weights=[1.0, 1.0, 1.0])["w"].item() == pytest.approx(1 / 3, rel=1e-6)


def test_the_result_is_new_and_the_inputs_are_unchanged() -> None:
    head = torch.ones(2, requires_grad=True)
    mean = average_heads([{"w": head}], weights=[1.0])["w"]
    assert not mean.requires_grad
    mean.zero_()
    assert torch.equal(head, torch.ones(2))


def test_nobody_holds_anything() -> None:
    assert average_heads([], weights=[]) == {}
    assert average_heads([{}, {}], weights=[0.5, 0.5]) == {}


@pytest.mark.parametrize(
    ("updates", "weights", "reason"),
    [
        ([{}], [], "got 1 updates but 0 weights"),
        (
            [{"w": torch.ones(2)}, {"w": torch.ones(3)}],
            [0.5, 0.5],
            r"one shape of 'w', got \(2,\) and \(3,\)",
        ),
        ([{"w": torch.ones(2)}, {}], [0.0, 1.0], "hold 'w' have weight 0"),
        ([{"w": torch.ones(2)}], [math.nan], "got nan"),
        ([{"w": torch.ones(2)}], [math.inf], "got inf"),
        ([{"w": torch.ones(2)}], [-1.0], "got -1.0"),
    ],
)
def test_heads_that_have_no_mean_are_refused(
    updates: list[dict[str, Tensor]], weights: list[float], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        average_heads(updates, weights=weights)


def fed(updates: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    mean = HeadMean()
    for update, weight in zip(updates, weights, strict=True):
        mean.add(update, weight)
    return mean.result()


@given(
    held=st.lists(st.sets(st.sampled_from("wbc")), min_size=1, max_size=8),
    weights=st.lists(st.floats(0.01, 1.0), min_size=8, max_size=8),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None)
def test_heads_fed_one_by_one_have_the_mean_of_all_in_any_order(
    held: list[set[str]], weights: list[float], seed: int
) -> None:
    """The oracle forms each mean at once, in float64."""
    updates = [{name: randn(2, 3, seed=seed + 10 * k + ord(name)) for name in names} for k, names in enumerate(held)]
    pairs = list(zip(updates, weights, strict=False))
    found = fed(updates, weights[: len(updates)])
    turned = fed(updates[::-1], weights[: len(updates)][::-1])
    assert list(found) == sorted(set().union(*held)) == list(turned)
    for name, mean in found.items():
        holders = [(update[name].double(), weight) for update, weight in pairs if name in update]
        heads, shares = torch.stack([head for head, _ in holders]), torch.tensor([w for _, w in holders]).double()
        expected = (shares[:, None, None] * heads).sum(0) / shares.sum()
        assert mean.dtype == torch.float32
        assert_close(mean.double(), expected, rtol=1e-6, atol=1e-7)
        assert_close(turned[name], mean, rtol=1e-6, atol=1e-7)
    together = average_heads(updates, weights=weights[: len(updates)])
    assert all(torch.equal(together[name], mean) for name, mean in found.items())


def test_heads_that_are_fed_are_copied() -> None:
    """Clients whose updates were let go would be held by their heads, or a later one would change an earlier mean."""
    head, mean = torch.ones(2), HeadMean()
    mean.add({"w": head}, 1.0)
    first = mean.result()["w"]
    head.zero_()
    mean.add({"w": torch.full((2,), 3.0)}, 1.0)
    assert torch.equal(first, torch.ones(2))
    assert torch.equal(mean.result()["w"], torch.full((2,), 2.0))


@given(st.lists(st.integers(1, 10**400), min_size=1, max_size=6))
def test_weights_are_the_correctly_rounded_shares(counts: list[int]) -> None:
    weights = example_weights(counts)
    assert weights == [float(Fraction(count, sum(counts))) for count in counts]
    assert math.fsum(weights) == pytest.approx(1.0, abs=1e-15 * len(counts))


def test_huge_counts_do_not_overflow() -> None:
    assert example_weights([10**400, 3 * 10**400]) == [0.25, 0.75]


@pytest.mark.parametrize("counts", [[], [0], [3, -1], [1.0], [True], ["1"], [math.nan]])
def test_counts_that_are_no_numbers_of_examples_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        example_weights(counts)
