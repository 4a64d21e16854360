"""Every number equals that of the dense matrices, which the code never forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pomona.adapters import AdapterWeights, LoraFactors
from pomona.aggregation.comparison import compare_adapters, compare_layers, principal_angles


def factors(out: int, in_: int, rank: int, *, seed: int, scale: float = 1.0) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, in_, generator=generator), torch.randn(out, rank, generator=generator)
    return LoraFactors(a=a, b=b, scale=scale)


def dense(update: LoraFactors) -> Tensor:
    return update.scale * update.b.double() @ update.a.double()


def dense_angles(one: Tensor, other: Tensor, ranks: tuple[int, int]) -> list[float]:
    """Angles between column spaces, by projectors: the eigenvalues of P_1 P_2 P_1 are squared cosines."""
    first = torch.linalg.svd(one).U[:, : ranks[0]]
    second = torch.linalg.svd(other).U[:, : ranks[1]]
    projected = first @ first.T @ second @ second.T @ first @ first.T
    squared = torch.linalg.eigvalsh(projected).flip(0)[: min(ranks)].clamp(0.0, 1.0)
    return [float(value) for value in squared.sqrt().arccos()]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    ranks=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    scales=st.tuples(st.sampled_from([1.0, -0.5, 3.0]), st.sampled_from([1.0, 0.25])),
    seed=st.integers(0, 1000),
)
def test_a_layer_is_compared_as_its_dense_matrices_are(
    shape: tuple[int, int], ranks: tuple[int, int], scales: tuple[float, float], seed: int
) -> None:
    one = factors(*shape, ranks[0], seed=seed, scale=scales[0])
    other = factors(*shape, ranks[1], seed=seed + 5000, scale=scales[1])
    first, second = dense(one), dense(other)
    got = compare_layers(one, other)
    expected_ranks = (min(*shape, ranks[0]), min(*shape, ranks[1]))
    assert got.ranks == expected_ranks
    assert got.norms == pytest.approx((float(first.norm()), float(second.norm())), rel=1e-12)
    assert got.distance == pytest.approx(float((first - second).norm()), rel=1e-12)
    cosine = float((first * second).sum() / first.norm() / second.norm())
    assert got.cosine == pytest.approx(cosine, abs=1e-12)
    spectra = [torch.linalg.svdvals(matrix) for matrix in (first, second)]
    assert got.stable_ranks == pytest.approx([float((s / s[0]).square().sum()) for s in spectra], rel=1e-12)
    assert got.column_angles == pytest.approx(dense_angles(first, second, expected_ranks), abs=1e-6)
    assert got.row_angles == pytest.approx(dense_angles(first.T, second.T, expected_ranks), abs=1e-6)


def test_factors_do_not_matter_products_do() -> None:
    one = factors(9, 7, 3, seed=0)
    mixing = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    same = LoraFactors(a=torch.linalg.inv(mixing) @ one.a.double(), b=one.b.double() @ mixing)
    got = compare_layers(one, same)
    assert got.distance < 1e-12 * got.norms[0]
    assert got.cosine == pytest.approx(1.0, abs=1e-14)
    assert max(*got.column_angles, *got.row_angles) < 1e-12


@pytest.mark.parametrize("angle", [1e-12, 1e-8, 1e-3, 0.5, math.pi / 4, 1.2, math.pi / 2])
def test_an_angle_is_exact_however_small(angle: float) -> None:
    basis = torch.eye(5, dtype=torch.float64)
    turned = basis[:, :2].clone()
    turned[:, 1] = math.cos(angle) * basis[:, 1] + math.sin(angle) * basis[:, 2]
    for one, other in ((basis[:, :2], turned), (turned, basis[:, :2]), (basis[:, [0, 1, 4]], turned)):
        assert principal_angles(one, other) == pytest.approx((0.0, angle), rel=1e-12, abs=1e-15)


def test_near_equal_adapters_keep_their_difference() -> None:
    one = factors(50, 40, 4, seed=0)
    step = factors(50, 40, 1, seed=1, scale=1e-10)
    other = LoraFactors(a=torch.cat([one.a, step.scale * step.a.double()]), b=torch.cat([one.b, step.b], dim=1))
    got = compare_layers(one, other)
    assert got.distance == pytest.approx(float(dense(step).norm()), rel=1e-4)
    assert got.ranks == (4, 5)


def test_large_and_small_numbers_do_not_overflow() -> None:
    one = factors(6, 5, 2, seed=0, scale=1e200)
    got = compare_layers(one, LoraFactors(a=one.a, b=one.b, scale=2e200))
    assert got.norms[1] / got.norms[0] == pytest.approx(2.0)
    assert got.distance == pytest.approx(got.norms[0])
    tiny = compare_layers(factors(6, 5, 2, seed=0, scale=1e-200), None)
    assert tiny.norms[0] == pytest.approx(1e-200 * float(dense(factors(6, 5, 2, seed=0)).norm()))


def test_an_absent_or_zero_layer_is_a_zero_change() -> None:
    one = factors(6, 5, 2, seed=0)
    zero = LoraFactors(a=one.a, b=torch.zeros_like(one.b))
    for other in (None, zero):
        got = compare_layers(one, other)
        assert (got.norms[1], got.cosine, got.ranks, got.stable_ranks[1]) == (0.0, 0.0, (2, 0), 0.0)
        assert got.distance == pytest.approx(got.norms[0])
        assert got.column_angles == got.row_angles == ()
        back = compare_layers(other, one)
        assert (back.norms, back.ranks) == (got.norms[::-1], (0, 2))
    assert compare_layers(zero, zero).cosine == 0.0


def test_all_layers_together_are_one_vector() -> None:
    one = AdapterWeights(layers={"a": factors(6, 5, 2, seed=0), "b": factors(4, 4, 1, seed=1)})
    other = AdapterWeights(
        layers={"b": factors(4, 4, 3, seed=2), "a": factors(6, 5, 1, seed=3), "c": factors(2, 3, 1, seed=4)}
    )
    vectors = [
        torch.cat([dense(x.layers[name]).flatten() if name in x.layers else torch.zeros(6) for name in "abc"]).numpy()
        for x in (one, other)
    ]
    got = compare_adapters(one, other)
    assert list(got.layers) == ["a", "b", "c"]
    assert got.norms == pytest.approx([np.linalg.norm(vector) for vector in vectors])
    assert got.distance == pytest.approx(np.linalg.norm(vectors[0] - vectors[1]))
    assert got.cosine == pytest.approx(vectors[0] @ vectors[1] / np.prod(got.norms))
    assert compare_adapters(AdapterWeights(), AdapterWeights()).cosine == 0.0


def test_heads_are_compared_where_they_can_be() -> None:
    one = AdapterWeights(heads={"w": torch.tensor([3.0, 4.0]), "old": torch.ones(1), "n": torch.ones(2)})
    other = AdapterWeights(heads={"w": torch.tensor([4.0, -3.0]), "new": torch.zeros(1), "n": torch.ones(3)})
    heads = compare_adapters(one, other).heads
    assert (heads["w"].norms, heads["w"].cosine) == ((5.0, 5.0), 0.0)
    assert heads["w"].distance == pytest.approx(math.sqrt(50))
    assert (heads["old"].norms, heads["old"].distance) == ((1.0, None), None)
    assert heads["new"].norms == (None, 0.0)
    assert (heads["n"].distance, heads["n"].cosine) == (None, None)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="one layer"):
        compare_layers(factors(6, 5, 2, seed=0), factors(5, 6, 2, seed=0))
    with pytest.raises(ValueError, match="one layer"):
        compare_layers(None, None)
    with pytest.raises(ValueError, match="finite"):
        compare_layers(LoraFactors(a=torch.full((1, 2), math.nan), b=torch.ones(2, 1)), None)
    with pytest.raises(ValueError, match="finite"):
        compare_adapters(AdapterWeights(heads={"w": torch.tensor([math.inf])}), AdapterWeights())
