"""Gradients of several owners add up to those on the pooled rows, and one owner is nothing special."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tests.continual.taught import Taught, bytes_of, same_bytes, taught
from torch import Tensor

from pomona.adapters import LoraFactors
from pomona.continual.edit_rounds import (
    EditState,
    Gradient,
    GradientShare,
    advance,
    is_done,
    start_edit,
)
from pomona.continual.editing import Examples
from pomona.continual.encoder import Adapter
from pomona.continual.forgetting import forget_classes, forget_owner, forget_step
from pomona.continual.groups import changed_groups, shrink_groups
from pomona.errors import ConfigError, DataError
from pomona.forget_settings import EditSettings, ForgetSettings

SHORT = ForgetSettings(rank=2, steps=6, batch_size=12, forget_batch_size=6, learning_rate=1e-2)
ALL_ROWS = SHORT.model_copy(update={"batch_size": 200, "forget_batch_size": 200})
FORGET = ("food",)


@pytest.fixture(scope="module")
def known(tiny_bert: Path, toy_data: Path) -> Taught:
    return taught(tiny_bert, toy_data)


def shares_of(
    known: Taught, parts: list[Examples], state: EditState, settings: ForgetSettings = ALL_ROWS
) -> list[GradientShare]:
    owners = [forget_owner(known.encoder, known.classifier, each, FORGET, settings=settings, seed=0) for each in parts]
    return [owner.share(state.number, state.adapter) for owner in owners]


def moved(known: Taught, seed: int) -> EditState:
    """Return a state whose update is not zero, so that both factors have gradients."""
    state = start_edit(known.encoder, rank=2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: LoraFactors(a=each.a, b=0.1 * torch.randn(each.b.shape, generator=generator), scale=each.scale)
        for name, each in state.adapter.items()
    }
    return replace(state, adapter=factors)


@hypothesis_settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 50), owners=st.integers(2, 4))
def test_over_any_split_the_step_is_that_on_the_pooled_rows(known: Taught, seed: int, owners: int) -> None:
    few = known.train.subset(torch.arange(0, len(known.train), 3))
    at = torch.randint(owners, (len(few),), generator=torch.Generator().manual_seed(seed))
    parts = [few.subset(at == each) for each in range(owners) if bool((at == each).any())]
    state = moved(known, seed)
    # plain gradient descent by hand: Adam divides by a gradient's size, which would hide its own
    pooled, split = (_summed(shares_of(known, each, state)) for each in ([few], parts))
    for name, expected in pooled.items():
        torch.testing.assert_close(split[name][0], expected[0], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(split[name][1], expected[1], atol=1e-6, rtol=1e-4)


def _summed(shares: list[GradientShare]) -> dict[str, tuple[Tensor, Tensor]]:
    """The oracle: mean over rows of each kind, one owner after another; read from Adam's first mean after a step."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for kind in ("retained", "forgotten"):
        given_ones: list[Gradient] = [getattr(each, kind) for each in shares if getattr(each, kind) is not None]
        rows = sum(each.rows for each in given_ones)
        for each in given_ones:
            for name, factors in each.factors.items():
                a, b = found.get(name, (torch.zeros_like(factors.a), torch.zeros_like(factors.b)))
                found[name] = a + factors.a * each.rows / rows, b + factors.b * each.rows / rows
    return found


def test_a_step_takes_the_mean_over_rows_of_each_kind(known: Taught) -> None:
    animal, food = (known.train.subset(known.train.targets == each) for each in (0, 1))
    parts = [animal, food, known.train.subset(torch.arange(0, len(known.train), 2))]
    state = moved(known, 0)
    shares = shares_of(known, parts, state)
    assert [(each.retained is None, each.forgotten is None) for each in shares] == [
        (False, True),
        (True, False),
        (False, False),
    ]
    after = advance(state, shares, ALL_ROWS)
    for name, (a, b) in _summed(shares).items():
        torch.testing.assert_close(after.first[name].a, 0.1 * a, atol=1e-8, rtol=1e-5)
        torch.testing.assert_close(after.first[name].b, 0.1 * b, atol=1e-8, rtol=1e-5)


def test_one_owner_of_all_rows_is_how_classes_are_forgotten_at_one_place(known: Taught) -> None:
    expected = forget_classes(known.encoder, known.classifier, known.train, FORGET, settings=SHORT, seed=3)
    owner = forget_owner(known.encoder, known.classifier, known.train, FORGET, settings=SHORT, seed=3)
    state = start_edit(known.encoder, rank=SHORT.rank, seed=3)
    while not is_done(state, SHORT):
        state = forget_step(state, [owner.share(state.number, state.adapter)], SHORT)
    assert same_bytes(bytes_of(state.adapter), bytes_of(expected.adapter))
    assert state.losses == expected.losses


