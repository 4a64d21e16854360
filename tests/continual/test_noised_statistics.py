"""Statistics from noised sums are such as features of length 1 can have, whatever the noise; without it they stay."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pomona.continual.discriminant import gaussian_head
from pomona.continual.noised_statistics import plausible_statistics
from pomona.continual.share_verification import check_class
from pomona.continual.statistics import ClassStatistics
from pomona.errors import PayloadError
from pomona.mos_settings import Moments

WIDTH = 6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def class_of(rows: int, *, seed: int, moments: Moments = "full", width: int = WIDTH) -> ClassStatistics:
    """Rows around a direction of their own, some directions varying more than others."""
    scales = torch.linspace(0.05, 0.4, width, dtype=torch.float64)
    drawn = torch.randn(rows, width, generator=generator(seed), dtype=torch.float64) * scales
    return ClassStatistics.of(
        torch.nn.functional.normalize(drawn + torch.eye(width)[seed % width], dim=1), moments=moments
    )


def noised(kept: ClassStatistics, *, noise: float, seed: int) -> tuple[float, Tensor, Tensor]:
    """Add noise of one scale to all that is released of a class."""
    drawn = torch.randn(1 + 2 * WIDTH + WIDTH * WIDTH, generator=generator(seed), dtype=torch.float64) * noise
    count, total, rest = kept.count + float(drawn[0]), kept.total + drawn[1 : 1 + WIDTH], drawn[1 + WIDTH :]
    if kept.moment.ndim == 1:
        return count, total, kept.moment + rest[:WIDTH]
    square = rest[: WIDTH * WIDTH].reshape(WIDTH, WIDTH)
    return count, total, kept.moment + (square.triu(1) + square.triu(1).T) / math.sqrt(2.0) + square.diagonal().diag()


@settings(max_examples=40)
@given(st.integers(2, 50), st.integers(0, 1000), st.sampled_from(["full", "diagonal"]))
def test_without_noise_nothing_is_changed(rows: int, seed: int, moments: Moments) -> None:
    kept = class_of(rows, seed=seed, moments=moments)
    found = plausible_statistics(float(rows), kept.total, kept.moment, total_noise=0.0, moment_noise=0.0)
    assert found.count == rows
    torch.testing.assert_close(found.total, kept.total, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.moment, kept.moment, atol=1e-7, rtol=0)


@settings(max_examples=150)
@given(
    st.integers(0, 50), st.integers(0, 1000), st.sampled_from(["full", "diagonal"]),
    st.sampled_from([1e-6, 0.01, 1.0, 30.0, 1e6]), st.floats(-5.0, 5.0),
)  # fmt: skip
def test_whatever_the_noise_they_could_be_of_features(
    rows: int, seed: int, moments: Moments, noise: float, of_count: float
) -> None:
    """The same check that sums of clients pass where nothing is noised; and a head can be made of them."""
    count, total, moment = noised(class_of(rows, seed=seed, moments=moments), noise=noise, seed=seed + 1)
    count += of_count * noise
    found = plausible_statistics(count, total, moment, total_noise=noise, moment_noise=noise)
    check_class("a class", found)
    assert found.count == max(1, round(count))
    other = plausible_statistics(0.0, total, moment, total_noise=noise, moment_noise=noise)
    logits = gaussian_head([found, other], prior=3.0, sphere_examples=10.0).logits(torch.eye(WIDTH))
    assert bool(logits.isfinite().all())


def test_noised_sums_as_they_are_would_be_of_no_features() -> None:
    """Why something is done about them: their variances are negative, and their mean is longer than any feature."""
    count, total, moment = noised(class_of(20, seed=1), noise=10.0, seed=2)
    with pytest.raises(PayloadError, match="expected features of length 1"):
        check_class("a class", ClassStatistics(round(count), total, moment))
    raw = ClassStatistics(round(count), total, moment)
    assert float(raw.mean().norm()) > 1.0
    assert float(torch.linalg.eigvalsh(raw.covariance())[0]) < 0.0


@pytest.mark.parametrize("moments", ["full", "diagonal"])
def test_they_are_nearer_to_the_truth_than_noised_ones(moments: Moments) -> None:
    """In squares over 200 draws; of means and of covariances, at noise below and above the signal."""
    kept = class_of(100, seed=4, moments=moments)
    for noise in (5.0, 50.0):
        errors = {"mean": [0.0, 0.0], "covariance": [0.0, 0.0]}
        for seed in range(200):
            count, total, moment = noised(kept, noise=noise, seed=seed)
            count = float(kept.count)  # as is, or dividing by it would be the largest error
            better = plausible_statistics(count, total, moment, total_noise=noise, moment_noise=noise)
            raw = ClassStatistics(kept.count, total, moment)
            for place, each in enumerate((better, raw)):
                errors["mean"][place] += float((each.mean() - kept.mean()).square().sum())
                errors["covariance"][place] += float((each.covariance() - kept.covariance()).square().sum())
        assert all(one < other for one, other in errors.values()), (noise, errors)


def test_a_class_that_nobody_seems_to_have_has_no_covariance_of_its_own_and_no_direction() -> None:
    nothing = torch.zeros(WIDTH, dtype=torch.float64)
    found = plausible_statistics(-7.0, nothing, nothing.diag(), total_noise=1.0, moment_noise=1.0)
    assert found.count == 1
    assert not found.total.any()
    assert not found.covariance().any()
    known = class_of(50, seed=1)
    logits = gaussian_head([known, found], prior=3.0, sphere_examples=10.0).logits(known.mean()[None].float())
    assert int(logits.argmax()) == 0
