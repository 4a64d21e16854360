"""The audit passes the mechanism as it is, and catches each bug that is planted in it."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from pomona.privacy.accounting import gaussian_epsilon
from pomona.privacy.audit import Audit, audit, clopper_pearson_epsilon
from pomona.privacy.clipping import clip
from pomona.privacy.gaussian_sum import GaussianSum
from pomona.privacy.randomness import SecureRandom

CANARIES, TENSORS, SIGMA, BOUND, DELTA = 2000, 4, 1.0, 0.5, 1e-5
SHAPES = {f"t{number}": (CANARIES,) for number in range(TENSORS)}

Release = Callable[[list[Mapping[str, Tensor]]], Mapping[str, Tensor]]


def mechanism(*, sigma: float = SIGMA, bound: float = BOUND, noise: SecureRandom | None = None) -> GaussianSum:
    return GaussianSum(
        SHAPES, bound=bound, noise_multiplier=sigma, divisor=100.0, noise=noise or SecureRandom(b"n" * 32)
    )


def as_it_is(cohort: list[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    made = mechanism()
    for update in cohort:
        made.add(update)
    return made.release()


def clipped_tensor_by_tensor(cohort: list[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for update in cohort:
        for name, tensor in update.items():
            total[name] += clip({name: tensor}, BOUND)[name]
    return _noised(total, BOUND)


def counted_three_times(cohort: list[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    made = mechanism(sigma=SIGMA / 3, bound=3 * BOUND)  # the same noise, three times the contribution
    for update in cohort:
        made.add(update)
    return made.release()


def half_the_noise(cohort: list[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    made = mechanism(sigma=SIGMA / 2)
    for update in cohort:
        made.add(update)
    return made.release()


def noise_of_the_bound_before(cohort: list[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """The bound grew by half since the noise was sized."""
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for update in cohort:
        for name, tensor in clip(update, 1.5 * BOUND).items():
            total[name] += tensor
    return _noised(total, BOUND)


def _noised(total: dict[str, Tensor], bound: float) -> dict[str, Tensor]:
    noise = SecureRandom(b"n" * 32)
    return {
        name: (tensor + SIGMA * bound * torch.from_numpy(noise.normal(tensor.numel()))) / 100.0
        for name, tensor in total.items()
    }


def attack(release: Release) -> Audit:
    return audit(
        release, canaries=CANARIES, tensors=TENSORS, noise_multiplier=SIGMA, delta=DELTA, random=SecureRandom(b"a" * 32)
    )


def test_the_mechanism_as_it_is_passes() -> None:
    found = attack(as_it_is)
    assert found.passes()
    assert found.mu == pytest.approx(1.0, abs=0.2)
    assert 0.0 < found.epsilon_bound < gaussian_epsilon(1.0, DELTA)


@pytest.mark.parametrize(
    ("bug", "mu"),
    [
        (clipped_tensor_by_tensor, 2.0),
        (counted_three_times, 3.0),
        (half_the_noise, 2.0),
        (noise_of_the_bound_before, 1.5),
    ],
)
def test_each_planted_bug_is_caught_and_measured(bug: Release, mu: float) -> None:
    found = attack(bug)
    assert not found.passes()
    assert found.mu == pytest.approx(mu, rel=0.15)
    assert found.epsilon_fit > 1.2 * gaussian_epsilon(1.0, DELTA)


def test_too_much_noise_is_noticed_too() -> None:
    """It breaks no promise, but the plan is not what runs."""
    found = attack(_louder)
    assert not found.passes()
    assert found.mu < 0.8


def _louder(cohort: list[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    made = mechanism(sigma=1.5 * SIGMA)
    for update in cohort:
        made.add(update)
    return made.release()


def test_the_bound_holds_for_what_it_does_not_know() -> None:
    """Scores that tell who took part: the bound grows with their number; scores of nothing say nothing."""
    told = clopper_pearson_epsilon(np.ones(2000), np.zeros(2000), delta=DELTA)
    assert math.log(200) < told < math.log(1000)
    rng = np.random.default_rng(0)
    same = [clopper_pearson_epsilon(rng.normal(size=500), rng.normal(size=500), delta=DELTA) for _ in range(40)]
    assert sum(value > 0.0 for value in same) <= 6
    assert clopper_pearson_epsilon(np.zeros(10), np.ones(10), delta=DELTA) == 0.0
