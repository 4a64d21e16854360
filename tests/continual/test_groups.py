"""The proximal step is checked against the minimum that defines it, and against a gradient of the norm."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pomona.adapters import LoraFactors
from pomona.continual.edit_rounds import EditState, Gradient, GradientShare, advance
from pomona.continual.encoder import Adapter
from pomona.continual.groups import block_of, changed_groups, groups_of, shrink_groups
from pomona.forget_settings import EditSettings

LAYERS = [f"bert.encoder.layer.{i}.{name}" for i in (4, 5) for name in ("intermediate.dense", "output.dense")]


def factors_of(seed: int, *, scales: tuple[float, float] = (1.0, 1.0)) -> dict[str, LoraFactors]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraFactors(
            a=torch.randn(2, 3, generator=generator) * scales[i // 2],
            b=torch.randn(4, 2, generator=generator) * scales[i // 2],
        )
        for i, name in enumerate(LAYERS)
    }


def flat(adapter: Adapter, block: str) -> Tensor:
    return torch.cat(
        [f.detach().flatten() for n in LAYERS if n.startswith(block) for f in (adapter[n].a, adapter[n].b)]
    )


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("bert.encoder.layer.11.output.dense", "bert.encoder.layer.11"),
        ("vit.layers.1.mlp.fc1", "vit.layers.1"),
        ("layer.0", "layer.0"),
        ("pooler.dense", "pooler.dense"),
    ],
)
def test_a_layer_belongs_to_its_block(layer: str, block: str) -> None:
    assert block_of(layer) == block


def test_groups_are_whole_blocks() -> None:
    assert groups_of(LAYERS) == {"bert.encoder.layer.4": tuple(LAYERS[:2]), "bert.encoder.layer.5": tuple(LAYERS[2:])}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), strength=st.floats(0, 3), rate=st.floats(1e-3, 0.5))
def test_the_step_goes_to_the_minimum_that_defines_it(seed: int, strength: float, rate: float) -> None:
    """``argmin_x ||x - theta||^2 / 2 + t ||x||`` lies on the ray to theta: found here by a fine search along it."""
    before = factors_of(seed)
    adapter = shrink_groups(before, strength=strength, learning_rate=rate)
    for block in groups_of(LAYERS):
        theta, found = flat(before, block), flat(adapter, block)
        threshold, norm = rate * strength * math.sqrt(len(theta)), float(theta.norm())
        along = torch.linspace(0, 1, 10001, dtype=torch.float64)
        objective = ((1 - along) * norm) ** 2 / 2 + threshold * along * norm
        best = float(along[objective.argmin()])
        torch.testing.assert_close(found, theta * best, atol=2e-4 * norm, rtol=0)
        if best == 0.0:
            assert not found.any()


def test_one_block_goes_to_zero_and_stays_while_the_other_is_trained() -> None:
    fresh, zeros = factors_of(1, scales=(0.01, 1.0)), factors_of(1, scales=(0.0, 0.0))
    state = EditState(0, fresh, zeros, zeros)
    for _ in range(6):
        gradient = Gradient(1, 0.0, _gradient(state.adapter))
        state = advance(state, [GradientShare(gradient, gradient)], EditSettings(steps=10), after_step=_shrink)
    assert changed_groups(state.adapter) == ("bert.encoder.layer.5",)
    assert not flat(state.adapter, "bert.encoder.layer.4").any()
    assert flat(state.adapter, "bert.encoder.layer.5").all()


def _gradient(adapter: Adapter) -> dict[str, LoraFactors]:
    """Of ``sum (B A - 1)^2``: it pulls every factor away from zero, unless both of a layer are."""
    errors = {name: 2 * (each.delta() - 1) for name, each in adapter.items()}
    return {name: LoraFactors(a=each.b.T @ errors[name], b=errors[name] @ each.a.T) for name, each in adapter.items()}


def _shrink(number: int, _learning_rate: float, adapter: Adapter) -> Adapter:
    return shrink_groups(adapter, strength=0.7, learning_rate=0.1) if number >= 1 else adapter


def test_a_gradient_of_the_norm_ends_at_no_zero() -> None:
    """What goes wrong without the step: the published regulariser leaves small numbers, and no group that is gone."""
    theta = torch.randn(40, generator=torch.Generator().manual_seed(0)).mul_(0.1).requires_grad_()
    optimizer = torch.optim.AdamW([theta], lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        (0.5 * theta.norm()).backward()
        optimizer.step()
    assert theta.detach().ne(0).all()


def test_a_block_counts_as_changed_only_if_a_product_is_not_zero() -> None:
    adapter = {name: LoraFactors(a=torch.ones(2, 3), b=torch.zeros(4, 2)) for name in LAYERS}
    assert changed_groups(adapter) == ()
    adapter[LAYERS[3]] = LoraFactors(a=torch.ones(2, 3), b=torch.ones(4, 2))
    assert changed_groups(adapter) == ("bert.encoder.layer.5",)
    before = factors_of(3)
    after = shrink_groups(before, strength=0.0, learning_rate=0.1)
    assert torch.equal(flat(after, LAYERS[0][:20]), flat(before, LAYERS[0][:20]))
    shrink_groups(before, strength=0.5, learning_rate=0.1)
    assert torch.equal(flat(before, LAYERS[0][:20]), flat(factors_of(3), LAYERS[0][:20]))
