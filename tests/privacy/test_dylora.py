"""One rank for all clients of a round: nested, public, and with a bound that does not depend on it."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from pomona.adapters import AdapterWeights, LoraFactors
from pomona.privacy.clipping import clip, joint_norm
from pomona.privacy.dylora import contribution, moved, prefix, rank_of_round, shapes_of
from pomona.privacy.gaussian_sum import GaussianSum
from pomona.privacy.randomness import SecureRandom

R, OUT, IN = 6, 5, 7


def weights(seed: int, *, rank: int = R) -> AdapterWeights:
    random = torch.Generator().manual_seed(seed)
    layers = {
        name: LoraFactors(
            a=torch.randn(rank, IN, generator=random), b=torch.randn(OUT, rank, generator=random), scale=2.0
        )
        for name in ("q", "v")
    }
    return AdapterWeights(layers=layers, heads={"head.bias": torch.randn(3, generator=random)})


@given(st.integers(0, 2**63 - 1), st.integers(1, 1000))
def test_the_rank_is_public_and_within_its_bounds(seed: int, number: int) -> None:
    rank = rank_of_round((2, 8), seed=seed, round_number=number)
    assert 2 <= rank <= 8
    assert rank == rank_of_round((2, 8), seed=seed, round_number=number)


def test_every_rank_has_its_turn() -> None:
    drawn = Counter(rank_of_round((1, 4), seed=0, round_number=number) for number in range(1, 2001))
    assert set(drawn) == {1, 2, 3, 4}
    assert max(drawn.values()) - min(drawn.values()) < 150
    assert {rank_of_round((3, 3), seed=0, round_number=number) for number in range(1, 9)} == {3}


@pytest.mark.parametrize("ranks", [(0, 3), (4, 3)])
def test_bounds_that_hold_no_rank_are_refused(ranks: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="least, most"):
        rank_of_round(ranks, seed=0, round_number=1)


@given(st.integers(1, R))
def test_moving_by_what_a_client_contributes_gives_what_it_trained(rank: int) -> None:
    whole = weights(0)
    start, trained = prefix(whole, rank), prefix(weights(1), rank)
    after = moved(whole, contribution(trained, start))
    for name, each in trained.layers.items():
        assert_close(after.layers[name].a[:rank], each.a)
        assert_close(after.layers[name].b[:, :rank], each.b)
        assert torch.equal(after.layers[name].a[rank:], whole.layers[name].a[rank:])
        assert torch.equal(after.layers[name].b[:, rank:], whole.layers[name].b[:, rank:])
        assert after.layers[name].scale == 2.0
    assert_close(after.heads["head.bias"], trained.heads["head.bias"])


@given(st.integers(1, R))
def test_a_prefix_of_the_product_is_the_product_of_prefixes(rank: int) -> None:
    """What DyLoRA trains: ``B[:, :b] A[:b]``, which every larger rank contains."""
    whole = weights(0)
    for name, each in prefix(whole, rank).layers.items():
        full = whole.layers[name]
        terms = sum(full.scale * torch.outer(full.b[:, i], full.a[i]) for i in range(rank))
        assert isinstance(terms, torch.Tensor)
        assert_close(each.delta(), terms)


def test_a_client_that_changes_nothing_contributes_nothing() -> None:
    start = weights(0)
    assert joint_norm(contribution(start, start)) == 0.0
    assert set(contribution(start, start)) == set(shapes_of(start))


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected tensors"):
        contribution(weights(1, rank=3), prefix(weights(0), 4))


@pytest.mark.parametrize("rank", [1, R])
def test_one_client_moves_the_mean_by_the_same_bound_at_every_rank(rank: int) -> None:
    start = prefix(weights(0), rank)
    far = {key: 1e6 * tensor for key, tensor in contribution(prefix(weights(1), rank), start).items()}
    means = []
    for updates in ([], [far]):
        total = GaussianSum(
            shapes_of(start), bound=0.5, noise_multiplier=1.0, divisor=100.0, noise=SecureRandom(b"k" * 32)
        )
        for update in updates:
            total.add(update)
        means.append(total.release())
    assert joint_norm({key: means[1][key] - means[0][key] for key in means[0]}) == pytest.approx(0.5 / 100, rel=1e-9)


def test_ranks_that_clients_choose_would_break_the_bound() -> None:
    """Rows averaged over those who have them: one client alone at a high rank moves its row by all of its bound."""
    clients, bound = 100, 1.0
    alone = clip({"row": torch.full((IN,), 1e6)}, bound)["row"]
    averaged_over_holders = alone / 1
    with_public_divisor = alone / clients
    assert float(averaged_over_holders.norm()) == pytest.approx(bound)
    assert float(averaged_over_holders.norm()) == pytest.approx(clients * float(with_public_divisor.norm()))
