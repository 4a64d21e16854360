"""The head is Bayes' rule for normal classes, a function of sums alone, and no worse than angles for lack of data."""

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from pomona.continual.discriminant import gaussian_head, within_covariance
from pomona.continual.heads import CosineHead
from pomona.continual.statistics import ClassStatistics, shrunk
from pomona.errors import DataError

WIDTH = 12


def rows_of(n: int, label: int, *, seed: int = 0) -> Tensor:
    """Features of unit length of one class: its own mean, and a spread that classes share."""
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99)) ** 3 * 0.1
    centre = torch.randn(WIDTH, generator=torch.Generator().manual_seed(label)) * 0.7
    noise = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(1000 * seed + label))
    return torch.nn.functional.normalize(centre + noise @ mix, dim=1)


def learned(n: int, *, classes: int = 4) -> list[ClassStatistics]:
    return [ClassStatistics.of(rows_of(n, c)) for c in range(classes)]


def accuracy_of(logits: Tensor, each: int) -> float:
    targets = torch.arange(logits.shape[1]).repeat_interleave(each)
    return float((logits.argmax(1) == targets).double().mean())


def test_logits_are_the_log_densities_of_the_mixed_covariances() -> None:
    kept, rows = learned(9), rows_of(5, 2, seed=1)
    found = gaussian_head(kept, prior=2.0).logits(rows)
    within, columns = within_covariance(kept), []
    for each in kept:
        mixed = (2 * WIDTH * within + 8 * each.covariance()) / (2 * WIDTH + 8)
        density = MultivariateNormal(each.mean(), mixed)
        columns.append(density.log_prob(rows.double()))  # type: ignore[no-untyped-call]
    expected = torch.stack(columns, dim=1)
    assert_close(found - found[:, :1], expected - expected[:, :1], rtol=1e-5, atol=1e-5)


def test_the_head_is_the_same_however_the_examples_are_spread() -> None:
    whole = gaussian_head(learned(20), prior=3.0, sphere_examples=10.0)
    parts = [ClassStatistics.of(rows_of(20, c)[7:]) + ClassStatistics.of(rows_of(20, c)[:7]) for c in (3, 1, 0, 2)]
    spread = gaussian_head([parts[2], parts[1], parts[3], parts[0]], prior=3.0, sphere_examples=10.0)
    assert_close(spread.logits(rows_of(6, 1, seed=2)), whole.logits(rows_of(6, 1, seed=2)), rtol=1e-9, atol=1e-9)
    without = gaussian_head(learned(20, classes=3), prior=3.0)
    assert torch.equal(without.logits(rows_of(6, 1)), gaussian_head(learned(20)[:3], prior=3.0).logits(rows_of(6, 1)))


@pytest.mark.parametrize(("n", "gain"), [(1, 0.0), (4, 0.05), (200, 0.3)])
def test_it_is_about_as_good_as_angles_with_few_examples_and_better_with_many(n: int, gain: float) -> None:
    kept, test = learned(n, classes=8), torch.cat([rows_of(100, c, seed=5) for c in range(8)])
    found = accuracy_of(gaussian_head(kept, prior=3.0, sphere_examples=10.0).logits(test), 100)
    angles = accuracy_of(CosineHead(torch.stack([each.mean() for each in kept]).float()).logits(test), 100)
    assert found >= angles + gain


@pytest.mark.parametrize(("n", "share"), [(5, 0.8), (10, 0.5), (30, 0.1), (90, 1 / 82)])
def test_the_share_of_the_sphere_falls_with_the_square_of_the_examples(n: int, share: float) -> None:
    estimate = within_covariance(learned(n))
    sphere = float(estimate.trace()) / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
    found = within_covariance(learned(n), sphere_examples=10.0)
    assert_close(found, (1 - share) * estimate + share * sphere, rtol=1e-9, atol=1e-12)


def test_classes_that_differ_where_they_vary_least_are_told_apart_with_many_examples() -> None:
    def rows(n: int, label: int, seed: int) -> Tensor:
        noise = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(100 * seed + label))
        return noise * torch.tensor([1.0] * 8 + [0.05] * 4) + torch.eye(WIDTH)[8 + label] * 0.2

    kept = [ClassStatistics.of(rows(100, c, 0)) for c in range(4)]
    test = torch.cat([rows(100, c, 1) for c in range(4)])
    found = accuracy_of(gaussian_head(kept, prior=3.0, sphere_examples=10.0).logits(test), 100)
    linear_share = gaussian_head(kept, prior=3.0, sphere_examples=33.0)  # 10 examples in 110 were a share of 9 %, too
    assert found >= accuracy_of(linear_share.logits(test), 100) + 0.05


def test_the_covariance_of_classes_of_unequal_size_is_pooled_and_shrunk() -> None:
    kept = [ClassStatistics.of(rows_of(n, c)) for c, n in enumerate((6, 10, 14))]
    plain = within_covariance(kept)
    sphere = float(plain.trace()) / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
    assert_close(within_covariance(kept, sphere_examples=30.0), plain / 10 + sphere * 9 / 10)
    pooled = torch.stack([(each.count - 1) * each.covariance() for each in kept]).sum(0)
    assert_close(plain, shrunk(pooled / 27, 27))


def test_diagonal_statistics_give_a_head_too() -> None:
    kept = [each.diagonal() for each in learned(50)]
    test = torch.cat([rows_of(50, c, seed=5) for c in range(4)])
    assert accuracy_of(gaussian_head(kept, prior=3.0).logits(test), 50) > 0.5


def test_a_class_without_examples_is_refused() -> None:
    empty = ClassStatistics.of(torch.zeros(0, WIDTH))
    for classes in ([], [empty], [*learned(3), empty]):
        with pytest.raises(DataError, match="all have examples"):
            gaussian_head(classes, prior=1.0)
    assert_close(within_covariance(learned(1)), torch.eye(WIDTH, dtype=torch.float64))
