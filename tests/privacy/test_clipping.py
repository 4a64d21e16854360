"""Whatever a client sends, what counts of it is finite and within the bound, over all tensors together."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pomona.privacy.clipping import clip, clipped_sum, joint_norm

numbers = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True, width=64),
    st.sampled_from([0.0, 5e-324, 1e-310, 1e308, -1e308, math.inf, math.nan]),
)
updates = st.dictionaries(
    st.sampled_from(["lora_A.q", "lora_B.q", "head.bias", "empty"]),
    st.lists(numbers, max_size=5).map(lambda values: torch.tensor(values, dtype=torch.float64)),
    min_size=1,
)
bounds = st.floats(min_value=1e-6, max_value=1e6)


def exact_norm(tensors: dict[str, Tensor]) -> float:
    return math.hypot(*(value for tensor in tensors.values() for value in tensor.flatten().tolist()))


@given(updates, bounds)
def test_what_counts_is_finite_and_within_the_bound(update: dict[str, Tensor], bound: float) -> None:
    clipped = clip(update, bound)
    assert {name: tensor.shape for name, tensor in clipped.items()} == {n: t.shape for n, t in update.items()}
    assert all(tensor.dtype == torch.float64 and bool(tensor.isfinite().all()) for tensor in clipped.values())
    assert exact_norm(clipped) <= bound


@given(updates, bounds)
def test_what_is_within_the_bound_is_left_alone_and_the_rest_keeps_its_direction(
    update: dict[str, Tensor], bound: float
) -> None:
    norm = exact_norm(update)
    clipped = clip(update, bound)
    if not math.isfinite(norm):
        assert exact_norm(clipped) == 0.0
    elif norm <= bound * (1 - 1e-9):
        assert all(torch.equal(clipped[name], tensor) for name, tensor in update.items())
    elif norm > bound * (1 + 1e-9):
        assert exact_norm(clipped) == pytest.approx(bound, rel=1e-9)
        for name, tensor in update.items():
            torch.testing.assert_close(clipped[name], tensor / norm * bound, rtol=1e-9, atol=1e-300 + bound * 1e-12)


@given(updates)
def test_the_norm_neither_overflows_nor_vanishes(update: dict[str, Tensor]) -> None:
    unknown = any(bool(tensor.isnan().any()) for tensor in update.values())
    expected = math.nan if unknown else exact_norm(update)
    assert joint_norm(update) == pytest.approx(expected, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types_are_measured_in_float64(dtype: torch.dtype) -> None:
    """Squares of float16 overflow at 256, and a norm of infinity would let the update count for nothing."""
    update = {"a": torch.full((100,), 300.0, dtype=dtype)}
    assert joint_norm(update) == pytest.approx(3000.0)
    assert exact_norm(clip(update, 1.0)) == pytest.approx(1.0)


def test_the_bound_is_on_all_tensors_together() -> None:
    """Clipped one by one, four tensors of norm 1 would count as 2, and the noise be too small by half."""
    update = {name: torch.tensor([10.0]) for name in "abcd"}
    assert exact_norm(clip(update, 1.0)) == pytest.approx(1.0)
    one_by_one = {name: clip({name: tensor}, 1.0)[name] for name, tensor in update.items()}
    assert exact_norm(one_by_one) == pytest.approx(2.0)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_one_bad_number_takes_all_of_its_update_away(poison: float) -> None:
    """It compares false with every bound, so the rest would pass unclipped."""
    clipped = clip({"a": torch.tensor([poison, 1e6]), "b": torch.tensor([1e6])}, 1.0)
    assert exact_norm(clipped) == 0.0


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_that_is_none_is_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="clipping bound above 0"):
        clip({"a": torch.ones(1)}, bound)


def test_nothing_has_norm_zero() -> None:
    assert joint_norm({}) == 0.0
    assert clip({"a": torch.zeros(0)}, 1.0)["a"].shape == (0,)


floats = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True, width=32),
    st.sampled_from([0.0, 1e-45, 3e38, -3e38, math.inf, math.nan]),
)


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Tensor]:
    """Gradients of some examples, ``(examples, *shape)``."""
    examples = draw(st.integers(1, 4))
    shapes = {"lora_A.q": (2, 3), "lora_B.q": (3, 2), "head.bias": (1,)}
    return {
        name: torch.tensor(draw(st.lists(floats, min_size=(n := math.prod(shape)) * examples, max_size=n * examples)))
        .to(torch.float32)
        .reshape(examples, *shape)
        for name, shape in shapes.items()
    }


@given(batches(), bounds)
def test_a_sum_over_examples_is_that_of_each_one_clipped(batch: dict[str, Tensor], bound: float) -> None:
    total = clipped_sum(list(batch.values()), bound)
    examples = len(batch["head.bias"])
    each = [clip({name: tensor[i] for name, tensor in batch.items()}, bound) for i in range(examples)]
    for name, found in zip(batch, total, strict=True):
        expected = torch.stack([one[name] for one in each]).sum(0)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * bound)


@given(batches(), bounds)
def test_one_example_adds_no_more_than_the_bound(batch: dict[str, Tensor], bound: float) -> None:
    for i in range(len(batch["head.bias"])):
        alone = clipped_sum([tensor[i : i + 1] for tensor in batch.values()], bound)
        assert exact_norm(dict(zip(batch, alone, strict=True))) <= bound


def test_a_sum_over_examples_that_are_all_bad_is_zero() -> None:
    (total,) = clipped_sum([torch.full((3, 2), math.nan)], 1.0)
    assert torch.equal(total, torch.zeros(2, dtype=torch.float64))


def test_a_sum_without_a_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="clipping bound above 0"):
        clipped_sum([torch.ones(1, 1)], 0.0)
