"""Folding a round's updates one by one: the dense sum, in the memory of one contribution."""

import weakref
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from pomona.adapters import LoraFactors
from pomona.aggregation.strategies import ADDING
from pomona.aggregation.strategies.contract import Contribution, Rules
from pomona.aggregation.strategies.folding import fold, guard_rank
from pomona.seeds import orthonormal_a
from pomona.strategies import StrategyName

SHAPES = {"large": (130, 120), "small": (6, 5)}  # of max_rank 4: one is held in terms, the other densely
RULES = Rules(shapes=SHAPES, max_rank=4)
EXACT_UP_TO = 2 * guard_rank(RULES.max_rank)
NAMES: list[StrategyName] = ["ffa-nested", "flora-bounded"]


def contribution(seed: int, *, rank: int, weight: float, scale: float = 1.0, nested: bool = False) -> Contribution:
    gen = torch.Generator().manual_seed(seed)
    return Contribution(
        layers={
            name: LoraFactors(
                a=orthonormal_a(name, rank, in_, seed=1) if nested else torch.randn(rank, in_, generator=gen),
                b=torch.randn(out, rank, generator=gen),
                scale=scale,
            )
            for name, (out, in_) in SHAPES.items()
        },
        weight=weight,
    )


def dense_sum(parts: Sequence[Contribution], name: str) -> Tensor:
    total = torch.zeros(SHAPES[name], dtype=torch.float64)
    for part in parts:
        factors = part.layers[name]
        total += part.weight * factors.scale * factors.b.double() @ factors.a.double()
    return total


def cohort(clients: int, *, rank: int, nested: bool = False) -> list[Contribution]:
    return [contribution(k, rank=rank, weight=1 / clients, nested=nested) for k in range(clients)]


@given(
    ranks=st.lists(st.integers(1, EXACT_UP_TO // 4), min_size=1, max_size=4),
    scales=st.lists(st.floats(0.01, 100.0), min_size=4, max_size=4),
    weights=st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_up_to_twice_the_guard_rank_the_fold_is_the_dense_sum(
    ranks: list[int], scales: list[float], weights: list[float], seed: int
) -> None:
    parts = [contribution(seed + k, rank=rank, weight=weights[k], scale=scales[k]) for k, rank in enumerate(ranks)]
    layers, kept = fold(parts, RULES)
    assert kept == dict.fromkeys(SHAPES, 1.0)
    for name in SHAPES:
        expected = dense_sum(parts, name)
        assert_close(layers[name].delta(), expected, rtol=0.0, atol=1e-12 * max(1e-30, float(expected.norm())))


def test_the_bound_is_not_too_modest_and_not_too_bold() -> None:
    """At the bound nothing is lost, and one rank above it something is."""
    at, above = cohort(EXACT_UP_TO, rank=1), cohort(EXACT_UP_TO + 1, rank=1)
    assert fold(at, RULES)[1] == {"large": 1.0, "small": 1.0}
    kept = fold(above, RULES)[1]
    assert 0.0 < kept["large"] < 1.0
    assert kept["small"] == 1.0


@pytest.mark.parametrize("clients", [3, 8, 30])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_beyond_the_bound_what_merges_lost_is_reported(clients: int, seed: int) -> None:
    """Unrelated updates are the hardest: the lost share is told to within a quarter of itself."""
    parts = [contribution(100 * seed + k, rank=20, weight=1 / clients) for k in range(clients)]
    layers, kept = fold(parts, RULES)
    expected = dense_sum(parts, "large")
    lost = float((layers["large"].delta() - expected).norm() / expected.norm()) ** 2
    assert lost > 0.1
    assert 1.0 - kept["large"] == pytest.approx(lost, rel=0.25)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("size", [0.0, 0.3, 3.0])
def test_the_share_that_a_round_kept_is_that_of_the_whole_adapter(size: float, *, warm: bool) -> None:
    """What merges lost of a small change is little of a large adapter."""
    rules = Rules(shapes=SHAPES, max_rank=4, warm_start=warm)
    state, _ = ADDING["flora-bounded"].aggregate({}, cohort(1, rank=4), round_number=1, rules=rules)
    state = {name: LoraFactors(a=size * each.a, b=each.b) for name, each in state.items()}
    parts = [contribution(500 + k, rank=20, weight=1 / 8) for k in range(8)]
    after, kept = ADDING["flora-bounded"].aggregate(state, parts, round_number=2, rules=rules)
    for name, share in kept.items():
        old = state[name].delta().double()
        whole = dense_sum(parts, name) + (0.0 if warm else old)  # all take over the whole of rank 4
        lost = float((after[name].delta().double() - whole).norm() / whole.norm()) ** 2
        assert lost > 1e-4
        assert 1.0 - share == pytest.approx(lost, rel=0.1)


def test_many_clients_who_agree_lose_nothing() -> None:
    """What counts is the rank of the sum, and not that of the stack."""
    parts = cohort(60, rank=3, nested=True)
    layers, kept = fold(parts, RULES)
    assert sum(part.rank for part in parts) > EXACT_UP_TO
    assert kept == {"large": 1.0, "small": 1.0}
    for name in SHAPES:
        expected = dense_sum(parts, name)
        assert_close(layers[name].delta(), expected, rtol=0.0, atol=1e-12 * float(expected.norm()))


def test_the_order_of_contributions_moves_an_exact_fold_by_rounding_only() -> None:
    parts = cohort(7, rank=5)
    layers, _ = fold(parts, RULES)
    for order in (parts[::-1], parts[3:] + parts[:3]):
        turned, _ = fold(order, RULES)
        for name in SHAPES:
            one, other = layers[name].delta(), turned[name].delta()
            assert_close(one, other, rtol=0.0, atol=1e-12 * float(one.norm()))


def test_nobody_or_nobody_who_counts_is_a_sum_of_zero() -> None:
    for parts in ([], [contribution(0, rank=3, weight=0.0)]):
        layers, kept = fold(parts, RULES)
        assert kept == {"large": 1.0, "small": 1.0}
        assert not any(factors.delta().any() for factors in layers.values())


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_that_adds_reads_its_contributions_once(name: StrategyName, *, warm: bool) -> None:
    """A generator that is gone through twice would give a round of zero clients."""
    rules = Rules(shapes=SHAPES, max_rank=4, warm_start=warm)
    strategy, nested = ADDING[name], name == "ffa-nested"
    state, _ = strategy.aggregate({}, cohort(3, rank=2, nested=nested), round_number=1, rules=rules)
    parts = cohort(9, rank=5, nested=nested)
    listed, kept = strategy.aggregate(state, parts, round_number=2, rules=rules)
    streamed, also_kept = strategy.aggregate(state, (part for part in parts), round_number=2, rules=rules)
    assert also_kept == kept
    for layer, factors in listed.items():
        assert torch.equal(streamed[layer].a, factors.a)
        assert torch.equal(streamed[layer].b, factors.b)
        assert not torch.equal(factors.b, state[layer].b)


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_that_adds_holds_no_contribution_while_the_next_is_read(name: StrategyName) -> None:
    """A thousand clients would sit in memory together."""
    tensors: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def read(number: int) -> Contribution:
        alive.append(sum(ref() is not None for ref in tensors))
        made = contribution(number, rank=2, weight=0.1, nested=name == "ffa-nested")
        tensors.extend(weakref.ref(tensor) for each in made.layers.values() for tensor in (each.a, each.b))
        return made

    def one_by_one() -> Iterator[Contribution]:
        for number in range(10):
            yield read(number)

    ADDING[name].aggregate({}, one_by_one(), round_number=1, rules=RULES)
    assert alive == [0] * 10
