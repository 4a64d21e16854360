"""Each defence is checked against its definition on dense vectors, and on attacks that move a plain mean at will."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from pomona.adapters import AdapterWeights, LoraFactors
from pomona.aggregation.flora import aggregate_layers, stack
from pomona.aggregation.geometry import add_head_changes, distances_to, gram_matrix, median_coefficients, norms
from pomona.aggregation.robust import (
    Defended,
    fltrust,
    geometric_median,
    krum_scores,
    median_bound,
    multi_krum,
    norm_bounding,
    trimmed_mean,
)
from pomona.aggregation.weights import example_weights

Defence = Callable[[Tensor, Sequence[float]], Defended]

SHAPES = {"k": (9, 7), "q": (8, 12)}
HEADS = {"bias": torch.full((4,), 0.5, dtype=torch.float64)}


def bounded(gram: Tensor, weights: Sequence[float]) -> Defended:
    return norm_bounding(gram, weights=weights, bound=median_bound(gram, factor=2.0))


def krum(gram: Tensor, weights: Sequence[float]) -> Defended:
    return multi_krum(gram, weights=weights, attackers=2, selected=len(weights) - 2)


def trimmed(gram: Tensor, weights: Sequence[float]) -> Defended:
    return trimmed_mean(gram, weights=weights, trimmed=2)


def median(gram: Tensor, weights: Sequence[float]) -> Defended:
    return geometric_median(gram, weights=weights)


DEFENCES: dict[str, Defence] = {"norm": bounded, "krum": krum, "trimmed": trimmed, "median": median}
each_defence = pytest.mark.parametrize("defence", DEFENCES.values(), ids=DEFENCES)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_factors(gen: torch.Generator, shape: tuple[int, int], rank: int) -> LoraFactors:
    return LoraFactors(
        a=torch.randn(rank, shape[1], generator=gen, dtype=torch.float64),
        b=torch.randn(shape[0], rank, generator=gen, dtype=torch.float64),
        scale=1 / math.sqrt(rank),
    )


def make_cohort(ranks: Sequence[int], *, noise: float = 0.3, seed: int = 0) -> list[AdapterWeights]:
    """Return honest clients: one common change of rank 2, and a change of each client's own rank beside it."""
    gen = random(seed)
    common = {name: make_factors(gen, shape, 2) for name, shape in SHAPES.items()}
    bias = torch.randn(4, generator=gen, dtype=torch.float64)
    return [
        AdapterWeights(
            layers={
                name: stack([common[name], make_factors(gen, shape, rank)], weights=[1.0, noise])
                for name, shape in SHAPES.items()
            },
            heads={"bias": HEADS["bias"] + bias + noise * torch.randn(4, generator=gen, dtype=torch.float64)},
        )
        for rank in ranks
    ]


def multiplied(update: AdapterWeights, factor: float) -> AdapterWeights:
    """Return an update that is ``factor`` times as large, in layers and heads."""
    return AdapterWeights(
        layers={name: replace(f, scale=factor * f.scale) for name, f in update.layers.items()},
        heads={name: HEADS[name] + factor * (head - HEADS[name]) for name, head in update.heads.items()},
    )


def gram_of(updates: Sequence[AdapterWeights]) -> Tensor:
    return gram_matrix(updates, heads=HEADS)


def flatten(update: AdapterWeights) -> Tensor:
    parts = [update.layers[name].delta().flatten() for name in SHAPES]
    return torch.cat([*parts, update.heads["bias"] - HEADS["bias"]])


def aggregated(updates: Sequence[AdapterWeights], weights: Sequence[float]) -> Tensor:
    """Return the change of the global adapter as the coordinator makes it, by stacking; dense."""
    layers, _ = aggregate_layers({}, [u.layers for u in updates], weights=weights, max_rank=64, energy=1.0)
    heads = add_head_changes(HEADS, [u.heads for u in updates], weights=weights)
    parts = [
        layers[name].delta().flatten() if name in layers else torch.zeros(math.prod(shape), dtype=torch.float64)
        for name, shape in SHAPES.items()
    ]
    return torch.cat([*parts, heads["bias"].double() - HEADS["bias"]])


HONEST_RANKS = (1, 2, 4, 4, 8, 8, 16, 3)
WEIGHTS = example_weights([40, 10, 20, 30, 20, 10, 40, 30])


