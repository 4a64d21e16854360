"""Singular values are checked against the dense SVD, and the summaries against what they mean."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pomona.adapters import AdapterWeights, LoraFactors
from pomona.aggregation.geometry import gram_matrix, norms
from pomona.aggregation.spectrum import LayerSpectrum, layer_spectrum, summary, update_spectrum

SCALES = st.floats(0.001, 4) | st.floats(-4, -0.001)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_factors(
    gen: torch.Generator,
    rank: int,
    *,
    out: int = 9,
    in_: int = 7,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> LoraFactors:
    return LoraFactors(
        a=torch.randn(rank, in_, generator=gen, dtype=dtype),
        b=torch.randn(out, rank, generator=gen, dtype=dtype),
        scale=scale,
    )


def with_spectrum(values: list[float], *, out: int = 9, in_: int = 8) -> LoraFactors:
    """Return factors whose product has these singular values."""
    gen = random(3)
    left = torch.linalg.qr(torch.randn(out, len(values), generator=gen, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(in_, len(values), generator=gen, dtype=torch.float64)).Q
    return LoraFactors(a=right.T.contiguous(), b=left * torch.tensor(values, dtype=torch.float64))


def dense_values(factors: LoraFactors) -> Tensor:
    values: Tensor = torch.linalg.svdvals(factors.scale * factors.b.double() @ factors.a.double())
    return values


@given(st.integers(0, 2**31), st.sampled_from([1, 2, 3, 5, 8, 12]), st.integers(1, 9), st.integers(1, 9), SCALES)
@settings(deadline=None, max_examples=80)
def test_singular_values_equal_those_of_the_dense_change(
    seed: int, rank: int, out: int, in_: int, scale: float
) -> None:
    factors = make_factors(random(seed), rank, out=out, in_=in_, scale=scale)
    report, expected = layer_spectrum(factors), dense_values(factors)
    count = min(rank, out, in_)
    atol = 1e-13 * abs(scale) * float(factors.a.norm() * factors.b.norm())
    assert len(report.singular_values) == count
    assert list(report.singular_values) == pytest.approx(expected[:count].tolist(), rel=0, abs=atol)
    assert float(expected[count:].sum()) <= atol  # nothing was left out
    assert list(report.singular_values) == sorted(report.singular_values, reverse=True)
    assert report.norm == pytest.approx(float(expected.norm()), abs=atol)


@given(st.integers(0, 2**31), st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_the_summaries_are_their_definitions(seed: int, rank: int) -> None:
    factors = make_factors(random(seed), rank, scale=3.0)
    report, values = layer_spectrum(factors), dense_values(factors)
    shares = [float(value / values.sum()) for value in values]
    energy = float(values.square().sum())
    assert report.stable_rank == pytest.approx(energy / float(values[0]) ** 2, rel=1e-10)
    assert report.top_share == pytest.approx(float(values[0]) ** 2 / energy, rel=1e-10)
    entropy = -math.fsum(share * math.log(share) for share in shares if share > 1e-15)
    assert report.effective_rank == pytest.approx(math.exp(entropy), rel=1e-9)
    assert 1.0 <= report.stable_rank <= rank * (1 + 1e-12)
    assert 1.0 <= report.effective_rank <= rank * (1 + 1e-12)


@pytest.mark.parametrize(
    ("values", "stable_rank", "effective_rank", "top_share"),
    [
        ([5.0], 1.0, 1.0, 1.0),
        ([2.0, 2.0, 2.0, 2.0], 4.0, 4.0, 0.25),
        ([3.0, 4.0], 1.5625, math.exp(-(3 / 7) * math.log(3 / 7) - (4 / 7) * math.log(4 / 7)), 0.64),
        ([1.0, 1e-9, 1e-9], 1.0, 1.0, 1.0),
    ],
)
def test_summaries_that_are_known(
    values: list[float], stable_rank: float, effective_rank: float, top_share: float
) -> None:
    report = layer_spectrum(with_spectrum(values))
    assert list(report.singular_values) == pytest.approx(sorted(values, reverse=True), abs=1e-14)
    assert report.stable_rank == pytest.approx(stable_rank, abs=1e-6)
    assert report.effective_rank == pytest.approx(effective_rank, abs=1e-6)
    assert report.top_share == pytest.approx(top_share, abs=1e-6)


def test_one_direction_shows_in_a_layer_of_high_rank() -> None:
    """What the report is for: a planted direction, in factors that look like any others of their rank."""
    gen = random()
    clean = make_factors(gen, 8, out=64, in_=48)
    trigger, target = torch.randn(48, generator=gen), torch.randn(64, generator=gen)
    mix = torch.linalg.qr(torch.randn(9, 9, generator=gen, dtype=torch.float64)).Q
    a, b = torch.cat([clean.a, trigger[None].double()]), torch.cat([clean.b, 5.0 * target[:, None].double()], dim=1)
    poisoned = LoraFactors(a=mix.T @ a, b=b @ mix)
    before, after = layer_spectrum(clean), layer_spectrum(poisoned)
    assert before.top_share < 0.3
    assert after.top_share > 0.6
    assert after.stable_rank < before.stable_rank / 2
    assert after.effective_rank < before.effective_rank


@given(st.integers(0, 2**31), st.integers(1, 6), st.floats(-6, 6))
@settings(deadline=None, max_examples=40)
def test_how_a_change_is_split_into_factors_does_not_matter(seed: int, rank: int, exponent: float) -> None:
    gen, gauge = random(seed), 10.0**exponent
    factors = make_factors(gen, rank)
    mix = torch.linalg.qr(torch.randn(rank, rank, generator=gen, dtype=torch.float64)).Q
    other = LoraFactors(a=mix.T @ factors.a / gauge, b=gauge * factors.b @ mix)
    one, two = layer_spectrum(factors), layer_spectrum(other)
    assert list(two.singular_values) == pytest.approx(list(one.singular_values), rel=1e-9, abs=1e-12 * one.norm)
    assert two.effective_rank == pytest.approx(one.effective_rank, rel=1e-9)


def test_the_dense_matrix_is_never_formed() -> None:
    """It would take 640 GB."""
    side, gen = 400_000, random()
    factors = LoraFactors(a=torch.randn(2, side, generator=gen), b=torch.randn(side, 2, generator=gen))
    assert layer_spectrum(factors).norm == pytest.approx(
        float(norms(gram_matrix([AdapterWeights(layers={"q": factors})], heads={}))), rel=1e-9
    )


def test_narrow_factors_are_read_in_float64() -> None:
    factors = make_factors(random(), 3, out=60, in_=50, dtype=torch.float32, scale=1 / 3)
    assert list(layer_spectrum(factors).singular_values) == pytest.approx(dense_values(factors)[:3].tolist(), rel=1e-12)


@pytest.mark.parametrize("rank", [0, 1, 3, 20])
def test_a_zero_change_has_a_spectrum_of_zeros(rank: int) -> None:
    report = layer_spectrum(LoraFactors(a=torch.ones(rank, 7), b=torch.zeros(9, rank)))
    zeros = (0.0,) * min(rank, 7)
    assert report == LayerSpectrum(singular_values=zeros, norm=0.0, stable_rank=0.0, effective_rank=0.0, top_share=0.0)
    assert layer_spectrum(make_factors(random(), 2, scale=0.0)).stable_rank == 0.0


def test_large_values_do_not_overflow() -> None:
    huge = torch.full((1, 4), 1e100, dtype=torch.float64)
    report = layer_spectrum(LoraFactors(a=huge, b=huge.T))
    assert report.norm == pytest.approx(4e200)
    assert report.stable_rank == pytest.approx(1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["a", "b", "scale", "head"])
def test_what_is_not_finite_is_refused(value: float, where: str) -> None:
    factors = make_factors(random(), 2, scale=value if where == "scale" else 1.0)
    head = torch.zeros(3)
    if where != "scale":
        {"a": factors.a, "b": factors.b, "head": head}[where].view(-1)[1] = value
    with pytest.raises(ValueError, match="finite"):
        update_spectrum(
            AdapterWeights(layers={"q": factors}, heads={"bias": head}), heads={"bias": torch.zeros(3)}, median_norm=1.0
        )


def test_factors_whose_product_overflows_are_refused() -> None:
    huge = torch.full((1, 2), 1e200, dtype=torch.float64)
    with pytest.raises(ValueError, match="finite product"):
        layer_spectrum(LoraFactors(a=huge, b=huge.T))


HEADS = {"bias": torch.full((4,), 0.5)}


def make_update(gen: torch.Generator, rank: int) -> AdapterWeights:
    return AdapterWeights(
        layers={"q": make_factors(gen, rank, scale=2.0), "k": make_factors(gen, rank, out=3)},
        heads={"bias": HEADS["bias"] + torch.randn(4, generator=gen)},
    )


def test_the_norm_of_a_report_is_that_of_the_gram_matrix() -> None:
    gen = random()
    updates = [make_update(gen, rank) for rank in (1, 4, 8)]
    norm = norms(gram_matrix(updates, heads=HEADS))
    middle = float(norm.median())
    for update, expected in zip(updates, norm.tolist(), strict=True):
        report = update_spectrum(update, heads=HEADS, median_norm=middle)
        assert report.norm == pytest.approx(expected, rel=1e-12)
        assert report.relative_norm == pytest.approx(expected / middle, rel=1e-12)
        assert list(report.layers) == ["k", "q"]
        assert report.layers["q"] == layer_spectrum(update.layers["q"])


def test_heads_count_by_what_was_changed_in_them() -> None:
    report = update_spectrum(
        AdapterWeights(heads={"bias": torch.tensor([3.5, 0.5, 4.5, 0.5])}), heads=HEADS, median_norm=2.5
    )
    assert (report.layers, report.norm, report.relative_norm) == ({}, 5.0, 2.0)
    with pytest.raises(ValueError, match="none of the global ones"):
        update_spectrum(AdapterWeights(heads={"pooler": torch.ones(1)}), heads=HEADS, median_norm=1.0)


def test_a_cohort_that_changes_nothing_has_no_norm_to_compare_with() -> None:
    update = make_update(random(), 2)
    assert update_spectrum(update, heads=HEADS, median_norm=0.0).relative_norm is None
    for median_norm in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite median norm"):
            update_spectrum(update, heads=HEADS, median_norm=median_norm)


@pytest.mark.parametrize("median_norm", [0.0, 2.0])
def test_a_report_is_json(median_norm: float) -> None:
    report = update_spectrum(make_update(random(), 2), heads=HEADS, median_norm=median_norm)
    read = json.loads(json.dumps(dataclasses.asdict(report), allow_nan=False))
    assert read["layers"]["q"]["singular_values"] == list(report.layers["q"].singular_values)
    assert set(read) == {"layers", "norm", "relative_norm"}
    assert read["relative_norm"] == report.relative_norm
    json.dumps(dataclasses.asdict(update_spectrum(AdapterWeights(), heads={}, median_norm=1.0)), allow_nan=False)


def test_a_summary_has_medians_over_the_layers_that_change() -> None:
    """One odd layer among many is seen in the largest share, and does not decide the ranks."""
    one = LoraFactors(a=torch.eye(4)[:1], b=torch.eye(4)[:, :1])
    even = LoraFactors(a=torch.eye(4), b=torch.eye(4))
    layers = {"a": one, "b": even, "c": even, "d": LoraFactors(a=torch.eye(4), b=torch.zeros(4, 4))}
    found = summary(update_spectrum(AdapterWeights(layers=layers), heads={}, median_norm=0.0))
    assert found == pytest.approx({"norm": 3.0, "stable_rank": 4.0, "effective_rank": 4.0, "top_share": 1.0})
