"""Small products are checked against dense matrices, flattened; the geometric median by its optimality condition."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from pomona.adapters import AdapterWeights, LoraFactors
from pomona.aggregation.geometry import (
    add_head_changes,
    cosines,
    distances,
    distances_to,
    gram_matrix,
    head_changes,
    inner_product,
    median_coefficients,
    norms,
    squared_distances,
)
from pomona.aggregation.heads import average_heads
from pomona.aggregation.verify import update_norm

SHAPES = {"k": (5, 7), "q": (6, 3), "v": (1, 4)}
HEAD_SHAPES = {"head.bias": (3,), "head.weight": (3, 4)}


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_factors(gen: torch.Generator, name: str, rank: int, *, scale: float = 1.0) -> LoraFactors:
    out, in_ = SHAPES[name]
    return LoraFactors(
        a=torch.randn(rank, in_, generator=gen, dtype=torch.float64),
        b=torch.randn(out, rank, generator=gen, dtype=torch.float64),
        scale=scale,
    )


def make_heads(gen: torch.Generator) -> dict[str, Tensor]:
    return {name: torch.randn(*shape, generator=gen) for name, shape in HEAD_SHAPES.items()}


def make_update(gen: torch.Generator, rank: int, *, scale: float = 1.0) -> AdapterWeights:
    layers = {name: make_factors(gen, name, rank, scale=scale) for name in SHAPES}
    return AdapterWeights(layers=layers, heads=make_heads(gen))


HEADS = make_heads(random(99))
SCALES = st.just(0.0) | st.floats(0.001, 4) | st.floats(-4, -0.001)


def flatten(update: AdapterWeights, heads: Mapping[str, Tensor]) -> Tensor:
    """Return the dense change of everything, one long vector."""
    parts = [
        update.layers[name].scale * update.layers[name].b.double() @ update.layers[name].a.double()
        if name in update.layers
        else torch.zeros(shape, dtype=torch.float64)
        for name, shape in SHAPES.items()
    ]
    parts += [update.heads.get(name, heads[name]).double() - heads[name].double() for name in HEAD_SHAPES]
    return torch.cat([part.flatten() for part in parts])


def dense(updates: Sequence[AdapterWeights], heads: Mapping[str, Tensor] = HEADS) -> Tensor:
    return torch.stack([flatten(update, heads) for update in updates])  # (K, n)


def magnitude(updates: Sequence[AdapterWeights]) -> float:
    """The largest entry of a Gram matrix that does not cancel, which is what rounding is relative to."""
    sizes = [
        sum(abs(f.scale) * float(f.a.norm() * f.b.norm()) for f in update.layers.values())
        + sum(float(c.norm()) for c in head_changes(update.heads, current=HEADS).values())
        for update in updates
    ]
    return max(sizes) ** 2


@st.composite
def cohorts(draw: st.DrawFn) -> list[AdapterWeights]:
    """Draw clients of unequal rank and scale, some without some layers and heads, some with a layer of rank 0."""
    gen = random(draw(st.integers(0, 2**31)))
    updates = []
    for _ in range(draw(st.integers(1, 5))):
        ranks = {name: draw(st.sampled_from([None, 0, 1, 2, 3, 8])) for name in SHAPES}
        layers = {
            name: make_factors(gen, name, rank, scale=draw(SCALES)) for name, rank in ranks.items() if rank is not None
        }
        kept = draw(st.sets(st.sampled_from(sorted(HEAD_SHAPES))))
        heads = {name: head for name, head in make_heads(gen).items() if name in kept}
        updates.append(AdapterWeights(layers=layers, heads=heads))
    return updates


@given(cohorts())
@settings(deadline=None, max_examples=80)
def test_inner_products_equal_those_of_the_dense_changes(updates: list[AdapterWeights]) -> None:
    gram, vectors = gram_matrix(updates, heads=HEADS), dense(updates)
    assert gram.dtype == torch.float64
    assert torch.equal(gram, gram.T)
    assert_close(gram, vectors @ vectors.T, rtol=0, atol=1e-14 * magnitude(updates))


@given(cohorts())
@settings(deadline=None, max_examples=60)
def test_norms_cosines_and_distances_equal_the_dense_ones(updates: list[AdapterWeights]) -> None:
    gram, vectors = gram_matrix(updates, heads=HEADS), dense(updates)
    size, atol = magnitude(updates), 1e-14 * magnitude(updates)
    norm = vectors.norm(dim=1)
    assert_close(norms(gram), norm, rtol=0, atol=math.sqrt(atol))
    differences = (vectors[:, None] - vectors[None]).norm(dim=2)
    assert_close(squared_distances(gram), differences.square(), rtol=0, atol=4 * atol)
    assert_close(distances(gram), differences, rtol=0, atol=2 * math.sqrt(atol))
    assert bool((cosines(gram).abs() <= 1.0).all())
    for i, j in ((i, j) for i in range(len(updates)) for j in range(len(updates))):
        product = float(norm[i] * norm[j])
        if product == 0.0:
            assert float(cosines(gram)[i, j]) == 0.0
        elif product > 1e-6 * size:
            assert float(cosines(gram)[i, j]) == pytest.approx(float(vectors[i] @ vectors[j]) / product, abs=1e-7)


def test_well_conditioned_factors_leave_little_rounding() -> None:
    gen = random()
    updates = [make_update(gen, rank, scale=16 / rank) for rank in (1, 2, 4, 8, 16)]
    gram, vectors = gram_matrix(updates, heads=HEADS), dense(updates)
    assert_close(gram, vectors @ vectors.T, rtol=1e-12, atol=1e-9)
    assert_close(norms(gram), vectors.norm(dim=1), rtol=1e-13, atol=0)
    assert_close(cosines(gram), _cosine(vectors), rtol=0, atol=1e-13)
    assert_close(distances(gram), torch.cdist(vectors, vectors), rtol=1e-12, atol=1e-6)


@pytest.mark.parametrize("ranks", [[3] * 120, [5, 8, 1] * 60])
def test_more_rows_than_are_multiplied_at_a_time(ranks: list[int]) -> None:
    gen = random()
    updates = [make_update(gen, rank, scale=1 / rank) for rank in ranks]
    updates[0] = AdapterWeights(layers={"q": updates[0].layers["q"]})
    vectors = dense(updates)
    assert_close(gram_matrix(updates, heads=HEADS), vectors @ vectors.T, rtol=1e-11, atol=1e-9)


def _cosine(vectors: Tensor) -> Tensor:
    unit: Tensor = vectors / vectors.norm(dim=1, keepdim=True)
    return unit @ unit.T


@given(st.integers(0, 2**31), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.floats(-6, 6))
@settings(deadline=None, max_examples=40)
def test_how_a_change_is_split_into_factors_does_not_matter(seed: int, ranks: list[int], exponent: float) -> None:
    gen = random(seed)
    updates = [make_update(gen, rank, scale=2.0) for rank in ranks]
    others = [
        replace(
            update, layers={name: _refactored(factors, gen, 10**exponent) for name, factors in update.layers.items()}
        )
        for update in updates
    ]
    gram = gram_matrix(updates, heads=HEADS)
    assert_close(gram_matrix(others, heads=HEADS), gram, rtol=0, atol=1e-12 * magnitude(updates))


def _refactored(factors: LoraFactors, gen: torch.Generator, gauge: float) -> LoraFactors:
    """Return ``(B M, M^-1 A)``, the scale moved into ``M`` too."""
    rotation = torch.linalg.qr(torch.randn(factors.rank, factors.rank, generator=gen, dtype=torch.float64)).Q
    mix = gauge * factors.scale * rotation
    return LoraFactors(a=torch.linalg.inv(rotation) / gauge @ factors.a, b=factors.b @ mix)


@given(cohorts(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_the_order_of_clients_does_not_matter(updates: list[AdapterWeights], shuffler: Random) -> None:
    order = list(range(len(updates)))
    shuffler.shuffle(order)
    gram = gram_matrix(updates, heads=HEADS)
    shuffled = gram_matrix([updates[k] for k in order], heads=HEADS)
    assert_close(shuffled, gram[order][:, order], rtol=0, atol=1e-14 * magnitude(updates))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_factors_are_multiplied_in_float64(dtype: torch.dtype) -> None:
    gen = random()
    updates = []
    for rank in (2, 5):
        wide = make_update(gen, rank, scale=1 / 3)
        layers = {name: replace(f, a=f.a.to(dtype), b=f.b.to(dtype)) for name, f in wide.layers.items()}
        updates.append(AdapterWeights(layers=layers))
    vectors = dense(updates)
    assert_close(gram_matrix(updates, heads=HEADS), vectors @ vectors.T, rtol=1e-13, atol=1e-12)


def test_the_dense_matrix_is_never_formed() -> None:
    """Each of these would take 640 GB."""
    side, gen = 400_000, random()
    updates = [
        AdapterWeights(
            layers={"q": LoraFactors(a=torch.randn(r, side, generator=gen), b=torch.randn(side, r, generator=gen))}
        )
        for r in (1, 2)
    ]
    one, other = (update.layers["q"] for update in updates)
    expected = float(((one.b.double().T @ other.b.double()) * (one.a.double() @ other.a.double().T)).sum())
    assert inner_product(*updates, heads={}) == pytest.approx(expected, rel=1e-9)
    assert float(norms(gram_matrix(updates, heads={}))[0]) == pytest.approx(
        float(one.a.double().norm() * one.b.double().norm()), rel=1e-12
    )


def test_factors_that_need_gradients_are_only_read() -> None:
    factors = LoraFactors(a=torch.ones(1, 4, requires_grad=True), b=torch.ones(3, 1, requires_grad=True))
    head = torch.ones(2, requires_grad=True)
    update = AdapterWeights(layers={"q": factors}, heads={"bias": head})
    gram = gram_matrix([update], heads={"bias": torch.zeros(2)})
    assert not gram.requires_grad
    assert gram.tolist() == [[14.0]]


def test_a_layer_and_a_head_that_are_absent_are_zero_changes() -> None:
    gen = random()
    full = make_update(gen, 2)
    part = AdapterWeights(layers={"q": full.layers["q"]}, heads={"head.bias": full.heads["head.bias"]})
    zeros = {name: replace(f, b=torch.zeros_like(f.b)) for name, f in full.layers.items() if name != "q"}
    same = AdapterWeights(
        layers={**zeros, "q": full.layers["q"]},
        heads={"head.bias": full.heads["head.bias"], "head.weight": HEADS["head.weight"]},
    )
    gram = gram_matrix([full, part, same, AdapterWeights()], heads=HEADS)
    assert_close(gram[1], gram[2], rtol=1e-14, atol=0)
    assert float(gram[1, 1]) > 0.0
    assert gram[3].tolist() == [0.0] * 4


def test_heads_count_by_what_was_changed_in_them() -> None:
    unchanged = AdapterWeights(heads=HEADS)
    changed = AdapterWeights(heads={"head.bias": HEADS["head.bias"].double() + torch.tensor([3.0, 0.0, 4.0])})
    gram = gram_matrix([unchanged, changed], heads=HEADS)
    assert_close(gram, torch.tensor([[0.0, 0.0], [0.0, 25.0]], dtype=torch.float64))


def test_an_inner_product_is_an_entry_of_the_gram_matrix() -> None:
    gen = random()
    updates = [make_update(gen, rank) for rank in (1, 4, 2)]
    vectors = dense(updates)
    assert inner_product(updates[0], updates[2], heads=HEADS) == pytest.approx(
        float(vectors[0] @ vectors[2]), rel=1e-10
    )


def test_the_norm_is_the_one_that_verification_bounds() -> None:
    gen = random()
    updates = [make_update(gen, rank, scale=0.5) for rank in (1, 4)]
    expected = [update_norm(u.layers, head_changes(u.heads, current=HEADS)) for u in updates]
    assert norms(gram_matrix(updates, heads=HEADS)).tolist() == pytest.approx(expected, rel=1e-13)


def test_equal_updates_are_at_no_distance_though_rounding_says_otherwise() -> None:
    """Guards the clamp: without it about half of these roots would be NaN."""
    negative = 0
    for seed in range(40):
        gen = random(seed)
        update = make_update(gen, 3)
        other = replace(update, layers={n: _refactored(f, gen, 1.0) for n, f in update.layers.items()})
        gram = gram_matrix([update, other], heads=HEADS)
        negative += bool(gram[0, 0] + gram[1, 1] - 2 * gram[0, 1] < 0.0)
        away = distances(gram)
        assert float(away[0, 1]) <= 1e-7 * float(norms(gram)[0])
        assert bool((distances_to(gram, torch.tensor([0.5, 0.5], dtype=torch.float64)) <= away.max() + 1e-6).all())
    assert negative > 0


def cancelling(seed: int, *, size: float, change: float) -> LoraFactors:
    """Return factors of about the given size whose product is small."""
    gen = random(seed)
    a = torch.randn(1, 7, generator=gen, dtype=torch.float64).repeat(2, 1)
    b = size * torch.randn(5, 1, generator=gen, dtype=torch.float64).repeat(1, 2)
    b[:, 1] = change * torch.randn(5, generator=gen, dtype=torch.float64) - b[:, 1]
    return LoraFactors(a=a, b=b)


def test_factors_that_cancel_do_not_hide_a_change() -> None:
    """Guards the QR: the sum over the given factors is off by more than the whole change, to either side of 0."""
    naive = []
    for seed in range(40):
        factors = cancelling(seed, size=1e10, change=10.0)
        naive.append(float(((factors.a @ factors.a.T) * (factors.b.T @ factors.b)).sum()))
        true = float(factors.delta().norm())
        assert true > 1.0
        gram = gram_matrix([AdapterWeights(layers={"k": factors}), AdapterWeights()], heads={})
        assert float(norms(gram)[0]) == pytest.approx(true, rel=1e-3)
        assert float(distances(gram)[0, 1]) == pytest.approx(true, rel=1e-3)
    assert min(naive) <= 0.0
    assert max(naive) > 1e3


@pytest.mark.parametrize("size", [1e3, 1e10, 1e15])
def test_no_update_looks_smaller_than_rounding_could_make_it(size: float) -> None:
    for seed in range(10):
        factors = cancelling(seed, size=size, change=0.0)  # what is left of it is rounding alone
        error = sys.float_info.epsilon * float(factors.a.norm() * factors.b.norm())
        seen = float(norms(gram_matrix([AdapterWeights(layers={"k": factors})], heads={})))
        assert error <= seen <= 100 * error


def test_a_square_below_zero_is_rounding() -> None:
    assert norms(torch.tensor([[-1e-20]], dtype=torch.float64)).tolist() == [0.0]


def test_zero_updates_have_no_direction() -> None:
    gram = torch.tensor([[0.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    assert cosines(gram).tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert cosines(torch.zeros(3, 3, dtype=torch.float64)).tolist() == [[0.0] * 3] * 3


def test_a_cosine_beyond_one_is_rounding() -> None:
    gram = torch.tensor([[1.0, 1.0 + 1e-9], [1.0 + 1e-9, 1.0]], dtype=torch.float64)
    assert float(cosines(gram).max()) == 1.0
    assert float(cosines(gram * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).min()) == -1.0


def test_what_does_not_fit_is_named() -> None:
    one = AdapterWeights(layers={"q": LoraFactors(a=torch.ones(1, 2), b=torch.ones(3, 1))})
    other = AdapterWeights(layers={"q": LoraFactors(a=torch.ones(1, 3), b=torch.ones(3, 1))})
    with pytest.raises(ValueError, match="at least one update, got none"):
        gram_matrix([], heads={})
    with pytest.raises(ValueError, match=r"layer 'q', got \[\(3, 2\), \(3, 3\)\]"):
        gram_matrix([one, other], heads={})
    with pytest.raises(ValueError, match=r"head 'bias' is none of the global ones: \['b'\]"):
        gram_matrix([AdapterWeights(heads={"bias": torch.ones(2)})], heads={"b": torch.ones(2)})
    with pytest.raises(ValueError, match=r"head 'bias' should have shape \(2,\), got \(1, 2\)"):
        gram_matrix([AdapterWeights(heads={"bias": torch.ones(1, 2)})], heads={"bias": torch.ones(2)})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["a", "b", "scale", "head"])
def test_an_update_that_is_not_finite_is_refused_by_its_position(value: float, where: str) -> None:
    gen = random()
    updates = [make_update(gen, 2) for _ in range(3)]
    bad = updates[1].layers["k"]
    if where == "scale":
        bad = replace(bad, scale=value)
    else:
        {"a": bad.a, "b": bad.b, "head": updates[1].heads["head.bias"]}[where].view(-1)[0] = value
    updates[1] = replace(updates[1], layers={**updates[1].layers, "k": bad})
    with pytest.raises(ValueError, match=r"expected finite updates .* update 1 is not"):
        gram_matrix(updates, heads=HEADS)


def test_zero_times_infinity_is_refused_too() -> None:
    factors = LoraFactors(a=torch.full((1, 4), math.inf), b=torch.zeros(3, 1))
    with pytest.raises(ValueError, match="update 0 is not"):
        gram_matrix([AdapterWeights(layers={"q": factors})], heads={})


def test_sizes_up_to_those_of_float32_are_fine_and_beyond_float64_refused() -> None:
    def update(size: float) -> AdapterWeights:
        a, b = torch.full((1, 4), size, dtype=torch.float64), torch.full((4, 1), size, dtype=torch.float64)
        return AdapterWeights(layers={"q": LoraFactors(a=a, b=b)})

    gram = gram_matrix([update(3e38), update(-1.0)], heads={})
    assert bool(torch.isfinite(distances(gram)).all())
    assert float(norms(gram)[0]) == pytest.approx(4 * 9e76)
    with pytest.raises(ValueError, match="of a size that can be squared, update 0 is not"):
        gram_matrix([update(1e78)], heads={})


@pytest.mark.parametrize("function", [norms, cosines, squared_distances, distances])
@pytest.mark.parametrize(
    "gram",
    [
        torch.ones(2, 3, dtype=torch.float64),
        torch.ones(2, dtype=torch.float64),
        torch.ones(2, 2),
        torch.tensor([[1.0, math.nan], [math.nan, 1.0]], dtype=torch.float64),
        torch.tensor([[math.inf]], dtype=torch.float64),
        torch.tensor([[1e308]], dtype=torch.float64),
    ],
)
def test_what_is_no_gram_matrix_is_refused(function: Callable[[Tensor], Tensor], gram: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected a (square float64 )?Gram matrix"):
        function(gram)


@given(st.integers(0, 2**31), st.integers(1, 6))
@settings(deadline=None, max_examples=40)
def test_distances_from_a_combination_equal_the_dense_ones(seed: int, clients: int) -> None:
    gen = random(seed)
    vectors = torch.randn(clients, 9, generator=gen, dtype=torch.float64)
    coefficients = torch.randn(clients, generator=gen, dtype=torch.float64)
    away = distances_to(vectors @ vectors.T, coefficients)
    assert_close(away, (vectors - coefficients @ vectors).norm(dim=1), rtol=1e-6, atol=1e-6)


# heads


def test_head_changes_are_added_with_the_weights_as_they_are() -> None:
    gen = random()
    updates = [make_heads(gen) for _ in range(3)]
    updates[1] = {"head.bias": updates[1]["head.bias"]}
    weights = [0.5, 0.125, 0.0625]
    moved = add_head_changes(HEADS, updates, weights=weights)
    bias = HEADS["head.bias"] + sum(
        w * (u["head.bias"] - HEADS["head.bias"]) for u, w in zip(updates, weights, strict=True)
    )
    matrix = HEADS["head.weight"] + sum(weights[k] * (updates[k]["head.weight"] - HEADS["head.weight"]) for k in (0, 2))
    assert list(moved) == sorted(HEADS)
    assert moved["head.bias"].dtype == torch.float32
    assert_close(moved["head.bias"], bias)
    assert_close(moved["head.weight"], matrix)


def test_head_changes_with_weights_that_sum_to_one_are_the_mean() -> None:
    gen = random()
    updates, weights = [make_heads(gen) for _ in range(3)], [0.5, 0.3, 0.2]
    assert_close(add_head_changes(HEADS, updates, weights=weights), average_heads(updates, weights=weights))


def test_a_mean_of_heads_would_take_back_what_norm_bounding_took_off() -> None:
    """Guards the reason for adding changes: weights that were all lowered are divided by their sum again."""
    current = {"bias": torch.zeros(1)}
    updates, weights = [{"bias": torch.full((1,), 100.0)}] * 2, [0.005, 0.005]  # bounded to a norm of 1
    assert average_heads(updates, weights=weights)["bias"].item() == 100.0
    assert add_head_changes(current, updates, weights=weights)["bias"].item() == 1.0


def test_heads_in_quarantine_are_not_touched() -> None:
    poisoned = [{"bias": torch.tensor([math.inf])}, {"bias": torch.tensor([2.0])}]
    assert add_head_changes({"bias": torch.zeros(1)}, poisoned, weights=[0.0, 0.5])["bias"].item() == 1.0


def test_heads_that_nobody_changes_come_back_bit_for_bit() -> None:
    moved = add_head_changes(HEADS, [HEADS, {}], weights=[0.3, 0.7])
    assert all(torch.equal(moved[name], HEADS[name]) for name in HEADS)


def test_wrong_weights_of_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 updates but 2 weights"):
        add_head_changes(HEADS, [{}], weights=[0.5, 0.5])
    with pytest.raises(ValueError, match="finite weights"):
        add_head_changes(HEADS, [{}], weights=[math.nan])
    with pytest.raises(ValueError, match="'pooler' is none of the global ones"):
        add_head_changes(HEADS, [{"pooler": torch.ones(1)}], weights=[0.0])


# the geometric median


def median_of(vectors: Tensor, weights: Tensor) -> Tensor:
    coefficients = median_coefficients(vectors @ vectors.T, weights)
    assert bool((coefficients >= 0.0).all())
    assert float(coefficients.sum()) == pytest.approx(1.0, abs=1e-12)
    return coefficients @ vectors


def pull(vectors: Tensor, weights: Tensor, point: Tensor) -> tuple[float, float]:
    """Return the length of the pull of the clients away from a point, and the weight of those on it.

    A point is the geometric median exactly if the first is at most the second (0 in its subdifferential).
    """
    share, away = weights / weights.sum(), (vectors - point).norm(dim=1)
    far = away > 1e-5 * vectors.norm(dim=1).max()  # the smoothing is at most a fifth of this
    pulls = (share[far] / away[far])[:, None] * (vectors[far] - point)
    return float(pulls.sum(dim=0).norm()), float(share[~far].sum())


@st.composite
def points(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Draw weighted clients, some of them copies of others, some far out."""
    gen = random(draw(st.integers(0, 2**31)))
    clients = draw(st.integers(1, 9))
    base = torch.randn(clients, draw(st.integers(1, 12)), generator=gen, dtype=torch.float64)
    scales = st.sampled_from([1.0, 1.0, 1.0, -1.0, 30.0])
    vectors = torch.stack([base[draw(st.integers(0, k))] * draw(scales) for k in range(clients)])
    weights = draw(st.lists(st.floats(0.125, 4), min_size=clients, max_size=clients))
    return vectors, torch.tensor(weights, dtype=torch.float64)