@dataclass(frozen=True)
class Attack:
    """Two poisoned clients behind the honest ones."""

    updates: list[AdapterWeights]
    weights: list[float]
    honest_mean: Tensor
    spread: float

    @property
    def share(self) -> float:
        return sum(self.weights[-2:])


def attack(poison: Callable[[AdapterWeights], Sequence[AdapterWeights]]) -> Attack:
    honest = make_cohort(HONEST_RANKS)
    vectors = torch.stack([flatten(update) for update in honest])
    weights = example_weights([40, 10, 20, 30, 20, 10, 40, 30, 20, 20])
    shares = torch.tensor(WEIGHTS, dtype=torch.float64)
    mean = shares @ vectors
    spread = float((vectors - mean).norm(dim=1).max())
    return Attack([*honest, *poison(make_cohort([6], seed=0)[0])], weights, mean, spread)


def flipped(size: float) -> Attack:
    return attack(lambda update: [multiplied(update, -size), multiplied(update, -size)])


def scaled(size: float) -> Attack:
    stranger = make_cohort([5], noise=0.0, seed=77)[0]
    return attack(lambda update: [multiplied(stranger, size), multiplied(update, size)])


# what goes wrong without


@pytest.mark.parametrize("size", [1e2, 1e5, 1e8])
@pytest.mark.parametrize("make_attack", [flipped, scaled])
def test_a_plain_mean_goes_wherever_one_client_wants(make_attack: Callable[[float], Attack], size: float) -> None:
    """Guards the reason of every test below."""
    case = make_attack(size)
    moved = float((aggregated(case.updates, case.weights) - case.honest_mean).norm())
    assert moved > 0.05 * size * float(case.honest_mean.norm())


@pytest.mark.parametrize("size", [1e2, 1e5, 1e8])
@pytest.mark.parametrize("make_attack", [flipped, scaled])
@each_defence
def test_a_defended_mean_stays_however_large_the_attack_is(
    defence: Defence, make_attack: Callable[[float], Attack], size: float
) -> None:
    case = make_attack(size)
    gram = gram_of(case.updates)
    defended = defence(gram, case.weights)
    moved = float((aggregated(case.updates, defended.weights) - case.honest_mean).norm())
    if defence is bounded:
        limit = 2 * float(norms(gram).median())
        assert moved <= case.share * (limit + float(case.honest_mean.norm())) + 1e-5
        assert moved < 0.7 * float(case.honest_mean.norm())
    elif defence is median:
        assert moved <= case.spread * (1 - case.share) / math.sqrt(1 - 2 * case.share)
    else:
        assert defended.quarantined == (8, 9)
        assert moved < 1e-5  # which is what heads in float32 are rounded to
    assert all(defended.reasons[-2:])


def test_a_flipped_client_of_ordinary_size_gets_past_norm_bounding_but_not_past_the_others() -> None:
    """Guards the docstring: norm bounding does not look at the direction."""
    case = flipped(1.0)
    gram = gram_of(case.updates)
    assert bounded(gram, case.weights).reasons[-2:] == ("", "")
    assert krum(gram, case.weights).quarantined == (8, 9)
    assert trimmed(gram, case.weights).quarantined == (8, 9)
    moved = float((aggregated(case.updates, case.weights) - case.honest_mean).norm())
    defended = float((aggregated(case.updates, median(gram, case.weights).weights) - case.honest_mean).norm())
    assert defended < moved / 3


@pytest.mark.parametrize("size", [0.5, 1.0, 1e8])
def test_fltrust_withstands_a_majority_of_attackers(size: float) -> None:
    """Seven of ten, which no defence that only compares clients with one another can."""
    honest = make_cohort((1, 4, 8))
    root = make_cohort((2,), seed=0)[0]
    poisoned = [multiplied(update, -size) for update in make_cohort((2, 3, 4, 5, 6, 7, 8))]
    updates, weights = [*honest, *poisoned], [0.1] * 10
    honest_mean = torch.stack([flatten(update) for update in honest]).mean(dim=0)
    defended = fltrust(gram_of([*updates, root]), weights=weights)
    assert defended.quarantined == (3, 4, 5, 6, 7, 8, 9)
    assert all("points elsewhere" in reason for reason in defended.reasons[3:])
    good = aggregated(updates, defended.weights)
    assert float((good - honest_mean).norm()) < 0.5 * float(honest_mean.norm())
    assert float(aggregated(updates, weights) @ honest_mean) < 0.0  # a plain mean goes backwards
    assert float(good @ honest_mean) > 0.0


