"""What a client noises itself hides which of two updates it was, whoever looks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pomona.privacy.audit import judged
from pomona.privacy.local_noise import hide_move
from pomona.privacy.randomness import SecureRandom
from pomona.protocol import LocalPrivacy


def hidden(
    before: list[Tensor], after: list[Tensor], *, clip: float = 1.0, noise_multiplier: float = 1.0
) -> list[Tensor]:
    parameters = [each.clone() for each in after]
    privacy = LocalPrivacy(noise_multiplier=noise_multiplier, clip=clip)
    hide_move(parameters, before, privacy=privacy, noise=SecureRandom())
    return parameters


def tensors(size: int = 4000) -> list[Tensor]:
    return [torch.zeros(size // 2), torch.zeros(2, size // 4)]


@pytest.mark.parametrize(("factor", "accepted"), [(1.0, True), (2 / 3, False), (3 / 2, False)])
def test_noise_has_twice_the_bound_times_the_multiplier(factor: float, accepted: bool) -> None:
    before = tensors(20_000)
    found = torch.cat([each.flatten() for each in hidden(before, before, clip=0.5, noise_multiplier=1.5 * factor)])
    assert (abs(float(found.std()) / (2 * 0.5 * 1.5) - 1.0) < 5 / math.sqrt(2 * 20_000)) is accepted


@given(scale=st.sampled_from([0.0, 1e-30, 0.1, 1.0, 1e6, 1e30]), clip=st.floats(0.01, 10.0))
def test_a_move_is_clipped_over_all_parameters_together(scale: float, clip: float) -> None:
    before = tensors(40)
    after = [each + scale for each in before]
    moved = torch.cat([each.double().flatten() for each in hidden(before, after, clip=clip, noise_multiplier=1e-9)])
    whole = scale * math.sqrt(40)
    assert float(moved.norm()) == pytest.approx(min(whole, clip), rel=1e-5, abs=1e-6 * clip)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_move_that_is_not_finite_is_sent_as_noise(bad: float) -> None:
    before = tensors(40)
    after = [each.clone() for each in before]
    after[0][3] = bad
    moved = hidden(before, after, noise_multiplier=1e-9)
    assert all(float(each.abs().max()) < 1e-6 for each in moved)


def test_parameters_that_are_not_those_from_before_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        hidden(tensors(40), tensors(40)[:1])


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (0.5, False)])
def test_the_audit_passes_two_opposite_updates_and_catches_noise_for_a_bound_of_one(
    factor: float, passes: bool
) -> None:
    """Between any two updates there are 2 C; noise sized for C, as for a client that is there or not, is half."""
    before, sigma, tries = [torch.zeros(1)], 2.0, 3000
    scores = []
    for towards in (5.0, -5.0):
        after = [torch.full((1,), towards)]
        sent = [hidden(before, after, noise_multiplier=factor * sigma)[0] for _ in range(tries)]
        scores.append(torch.cat(sent).double().numpy())
    assert judged(scores[0], scores[1], noise_multiplier=sigma, delta=1e-5).passes() is passes