@given(points())
@settings(deadline=None, max_examples=150)
def test_the_median_satisfies_its_optimality_condition(cohort: tuple[Tensor, Tensor]) -> None:
    vectors, weights = cohort
    length, on_it = pull(vectors, weights, median_of(vectors, weights))
    assert length <= on_it + 2e-3


@given(points())
@settings(deadline=None, max_examples=60)
def test_no_dense_search_finds_a_better_point(cohort: tuple[Tensor, Tensor]) -> None:
    vectors, weights = cohort

    def cost(point: Tensor) -> float:
        return float(weights @ (vectors - point).norm(dim=1))

    found, point = cost(median_of(vectors, weights)), weights @ vectors / weights.sum()
    for _ in range(300):  # Weiszfeld on the dense vectors, from the mean
        inverse = weights / (vectors - point).norm(dim=1).clamp(min=1e-9)
        point = inverse @ vectors / inverse.sum()
    best = min(cost(point), *(cost(vector) for vector in vectors))
    assert found <= best + 1e-5 * float(weights.sum()) * float(vectors.norm(dim=1).max())


@pytest.mark.parametrize(
    ("rows", "weights", "expected"),
    [
        ([[5.0]], [2.0], [5.0]),
        ([[0.0], [1.0], [10.0]], [1.0, 1.0, 1.0], [1.0]),
        ([[0.0], [1.0], [10.0]], [1.0, 1.0, 2.5], [10.0]),
        ([[0.0], [1.0], [10.0], [11.0], [90.0]], [1.0] * 5, [10.0]),
        ([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [1.0] * 4, [0.0, 0.0]),
        ([[4.0, 0.0], [-1.0, 0.0], [0.0, 7.0], [0.0, -2.0]], [1.0] * 4, [0.0, 0.0]),  # where the diagonals cross
        ([[0.0, 0.0], [2.0, 0.0], [1.0, 3**0.5]], [1.0] * 3, [1.0, 3**-0.5]),  # Fermat's point
        ([[0.0, 0.0], [1.0, 0.1], [-1.0, 0.1]], [1.0] * 3, [0.0, 0.0]),  # an angle above 120 degrees: the corner
        ([[3.0, 4.0]] * 3, [1.0, 2.0, 3.0], [3.0, 4.0]),
        ([[0.0, 0.0]] * 3, [1.0, 2.0, 3.0], [0.0, 0.0]),
    ],
)
def test_medians_that_are_known(rows: list[list[float]], weights: list[float], expected: list[float]) -> None:
    vectors = torch.tensor(rows, dtype=torch.float64)
    found = median_of(vectors, torch.tensor(weights, dtype=torch.float64))
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_equal_updates_share_the_median_by_weight() -> None:
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    for vectors in (torch.ones(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)):
        assert median_coefficients(vectors @ vectors.T, weights).tolist() == [0.125, 0.25, 0.625]


def test_a_weight_of_two_is_two_clients() -> None:
    vectors = torch.randn(5, 6, generator=random(), dtype=torch.float64)
    one = median_of(vectors, torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0], dtype=torch.float64))
    other = median_of(vectors[[0, 1, 2, 2, 3, 4]], torch.ones(6, dtype=torch.float64))
    assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1e1, 1e3, 1e6, 1e9, 1e12, 1e15])
