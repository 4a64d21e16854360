"""Every strategy against dense oracles: what it computes, which invariants it holds, and which it is seen to break."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from pomona.adapters import LoraFactors
from pomona.aggregation.flora import recompress
from pomona.aggregation.strategies import BY_NAME
from pomona.aggregation.strategies.contract import Assignment, Contribution, Rules, Strategy, leading
from pomona.aggregation.strategies.start import starting_factors
from pomona.seeds import fresh_a, orthonormal_a
from pomona.settings import TrainingSettings
from pomona.strategies import BY_NAME as FACTS
from pomona.strategies import EQUAL_RANK, StrategyName

NAMES: list[StrategyName] = sorted(BY_NAME)
EXACT = [name for name in NAMES if FACTS[name].exact]
RAGGED = [name for name in NAMES if FACTS[name].heterogeneous_ranks]
PAPER_RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
SHAPES = {"query": (24, 20), "dense": (18, 24)}

State = dict[str, LoraFactors]
Train = Callable[[LoraFactors, Assignment, int], LoraFactors]


def rules(**changes: object) -> Rules:
    return replace(Rules(shapes=SHAPES, seed=3, max_rank=16, rank=4), **changes)  # type: ignore[arg-type]


def ranks_of(name: str, ranks: Sequence[int], rule: Rules) -> list[int]:
    return [rule.rank] * len(ranks) if name in EQUAL_RANK else list(ranks)


def moved(start: LoraFactors, assignment: Assignment, client: int) -> LoraFactors:
    """A client that moves the factors it trains, by noise of its own."""
    noise = torch.Generator().manual_seed(1000 * client + assignment.adapter_seed % 997)
    a = start.a + 0.3 * torch.randn(start.a.shape, generator=noise) * (assignment.trains != "b")
    b = start.b + 0.3 * torch.randn(start.b.shape, generator=noise) * (assignment.trains != "a")
    return LoraFactors(a=a, b=b, scale=start.scale)


def idle(start: LoraFactors, _assignment: Assignment, _client: int) -> LoraFactors:
    return start


def trained(
    strategy: Strategy, state: State, ranks: Sequence[int], rule: Rules, *, number: int, train: Train
) -> list[Contribution]:
    weights = torch.arange(1, len(ranks) + 1, dtype=torch.float64)
    weights = weights / weights.sum()
    found = []
    for client, rank in enumerate(ranks):
        assignment = strategy.assign(state, rank=rank, round_number=number, rules=rule)
        start = starting_factors(assignment, rule)
        layers = {name: train(factors, assignment, client) for name, factors in start.items()}
        found.append(Contribution(layers=layers, weight=float(weights[client])))
    return found


def run(
    name: StrategyName,
    ranks: Sequence[int],
    rule: Rules,
    *,
    rounds: int,
    train: Train = moved,
    state: State | None = None,
) -> tuple[State, list[Contribution], State]:
    """Return the state before the last round, what was trained in it, and the state after."""
    strategy, after = BY_NAME[name], dict(state or {})
    before: State = {}
    parts: list[Contribution] = []
    for number in range(1, rounds + 1):
        before = after
        parts = trained(strategy, before, ranks_of(name, ranks, rule), rule, number=number, train=train)
        after, _ = strategy.aggregate(before, parts, round_number=number, rules=rule)
    return before, parts, after


def dense(state: State) -> dict[str, Tensor]:
    return {
        name: state[name].b.double() @ state[name].a.double() * state[name].scale
        if name in state
        else torch.zeros(*shape, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def effective(strategy: Strategy, before: State, part: Contribution, rank: int, number: int, rule: Rules) -> State:
    """What the client's model adds to the base after training: what stayed frozen, and what it trained."""
    assignment = strategy.assign(before, rank=rank, round_number=number, rules=rule)
    found = {}
    for name, factors in part.layers.items():
        whole = [LoraFactors(a=factors.a.double(), b=factors.b.double() * factors.scale)]
        if (given_ := assignment.layers.get(name)) is not None:
            at = rule.layer_rank(name, assignment.trainable) if assignment.trainable else 0
            whole.append(LoraFactors(a=given_.a[at:].double(), b=given_.b[:, at:].double()))
        found[name] = LoraFactors(
            a=torch.cat([each.a for each in whole]), b=torch.cat([each.b for each in whole], dim=1)
        )
    return found


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
def test_an_exact_strategy_gives_the_mean_of_the_clients_models(name: StrategyName, rounds: int) -> None:
    """The oracle: form every client's effective update densely, take the weighted mean; no truncation is in the way."""
    rule = rules(max_rank=24)
    ranks = ranks_of(name, (2, 5, 3), rule)
    before, parts, after = run(name, ranks, rule, rounds=rounds)
    for layer, result in dense(after).items():
        expected = sum(
            part.weight * dense(effective(BY_NAME[name], before, part, rank, rounds, rule))[layer]
            for part, rank in zip(parts, ranks, strict=True)
        )
        assert isinstance(expected, Tensor)
        assert float(expected.norm()) > 0.1
        assert_close(result, expected, rtol=1e-4, atol=2e-5)


