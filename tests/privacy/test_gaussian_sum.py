"""The noise is on the sum, of the scale that is claimed, whoever answered; and it is drawn once."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pomona.privacy.gaussian_sum import GaussianSum
from pomona.privacy.randomness import SecureRandom

KEY = bytes(range(32))
SHAPES = {"lora_B.q": (100, 50), "lora_A.q": (50, 80), "head.bias": (24,)}
DIMENSIONS = 100 * 50 + 50 * 80 + 24
UNLIKELY = 1e-4


def made(*, sigma: float = 2.0, bound: float = 0.5, divisor: float = 10.0, key: bytes = KEY) -> GaussianSum:
    return GaussianSum(SHAPES, bound=bound, noise_multiplier=sigma, divisor=divisor, noise=SecureRandom(key))


def update(scale: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, scale) for name, shape in SHAPES.items()}


def released(mechanism: GaussianSum) -> np.ndarray:
    return np.concatenate([tensor.reshape(-1).numpy() for _, tensor in sorted(mechanism.release().items())])


def signal(count: int, *, bound: float = 0.5, divisor: float = 10.0) -> float:
    """What ``count`` clients who all send the same beyond the bound move each number by."""
    return count * bound / math.sqrt(DIMENSIONS) / divisor


@pytest.mark.parametrize("replies", [0, 1, 30])
def test_the_noise_has_the_scale_that_is_claimed_however_many_answered(replies: int) -> None:
    mechanism = made()
    for _ in range(replies):
        mechanism.add(update())
    noise = (released(mechanism) - signal(replies)) * 10.0 / (2.0 * 0.5)
    assert stats.kstest(noise, "norm").pvalue > UNLIKELY
    assert abs(noise.std() - 1.0) < 4 / math.sqrt(2 * DIMENSIONS)


@pytest.mark.parametrize("factor", [2 / 3, 3 / 2])
def test_noise_of_another_scale_would_be_noticed(factor: float) -> None:
    noise = released(made(sigma=2.0 * factor)) * 10.0 / (2.0 * 0.5)
    assert stats.kstest(noise, "norm").pvalue < UNLIKELY
    assert abs(noise.std() - 1.0) > 4 / math.sqrt(2 * DIMENSIONS)


def test_every_tensor_has_noise_of_its_own() -> None:
    mechanism = GaussianSum(
        {"a": (4000,), "b": (4000,)}, bound=1.0, noise_multiplier=1.0, divisor=1.0, noise=SecureRandom(KEY)
    )
    parts = mechanism.release()
    assert abs(np.corrcoef(parts["a"].numpy(), parts["b"].numpy())[0, 1]) < 4 / math.sqrt(4000)


def test_one_client_moves_the_release_by_at_most_the_bound_over_the_divisor() -> None:
    """The same key gives the same noise, so the difference is the client."""
    with_client, without = made(), made()
    for mechanism in (with_client, without):
        mechanism.add(update(-3.0))
    with_client.add({name: torch.randn(shape) * 1e30 for name, shape in SHAPES.items()})
    moved = float(np.linalg.norm(released(with_client) - released(without)))
    assert moved == pytest.approx(0.5 / 10.0, rel=1e-9)


def test_the_divisor_is_not_the_number_of_replies() -> None:
    few, many = made(sigma=1e-9), made(sigma=1e-9)
    few.add(update())
    for _ in range(5):
        many.add(update())
    np.testing.assert_allclose(released(many), 5 * released(few), rtol=1e-5)


def test_a_client_that_is_not_finite_adds_nothing() -> None:
    mechanism, empty = made(), made()
    mechanism.add(update(math.nan))
    assert np.array_equal(released(mechanism), released(empty))


def test_a_sum_is_released_once() -> None:
    """Noise drawn again for the same sum averages out."""
    mechanism = made()
    mechanism.release()
    for again in (mechanism.release, lambda: mechanism.add(update())):
        with pytest.raises(ValueError, match="released"):
            again()


def test_noise_differs_between_rounds() -> None:
    first, second = (
        GaussianSum(SHAPES, bound=1.0, noise_multiplier=1.0, divisor=1.0, noise=SecureRandom()) for _ in range(2)
    )
    assert not np.array_equal(released(first), released(second))


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="expected tensors"):
        made().add({"lora_B.q": torch.zeros(1)})


@pytest.mark.parametrize("name", ["sigma", "bound", "divisor"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_numbers_that_promise_nothing_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        made(**{name: value})  # type: ignore[arg-type]