@pytest.mark.parametrize("size", [1e2, 1e8])
def test_fltrust_takes_the_length_from_the_server(size: float) -> None:
    case = scaled(size)
    root = make_cohort((2,), seed=0)[0]
    defended = fltrust(gram_of([*case.updates, root]), weights=case.weights)
    assert float(aggregated(case.updates, defended.weights).norm()) <= float(flatten(root).norm()) + 1e-5
    assert all(defended.reasons[-2:])


def hiding(update: AdapterWeights, *, size: float) -> AdapterWeights:
    """Return the same update in factors of an enormous size, which cancel but for that update."""

    def hidden(factors: LoraFactors) -> LoraFactors:
        gen = random(11)
        a = torch.randn(1, factors.a.shape[1], generator=gen, dtype=torch.float64)
        b = size * torch.randn(factors.b.shape[0], 1, generator=gen, dtype=torch.float64)
        return LoraFactors(a=torch.cat([a, factors.scale * factors.a, a]), b=torch.cat([b, factors.b, -b], dim=1))

    return replace(update, layers={name: hidden(factors) for name, factors in update.layers.items()})


@each_defence
def test_factors_that_cancel_hide_an_attack_from_no_defence(defence: Defence) -> None:
    case = flipped(20.0)
    hidden = [*case.updates[:-2], *(hiding(update, size=1e9) for update in case.updates[-2:])]
    one, other = defence(gram_of(case.updates), case.weights), defence(gram_of(hidden), case.weights)
    assert other.weights == pytest.approx(one.weights, rel=1e-4)
    assert all(other.reasons[-2:])


def test_fltrust_does_not_enlarge_what_is_rounding() -> None:
    """An update that looks like next to nothing would be scaled up until its rounding error is everything."""
    a, b = torch.zeros(3, 12, dtype=torch.float64), torch.zeros(8, 3, dtype=torch.float64)
    a[0, 0] = a[1, 0] = a[2, 1] = 1.0
    b[0, 2] = 1e-30
    tiny = AdapterWeights(layers={"q": LoraFactors(a=a, b=b.clone())})
    b[:, 0], b[:, 1] = 1e6, -1e6  # without rounding nothing is left of these two
    sneaky = AdapterWeights(layers={"q": LoraFactors(a=a, b=b)})
    root = multiplied(tiny, 1e30)
    assert fltrust(gram_of([tiny, root]), weights=[1.0]).weights[0] == pytest.approx(1e30)
    assert fltrust(gram_of([sneaky, root]), weights=[1.0]).weights[0] < 1.0 / math.ulp(1e6)


# against the definitions


@st.composite
def clients(draw: st.DrawFn) -> tuple[Tensor, list[float]]:
    """Draw seven to ten weighted dense vectors of very unequal length, with no order or direction in common."""
    gen = random(draw(st.integers(0, 2**31)))
    count = draw(st.integers(7, 10))
    sizes = torch.tensor(draw(st.lists(st.floats(0.01, 100), min_size=count, max_size=count)), dtype=torch.float64)
    vectors = sizes[:, None] * torch.randn(count, 6, generator=gen, dtype=torch.float64)
    return vectors, draw(st.lists(st.floats(0.125, 4), min_size=count, max_size=count))


@given(clients(), st.floats(0.01, 100))
@settings(deadline=None, max_examples=60)
def test_norm_bounding_is_clipping(cohort: tuple[Tensor, list[float]], bound: float) -> None:
    vectors, weights = cohort
    defended = norm_bounding(vectors @ vectors.T, weights=weights, bound=bound)
    for vector, before, after, reason in zip(vectors, weights, defended.weights, defended.reasons, strict=True):
        norm = float(vector.norm())
        assert after == pytest.approx(before / max(1.0, norm / bound), rel=1e-9)
        assert after * norm <= before * bound * (1 + 1e-9)
        assert bool(reason) == (norm > bound * (1 + 2e-9)) or norm == pytest.approx(bound, rel=1e-8)


