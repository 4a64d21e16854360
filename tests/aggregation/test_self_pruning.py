"""HetLoRA's self-pruning: who gives up a tail, who keeps it, and what is left."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.adapters import LoraFactors
from pomona.aggregation.strategies import hetlora
from pomona.aggregation.strategies.contract import Rules
from pomona.aggregation.strategies.hetlora import kept_rank, pruned, tail_norm
from pomona.aggregation_settings import SelfPruningSettings
from pomona.settings import TrainingSettings

SHAPES = {"query": (6, 5), "dense": (7, 6)}
HALVED = TrainingSettings(rank_pattern=(("query", 0.5),))

Layers = dict[str, LoraFactors]


def rules(*, decay: float = 0.5, penalty: float = 0.1, training: TrainingSettings | None = None) -> Rules:
    pruning = SelfPruningSettings(decay=decay, penalty=penalty)
    return Rules(shapes=SHAPES, training=training or TrainingSettings(), self_pruning=pruning)


def adapter(rule: Rules, *, rank: int = 4, seed: int = 0) -> Layers:
    gen = torch.Generator().manual_seed(seed)
    return {
        name: LoraFactors(
            a=torch.randn(rule.layer_rank(name, rank), in_, generator=gen),
            b=torch.randn(out, rule.layer_rank(name, rank), generator=gen),
        )
        for name, (out, in_) in SHAPES.items()
    }


def with_tail(layers: Layers, factor: float, *, kept: int, rule: Rules) -> Layers:
    """The same adapter with B of the tail scaled, which scales the norm of the tail."""
    changed = {}
    for name, factors in layers.items():
        b = factors.b.clone()
        b[:, rule.layer_rank(name, kept) :] *= factor
        changed[name] = replace(factors, b=b)
    return changed


@pytest.mark.parametrize(
    ("rank", "decay", "kept"), [(8, 0.75, 6), (4, 0.5, 2), (5, 0.5, 2), (3, 0.1, 1), (2, 0.99, 1), (1, 0.5, 1)]
)
def test_the_kept_rank_is_the_share_rounded_down_and_at_least_one(rank: int, decay: float, kept: int) -> None:
    assert kept_rank(rank, rules(decay=decay)) == kept


def test_without_the_option_nothing_is_penalised_or_pruned() -> None:
    plain = Rules(shapes=SHAPES)
    assert kept_rank(8, plain) == 8
    asked = hetlora.assign({}, rank=8, round_number=1, rules=plain)
    assert (asked.tail_from, asked.tail_penalty) == (0, 0.0)
    start = adapter(plain)
    trained = with_tail(start, 0.1, kept=2, rule=plain)
    assert pruned(start, trained, rank=4, rules=plain) == (4, trained)


def test_clients_are_told_where_the_tail_begins_and_what_it_costs() -> None:
    asked = hetlora.assign({}, rank=8, round_number=1, rules=rules(decay=0.75, penalty=0.25))
    assert (asked.rank, asked.tail_from, asked.tail_penalty) == (8, 6, 0.25)


def test_the_norm_of_the_tail_is_that_of_its_factors() -> None:
    rule = rules(training=HALVED)
    layers = adapter(rule)
    expected = sum(
        float(layers[name].b.double()[:, k:].norm() * layers[name].a.double()[k:].norm())
        for name, k in (("query", 1), ("dense", 2))
    )
    assert tail_norm(layers, 2, rule) == pytest.approx(expected, rel=1e-12)
    assert tail_norm(layers, 4, rule) == 0.0


@pytest.mark.parametrize("training", [None, HALVED], ids=["equal", "pattern"])
def test_a_tail_that_shrank_goes(training: TrainingSettings | None) -> None:
    rule = rules(training=training)
    start = adapter(rule)
    trained = with_tail(start, 0.9, kept=2, rule=rule)
    rank, layers = pruned(start, trained, rank=4, rules=rule)
    assert rank == 2
    for name, factors in layers.items():
        k = rule.layer_rank(name, 2)
        assert factors.rank == k
        assert torch.equal(factors.a, trained[name].a[:k])
        assert torch.equal(factors.b, trained[name].b[:, :k])


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_a_tail_that_did_not_shrink_stays(factor: float) -> None:
    rule = rules()
    start = adapter(rule)
    trained = with_tail(start, factor, kept=2, rule=rule)
    assert pruned(start, trained, rank=4, rules=rule) == (4, trained)


def test_a_fresh_tail_has_nothing_to_lose_and_stays() -> None:
    """In the first round B is zero: everybody would be pruned before anything was learned, or nobody could grow."""
    rule = rules()
    trained = adapter(rule)
    start = {name: replace(factors, b=torch.zeros_like(factors.b)) for name, factors in trained.items()}
    assert pruned(start, trained, rank=4, rules=rule) == (4, trained)
    assert pruned(start, start, rank=4, rules=rule) == (4, start)


def test_rank_one_has_no_tail() -> None:
    rule = rules()
    start = adapter(rule, rank=1)
    trained = with_tail(start, 0.1, kept=0, rule=rule)
    assert pruned(start, trained, rank=1, rules=rule) == (1, trained)


@given(st.integers(1, 64), st.floats(0.01, 0.99))
def test_pruning_again_and_again_ends_and_never_at_zero(rank: int, decay: float) -> None:
    rule, seen = rules(decay=decay), [rank]
    while (kept := kept_rank(seen[-1], rule)) < seen[-1]:
        seen.append(kept)
    assert seen[-1] >= 1
    assert len(seen) <= rank
    assert seen[-1] == 1, "int() rounds down, so that every rank above one has a tail"


@given(st.integers(2, 6), st.floats(0.1, 0.9), st.floats(0.0, 2.0), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_the_head_of_the_adapter_says_nothing_about_its_tail(rank: int, decay: float, factor: float, seed: int) -> None:
    """Only the tail is compared, whatever the rest learned."""
    rule = rules(decay=decay)
    start, other = adapter(rule, rank=rank, seed=seed), adapter(rule, rank=rank, seed=seed + 1)
    kept = kept_rank(rank, rule)
    trained = with_tail(start, factor, kept=kept, rule=rule)
    mixed = {
        name: LoraFactors(
            a=torch.cat([other[name].a[:kept], each.a[kept:]]),
            b=torch.cat([other[name].b[:, :kept], each.b[:, kept:]], dim=1),
        )
        for name, each in trained.items()
    }
    assert pruned(start, mixed, rank=rank, rules=rule)[0] == pruned(start, trained, rank=rank, rules=rule)[0]
