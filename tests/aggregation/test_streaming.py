"""Updates folded in one by one are checked against the dense float64 sum of all of them."""

import gc
import math
from collections.abc import Iterable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from pomona.adapters import LoraFactors
from pomona.aggregation.flora import aggregate_layers
from pomona.aggregation.streaming import StackAccumulator
from pomona.aggregation.weights import example_weights

OUT, IN = 40, 30
WEIGHTS = st.builds(math.ldexp, st.sampled_from([-1.0, 1.0]), st.integers(-12, 2))


def make_factors(
    gen: torch.Generator,
    rank: int,
    *,
    out: int = OUT,
    in_: int = IN,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> LoraFactors:
    return LoraFactors(
        a=torch.randn(rank, in_, generator=gen, dtype=dtype),
        b=torch.randn(out, rank, generator=gen, dtype=dtype),
        scale=scale,
    )


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense_sum(updates: Iterable[LoraFactors], weights: Iterable[float]) -> Tensor:
    return torch.stack(
        [w * u.scale * (u.b.double() @ u.a.double()) for u, w in zip(updates, weights, strict=True)]
    ).sum(dim=0)


def accumulate(
    updates: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    guard_rank: int = 4,
    block_rank: int | None = None,
    start: LoraFactors | None = None,
    dtype: torch.dtype = torch.float64,
) -> StackAccumulator:
    out, in_ = updates[0].b.shape[0], updates[0].a.shape[1]
    total = StackAccumulator(out, in_, guard_rank=guard_rank, block_rank=block_rank, start=start, dtype=dtype)
    for update, weight in zip(updates, weights, strict=True):
        total.add(update, weight)
    return total


def held(total: StackAccumulator) -> Tensor:
    """All that is held, as a dense matrix."""
    factors, retained = total.result(max_rank=1000, energy=1.0)
    assert retained == pytest.approx(1.0, abs=1e-11)
    return factors.b.double() @ factors.a.double()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def magnitude(updates: Iterable[LoraFactors], weights: Iterable[float]) -> float:
    """What rounding is relative to: terms may cancel."""
    return sum(
        float(abs(u.scale * w) * u.b.double().norm() * u.a.double().norm())
        for u, w in zip(updates, weights, strict=True)
    )


def in_one_subspace(gen: torch.Generator, ranks: Sequence[int], *, width: int = 3) -> list[LoraFactors]:
    """Updates whose sum, of whatever weights, has at most the rank ``width``."""
    left = torch.randn(OUT, width, generator=gen, dtype=torch.float64)
    right = torch.randn(width, IN, generator=gen, dtype=torch.float64)
    return [
        LoraFactors(
            a=torch.randn(rank, width, generator=gen, dtype=torch.float64) @ right,
            b=left @ torch.randn(width, rank, generator=gen, dtype=torch.float64),
        )
        for rank in ranks
    ]


@st.composite
def cohorts(draw: st.DrawFn, max_total: int = 1000) -> tuple[list[LoraFactors], list[float]]:
    """Draw clients of unequal rank and scale for one layer, with their weights."""
    gen = random(draw(st.integers(0, 2**31)))
    out, in_ = draw(st.integers(20, 40)), draw(st.integers(20, 40))
    ranks = draw(st.lists(st.integers(1, 9), min_size=1, max_size=9))
    while sum(ranks) > max_total:
        ranks = ranks[:-1] if len(ranks) > 1 else [max_total]
    updates = [make_factors(gen, r, out=out, in_=in_, scale=draw(st.floats(0.125, 8))) for r in ranks]
    for i in draw(st.sets(st.integers(0, len(ranks) - 1))):
        if i and ranks[i] == ranks[i - 1]:
            updates[i] = updates[i - 1]
        elif ranks[i] > 1:
            updates[i].b[:, 0] = 0.0
    return updates, draw(st.lists(WEIGHTS, min_size=len(ranks), max_size=len(ranks)))


guards = st.tuples(st.integers(1, 5), st.integers(1, 4))


# exact


@given(cohorts(max_total=8), st.integers(1, 7))
@settings(deadline=None, max_examples=80)
def test_the_sum_is_exact_up_to_the_stated_rank(cohort: tuple[list[LoraFactors], list[float]], guard: int) -> None:
    updates, weights = cohort
    total = accumulate(updates, weights, guard_rank=guard, block_rank=8 - guard)
    error = float((held(total) - dense_sum(updates, weights)).norm())
    assert error <= 1e-13 * magnitude(updates, weights)
    assert total.error_bound == 0.0
    assert total.estimated_error == 0.0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("energy", [0.8, 1.0])
def test_up_to_the_stated_rank_the_result_is_that_of_the_one_shot_aggregation(
    dtype: torch.dtype, tolerance: float, energy: float
) -> None:
    gen = random()
    start = make_factors(gen, 3, out=96, in_=80, scale=0.5, dtype=dtype)
    updates = [make_factors(gen, r, out=96, in_=80, scale=16 / r, dtype=dtype) for r in (8, 4, 2, 2)]
    weights = example_weights([10, 20, 30, 40])
    total = accumulate(updates, weights, guard_rank=8, start=start, dtype=dtype)
    factors, retained = total.result(max_rank=9, energy=energy)
    layers, energies = aggregate_layers(
        {"q": start}, [{"q": update} for update in updates], weights=weights, max_rank=9, energy=energy
    )
    expected = layers["q"]
    assert factors.a.dtype == factors.b.dtype == dtype
    assert (factors.rank, factors.scale) == (expected.rank, 1.0)
    assert_close(factors.a, expected.a, rtol=0, atol=tolerance * float(expected.a.norm()))
    assert_close(factors.b, expected.b, rtol=0, atol=tolerance * float(expected.b.norm()))
    assert retained == pytest.approx(energies["q"], abs=tolerance)


@given(st.integers(0, 2**31), st.lists(st.integers(1, 9), min_size=1, max_size=30), guards)
@settings(deadline=None, max_examples=40)
def test_merges_lose_nothing_while_the_sum_has_no_more_than_the_guard_rank(
    seed: int, ranks: list[int], guard: tuple[int, int]
) -> None:
    updates = in_one_subspace(random(seed), ranks)
    weights = [1.0 + i for i in range(len(ranks))]
    total = accumulate(updates, weights, guard_rank=2 + guard[0], block_rank=guard[1])
    size = magnitude(updates, weights)
    assert float((held(total) - dense_sum(updates, weights)).norm()) <= 1e-13 * size
    assert total.error_bound <= 1e-12 * size / float(dense_sum(updates, weights).norm())


@pytest.mark.parametrize("zeros", [False, True])
def test_updates_that_say_the_same_again_and_again_lose_nothing(zeros: bool) -> None:
    """Blocks without full rank leave the QR free to choose directions, which must not lean on those that are kept."""
    gen = random()
    pool = make_factors(gen, 6, out=60, in_=60)
    updates = []
    for _ in range(400):
        picks = torch.randint(0, 6, (2, 3), generator=gen)
        updates.append(LoraFactors(a=pool.a[picks[0]], b=pool.b[:, picks[1]].clone()))
        if zeros:
            updates[-1].b[:, 0] = 0.0
    total = accumulate(updates, [1.0] * 400, guard_rank=12, block_rank=8)
    assert relative_error(held(total), dense_sum(updates, [1.0] * 400)) < 1e-12
    assert total.error_bound < 1e-12
    assert total.result(max_rank=60, energy=1.0)[0].rank == 6


def test_axes_as_directions_are_no_special_case() -> None:
    """A zero column makes QR choose an axis; here the axes are those that are kept."""
    eye = torch.eye(OUT, dtype=torch.float64)
    updates = [LoraFactors(a=eye[i % 3 : i % 3 + 2, :IN], b=eye[:, i % 4 : i % 4 + 2]) for i in range(100)]
    total = accumulate(updates, [1.0] * 100, guard_rank=5, block_rank=3)
    assert relative_error(held(total), dense_sum(updates, [1.0] * 100)) < 1e-13
    assert total.error_bound < 1e-13


@given(cohorts(), st.integers(0, 2**31), guards)
@settings(deadline=None, max_examples=40)
def test_the_order_moves_an_exact_sum_by_rounding_only(
    cohort: tuple[list[LoraFactors], list[float]], seed: int, guard: tuple[int, int]
) -> None:
    updates, weights = cohort
    same = in_one_subspace(random(seed), [update.rank for update in updates])
    order = torch.randperm(len(same), generator=random(seed)).tolist()
    one = accumulate(same, weights, guard_rank=3, block_rank=guard[1])
    other = accumulate([same[i] for i in order], [weights[i] for i in order], guard_rank=3, block_rank=guard[1])
    assert float((held(one) - held(other)).norm()) <= 1e-13 * magnitude(same, weights)


def test_the_same_order_gives_the_same_bytes() -> None:
    updates = [make_factors(random(i), 3, dtype=torch.float32) for i in range(20)]
    one, other = (
        accumulate(updates, [1.0] * 20, dtype=torch.float32).result(max_rank=2, energy=1.0)[0] for _ in range(2)
    )
    assert torch.equal(one.a, other.a)
    assert torch.equal(one.b, other.b)


@pytest.mark.parametrize(("out", "in_"), [(9, 7), (7, 9), (3, 200), (16, 16)])
def test_a_small_layer_is_summed_densely_and_loses_nothing(out: int, in_: int) -> None:
    gen = random()
    updates = [make_factors(gen, r, out=out, in_=in_, scale=2.0 / r) for r in [5, 1, 12, 3] * 10]
    weights = example_weights(range(1, 41))
    total = accumulate(updates, weights, guard_rank=4)
    assert total.nbytes == 8 * out * in_
    assert relative_error(held(total), dense_sum(updates, weights)) < 1e-13
    assert total.error_bound == total.estimated_error == 0.0


# where truncation in the middle was needed


@given(cohorts(), guards)
@settings(deadline=None, max_examples=150)
def test_the_bound_bounds_the_true_error(cohort: tuple[list[LoraFactors], list[float]], guard: tuple[int, int]) -> None:
    updates, weights = cohort
    total = accumulate(updates, weights, guard_rank=guard[0], block_rank=guard[1])
    expected = dense_sum(updates, weights)
    if math.isfinite(total.error_bound):
        allowed = total.error_bound * float(expected.norm()) + 1e-13 * magnitude(updates, weights)
        assert float((held(total) - expected).norm()) <= allowed
    assert total.error_bound == 0.0 or sum(update.rank for update in updates) > sum(guard)


def test_the_bound_is_met_where_one_merge_dropped_something() -> None:
    """Rules out a bound that holds because it is far too large."""
    updates = [
        LoraFactors(
            a=torch.eye(IN, dtype=torch.float64)[i : i + 1], b=torch.eye(OUT, dtype=torch.float64)[:, i : i + 1]
        )
        for i in range(6)
    ]
    total = accumulate(updates, [9.0, 8.0, 7.0, 2.0, 1.0, 9.0], guard_rank=3, block_rank=2)
    assert relative_error(held(total), dense_sum(updates, [9.0, 8.0, 7.0, 2.0, 1.0, 9.0])) == pytest.approx(
        math.sqrt(5 / 280)
    )
    assert total.error_bound == pytest.approx(math.sqrt(5) / (math.sqrt(275) - math.sqrt(5)))


def test_the_bound_says_so_when_it_says_nothing() -> None:
    updates = [make_factors(random(i), 8) for i in range(60)]
    assert accumulate(updates, [1.0] * 60, guard_rank=2).error_bound == math.inf


@pytest.mark.parametrize("count", [3, 10, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_estimate_is_near_the_true_error(count: int, seed: int) -> None:
    gen = random(seed)
    updates = [make_factors(gen, 4, out=90, in_=80) for _ in range(count)]
    weights = [1.0 / (1 + i) for i in range(count)]
    total = accumulate(updates, weights, guard_rank=4)
    true = relative_error(held(total), dense_sum(updates, weights))
    assert true > 0.05
    assert total.estimated_error == pytest.approx(true, rel=0.2)


def test_the_order_moves_a_truncated_sum_by_no_more_than_the_bounds() -> None:
    gen = random()
    updates = [make_factors(gen, 3) for _ in range(4)]
    weights = [8.0, 1.0, 0.5, 0.25]
    one = accumulate(updates, weights, guard_rank=6, block_rank=2)
    other = accumulate(updates[::-1], weights[::-1], guard_rank=6, block_rank=2)
    size = float(dense_sum(updates, weights).norm())
    moved = float((held(one) - held(other)).norm())
    assert 1e-6 * size < moved <= (one.error_bound + other.error_bound) * size


def test_without_a_guard_rank_what_adds_up_slowly_never_adds_up() -> None:
    """One loud client, then many that agree with one another: the sum is theirs, and only a guard rank sees it."""
    loud, common = make_factors(random(1), 1), make_factors(random(2), 1)
    updates = [loud, *[common] * 30]
    weights = [4.0, *[0.5] * 30]
    expected = dense_sum(updates, weights)
    best = float(torch.linalg.svdvals(expected)[1] / expected.norm())

    def error(guard_rank: int) -> float:
        total = accumulate(updates, weights, guard_rank=guard_rank, block_rank=1)
        factors, _ = total.result(max_rank=1, energy=1.0)
        return relative_error(factors.delta(), expected)

    assert error(guard_rank=1) > 2 * best
    assert error(guard_rank=2) == pytest.approx(best, abs=1e-12)
    without = accumulate(updates, weights, guard_rank=1, block_rank=1)
    assert without.error_bound == math.inf
    assert without.estimated_error > 2 * best


def test_with_a_guard_rank_the_result_is_near_the_best_of_its_rank() -> None:
    """Clients that share directions and have noise of their own: ten times as many ranks as are kept."""
    gen = random()
    shared = in_one_subspace(gen, [4] * 60, width=4)
    updates = [
        LoraFactors(
            a=torch.cat([update.a, 0.5 * torch.randn(2, IN, generator=gen, dtype=torch.float64)]),
            b=torch.cat([update.b, 0.5 * torch.randn(OUT, 2, generator=gen, dtype=torch.float64)], dim=1),
        )
        for update in shared
    ]
    expected = dense_sum(updates, [1.0] * 60)
    s = torch.linalg.svdvals(expected)
    best = float(s[4:].norm() / s.norm())
    factors, _ = accumulate(updates, [1.0] * 60, guard_rank=8).result(max_rank=4, energy=1.0)
    assert best <= relative_error(factors.delta(), expected) < 1.05 * best


# weights and start


def test_raw_weights_are_normalised_at_the_end() -> None:
    gen = random()
    counts = [100, 250, 7, 1]
    updates = [make_factors(gen, 2, scale=4.0) for _ in counts]
    start = make_factors(gen, 2)
    raw = accumulate(updates, [float(n) for n in counts], guard_rank=4, start=start)
    shares = example_weights(counts)
    assert raw.total_weight == sum(counts)
    factors, _ = raw.result(max_rank=10, energy=1.0, mean=True)
    assert relative_error(factors.delta(), start.delta() + dense_sum(updates, shares)) < 1e-13


@pytest.mark.parametrize("guard_rank", [4, 100])
@pytest.mark.parametrize("rank", [2, 27, 50])
def test_the_start_may_have_any_rank_and_scale(guard_rank: int, rank: int) -> None:
    gen = random()
    start, own = make_factors(gen, rank, scale=0.375), make_factors(gen, 5, scale=2.0)
    factors, retained = accumulate([own], [4.0], guard_rank=guard_rank, start=start).result(50, 1.0, mean=True)
    assert retained == 1.0
    assert factors.rank == min(rank + 5, IN)
    assert relative_error(factors.delta(), start.delta() + own.delta()) < 1e-13


def test_a_client_that_changes_nothing_counts_in_the_mean() -> None:
    busy = make_factors(random(), 2)
    idle = LoraFactors(a=busy.a, b=torch.zeros_like(busy.b))
    total = accumulate([idle, busy, busy], [3.0, 1.0, 0.0])
    factors, _ = total.result(max_rank=4, energy=1.0, mean=True)
    assert total.total_weight == 4.0
    assert relative_error(factors.delta(), 0.25 * busy.delta()) < 1e-14


def test_a_mean_needs_weights_that_do_not_cancel() -> None:
    one, other = make_factors(random(1), 2), make_factors(random(2), 2)
    with pytest.raises(ValueError, match="do not sum to zero"):
        accumulate([one, other], [1.0, -1.0]).result(max_rank=4, energy=1.0, mean=True)


def test_a_merge_does_not_touch_the_start() -> None:
    """However large the updates' raw weights are, ``start`` is added when they have been divided away."""
    gen = random()
    start = make_factors(gen, 4)
    updates = [make_factors(gen, 4) for _ in range(20)]
    total = accumulate(updates, [1e9] * 20, guard_rank=4, start=start)
    without = accumulate(updates, [1e9] * 20, guard_rank=4)
    mean, _ = without.result(max_rank=30, energy=1.0, mean=True)
    factors, _ = total.result(max_rank=30, energy=1.0, mean=True)
    assert relative_error(factors.delta(), start.delta() + mean.delta()) < 1e-13


@pytest.mark.parametrize("how", ["b", "a", "scale", "weight", "rank", "nobody", "underflow"])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("guard_rank", [2, 100])
def test_every_way_to_change_nothing_returns_the_start_itself(how: str, mean: bool, guard_rank: int) -> None:
    gen = random()
    start, own = make_factors(gen, 6, scale=0.5), make_factors(gen, 2)
    update = {
        "b": LoraFactors(a=own.a, b=torch.zeros_like(own.b)),
        "a": LoraFactors(a=torch.zeros_like(own.a), b=own.b),
        "scale": LoraFactors(a=own.a, b=own.b, scale=0.0),
        "weight": own,
        "rank": LoraFactors(a=own.a[:0], b=own.b[:, :0]),
        "underflow": LoraFactors(a=1e-200 * own.a, b=1e-200 * own.b),
    }
    total = StackAccumulator(OUT, IN, guard_rank=guard_rank, start=start, dtype=torch.float64)
    for _ in range(0 if how == "nobody" else 9):
        total.add(update[how], 0.0 if how == "weight" else 1.0)
    factors, retained = total.result(max_rank=2, energy=1.0, mean=mean)
    assert factors is start
    assert retained == 1.0
    assert total.error_bound == total.estimated_error == 0.0


@pytest.mark.parametrize("guard_rank", [2, 100])
def test_nothing_on_nothing_is_a_zero_of_rank_one(guard_rank: int) -> None:
    total = StackAccumulator(OUT, IN, guard_rank=guard_rank)
    for mean in (True, False):
        factors, retained = total.result(max_rank=4, energy=1.0, mean=mean)
        assert (factors.rank, retained) == (1, 1.0)
        assert torch.equal(factors.delta(), torch.zeros(OUT, IN))


def test_updates_that_cancel_leave_nothing_but_rounding() -> None:
    updates = [make_factors(random(), 3)] * 40
    total = accumulate(updates, [1.0, -1.0] * 20, guard_rank=3, block_rank=2)
    factors, _ = total.result(max_rank=4, energy=1.0)
    assert float(factors.delta().norm()) <= 1e-13 * magnitude(updates, [1.0] * 40)


def test_terms_that_cancel_exactly_leave_room() -> None:
    one = LoraFactors(a=torch.eye(4, IN), b=torch.cat([torch.eye(OUT, 2), -torch.eye(OUT, 2)], dim=1))
    nothing = LoraFactors(a=torch.cat([one.a[:2], one.a[:2]]), b=one.b)
    busy = make_factors(random(), 2, dtype=torch.float32)
    factors, retained = accumulate([nothing], [1.0], guard_rank=2, dtype=torch.float32).result(4, 1.0)
    assert (factors.rank, retained) == (1, 1.0)
    assert torch.equal(factors.delta(), torch.zeros(OUT, IN))
    total = accumulate([nothing, busy], [1.0, 1.0], guard_rank=2, dtype=torch.float32)
    assert total.error_bound == 0.0
    assert relative_error(held(total), dense_sum([busy], [1.0])) < 1e-6


def test_one_client_alone_gets_its_own_training_result_back() -> None:
    gen = random()
    start, own = make_factors(gen, 4), make_factors(gen, 3, scale=2.0)
    factors, retained = accumulate([own], [123.0], start=start).result(max_rank=7, energy=1.0, mean=True)
    assert retained == 1.0
    assert factors.rank == 7
    assert relative_error(factors.delta(), start.delta() + own.delta()) < 1e-13


def test_an_update_may_be_wider_than_the_accumulator() -> None:
    update = in_one_subspace(random(), [50])[0]
    total = accumulate([update], [1.0], guard_rank=3, block_rank=2)
    assert relative_error(held(total), update.delta()) < 1e-12


# the last truncation


@given(cohorts(), guards, st.integers(1, 8), st.floats(0.1, 1.0))
@settings(deadline=None, max_examples=40)
def test_the_result_is_never_above_its_rank_and_keeps_the_energy_that_it_says(
    cohort: tuple[list[LoraFactors], list[float]], guard: tuple[int, int], max_rank: int, energy: float
) -> None:
    updates, weights = cohort
    total = accumulate(updates, weights, guard_rank=guard[0], block_rank=guard[1])
    before = held(total)
    factors, retained = total.result(max_rank=max_rank, energy=energy)
    assert 1 <= factors.rank <= max_rank
    assert factors.scale == 1.0
    assert retained == pytest.approx(1.0 - relative_error(factors.delta(), before) ** 2, abs=1e-9)
    assert retained >= energy - 1e-9 or factors.rank == max_rank


def test_the_result_changes_nothing_and_adding_may_go_on() -> None:
    gen = random()
    updates = [make_factors(gen, 3) for _ in range(9)]
    straight = accumulate(updates, [1.0] * 9)
    stopped = StackAccumulator(OUT, IN, guard_rank=4, dtype=torch.float64)
    for update in updates:
        stopped.add(update, 1.0)
        stopped.result(max_rank=1, energy=0.5)
    assert torch.equal(held(stopped), held(straight))


# memory


def live_bytes() -> int:
    gc.collect()
    found = {
        thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()
        for thing in gc.get_objects()
        if type(thing) is Tensor
    }
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_held_does_not_grow_with_the_clients(dtype: torch.dtype) -> None:
    out, in_, rank, guard_rank = 300, 200, 8, 16
    before = live_bytes()
    total = StackAccumulator(out, in_, guard_rank=guard_rank, dtype=dtype)
    sizes = set()
    for client in range(60):
        total.add(make_factors(random(client), rank, out=out, in_=in_, dtype=dtype), 1.0)
        if client in {0, 5, 59}:
            sizes.add(live_bytes() - before)
    images = 16 * (8 * out + dtype.itemsize * in_)
    assert sizes == {total.nbytes}
    assert total.nbytes == 2 * guard_rank * ((out + in_) * dtype.itemsize + 8) + images


def test_a_clients_tensors_are_neither_kept_nor_changed() -> None:
    update = make_factors(random(), 3)
    a, b = update.a.clone().requires_grad_(), update.b.clone()
    total = StackAccumulator(OUT, IN, guard_rank=4, dtype=torch.float64)
    for _ in range(9):
        total.add(LoraFactors(a=a, b=b), 1.0)
    assert torch.equal(a, update.a)
    assert torch.equal(b, update.b)
    b.zero_()
    assert relative_error(held(total), 9 * update.delta()) < 1e-12
    assert not total.result(max_rank=2, energy=1.0)[0].a.requires_grad


# dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_updates_are_held_in_float32(dtype: torch.dtype) -> None:
    updates = [make_factors(random(i), 2, dtype=dtype) for i in range(3)]
    total = accumulate(updates, [1.0] * 3, guard_rank=4, dtype=torch.float32)
    factors, _ = total.result(max_rank=6, energy=1.0)
    assert factors.a.dtype == factors.b.dtype == torch.float32
    assert relative_error(held(total), dense_sum(updates, [1.0] * 3)) < 1e-6


def test_merging_in_float32_rounds_by_millionths() -> None:
    updates = [
        LoraFactors(a=update.a.float(), b=update.b.float()) for update in in_one_subspace(random(), [4] * 200, width=8)
    ]
    total = accumulate(updates, [1.0] * 200, guard_rank=8, dtype=torch.float32)
    assert relative_error(held(total), dense_sum(updates, [1.0] * 200)) < 1e-5
    assert total.estimated_error < 1e-5


def test_a_wider_start_widens_the_result() -> None:
    start, own = make_factors(random(), 2), make_factors(random(1), 2, dtype=torch.float32)
    factors, _ = accumulate([own], [1.0], start=start, dtype=torch.float32).result(max_rank=4, energy=1.0)
    assert factors.a.dtype == factors.b.dtype == torch.float64


# refusals


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factor", ["a", "b"])
@pytest.mark.parametrize("guard_rank", [2, 100])
def test_what_is_not_finite_is_refused_and_left_out(value: float, factor: str, guard_rank: int) -> None:
    good, bad = make_factors(random(), 3), make_factors(random(1), 3)
    (bad.a if factor == "a" else bad.b)[1, 2] = value
    total = accumulate([good], [1.0], guard_rank=guard_rank)
    with pytest.raises(ValueError, match="finite factors"):
        total.add(bad, 1.0)
    assert total.total_weight == 1.0
    assert relative_error(held(total), good.delta()) < 1e-14


def test_a_zero_factor_does_not_hide_an_infinity() -> None:
    hidden = LoraFactors(a=torch.full((2, IN), math.inf), b=torch.zeros(OUT, 2))
    with pytest.raises(ValueError, match="finite factors"):
        StackAccumulator(OUT, IN, guard_rank=2).add(hidden, 1.0)


def test_a_sum_that_overflows_is_refused() -> None:
    huge = LoraFactors(a=torch.full((4, IN), 3e38), b=torch.full((OUT, 4), 3e38))
    total = accumulate([huge], [1.0], guard_rank=2, dtype=torch.float32)
    with pytest.raises(ValueError, match="overflow"):
        total.add(huge, 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_and_scales_are_finite(value: float) -> None:
    own = make_factors(random(), 2)
    total = StackAccumulator(OUT, IN, guard_rank=4, dtype=torch.float64)
    with pytest.raises(ValueError, match="finite weight and scale"):
        total.add(own, value)
    with pytest.raises(ValueError, match="finite weight and scale"):
        total.add(LoraFactors(a=own.a, b=own.b, scale=value), 1.0)


def test_the_accumulator_names_what_is_wrong() -> None:
    own = make_factors(random(), 2)
    total = StackAccumulator(OUT, IN, guard_rank=4)
    with pytest.raises(ValueError, match=r"\(out, in\) = \(40, 30\), got \(41, 30\)"):
        total.add(make_factors(random(), 2, out=41), 1.0)
    with pytest.raises(ValueError, match=r"no wider than torch\.float32, got torch\.float64"):
        total.add(own, 1.0)
    with pytest.raises(ValueError, match=r"\(out, in\) = \(40, 31\), got \(40, 30\)"):
        StackAccumulator(OUT, IN + 1, guard_rank=4, start=own)
    with pytest.raises(ValueError, match=r"expected float32 or float64, got torch\.float16"):
        StackAccumulator(OUT, IN, guard_rank=4, dtype=torch.float16)
    for sizes in ((0, 3, 1, 1), (3, 0, 1, 1), (3, 3, 0, 1), (3, 3, 1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            StackAccumulator(sizes[0], sizes[1], guard_rank=sizes[2], block_rank=sizes[3])
    for max_rank, energy in ((0, 1.0), (1, 0.0), (1, 1.1)):
        with pytest.raises(ValueError, match="expected"):
            total.result(max_rank=max_rank, energy=energy)


@pytest.mark.parametrize("size", [(OUT, IN), (6, 5), (5, 6)])
def test_what_is_held_is_the_sum_without_decomposing_it(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    updates = [
        LoraFactors(
            a=torch.randn(2, size[1], generator=generator), b=torch.randn(size[0], 2, generator=generator), scale=0.5
        )
        for _ in range(9)
    ]
    total = StackAccumulator(*size, guard_rank=4, dtype=torch.float64)
    assert not total.held().delta().any()
    for count, update in enumerate(updates, start=1):
        total.add(update, count)
        factors, _ = total.result(max_rank=99, energy=1.0)
        torch.testing.assert_close(total.held().delta(), factors.delta(), rtol=1e-9, atol=1e-9)
    before = total.held()
    before.b.zero_()
    assert total.held().delta().any()