def test_no_block_is_shrunk_before_the_warm_up_is_over(known: Taught) -> None:
    sparse = SHORT.model_copy(update={"steps": 4, "warm_up": 0.5, "sparsity": 1e3})
    dense = sparse.model_copy(update={"sparsity": 0.0})
    one, other = start_edit(known.encoder, rank=2, seed=0), start_edit(known.encoder, rank=2, seed=0)
    for number in range(3):
        assert same_bytes(bytes_of(one.adapter), bytes_of(other.adapter)), number
        one = forget_step(one, shares_of(known, [known.train], one, sparse), sparse)
        other = forget_step(other, shares_of(known, [known.train], other, dense), dense)
    assert changed_groups(one.adapter) == ()
    assert len(changed_groups(other.adapter)) == 2


def test_cut_off_it_goes_on_to_the_same_bytes_with_owners_that_start_anew(known: Taught) -> None:
    halves = [known.train.subset(torch.arange(start, len(known.train), 2)) for start in (0, 1)]
    whole = start_edit(known.encoder, rank=SHORT.rank, seed=0)
    cut = whole
    owners = [forget_owner(known.encoder, known.classifier, each, FORGET, settings=SHORT, seed=0) for each in halves]
    while not is_done(whole, SHORT):
        whole = forget_step(whole, [each.share(whole.number, whole.adapter) for each in owners], SHORT)
    while not is_done(cut, SHORT):
        cut = forget_step(cut, shares_of(known, halves, cut, SHORT), SHORT)
    assert same_bytes(bytes_of(cut.adapter), bytes_of(whole.adapter))


@pytest.mark.parametrize("steps", [1, 5])
def test_a_step_is_one_of_adam(steps: int) -> None:
    settings, generator = EditSettings(steps=10, learning_rate=1e-2), torch.Generator().manual_seed(0)

    def drawn() -> LoraFactors:
        return LoraFactors(a=torch.randn(2, 5, generator=generator), b=torch.randn(3, 2, generator=generator))

    factors, zero = drawn(), LoraFactors(a=torch.zeros(2, 5), b=torch.zeros(3, 2))
    state = EditState(0, {"x": factors}, {"x": zero}, {"x": zero})
    leaves = [each.clone().requires_grad_() for each in (factors.a, factors.b)]
    adam = torch.optim.Adam(leaves, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, settings.steps)
    for _ in range(steps):
        one, other = drawn(), drawn()
        shares = [GradientShare(Gradient(4, 1.0, {"x": one}), Gradient(2, 1.0, {"x": other}))]
        state = advance(state, shares, settings)
        leaves[0].grad, leaves[1].grad = one.a + other.a, one.b + other.b
        adam.step()
        schedule.step()
    torch.testing.assert_close(state.adapter["x"].a, leaves[0].detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(state.adapter["x"].b, leaves[1].detach(), atol=1e-6, rtol=1e-5)
    assert state.losses == (2.0,) * steps


def test_blocks_that_each_owner_shrinks_are_not_zero_on_average() -> None:
    """What goes wrong where owners take the proximal step: each drops another block, and the mean has all of them."""

    def adapter(first: float, second: float) -> Adapter:
        return {
            f"bert.encoder.layer.{block}.x": LoraFactors(a=torch.full((1, 4), size), b=torch.full((4, 1), size))
            for block, size in enumerate((first, second))
        }

    one, other = (
        shrink_groups(each, strength=2.0, learning_rate=0.1) for each in (adapter(1.0, 0.1), adapter(0.1, 0.4))
    )
    assert [len(changed_groups(each)) for each in (one, other)] == [1, 1]
    mean = {name: LoraFactors(a=(one[name].a + other[name].a) / 2, b=(one[name].b + other[name].b) / 2) for name in one}
    assert len(changed_groups(mean)) == 2
    plain = adapter(0.55, 0.25)  # the mean of what the two had
    assert changed_groups(shrink_groups(plain, strength=3.0, learning_rate=0.1)) == ("bert.encoder.layer.0",)


def test_what_cannot_be_stepped_on_says_so(known: Taught) -> None:
    state = start_edit(known.encoder, rank=2, seed=0)
    (retained,) = shares_of(known, [known.train.subset(known.train.targets != 1)], state)
    with pytest.raises(DataError, match="got 1 and 0"):
        advance(state, [retained], SHORT)
    assert retained.retained is not None
    broken = GradientShare(retained.retained, replace(retained.retained, loss=float("nan")))
    with pytest.raises(ConfigError, match="diverged at step 0"):
        advance(state, [broken], SHORT)
    plus = SHORT.model_copy(update={"push": 0.1})
    with pytest.raises(ConfigError, match="prototypes of all examples"):
        shares_of(known, [known.train], state, plus)