@given(clients(), st.integers(0, 2), st.integers(1, 7))
@settings(deadline=None, max_examples=60)
def test_multi_krum_is_its_definition(cohort: tuple[Tensor, list[float]], attackers: int, selected: int) -> None:
    vectors, weights = cohort
    count = len(weights)
    selected = min(selected, count - attackers)
    scores = []
    for i in range(count):
        others = sorted(float((vectors[i] - vectors[j]).square().sum()) for j in range(count) if j != i)
        scores.append(math.fsum(others[: count - attackers - 2]))
    gram = vectors @ vectors.T
    assert krum_scores(gram, attackers=attackers).tolist() == pytest.approx(scores, rel=1e-6)
    kept = sorted(range(count), key=scores.__getitem__)[:selected]
    total = math.fsum(weights) / math.fsum(weights[k] for k in kept)
    expected = [weights[k] * total if k in kept else 0.0 for k in range(count)]
    defended = multi_krum(gram, weights=weights, attackers=attackers, selected=selected)
    assert defended.weights == pytest.approx(expected, rel=1e-12)
    assert defended.quarantined == tuple(k for k in range(count) if k not in kept)


@given(clients(), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_the_trimmed_mean_cuts_those_farthest_from_the_dense_median(
    cohort: tuple[Tensor, list[float]], cut: int
) -> None:
    vectors, weights = cohort
    count, shares = len(weights), torch.tensor(weights, dtype=torch.float64)
    center = shares @ vectors / shares.sum()
    for _ in range(600):  # Weiszfeld on dense vectors, slowly
        inverse = shares / (vectors - center).norm(dim=1).clamp(min=1e-9)
        center = inverse @ vectors / inverse.sum()
    away = (vectors - center).norm(dim=1)
    order = away.argsort()
    defended = trimmed_mean(vectors @ vectors.T, weights=weights, trimmed=cut)
    assert len(defended.quarantined) == cut
    if cut:
        gap = float(away[order[count - cut]] - away[order[count - cut - 1]])
        if gap > 1e-3 * float(away.max()):  # else the two medians may round to different orders
            assert set(defended.quarantined) == set(order[count - cut :].tolist())
    kept = [k for k in range(count) if k not in defended.quarantined]
    scale = math.fsum(weights) / math.fsum(weights[k] for k in kept)
    assert [defended.weights[k] for k in kept] == pytest.approx([weights[k] * scale for k in kept], rel=1e-12)


@given(clients(), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_what_the_trimmed_mean_keeps_is_no_farther_than_the_farthest_honest(
    cohort: tuple[Tensor, list[float]], attackers: int
) -> None:
    """The guarantee of its docstring, whichever clients the attackers are."""
    vectors, weights = cohort
    gram, shares = vectors @ vectors.T, torch.tensor(weights, dtype=torch.float64)
    defended = trimmed_mean(gram, weights=weights, trimmed=attackers)
    away = distances_to(gram, median_coefficients(gram, shares))
    kept = max(float(away[k]) for k in range(len(weights)) if k not in defended.quarantined)
    for first in range(len(weights)):
        bad = {(first + i) % len(weights) for i in range(attackers)}
        assert kept <= max(float(away[k]) for k in range(len(weights)) if k not in bad)


@given(clients())
@settings(deadline=None, max_examples=40)
def test_the_geometric_median_is_the_combination_of_geometry(cohort: tuple[Tensor, list[float]]) -> None:
    vectors, weights = cohort
    gram, shares = vectors @ vectors.T, torch.tensor(weights, dtype=torch.float64)
    expected = (shares.sum() * median_coefficients(gram, shares)).tolist()
    assert geometric_median(gram, weights=weights).weights == pytest.approx(expected, rel=1e-12)


@given(clients())
@settings(deadline=None, max_examples=60)
def test_fltrust_is_its_definition(cohort: tuple[Tensor, list[float]]) -> None:
    vectors, weights = cohort
    root, rest = vectors[-1], weights[:-1]
    trust = [max(0.0, float(torch.nn.functional.cosine_similarity(v, root, dim=0))) for v in vectors[:-1]]
    total = math.fsum(p * t for p, t in zip(rest, trust, strict=True))
    scale = math.fsum(rest) * float(root.norm())
    expected = [
        scale * p * t / (total * float(v.norm())) if t else 0.0
        for p, t, v in zip(rest, trust, vectors[:-1], strict=True)
    ]
    defended = fltrust(vectors @ vectors.T, weights=rest)
    assert defended.weights == pytest.approx(expected, rel=1e-6, abs=1e-12)
    sums = torch.tensor(defended.weights, dtype=torch.float64) @ vectors[:-1]
    assert float(sums.norm()) <= scale * (1 + 1e-9)


def test_with_equal_weights_fltrust_is_that_of_the_paper() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.1], [0.6, 0.8]], dtype=torch.float64)
    defended = fltrust(vectors @ vectors.T, weights=[1 / 3] * 3)
    # trust 0.6, 0.8 and 0; both are brought to length 1 and averaged with that trust
    assert defended.weights == pytest.approx((0.6 / 1.4, 0.8 / 1.4 / 2, 0.0), rel=1e-12)