@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    alpha=st.sampled_from([0.5, 1.0, 2.0, 3.0]),
    fixed=st.sampled_from([None, 8.0]),
    rslora=st.booleans(),
    pattern=st.dictionaries(st.sampled_from(sorted(SHAPES)), st.sampled_from([0.2, 0.5, 1.5, 2.0])),
    seed=st.integers(0, 2**32),
    warm=st.booleans(),
)
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("name", EXACT)
def test_exactness_holds_for_any_ranks_and_scales(
    name: StrategyName,
    ranks: list[int],
    alpha: float,
    fixed: float | None,
    rslora: bool,
    pattern: dict[str, float],
    seed: int,
    warm: bool,
) -> None:
    training = TrainingSettings(
        alpha_per_rank=2.0 if fixed else alpha, alpha=fixed, rslora=rslora, rank_pattern=tuple(sorted(pattern.items()))
    )
    rule = rules(max_rank=24, training=training, seed=seed, warm_start=warm)
    ranks = ranks_of(name, ranks, rule)
    before, parts, after = run(name, ranks, rule, rounds=2)
    for layer, factor in pattern.items():
        assert [part.layers[layer].rank for part in parts] == [max(1, round(factor * rank)) for rank in ranks]
    for layer, result in dense(after).items():
        expected = torch.zeros_like(result)
        for part, rank in zip(parts, ranks, strict=True):
            mine = effective(BY_NAME[name], before, part, rank, 2, rule)
            expected += part.weight * dense(mine)[layer]
        assert_close(result, expected, rtol=1e-4, atol=1e-4 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize(
    ("name", "warm"), [*((name, False) for name in NAMES if FACTS[name].keeps_no_op), ("flora-bounded", True)]
)
def test_a_round_without_change_changes_nothing(name: StrategyName, *, warm: bool) -> None:
    rule = rules(warm_start=warm)
    _, _, state = run(name, (2, 5, 3), rule, rounds=2)
    strategy = BY_NAME[name]
    for number in (3, 4):
        parts = trained(strategy, state, ranks_of(name, (2, 5, 3), rule), rule, number=number, train=idle)
        again, _ = strategy.aggregate(state, parts, round_number=number, rules=rule)
        for layer, matrix in dense(again).items():
            assert_close(matrix, dense(state)[layer], rtol=1e-5, atol=1e-5)


def test_flexlora_collapses_the_rank_when_nobody_changes_anything() -> None:
    """A random adapter of rank 64 is cut to 43 % of its norm in one round: what small clients never got is removed."""
    rule = rules(shapes={"layer": (1024, 1024)}, max_rank=64)
    noise = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=noise) for shape in ((64, 1024), (1024, 64)))
    state = {"layer": recompress(LoraFactors(a=a, b=b), rank=64)[0]}
    equal = [0.1] * 10
    strategy = BY_NAME["flexlora"]
    parts = trained(strategy, state, PAPER_RANKS, rule, number=2, train=idle)
    parts = [replace(part, weight=weight) for part, weight in zip(parts, equal, strict=True)]
    after, _ = strategy.aggregate(state, parts, round_number=2, rules=rule)
    held = torch.zeros(64)
    for rank in PAPER_RANKS:
        held[:rank] += 0.1
    values = torch.linalg.vector_norm(state["layer"].a, dim=1) ** 2
    expected = float((held * values).norm() / values.norm())
    norm = float(state["layer"].delta().norm())
    assert float(after["layer"].delta().norm()) / norm == pytest.approx(expected, rel=1e-4)
    assert expected == pytest.approx(0.43, abs=0.01)
    mended, _ = strategy.aggregate(state, parts, round_number=2, rules=replace(rule, rank_partitioned=True))
    assert float((mended["layer"].delta() - state["layer"].delta()).norm()) < 1e-5 * norm