@pytest.mark.parametrize(("attackers", "clients"), [(1, 9), (3, 9), (4, 9), (50, 101)])
def test_attackers_move_the_median_by_no_more_than_the_bound(size: float, attackers: int, clients: int) -> None:
    gen = random(attackers)
    honest = 1.0 + torch.randn(clients - attackers, 20, generator=gen, dtype=torch.float64)
    attack = size * torch.randn(1, 20, generator=gen, dtype=torch.float64).repeat(attackers, 1)
    vectors = torch.cat([honest, attack])
    center = honest.mean(dim=0)
    share = attackers / clients
    bound = float((honest - center).norm(dim=1).max()) * (1 - share) / math.sqrt(1 - 2 * share)
    assert float((median_of(vectors, torch.ones(clients, dtype=torch.float64)) - center).norm()) <= bound
    assert float((vectors.mean(dim=0) - center).norm()) > share * size  # the mean it moves at will


def test_a_common_shift_moves_the_median_with_it() -> None:
    vectors = torch.randn(6, 8, generator=random(), dtype=torch.float64)
    weights = torch.ones(6, dtype=torch.float64)
    assert_close(median_of(vectors + 3.0, weights), median_of(vectors, weights) + 3.0, rtol=0, atol=1e-6)
    assert_close(median_of(1e-9 * vectors, weights), 1e-9 * median_of(vectors, weights), rtol=1e-6, atol=0)
    assert_close(median_of(1e9 * vectors, weights), 1e9 * median_of(vectors, weights), rtol=1e-6, atol=0)
