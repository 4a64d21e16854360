"""Stacking is checked against the dense sum, which is slow and obviously right."""

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from pomona.adapters import LoraFactors
from pomona.aggregation.flora import aggregate_layers, recompress, stack, truncation_rank
from pomona.aggregation.weights import example_weights

Layers = dict[str, LoraFactors]

FLORA_RANKS = [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]


def make_factors(
    gen: torch.Generator,
    rank: int,
    *,
    out: int = 12,
    in_: int = 10,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> LoraFactors:
    return LoraFactors(
        a=torch.randn(rank, in_, generator=gen, dtype=dtype),
        b=torch.randn(out, rank, generator=gen, dtype=dtype),
        scale=scale,
    )


def dense_mean(updates: Sequence[LoraFactors], weights: Sequence[float]) -> Tensor:
    terms = [w * u.scale * (u.b.double() @ u.a.double()) for u, w in zip(updates, weights, strict=True)]
    return torch.stack(terms).sum(dim=0)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[list[LoraFactors], list[float]]:
    """Draw clients of unequal rank, alpha and kind of scale for one layer, with their weights."""
    gen = random(draw(st.integers(0, 2**31)))
    out, in_ = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    ranks = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    updates = []
    for rank in ranks:
        alpha, rslora = draw(st.floats(0.125, 64)), draw(st.booleans())
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        updates.append(make_factors(gen, rank, out=out, in_=in_, scale=scale))
    return updates, draw(st.lists(st.floats(0.0625, 4), min_size=len(ranks), max_size=len(ranks)))


@given(cohorts())
@settings(deadline=None, max_examples=60)
def test_stack_equals_the_dense_weighted_sum(cohort: tuple[list[LoraFactors], list[float]]) -> None:
    updates, weights = cohort
    stacked = stack(updates, weights=weights)
    assert stacked.rank == sum(update.rank for update in updates)
    assert stacked.scale == 1.0
    magnitude = sum(float(u.scale * w * u.b.norm() * u.a.norm()) for u, w in zip(updates, weights, strict=True))
    assert_close(stacked.delta(), dense_mean(updates, weights), rtol=0, atol=1e-14 * magnitude)


def test_stack_equals_the_dense_mean_at_the_ranks_of_the_paper() -> None:
    gen = random()
    updates = [
        make_factors(gen, r, out=96, in_=80, scale=(2 * r) / (math.sqrt(r) if i % 2 else r))
        for i, r in enumerate(FLORA_RANKS)
    ]
    weights = example_weights([100 * (i + 1) for i in range(10)])
    assert relative_error(stack(updates, weights=weights).delta(), dense_mean(updates, weights)) < 1e-14


def test_weights_and_scales_go_into_one_factor_only() -> None:
    gen = random()
    updates = [make_factors(gen, r, scale=2.0 / r) for r in (2, 3)]
    assert torch.equal(stack(updates, weights=[0.25, 0.75]).b, torch.cat([u.b for u in updates], dim=1))


def test_weights_on_both_factors_would_be_wrong() -> None:
    """Guards the reason for the test above: p lands squared in the product."""
    gen = random()
    updates = [make_factors(gen, r, out=96, in_=80, scale=2.0) for r in FLORA_RANKS]
    weights = example_weights([10, 9, 8, 7, 6, 5, 4, 3, 2, 1])
    both = LoraFactors(
        a=torch.cat([w * u.scale * u.a for u, w in zip(updates, weights, strict=True)]),
        b=torch.cat([w * u.b for u, w in zip(updates, weights, strict=True)], dim=1),
    )
    assert relative_error(both.delta(), dense_mean(updates, weights)) > 0.6
    assert relative_error(stack(updates, weights=weights).delta(), dense_mean(updates, weights)) < 1e-14


def test_averaging_the_factors_instead_would_be_wrong() -> None:
    """Guards the reason this module exists."""
    one = LoraFactors(a=torch.tensor([[1.0]]), b=torch.tensor([[1.0]]))
    other = LoraFactors(a=torch.tensor([[-1.0]]), b=torch.tensor([[-1.0]]))
    assert stack([one, other], weights=[0.5, 0.5]).delta().item() == 1.0
    assert ((one.b + other.b) / 2 @ ((one.a + other.a) / 2)).item() == 0.0


def test_stack_names_what_is_wrong() -> None:
    one = LoraFactors(a=torch.ones(1, 2), b=torch.ones(3, 1))
    other = LoraFactors(a=torch.ones(1, 3), b=torch.ones(3, 1))
    with pytest.raises(ValueError, match="at least one update, got none"):
        stack([], weights=[])
    with pytest.raises(ValueError, match="got 2 updates but 1 weights"):
        stack([one, one], weights=[1.0])
    with pytest.raises(ValueError, match=r"one layer, got the shapes \(out, in\) \[\(3, 2\), \(3, 3\)\]"):
        stack([one, other], weights=[0.5, 0.5])
    for weight in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite weights"):
            stack([one], weights=[weight])


@given(cohorts(), st.integers(1, 12))
@settings(deadline=None, max_examples=80)
def test_recompress_is_the_best_approximation_of_its_rank(
    cohort: tuple[list[LoraFactors], list[float]], rank: int
) -> None:
    updates, weights = cohort
    stacked = stack(updates, weights=weights)
    small, lost = recompress(stacked, rank=rank)
    dense = stacked.delta()
    singular_values = torch.linalg.svdvals(dense)  # Eckart-Young: nothing of this rank comes closer
    best = float(singular_values[rank:].norm() / singular_values.norm())
    assert 1 <= small.rank <= rank
    assert small.scale == 1.0
    assert relative_error(small.delta(), dense) == pytest.approx(best, abs=1e-9)
    assert lost == pytest.approx(best, abs=1e-9)
    assert 0.0 <= lost <= 1.0


@pytest.mark.parametrize(("out", "in_", "ranks"), [(40, 30, [4, 8]), (30, 40, [16, 16]), (9, 7, [8, 8, 8])])
def test_recompress_equals_the_truncated_dense_svd(out: int, in_: int, ranks: list[int]) -> None:
    gen = random()
    stacked = stack([make_factors(gen, r, out=out, in_=in_) for r in ranks], weights=[1.0] * len(ranks))
    u, s, vt = torch.linalg.svd(stacked.delta(), full_matrices=False)
    small, _ = recompress(stacked, rank=5)
    assert small.rank == 5
    assert_close(small.delta(), (u[:, :5] * s[:5]) @ vt[:5], rtol=0, atol=1e-12 * float(s[0]))


def test_recompress_with_room_enough_is_lossless_and_no_larger_than_needed() -> None:
    one = make_factors(random(), 3)
    twice = stack([one, one], weights=[0.5, 0.5])  # rank 6 in form, 3 in truth
    small, lost = recompress(twice, rank=64)
    assert (small.rank, lost) == (3, 0.0)
    assert relative_error(small.delta(), one.delta()) < 1e-14


def test_recompress_applies_the_scale_once() -> None:
    factors = make_factors(random(), 3, scale=7.5)
    small, _ = recompress(factors, rank=3)
    assert relative_error(small.delta(), factors.delta()) < 1e-14


def test_recompress_balances_the_factors_and_fixes_the_signs() -> None:
    small, _ = recompress(make_factors(random(), 4), rank=4)
    root = torch.linalg.svdvals(small.delta())[:4].sqrt()
    assert_close(small.a.norm(dim=1), root)
    assert_close(small.b.norm(dim=0), root)
    assert bool((small.b.gather(0, small.b.abs().argmax(dim=0, keepdim=True)) > 0).all())


def test_recompress_does_not_depend_on_the_signs_and_balance_of_its_input() -> None:
    factors = make_factors(random(), 3)
    gauge = torch.tensor([-1e6, 1e-3, -2.0], dtype=torch.float64)
    other = LoraFactors(a=gauge[:, None] * factors.a, b=factors.b / gauge)
    assert_close(recompress(other, rank=3)[0].b, recompress(factors, rank=3)[0].b, rtol=1e-9, atol=1e-12)
    assert_close(recompress(other, rank=3)[0].a, recompress(factors, rank=3)[0].a, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("out", "in_", "rank"), [(40, 30, 8), (6, 5, 8)])
def test_equal_inputs_give_equal_bytes(out: int, in_: int, rank: int) -> None:
    factors = make_factors(random(), rank, out=out, in_=in_, dtype=torch.float32)
    one, _ = recompress(factors, rank=4)
    other, _ = recompress(LoraFactors(a=factors.a.clone(), b=factors.b.clone()), rank=4)
    assert torch.equal(one.a, other.a)
    assert torch.equal(one.b, other.b)
    assert one.a.is_contiguous()
    assert one.b.is_contiguous()


@pytest.mark.parametrize("rank", [0, 1, 3, 20])
def test_recompress_of_nothing_is_a_zero_of_rank_one(rank: int) -> None:
    nothing = LoraFactors(a=torch.ones(rank, 10), b=torch.zeros(12, rank))
    small, lost = recompress(nothing, rank=4)
    assert (small.rank, lost) == (1, 0.0)
    assert torch.equal(small.delta(), torch.zeros(12, 10))


def test_recompress_computes_in_float64_and_answers_in_the_dtype_of_its_input() -> None:
    factors = make_factors(random(), 8, out=60, in_=50, dtype=torch.float32)
    exact = factors.b.double() @ factors.a.double()
    small, _ = recompress(factors, rank=8)
    assert small.a.dtype == small.b.dtype == torch.float32
    assert relative_error(small.b.double() @ small.a.double(), exact) < 1e-7  # one rounding of each factor
    assert recompress(make_factors(random(), 2, dtype=torch.bfloat16), rank=2)[0].a.dtype == torch.float32
    assert recompress(make_factors(random(), 2), rank=2)[0].a.dtype == torch.float64


def test_recompress_does_not_overflow_where_float32_would() -> None:
    huge = LoraFactors(a=torch.full((1, 4), 1e30), b=torch.full((4, 1), 1e30))
    small, lost = recompress(huge, rank=1)
    assert lost == 0.0
    assert bool(torch.isfinite(small.a).all())
    assert bool(torch.isfinite(small.b).all())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rank", [2, 20])
def test_recompress_refuses_what_is_not_finite(value: float, rank: int) -> None:
    factors = make_factors(random(), rank)
    factors.a[0, 0] = value
    with pytest.raises(ValueError, match="finite"):
        recompress(factors, rank=2)


def test_recompress_refuses_rank_zero() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        recompress(make_factors(random(), 2), rank=0)


@pytest.mark.parametrize(
    ("singular_values", "max_rank", "energy", "expected"),
    [
        ([3.0, 1.0], 8, 0.9, 1),  # 9 / 10 exactly
        ([3.0, 1.0], 8, 0.91, 2),
        ([4.0, 2.0, 1.0], 8, 16 / 21, 1),
        ([4.0, 2.0, 1.0], 8, 20 / 21 + 1e-9, 3),
        ([4.0, 2.0, 1.0], 2, 1.0, 2),
        ([4.0, 2.0, 1.0], 8, 1.0, 3),
        ([1.0, 1e-12], 8, 1.0, 2),  # 1e-24 of the energy is still not nothing
        ([1.0, 1e-12], 8, 0.999999, 1),
        ([1.0, 0.0, 0.0], 8, 1.0, 1),
        ([0.0, 0.0], 8, 1.0, 1),
        ([0.0], 8, 0.5, 1),
        ([1e200, 1e200], 8, 0.6, 2),  # the squares overflow
        ([1e-200, 1e-200], 8, 0.6, 2),  # the squares underflow
        ([1.0, 1.0, 1.0], 8, 1e-9, 1),
        ([1.0, 1.0, 1.0], 2, 0.99, 2),
    ],
)
def test_truncation_rank(singular_values: list[float], max_rank: int, energy: float, expected: int) -> None:
    values = torch.tensor(singular_values, dtype=torch.float64)
    assert truncation_rank(values, max_rank=max_rank, energy=energy) == expected


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.floats(0.01, 0.999))
@settings(deadline=None)
def test_truncation_rank_is_the_smallest_that_keeps_the_energy(values: list[float], energy: float) -> None:
    singular_values = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank = truncation_rank(singular_values, max_rank=8, energy=energy)
    squares = [value**2 for value in sorted(values, reverse=True)]
    assert math.fsum(squares[:rank]) >= energy * math.fsum(squares) * (1 - 1e-12)
    assert rank == 1 or math.fsum(squares[: rank - 1]) < energy * math.fsum(squares) * (1 + 1e-12)