def test_padding_dilutes_what_few_clients_have() -> None:
    """HetLoRA's zeros count: with equal weights a row of one client in four shrinks to 1/16 of its product."""
    rule = rules(shapes={"layer": (12, 10)})
    strategy, ranks = BY_NAME["hetlora"], (4, 2, 2, 2)
    a, b = torch.eye(4, 10), torch.eye(12, 4)
    state = {"layer": LoraFactors(a=a, b=b)}
    parts = trained(strategy, state, ranks, rule, number=2, train=idle)
    weights = [math.sqrt(min(rank, 4)) for rank in ranks]  # the norm of each client's part
    share = weights[0] / sum(weights)
    after, _ = strategy.aggregate(state, parts, round_number=2, rules=rule)
    assert_close(after["layer"].delta()[:2, :2], torch.eye(2), rtol=1e-5, atol=1e-6)
    assert_close(after["layer"].delta()[2:4, 2:4], share**2 * torch.eye(2), rtol=1e-5, atol=1e-6)
    mended, _ = strategy.aggregate(state, parts, round_number=2, rules=replace(rule, rank_partitioned=True))
    assert_close(mended["layer"].delta(), state["layer"].delta(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["fedit", "hetlora"])
def test_a_mean_of_factors_is_not_the_mean_of_products(name: StrategyName) -> None:
    """The error that exact strategies do not have; with independent factors it is most of the update."""
    rule = rules(rank=4)
    before, parts, after = run(name, (4, 4, 4, 4), rule, rounds=1, train=_unrelated)
    for layer, result in dense(after).items():
        expected = sum(part.weight * dense(effective(BY_NAME[name], before, part, 4, 1, rule))[layer] for part in parts)
        assert isinstance(expected, Tensor)
        assert float((result - expected).norm() / expected.norm()) > 0.5


def _unrelated(start: LoraFactors, _assignment: Assignment, client: int) -> LoraFactors:
    noise = torch.Generator().manual_seed(client)
    return LoraFactors(
        a=torch.randn(start.a.shape, generator=noise),
        b=torch.randn(start.b.shape, generator=noise),
        scale=start.scale,
    )


def test_fedit_averages_all_clients() -> None:
    """A published baseline returned the first client's factors alone."""
    rule = rules()
    _, parts, after = run("fedit", (4, 4, 4), rule, rounds=1)
    for layer in SHAPES:
        a = sum(part.weight * part.layers[layer].a.double() for part in parts)
        b = sum(part.weight * part.layers[layer].b.double() * part.layers[layer].scale for part in parts)
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        assert_close(after[layer].a.double(), a, rtol=1e-6, atol=1e-7)
        assert_close(after[layer].b.double(), b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", sorted(EQUAL_RANK))
def test_unequal_ranks_are_refused_where_they_make_no_sense(name: StrategyName) -> None:
    rule = rules()
    parts = trained(BY_NAME["flora"], {}, (2, 3), rule, number=1, train=moved)
    with pytest.raises(ValueError, match=r"one rank, got ranks \[2, 3\]"):
        BY_NAME[name].aggregate({}, parts, round_number=1, rules=rule)


@pytest.mark.parametrize("name", sorted(EQUAL_RANK))
def test_equal_ranks_may_differ_between_layers(name: StrategyName) -> None:
    """A pattern is no inequality of clients."""
    training = TrainingSettings(rank_pattern=(("dense", 0.5), ("query", 2.0)))
    _, _, after = run(name, (4, 4, 4), rules(training=training), rounds=2)
    parts = trained(BY_NAME[name], after, (4, 4), rules(training=training), number=3, train=moved)
    assert {layer: factors.rank for layer, factors in parts[0].layers.items()} == {"query": 8, "dense": 2}
    other = trained(BY_NAME[name], after, (4,), rules(), number=3, train=moved)
    with pytest.raises(ValueError, match=r"one rank, got ranks \[(4, 8|2, 4)\]"):
        BY_NAME[name].aggregate(after, [*parts, *other], round_number=3, rules=rules(training=training))


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_clients_does_not_matter(name: StrategyName) -> None:
    rule = rules()
    before, parts, after = run(name, (2, 5, 3), rule, rounds=2)
    turned, _ = BY_NAME[name].aggregate(before, parts[::-1], round_number=2, rules=rule)
    for layer, matrix in dense(turned).items():
        assert_close(matrix, dense(after)[layer], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_one_client_alone_is_local_training(name: StrategyName) -> None:
    rule = rules(max_rank=24)
    rank = rule.rank
    before, parts, after = run(name, (rank,), rule, rounds=2)
    mine = dense(effective(BY_NAME[name], before, parts[0], rank, 2, rule))
    for layer, matrix in dense(after).items():
        assert_close(matrix, mine[layer], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in NAMES),
        ("flora-bounded", {"warm_start": True}),
        ("flexlora", {"rank_partitioned": True}),
        ("hetlora", {"rank_partitioned": True}),
    ],
)
def test_results_are_plain_float32_of_scale_one(name: StrategyName, options: dict[str, object]) -> None:
    """They are encoded and published as they are."""
    _, _, after = run(name, (2, 5, 3), rules(**options), rounds=2)
    assert sorted(after) == sorted(SHAPES)
    for factors in after.values():
        assert (factors.scale, factors.a.dtype, factors.b.dtype) == (1.0, torch.float32, torch.float32)
        assert factors.a.is_contiguous()
        assert factors.b.is_contiguous()


@pytest.mark.parametrize("name", NAMES)
def test_what_a_client_is_given_never_exceeds_what_it_can_train(name: StrategyName) -> None:
    rule = rules()
    _, _, state = run(name, (2, 5, 3), rule, rounds=2)
    for rank in (4, 5, 9):
        assignment = BY_NAME[name].assign(state, rank=rank, round_number=3, rules=rule)
        assert 1 <= assignment.rank <= rank
        assert 0 <= assignment.trainable <= assignment.rank


def size(assignment: Assignment) -> int:
    return sum(
        factors.b.numel() + (0 if assignment.draws_a else factors.a.numel()) for factors in assignment.layers.values()
    )


@pytest.mark.parametrize("name", NAMES)
def test_download_grows_with_clients_only_where_it_is_said(name: StrategyName) -> None:
    shapes = {"layer": (400, 300)}
    rule = rules(shapes=shapes, max_rank=8, rank=4)
    sizes = []
    for clients in (2, 12):
        strategy = BY_NAME[name]
        state: State = {}
        for number in (1, 2):
            parts = trained(strategy, state, [4] * clients, rule, number=number, train=_unrelated)
            if name == "ffa-nested":
                parts = trained(strategy, state, [4] * clients, rule, number=number, train=moved)
            state, _ = strategy.aggregate(state, parts, round_number=number, rules=rule)
        sizes.append(size(strategy.assign(state, rank=4, round_number=3, rules=rule)))
    assert (sizes[1] > sizes[0]) == FACTS[name].download_grows_with_clients


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [1, 2])
def test_a_plain_sum_of_what_is_sent_is_enough_only_where_it_is_said(name: StrategyName, number: int) -> None:
    """One client sends more by some noise, the other less by it: the sum of what they train is the same."""
    rule, strategy = rules(max_rank=24), BY_NAME[name]
    before, parts, _ = run(name, (4, 4), rule, rounds=number)
    trains = strategy.assign(before, rank=4, round_number=number, rules=rule).trains
    noise = torch.Generator().manual_seed(5)
    sent: list[Contribution] = []
    for sign in (0.0, 1.0):
        shifted = [dict(part.layers) for part in parts]
        for layer in SHAPES:
            moves = [
                torch.randn(each.shape, generator=noise)
                for each in (parts[0].layers[layer].a, parts[0].layers[layer].b)
            ]
            for part, way in zip(shifted, (sign, -sign), strict=True):
                a = part[layer].a + way * moves[0] * (trains != "b")
                b = part[layer].b + way * moves[1] * (trains != "a")
                part[layer] = replace(part[layer], a=a, b=b)
        sent += [Contribution(layers=layers, weight=0.5) for layers in shifted]
    results = [
        dense(strategy.aggregate(before, pair, round_number=number, rules=rule)[0]) for pair in (sent[:2], sent[2:])
    ]
    same = all(torch.allclose(results[0][layer], results[1][layer], rtol=1e-4, atol=1e-5) for layer in SHAPES)
    assert same is FACTS[name].secure_aggregation