def test_krum_with_one_selected_takes_the_middle_of_the_crowd() -> None:
    points = torch.tensor([[0.0], [1.0], [2.0], [2.5], [50.2], [-90.0], [3.5]], dtype=torch.float64)
    defended = multi_krum(points @ points.T, weights=[1 / 7] * 7, attackers=2, selected=1)
    assert defended.weights == pytest.approx((0, 0, 1, 0, 0, 0, 0))
    assert defended.reasons[4] == "Krum score 6779 is number 6 of 7 and 1 are kept"
    assert defended.reasons[2] == ""


def test_the_bound_follows_the_lower_median() -> None:
    for sizes, expected in [([1.0, 2.0, 9.0], 2.0), ([1.0, 2.0, 9e9, 9e9], 2.0), ([5.0], 5.0), ([0.0, 0.0], 0.0)]:
        gram = torch.tensor(sizes, dtype=torch.float64).square().diag()
        assert median_bound(gram, factor=3.0) == pytest.approx(3 * expected)
    for factor in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite factor above 0"):
            median_bound(torch.eye(2, dtype=torch.float64), factor=factor)


def test_a_bound_of_zero_quarantines_all_that_change_something() -> None:
    gram = torch.tensor([0.0, 4.0], dtype=torch.float64).diag()
    defended = norm_bounding(gram, weights=[0.5, 0.5], bound=0.0)
    assert defended.weights == (0.5, 0.0)
    assert defended.reasons == ("", "norm 2 is above the bound 0: scaled by 0")


# honest cohorts


@each_defence
def test_an_honest_cohort_is_nearly_untouched(defence: Defence) -> None:
    honest = make_cohort(HONEST_RANKS)
    defended = defence(gram_of(honest), WEIGHTS)
    plain = aggregated(honest, WEIGHTS)
    assert math.fsum(defended.weights) == pytest.approx(1.0)
    assert float((aggregated(honest, defended.weights) - plain).norm()) < 0.1 * float(plain.norm())


def test_an_honest_cohort_is_untouched_where_nothing_is_assumed() -> None:
    gram = gram_of(make_cohort(HONEST_RANKS))
    untouched = Defended(weights=tuple(WEIGHTS), reasons=("",) * 8)
    assert bounded(gram, WEIGHTS) == untouched
    for defended in (
        multi_krum(gram, weights=WEIGHTS, attackers=0, selected=8),
        trimmed_mean(gram, weights=WEIGHTS, trimmed=0),
    ):
        assert defended.weights == pytest.approx(WEIGHTS, rel=1e-12)
        assert defended.reasons == untouched.reasons


def test_an_honest_cohort_is_trusted_by_the_server() -> None:
    *honest, root = make_cohort((*HONEST_RANKS, 2))
    defended = fltrust(gram_of([*honest, root]), weights=WEIGHTS)
    assert defended.quarantined == ()
    plain = aggregated(honest, WEIGHTS)
    assert float((aggregated(honest, defended.weights) - plain).norm()) < 0.15 * float(plain.norm())


@each_defence
def test_equal_updates_keep_their_mean(defence: Defence) -> None:
    update = make_cohort((3,))[0]
    defended = defence(gram_of([update] * 7), [1 / 7] * 7)
    assert math.fsum(defended.weights) == pytest.approx(1.0)
    assert_close(aggregated([update] * 7, defended.weights), flatten(update), rtol=1e-5, atol=1e-6)
    if defence in {bounded, median}:
        assert defended.weights == pytest.approx([1 / 7] * 7)
        assert not any(defended.reasons)