@pytest.mark.parametrize(("max_rank", "energy"), [(0, 1.0), (-1, 1.0), (1, 0.0), (1, 1.1), (1, math.nan)])
def test_limits_out_of_range_are_refused(max_rank: int, energy: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        truncation_rank(torch.ones(2), max_rank=max_rank, energy=energy)
    with pytest.raises(ValueError, match="expected"):
        aggregate_layers({}, [], weights=[], max_rank=max_rank, energy=energy)


# aggregate_layers


def aggregate(
    global_layers: Mapping[str, LoraFactors],
    updates: Sequence[Mapping[str, LoraFactors]],
    weights: Sequence[float],
    *,
    max_rank: int = 64,
    energy: float = 1.0,
) -> tuple[Layers, dict[str, float]]:
    return aggregate_layers(global_layers, updates, weights=weights, max_rank=max_rank, energy=energy)


def untrained(gen: torch.Generator, rank: int, *, dtype: torch.dtype = torch.float32) -> LoraFactors:
    factors = make_factors(gen, rank, scale=2.0, dtype=dtype)
    return LoraFactors(a=factors.a, b=torch.zeros_like(factors.b), scale=factors.scale)


def test_the_global_adapter_plus_the_weighted_mean() -> None:
    gen = random()
    names = ("k", "q")
    current = {name: make_factors(gen, 6) for name in names}
    ranks = (1, 2, 4)
    updates = [{name: make_factors(gen, r, scale=16 / r) for name in names} for r in ranks]
    weights = example_weights([10, 20, 70])
    layers, retained = aggregate(current, updates, weights)
    assert retained == {"k": 1.0, "q": 1.0}
    for name in names:
        expected = current[name].delta() + dense_mean([update[name] for update in updates], weights)
        assert layers[name].scale == 1.0
        assert relative_error(layers[name].delta(), expected) < 1e-13


def test_float32_in_is_float32_out_rounded_once() -> None:
    gen = random()
    current = {"q": make_factors(gen, 4, dtype=torch.float32)}
    updates = [{"q": make_factors(gen, 2, scale=1 / 3, dtype=torch.float32)} for _ in range(3)]
    layers, _ = aggregate(current, updates, [1 / 3] * 3)
    expected = dense_mean([current["q"], *(u["q"] for u in updates)], [1.0] + [1 / 3] * 3)
    assert layers["q"].a.dtype == layers["q"].b.dtype == torch.float32
    assert relative_error(layers["q"].b.double() @ layers["q"].a.double(), expected) < 2e-7


def test_weights_are_applied_in_float64() -> None:
    update = {"q": make_factors(random(), 2, dtype=torch.float32)}
    layers, _ = aggregate({}, [update] * 3, [0.1, 0.2, -0.3])  # in float32 a hundred-millionth would be left
    assert float(layers["q"].delta().norm()) < 1e-14 * float(update["q"].delta().norm())


def test_rounds_in_which_nobody_changes_anything_return_the_same_tensors() -> None:
    gen = random()
    current: Layers = {"q": make_factors(gen, 6, dtype=torch.float32)}
    first = current["q"]
    for _ in range(5):
        updates = [{"q": untrained(gen, r)} for r in FLORA_RANKS]
        current, retained = aggregate(current, updates, example_weights(FLORA_RANKS), max_rank=8)
        assert retained == {"q": 1.0}
    assert current["q"].a is first.a
    assert current["q"].b is first.b
    assert current["q"].scale == first.scale


@pytest.mark.parametrize("how", ["b", "a", "scale", "weight", "absent", "nobody"])
def test_every_way_to_change_nothing_changes_nothing(how: str) -> None:
    gen = random()
    current = {"q": make_factors(gen, 6, scale=0.5)}
    own = make_factors(gen, 2)
    zero_a, zero_b = torch.zeros_like(own.a), torch.zeros_like(own.b)
    update: dict[str, Layers] = {
        "b": {"q": LoraFactors(a=own.a, b=zero_b)},
        "a": {"q": LoraFactors(a=zero_a, b=own.b)},
        "scale": {"q": LoraFactors(a=own.a, b=own.b, scale=0.0)},
        "weight": {"q": own},
        "absent": {},
    }
    updates = [] if how == "nobody" else [update[how]]
    layers, _ = aggregate(current, updates, [0.0 if how == "weight" else 1.0] * len(updates), max_rank=2)
    assert layers["q"] is current["q"]


def test_a_client_that_changes_nothing_counts_as_zero_beside_one_that_does() -> None:
    gen = random()
    idle, busy = untrained(gen, 4, dtype=torch.float64), make_factors(gen, 2)
    layers, _ = aggregate({}, [{"q": idle}, {"q": busy}], [0.75, 0.25])
    assert layers["q"].rank == 2
    assert relative_error(layers["q"].delta(), 0.25 * busy.delta()) < 1e-14


def test_a_client_without_a_layer_has_a_zero_update_of_it() -> None:
    gen = random()
    busy = make_factors(gen, 2)
    layers, _ = aggregate({}, [{"q": busy}, {"k": busy}], [0.25, 0.75])
    assert list(layers) == ["k", "q"]
    assert relative_error(layers["q"].delta(), 0.25 * busy.delta()) < 1e-14
    assert relative_error(layers["k"].delta(), 0.75 * busy.delta()) < 1e-14


def test_a_layer_that_nobody_has_is_absent() -> None:
    layers, retained = aggregate({}, [{"q": untrained(random(), 2)}], [1.0])
    assert layers == {}
    assert retained == {}


def test_updates_that_cancel_the_global_adapter_leave_a_valid_zero() -> None:
    current = make_factors(random(), 2)
    opposite = LoraFactors(a=current.a, b=-current.b)
    layers, retained = aggregate({"q": current}, [{"q": opposite}], [1.0])
    assert layers["q"].rank >= 1
    assert float(layers["q"].delta().norm()) < 1e-14 * float(current.delta().norm())
    assert 0.0 <= retained["q"] <= 1.0


@given(st.integers(0, 2**31), st.permutations(range(6)))
@settings(deadline=None, max_examples=40)
def test_the_order_of_clients_does_not_matter(seed: int, order: list[int]) -> None:
    gen = random(seed)
    current = {"q": make_factors(gen, 3, out=30, in_=25)}
    updates = [{"q": make_factors(gen, r, out=30, in_=25, scale=2.0)} for r in (1, 2, 3, 4, 2, 1)]
    weights = example_weights([5, 1, 9, 3, 3, 7])
    one, _ = aggregate(current, updates, weights)
    other, _ = aggregate(current, [updates[i] for i in order], [weights[i] for i in order])
    assert relative_error(other["q"].delta(), one["q"].delta()) < 1e-12


def test_one_client_gets_its_own_training_result_back() -> None:
    gen = random()
    current = {"q": make_factors(gen, 4)}
    own = {"q": make_factors(gen, 3, scale=2.0)}
    layers, retained = aggregate(current, [own], example_weights([123]), max_rank=7)
    assert retained == {"q": 1.0}
    assert layers["q"].rank == 7
    assert relative_error(layers["q"].delta(), current["q"].delta() + own["q"].delta()) < 1e-13


def test_a_late_joiner_needs_the_last_global_adapter_only() -> None:
    """Some take part in one round only; the accumulated dense deltas are what everybody should have."""
    gen = random()
    clients = {"a": 1, "b": 2, "c": 4}
    examples = {"a": 30, "b": 10, "c": 60}
    accumulated = torch.zeros(24, 20, dtype=torch.float64)
    current: Layers = {}
    for cohort in (["a", "b"], ["b"], ["a", "b", "c"]):
        updates = [{"q": make_factors(gen, clients[c], out=24, in_=20, scale=2.0)} for c in cohort]
        weights = example_weights([examples[c] for c in cohort])
        current, retained = aggregate(current, updates, weights)
        accumulated += dense_mean([update["q"] for update in updates], weights)
        assert retained == {"q": 1.0}
        assert relative_error(current["q"].delta(), accumulated) < 1e-13
    assert current["q"].rank == 1 + 2 + 2 + 1 + 2 + 4


def test_truncation_keeps_the_bound_and_reports_the_energy() -> None:
    gen = random()
    current = {"q": make_factors(gen, 4)}
    updates = [{"q": make_factors(gen, 4)} for _ in range(2)]
    layers, retained = aggregate(current, updates, [0.5, 0.5], max_rank=5)
    s = torch.linalg.svdvals(current["q"].delta() + dense_mean([u["q"] for u in updates], [0.5, 0.5]))
    assert layers["q"].rank == 5
    assert retained["q"] == pytest.approx(float(s[:5].square().sum() / s.square().sum()), abs=1e-12)
    assert retained["q"] < 1.0


def test_energy_chooses_the_rank() -> None:
    u, _ = torch.linalg.qr(torch.randn(12, 3, generator=random(), dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(10, 3, generator=random(1), dtype=torch.float64))
    update = {"q": LoraFactors(a=v.T, b=u * torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))}
    layers, retained = aggregate({}, [update], [1.0], energy=0.9)
    assert layers["q"].rank == 2
    assert retained["q"] == pytest.approx(20 / 21)


def test_aggregation_changes_none_of_its_inputs() -> None:
    gen = random()
    current, update = {"q": make_factors(gen, 4)}, {"q": make_factors(gen, 2)}
    before = [tensor.clone() for factors in (current["q"], update["q"]) for tensor in (factors.a, factors.b)]
    aggregate(current, [update], [1.0])
    after = [tensor for factors in (current["q"], update["q"]) for tensor in (factors.a, factors.b)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_aggregate_names_what_is_wrong() -> None:
    gen = random()
    update = {"q": make_factors(gen, 2)}
    with pytest.raises(ValueError, match="got 1 updates but 0 weights"):
        aggregate({}, [update], [])
    with pytest.raises(ValueError, match="finite weights, got nan"):
        aggregate({}, [update], [math.nan])
    with pytest.raises(ValueError, match="one layer"):
        aggregate({"q": make_factors(gen, 2, out=5)}, [update], [1.0])