def test_ffa_sends_b_alone_and_its_a_never_moves() -> None:
    rule = rules()
    _, parts, after = run("ffa", (4, 4), rule, rounds=3)
    assignment = BY_NAME["ffa"].assign(after, rank=4, round_number=4, rules=rule)
    assert (assignment.trains, assignment.draws_a) == ("b", True)
    for layer, (_, in_) in SHAPES.items():
        drawn = fresh_a(layer, 4, in_, seed=assignment.adapter_seed)
        assert torch.equal(after[layer].a, drawn)
        assert all(torch.equal(part.layers[layer].a, drawn) for part in parts)


def test_rolora_takes_turns() -> None:
    rule = rules()
    before, _, after = run("rolora", (4, 4), rule, rounds=2)
    for layer in SHAPES:
        assert torch.equal(after[layer].b, before[layer].b)
        assert not torch.equal(after[layer].a, before[layer].a)
    before, _, after = run("rolora", (4, 4), rule, rounds=3)
    for layer in SHAPES:
        assert_close(after[layer].a, before[layer].a, rtol=1e-6, atol=1e-7)
        assert not torch.equal(after[layer].b, before[layer].b)


def test_nested_rows_are_public_orthonormal_and_new_each_round() -> None:
    rule = rules()
    seeds = {BY_NAME["ffa-nested"].assign({}, rank=4, round_number=n, rules=rule).adapter_seed for n in (1, 2, 3)}
    assert len(seeds) == 3
    large, small = orthonormal_a("query", 7, 20, seed=5), orthonormal_a("query", 3, 20, seed=5)
    assert_close(large @ large.T, torch.eye(7), rtol=0.0, atol=1e-6)
    assert_close(small, large[:3], rtol=0.0, atol=1e-6)
    with pytest.raises(ValueError, match="at most 20 orthonormal rows, got rank 21"):
        orthonormal_a("query", 21, 20, seed=5)