# what all have in common


def fltrust_with_last(gram: Tensor, weights: Sequence[float]) -> Defended:
    return fltrust(
        torch.cat([torch.cat([gram, gram[:, :1]], 1), torch.cat([gram[:1], gram[:1, :1]], 1)]), weights=weights
    )


EVERY = {**DEFENCES, "fltrust": fltrust_with_last}
every_defence = pytest.mark.parametrize("defence", EVERY.values(), ids=EVERY)


@every_defence
@given(cohort=clients())
@settings(deadline=None, max_examples=30)
def test_a_reason_is_given_exactly_where_the_weight_is_lowered(
    defence: Defence, cohort: tuple[Tensor, list[float]]
) -> None:
    vectors, weights = cohort
    gram = vectors @ vectors.T
    before = gram.clone()
    defended = defence(gram, weights)
    assert torch.equal(gram, before)
    for old, new, reason in zip(weights, defended.weights, defended.reasons, strict=True):
        assert new >= 0.0
        assert bool(reason) == (new < old * (1 - 1e-9))


@every_defence
@given(cohort=clients(), factor=st.floats(0.01, 100))
@settings(deadline=None, max_examples=20)
def test_weights_need_not_sum_to_one(defence: Defence, cohort: tuple[Tensor, list[float]], factor: float) -> None:
    vectors, weights = cohort
    one = defence(vectors @ vectors.T, weights).weights
    other = defence(vectors @ vectors.T, [factor * weight for weight in weights]).weights
    assert other == pytest.approx([factor * weight for weight in one], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("defence", DEFENCES.values(), ids=DEFENCES)
@given(cohort=clients(), shuffler=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_the_order_of_clients_does_not_matter(
    defence: Defence, cohort: tuple[Tensor, list[float]], shuffler: Random
) -> None:
    vectors, weights = cohort
    order = list(range(len(weights)))
    shuffler.shuffle(order)
    defended = defence(vectors @ vectors.T, weights)
    other = defence(vectors[order] @ vectors[order].T, [weights[k] for k in order])
    assert other.weights == pytest.approx([defended.weights[k] for k in order], rel=1e-6, abs=1e-9)
    assert [bool(reason) for reason in other.reasons] == [bool(defended.reasons[k]) for k in order]


@every_defence
def test_how_a_change_is_split_into_factors_does_not_matter(defence: Defence) -> None:
    case, gen = scaled(20.0), random(5)
    others = [
        replace(update, layers={name: _refactored(f, gen) for name, f in update.layers.items()})
        for update in case.updates
    ]
    one, other = defence(gram_of(case.updates), case.weights), defence(gram_of(others), case.weights)
    assert other.weights == pytest.approx(one.weights, rel=1e-6)
    assert [bool(reason) for reason in other.reasons] == [bool(reason) for reason in one.reasons]


def _refactored(factors: LoraFactors, gen: torch.Generator) -> LoraFactors:
    mix = torch.eye(factors.rank, dtype=torch.float64)
    mix += torch.rand(factors.rank, factors.rank, generator=gen, dtype=torch.float64) / factors.rank
    return LoraFactors(a=torch.linalg.inv(1e3 * mix) @ factors.a, b=factors.b @ mix, scale=1e3 * factors.scale)


@each_defence
def test_all_zero_updates_change_nothing_and_break_nothing(defence: Defence) -> None:
    zero = AdapterWeights(layers={"q": LoraFactors(a=torch.ones(2, 12), b=torch.zeros(8, 2))}, heads=HEADS)
    updates = [zero] * 7
    defended = defence(gram_of(updates), [1 / 7] * 7)
    assert math.fsum(defended.weights) == pytest.approx(1.0)
    assert float(aggregated(updates, defended.weights).norm()) == 0.0


def test_fltrust_trusts_no_client_that_changes_nothing() -> None:
    gram = torch.diag(torch.tensor([0.0, 0.0, 4.0], dtype=torch.float64))
    defended = fltrust(gram, weights=[0.5, 0.5])
    assert defended.quarantined == (0, 1)
    assert defended.reasons[0] == "it changes nothing, so it has no direction that could be trusted"


def test_fltrust_does_not_take_rounding_for_trust() -> None:
    """Orthogonal updates have a cosine of about 1e-17, of which a mean would be made by division."""
    gram = torch.tensor([[1.0, 0.0, 1e-17], [0.0, 1.0, 2e-17], [1e-17, 2e-17, 1.0]], dtype=torch.float64)
    assert fltrust(gram, weights=[0.5, 0.5]).quarantined == (0, 1)


def test_one_client() -> None:
    gram = torch.tensor([[4.0]], dtype=torch.float64)
    alone = Defended(weights=(1.0,), reasons=("",))
    assert bounded(gram, [1.0]) == alone
    assert median(gram, [1.0]) == alone
    assert trimmed_mean(gram, weights=[1.0], trimmed=0) == alone
    assert fltrust(torch.full((2, 2), 4.0, dtype=torch.float64), weights=[1.0]) == alone


def test_too_few_clients_are_named() -> None:
    gram = torch.eye(6, dtype=torch.float64)
    with pytest.raises(ValueError, match="Krum needs at least 7 clients to withstand 2 attackers, got 6"):
        multi_krum(gram, weights=[1.0] * 6, attackers=2, selected=1)
    assert multi_krum(torch.eye(7, dtype=torch.float64), weights=[1.0] * 7, attackers=2, selected=1).quarantined
    with pytest.raises(ValueError, match="Krum needs at least 3 clients to withstand 0 attackers, got 2"):
        multi_krum(gram[:2, :2], weights=[1.0] * 2, attackers=0, selected=1)
    with pytest.raises(ValueError, match="a mean trimmed by 3 needs at least 7 clients, got 6"):
        trimmed_mean(gram, weights=[1.0] * 6, trimmed=3)
    assert len(trimmed_mean(gram[:5, :5], weights=[1.0] * 5, trimmed=2).quarantined) == 2


def test_settings_out_of_range_are_named() -> None:
    gram, weights = torch.eye(5, dtype=torch.float64), [0.2] * 5
    with pytest.raises(ValueError, match="attackers of at least 0, got -1"):
        multi_krum(gram, weights=weights, attackers=-1, selected=1)
    for selected in (0, 5):
        with pytest.raises(ValueError, match=rf"selected from 1 to 4 \(all but attackers\), got {selected}"):
            multi_krum(gram, weights=weights, attackers=1, selected=selected)
    with pytest.raises(ValueError, match="at least 0 clients, got -1"):
        trimmed_mean(gram, weights=weights, trimmed=-1)
    for bound in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite bound that is not negative"):
            norm_bounding(gram, weights=weights, bound=bound)
    with pytest.raises(ValueError, match="changes something, its norm is 0"):
        fltrust(torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)), weights=[1.0])


