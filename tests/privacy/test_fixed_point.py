"""After rounding a client still contributes at most the bound, and what comes back is what went in, to half a step."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.privacy.secure_sum_in_memory import terms
from torch import Tensor

from pomona.privacy.clipping import clip
from pomona.privacy.randomness import SecureRandom
from pomona.privacy.secure_sum.discrete_gaussian import discrete_gaussian
from pomona.privacy.secure_sum.fixed_point import contribution, restored, rounded
from pomona.privacy.secure_sum.terms import Terms

KEY = bytes(range(32))
SHAPES = {"lora_B.q": (3, 2), "head.bias": (2,)}
STEP = 2.0**-6

numbers = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True, width=64),
    st.floats(-2, 2),
    st.integers(-500, 500).map(lambda count: (count + 0.5) * STEP),  # half-way: all are rounded as far as can be
    st.sampled_from([0.0, 5e-324, 1e308, math.inf, math.nan]),
)


def coarse(dimensions: int, **changes: object) -> Terms:
    """A grid so wide that rounding matters."""
    return terms(4, dimensions=dimensions, fraction_bits=6, noise_multiplier=2.0, **changes)


def exact_norm_is_within(vector: np.ndarray, made: Terms) -> bool:
    squared = sum(int(number) ** 2 for number in vector)
    return squared <= (Fraction(made.clip) * (1 << made.fraction_bits)) ** 2


@given(st.lists(numbers, min_size=1, max_size=60), st.sampled_from([1.0, 0.7, 3.3]))
@settings(deadline=None)
def test_what_counts_is_within_the_bound_after_rounding(values: list[float], bound: float) -> None:
    made = coarse(len(values), clip=bound)
    assert exact_norm_is_within(rounded({"a": torch.tensor(values, dtype=torch.float64)}, made), made)


def test_clipping_to_the_bound_itself_would_not_be_enough() -> None:
    """Every number is just above one and a half steps and rounded up to two: a third more than the noise is for."""
    made = coarse(1815)
    values = {"a": torch.full((1815,), 1.501 * STEP, dtype=torch.float64)}
    naive = torch.round(clip(values, made.clip)["a"] / STEP).to(torch.int64).numpy()
    assert float(np.linalg.norm(naive)) * STEP > 1.33 * made.clip
    assert exact_norm_is_within(rounded(values, made), made)


def test_a_bound_on_each_number_would_let_a_client_count_for_many() -> None:
    made = coarse(400)
    huge = {"a": torch.full((400,), 1e6, dtype=torch.float64)}
    each_clipped = (huge["a"].clamp(-made.clip, made.clip) / STEP).to(torch.int64).numpy()
    assert float(np.linalg.norm(each_clipped)) * STEP == pytest.approx(20 * made.clip)
    assert exact_norm_is_within(rounded(huge, made), made)


@given(st.lists(st.floats(-0.2, 0.2), min_size=8, max_size=8))
@settings(deadline=None)
def test_what_is_within_the_bound_comes_back_to_half_a_step(values: list[float]) -> None:
    made = terms(4)
    update = unflat(torch.tensor(values, dtype=torch.float64))
    back = restored(rounded(update, made), SHAPES, made)
    for name, tensor in update.items():
        assert float((back[name] - tensor).abs().max()) <= 0.5 * 2.0**-made.fraction_bits


def unflat(values: Tensor) -> dict[str, Tensor]:
    return {"lora_B.q": values[:6].reshape(3, 2), "head.bias": values[6:]}


def test_tensors_are_in_the_order_of_their_names() -> None:
    made = terms(4, clip=100.0)
    update = unflat(torch.arange(8, dtype=torch.float32))
    backwards = dict(reversed(update.items()))
    assert rounded(update, made).tolist() == [n * 2**16 for n in (6, 7, 0, 1, 2, 3, 4, 5)]
    assert np.array_equal(rounded(update, made), rounded(backwards, made))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_counts_as_zero_and_has_its_noise(poison: float) -> None:
    made = terms(4)
    update = unflat(torch.tensor([poison] * 8))
    noise = discrete_gaussian(8, variance=made.share_variance, noise=SecureRandom(KEY))
    assert np.array_equal(contribution(update, made, SecureRandom(KEY)), noise)


def test_a_contribution_is_the_rounded_update_and_a_noise_share() -> None:
    made = terms(4)
    update = unflat(torch.full((8,), 0.25))
    noise = discrete_gaussian(8, variance=made.share_variance, noise=SecureRandom(KEY))
    assert np.array_equal(contribution(update, made, SecureRandom(KEY)) - rounded(update, made), noise)


def test_another_number_of_elements_is_refused_on_both_ways() -> None:
    made = terms(4)
    with pytest.raises(ValueError, match="an update of 8 numbers, got 7"):
        rounded({"a": torch.zeros(7)}, made)
    with pytest.raises(ValueError, match="a sum of 8 numbers for these shapes, got 7"):
        restored(np.zeros(7, dtype=np.int64), SHAPES, made)