def test_the_norm_of_nested_b_is_that_of_the_update() -> None:
    """What makes clipping B a clip of the update."""
    _, parts, _ = run("ffa-nested", (2, 5, 3), rules(), rounds=2)
    for part in parts:
        for factors in part.layers.values():
            assert float(factors.delta().norm()) == pytest.approx(factors.scale * float(factors.b.norm()), rel=1e-5)


def test_a_warm_client_goes_on_from_the_largest_components() -> None:
    rule = rules(warm_start=True)
    _, _, state = run("flora-bounded", (2, 5, 3), rule, rounds=2)
    strategy = BY_NAME["flora-bounded"]
    assignment = strategy.assign(state, rank=3, round_number=3, rules=rule)
    for layer, start in starting_factors(assignment, rule).items():
        left, values, right = torch.linalg.svd(state[layer].delta().double())
        best = left[:, :3] * values[:3] @ right[:3]
        assert_close(start.delta().double(), best, rtol=1e-4, atol=1e-5)
    cold = strategy.assign(state, rank=3, round_number=3, rules=replace(rule, warm_start=False))
    assert all(not start.b.any() for start in starting_factors(cold, rule).values())


def test_warm_start_by_replacement_would_collapse_the_rank() -> None:
    """What goes wrong without the delta: the same clients, their products averaged as they are."""
    rule = rules(warm_start=True, max_rank=8)
    _, _, state = run("flora-bounded", (2, 8, 3), rule, rounds=3)
    parts = trained(BY_NAME["flora-bounded"], state, (2, 8, 3), rule, number=4, train=idle)
    kept, _ = BY_NAME["flora-bounded"].aggregate(state, parts, round_number=4, rules=rule)
    lost, _ = BY_NAME["flexlora"].aggregate(state, parts, round_number=4, rules=rule)
    for layer in SHAPES:
        whole = float(state[layer].delta().norm())
        assert float((kept[layer].delta() - state[layer].delta()).norm()) < 1e-4 * whole
        assert float((lost[layer].delta() - state[layer].delta()).norm()) > 0.05 * whole