@each_defence
def test_weights_and_gram_matrices_that_are_none_are_refused(defence: Defence) -> None:
    gram = torch.eye(7, dtype=torch.float64)
    with pytest.raises(ValueError, match="at least one client, got none"):
        defence(torch.zeros(0, 0, dtype=torch.float64), [])
    with pytest.raises(ValueError, match=r"7 weights need a Gram matrix of \(7, 7\), got \(8, 8\)"):
        multi_krum(torch.eye(8, dtype=torch.float64), weights=[1.0] * 7, attackers=0, selected=1)
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="expected finite weights above 0"):
            defence(gram, [weight, *[0.1] * 6])
    for value in (math.nan, math.inf):
        poisoned = gram.clone()
        poisoned[2, 3] = value
        with pytest.raises(ValueError, match="Gram matrix that is finite"):
            defence(poisoned, [0.1] * 7)


def test_fltrust_counts_one_row_more() -> None:
    with pytest.raises(ValueError, match=r"7 weights need a Gram matrix of \(8, 8\), got \(7, 7\)"):
        fltrust(torch.eye(7, dtype=torch.float64), weights=[1.0] * 7)


def test_nobody_is_dropped_in_silence() -> None:
    with pytest.raises(ValueError, match="client 1 would be dropped without a reason"):
        Defended(weights=(1.0, 0.0), reasons=("", ""))
    with pytest.raises(ValueError, match="got 2 weights but 1 reasons"):
        Defended(weights=(1.0, 0.0), reasons=("",))
    for weight in (-0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="for client 0"):
            Defended(weights=(weight,), reasons=("x",))
