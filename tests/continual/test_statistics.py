"""Statistics of parts add up to those of the whole, subtraction undoes addition, and samples have them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from pomona.continual.statistics import (
    ClassStatistics,
    GaussianClass,
    cholesky,
    class_statistics,
    shrunk,
)
from pomona.errors import DataError, PayloadError
from pomona.mos_settings import Moments

MOMENTS: tuple[Moments, Moments] = ("full", "diagonal")


def features(n: int, *, width: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    return torch.nn.functional.normalize(torch.randn(n, width, generator=generator) @ mix + 1.0, dim=1)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    moments=st.sampled_from(MOMENTS),
    seed=st.integers(0, 99),
)
def test_statistics_of_clients_add_up_to_those_of_all_data(sizes: list[int], moments: Moments, seed: int) -> None:
    rows = features(sum(sizes), seed=seed)
    parts = [ClassStatistics.of(part, moments=moments) for part in torch.split(rows, sizes)]
    whole, total = ClassStatistics.of(rows, moments=moments), parts[0]
    for part in parts[1:]:
        total = total + part
    assert total.count == whole.count == sum(sizes)
    assert_close(total.total, whole.total, rtol=0, atol=1e-12)
    assert_close(total.moment, whole.moment, rtol=0, atol=1e-12)
    left = total - parts[-1]
    alone = ClassStatistics.of(rows[: sum(sizes[:-1])], moments=moments)
    assert left.count == alone.count
    assert_close(left.moment, alone.moment, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 50])
def test_mean_and_covariance_are_those_of_the_examples(n: int) -> None:
    rows = features(n)
    kept = ClassStatistics.of(rows)
    assert_close(kept.mean(), rows.double().mean(0))
    expected = torch.cov(rows.double().T)
    assert_close(kept.covariance(), expected, rtol=0, atol=1e-12)
    assert_close(kept.diagonal().covariance(), expected.diagonal().diag(), rtol=0, atol=1e-12)
    assert_close(ClassStatistics.of(rows, moments="diagonal").moment, kept.diagonal().moment)


def test_small_features_far_from_zero_keep_their_covariance() -> None:
    """In float32 the difference of the two sums would be rounding alone."""
    rows = 1.0 + 1e-4 * features(40)
    expected = torch.cov(rows.double().T)
    assert_close(ClassStatistics.of(rows).covariance(), expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    single = rows.T @ rows / 40 - torch.outer(rows.mean(0), rows.mean(0))
    assert float((single - expected).abs().max()) > 0.5 * float(expected.abs().max())


@pytest.mark.parametrize("kind", ["full", "diagonal", "compressed"])
def test_samples_have_the_mean_and_covariance_and_not_one_a_third_larger(kind: str) -> None:
    full = ClassStatistics.of(features(40))
    kinds: dict[str, GaussianClass] = {
        "full": full, "diagonal": full.diagonal(), "compressed": full.compressed(2)
    }  # fmt: skip
    kept = kinds[kind]
    drawn = kept.sample(20_000, torch.Generator().manual_seed(1))
    found, expected = torch.cov(drawn.T), kept.covariance()
    scale = expected.diagonal().max()
    assert float((drawn.mean(0) - kept.mean()).abs().max() / scale.sqrt()) < 0.03
    assert float((found - expected).abs().max() / scale) < 0.05
    assert float((found - expected * 4 / 3).abs().max() / scale) > 0.2
    again = kept.sample(20_000, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)


@pytest.mark.parametrize("moments", MOMENTS)
def test_one_example_is_its_own_sample(moments: Moments) -> None:
    one = ClassStatistics.of(features(1), moments=moments)
    assert not one.covariance().any()
    drawn = one.sample(5, torch.Generator().manual_seed(0))
    assert_close(drawn, features(1).double().expand(5, -1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("count", [2, 7, 50, 1000])
def test_one_example_many_times_has_no_spread(moments: Moments, count: int) -> None:
    """The difference of the sums is rounding, whose sign would decide whether there is a normal distribution at all."""
    rows = torch.nn.functional.normalize(features(1), dim=1).expand(count, -1) * (1 + 1e-7 * features(count)[:, :1])
    many = ClassStatistics.of(rows, moments=moments)
    assert not many.covariance().any()
    assert_close(many.sample(5, torch.Generator().manual_seed(0)), many.mean().expand(5, -1), rtol=0, atol=1e-9)


def test_compression_keeps_variances_exactly_and_is_exact_at_full_rank() -> None:
    full = ClassStatistics.of(features(60))
    errors = []
    for rank in (1, 3, 6):
        kept = full.compressed(rank)
        assert_close(kept.covariance().diagonal(), full.covariance().diagonal())
        assert_close(kept.mean(), full.mean())
        errors.append(float((kept.covariance() - full.covariance()).norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-12
    with pytest.raises(ValueError, match="at least 1"):
        full.compressed(0)


def test_shrinking_helps_where_there_are_few_examples_and_vanishes_where_there_are_many() -> None:
    truth = torch.cov(features(20_000, width=20, seed=3).double().T)
    for n, gains in ((8, True), (10_000, False)):
        empirical = ClassStatistics.of(features(20_000, width=20, seed=3)[:n]).covariance()
        better = shrunk(empirical, n)
        assert (float((better - truth).norm()) < 0.9 * float((empirical - truth).norm())) is gains
        assert float(torch.linalg.eigvalsh(better)[0]) > 0.0
        if not gains:
            assert float((better - empirical).norm()) < 0.01 * float(empirical.norm())
    assert not shrunk(torch.zeros(4, 4, dtype=torch.float64), 1).any()


def test_each_class_of_a_range_has_its_own() -> None:
    rows, targets = features(6), torch.tensor([5, 4, 5, 4, 4, 9])
    found = class_statistics(rows, targets, range(4, 7))
    assert [each.count for each in found] == [3, 2, 0]
    assert_close(found[1].total, rows[[0, 2]].double().sum(0))


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_tensors_there_and_back(kind: Moments) -> None:
    kept = ClassStatistics.of(features(7), moments=kind)
    back = ClassStatistics.from_tensors(kept.to_tensors())
    assert back.count == 7
    assert torch.equal(back.total, kept.total)
    assert torch.equal(back.moment, kept.moment)


def test_what_are_no_statistics_is_refused() -> None:
    kept = ClassStatistics.of(features(3))
    with pytest.raises(DataError, match="cannot take 4 examples out of statistics of 3"):
        _ = kept - ClassStatistics.of(features(4))
    for other in (kept.diagonal(), ClassStatistics.of(features(3, width=5))):
        with pytest.raises(DataError, match="one width and kind"):
            _ = kept + other
    with pytest.raises(DataError, match="no mean"):
        ClassStatistics.of(features(0)).mean()
    with pytest.raises(ValueError, match="float64 sums"):
        ClassStatistics(1, torch.ones(3), torch.ones(3))
    with pytest.raises(PayloadError, match="count, total and moment"):
        ClassStatistics.from_tensors({"count": torch.tensor([1]), "total": torch.ones(3, dtype=torch.float64)})
    with pytest.raises(DataError, match="damaged"):
        cholesky(-torch.eye(3, dtype=torch.float64))