def test_flora_is_never_truncated() -> None:
    rule = rules(max_rank=3)
    _, _, after = run("flora", (2, 5, 3), rule, rounds=5)
    assert {name: factors.rank for name, factors in after.items()} == {"query": 20, "dense": 18}
    _, _, bounded = run("flora-bounded", (2, 5, 3), rule, rounds=5)
    assert all(factors.rank == 3 for factors in bounded.values())


def test_the_facts_name_every_strategy_once() -> None:
    assert sorted(FACTS) == NAMES


@pytest.mark.parametrize(("clients", "rank"), [(2, 4), (4, 2), (5, 1)])
def test_the_residual_of_fedex_is_no_larger_than_it_must_be(clients: int, rank: int) -> None:
    """The mean is rounded to float32, and the rounding, of full rank, would travel to every client."""
    generator = torch.Generator().manual_seed(clients)
    shape = {"q": (40, 30)}
    shared = torch.randn(rank, 30, generator=generator)

    def published(a_of: Callable[[], Tensor]) -> int:
        parts = [
            Contribution(
                layers={"q": LoraFactors(a=a_of(), b=torch.randn(40, rank, generator=generator))}, weight=1 / clients
            )
            for _ in range(clients)
        ]
        layers, _ = BY_NAME["fedex"].aggregate({}, parts, round_number=1, rules=Rules(shapes=shape, rank=rank))
        return layers["q"].rank

    assert published(lambda: torch.randn(rank, 30, generator=generator)) == rank + (clients - 1) * rank
    assert published(shared.clone) == rank


def test_flexlora_puts_the_singular_values_into_b() -> None:
    """As its code does; a client's step in A would otherwise be sized by them."""
    rule = rules()
    _, _, state = run("flexlora", [4, 4], rule, rounds=1)
    given = BY_NAME["flexlora"].assign(state, rank=3, round_number=2, rules=rule).layers
    for name, factors in given.items():
        assert_close(factors.a @ factors.a.T, torch.eye(3), rtol=1e-4, atol=1e-4)
        assert_close(dense({name: factors})[name], dense({name: leading(state[name], 3)})[name], rtol=1e-4, atol=1e-5)


def test_a_component_whose_only_holder_changed_nothing_is_no_number_by_zero() -> None:
    """HetLoRA weighs by norm: the only client that has the last rows may weigh nothing."""
    shape = {"q": (6, 5)}
    idle = Contribution(layers={"q": LoraFactors(a=torch.ones(4, 5), b=torch.zeros(6, 4))}, weight=0.5)
    busy = Contribution(layers={"q": LoraFactors(a=torch.ones(2, 5), b=torch.ones(6, 2))}, weight=0.5)
    layers, _ = BY_NAME["hetlora"].aggregate(
        {}, [idle, busy], round_number=1, rules=Rules(shapes=shape, rank_partitioned=True)
    )
    assert_close(layers["q"].delta(), busy.layers["q"].delta())


@pytest.mark.parametrize("training", [{"alpha": 8.0}, {"alpha": 8.0, "rslora": True}, {"rslora": True}], ids=str)
def test_a_client_starts_from_its_part_of_the_global_adapter_whatever_its_scale(training: dict[str, object]) -> None:
    """With layers of other ranks too: the scale is the client's, and not the layer's."""
    chosen = TrainingSettings.model_validate({**training, "rank_pattern": {next(iter(SHAPES)): 2.0}})
    rule = rules(training=chosen, warm_start=True)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: LoraFactors(a=torch.randn(8, in_, generator=generator), b=torch.randn(out, 8, generator=generator))
        for name, (out, in_) in SHAPES.items()
    }
    assignment = BY_NAME["flora-bounded"].assign(state, rank=3, round_number=2, rules=rule)
    started = starting_factors(assignment, rule)
    scale = 8.0 / 3 if training == {"alpha": 8.0} else 8.0 / 3**0.5 if "alpha" in training else 2.0 * 3**0.5
    for number, (name, factors) in enumerate(started.items()):
        assert factors.scale == pytest.approx(scale)
        assert_close(factors.delta(), leading(state[name], 6 if number == 0 else 3).delta(), rtol=1e-4, atol=1e-4)
