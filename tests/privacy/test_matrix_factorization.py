"""Correlated noise has the covariance it claims, hides as much as it claims, and leaves less error for the same."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy import stats
from scipy.optimize import minimize
from torch import Tensor

from pomona.errors import ConfigError
from pomona.privacy.accounting import epsilon, gaussian_epsilon
from pomona.privacy.audit import Audit, audit
from pomona.privacy.clipping import clip
from pomona.privacy.matrix_factorization import (
    BandedFactorization,
    CorrelatedNoise,
    eligible,
    epsilon_of,
    event_of,
    expected_error,
    factorize,
    noise_for_factorization,
)
from pomona.privacy.randomness import SecureRandom

KEY = bytes(range(32))
UNLIKELY = 1e-4

Matrix = NDArray[np.float64]
ROUNDS = st.integers(1, 24)
BANDS = st.integers(1, 30)


def dense(factorization: BandedFactorization) -> Matrix:
    """``C`` by its definition: a Toeplitz matrix, its columns divided by their norms."""
    size = factorization.rounds
    matrix = np.zeros((size, size))
    for row, column in itertools.product(range(size), repeat=2):
        if 0 <= row - column < len(factorization.coefficients):
            matrix[row, column] = factorization.coefficients[row - column]
    return np.asarray(matrix / np.linalg.norm(matrix, axis=0))


def workload(factorization: BandedFactorization) -> Matrix:
    """``A``: the server's weights after each round, from what came out of the rounds."""
    size, weights, momentum = factorization.rounds, np.zeros(factorization.rounds), np.zeros(factorization.rounds)
    rows = []
    for number in range(size):
        momentum = factorization.momentum * momentum + np.eye(size)[number]
        weights = weights + momentum
        rows.append(weights)
    return np.array(rows)


def root_mean_square(matrix: Matrix) -> float:
    return float(np.linalg.norm(matrix)) / math.sqrt(len(matrix))


def drawn(factorization: BandedFactorization, size: int, *, key: bytes = KEY, first_round: int = 1) -> Matrix:
    """The noise of all rounds, ``(T, size)``, over two tensors."""
    shapes = {"b": (size - size // 3,), "a": (size // 3, 1)}
    noise = CorrelatedNoise(factorization, shapes, noise=SecureRandom(key), first_round=first_round)
    rows = [noise.draw(number) for number in range(first_round, factorization.rounds + 1)]
    return np.array([np.concatenate([row["a"].reshape(-1).numpy(), row["b"].numpy()]) for row in rows])


def patterns(rounds: int, *, apart: int, most: int) -> Iterator[tuple[int, ...]]:
    """All sets of rounds, from 0 on, in which a client may take part."""
    for count in range(1, most + 1):
        for chosen in itertools.combinations(range(rounds), count):
            if all(later - earlier >= apart for earlier, later in itertools.pairwise(chosen)):
                yield chosen


def sensitivity(matrix: Matrix, *, apart: int, most: int) -> float:
    """How far a client moves ``C X``: the worst rounds, each contribution of norm 1 and of the worst sign."""
    return max(
        float(np.linalg.norm(matrix[:, list(chosen)] @ np.array(signs)))
        for chosen in patterns(len(matrix), apart=apart, most=most)
        for signs in itertools.product((1.0, -1.0), repeat=len(chosen))
    )


@settings(max_examples=50, deadline=None)
@given(ROUNDS, BANDS, st.sampled_from([0.0, 0.9]))
def test_the_matrix_has_its_bands_and_columns_of_norm_one(rounds: int, bands: int, momentum: float) -> None:
    factorization = factorize(rounds, bands=bands, momentum=momentum)
    matrix = np.zeros((rounds, rounds))
    for number in range(1, rounds + 1):
        row = factorization.row(number)
        assert len(row) <= min(bands, number)
        matrix[number - 1, number - len(row) : number] = row[::-1]
    np.testing.assert_allclose(matrix, dense(factorization), rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=0), 1.0, rtol=1e-12)


def test_a_factorization_is_the_same_every_time_and_survives_json() -> None:
    made = factorize(200, bands=20)
    assert made == factorize(200, bands=20)
    assert BandedFactorization.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("rounds", "bands"), [(12, 3), (12, 12), (40, 7)])
def test_no_coefficient_near_the_ones_found_has_less_error(rounds: int, bands: int, momentum: float) -> None:
    found = factorize(rounds, bands=bands, momentum=momentum)

    def error(coefficients: tuple[float, ...]) -> float:
        toeplitz = sum(each * np.eye(rounds, k=-place) for place, each in enumerate(coefficients))
        return float(np.linalg.norm(workload(found) @ np.linalg.inv(toeplitz)) * np.linalg.norm(coefficients))

    least = error(found.coefficients)
    for place, step in itertools.product(range(1, bands), (-0.03, 0.03)):
        others = list(found.coefficients)
        others[place] += step
        assert error(tuple(others)) > least


@pytest.mark.parametrize(("rounds", "bands"), [(8, 2), (16, 4), (16, 16), (24, 5)])
def test_hardly_any_error_is_lost_to_the_best_matrix_of_those_bands(rounds: int, bands: int) -> None:
    """Of all banded matrices, found by gradient descent on every entry."""
    found = factorize(rounds, bands=bands)
    mask = torch.from_numpy(np.tri(rounds) - np.tri(rounds, k=-bands))
    sums = torch.from_numpy(workload(found))

    def loss(flat: Matrix) -> tuple[float, Matrix]:
        entries = torch.from_numpy(flat).reshape(rounds, rounds).requires_grad_()
        matrix = entries * mask
        inverse = torch.linalg.inv(matrix / matrix.norm(dim=0))
        error = (sums @ inverse).square().sum()
        error.backward()
        assert entries.grad is not None
        return float(error.detach()), entries.grad.numpy().reshape(-1)

    best = minimize(loss, dense(found).reshape(-1), jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    ours, _ = loss(dense(found).reshape(-1))
    assert 1.0 <= math.sqrt(ours / best.fun) < 1.02


def test_the_square_root_cut_to_few_bands_would_leave_more_error() -> None:
    """Why coefficients are searched for."""
    found = factorize(2000, bands=50)
    numbers = np.arange(1, 50)
    root = (1.0, *np.cumprod((2 * numbers - 1) / (2 * numbers)).tolist())
    cut = found.model_copy(update={"coefficients": root})
    ours, theirs = (expected_error(each, noise_multiplier=1.0).correlated for each in (found, cut))
    assert ours < 0.88 * theirs


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"bands": 0}, {"momentum": 1.0}, {"momentum": -0.1}])
def test_sizes_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    facts = {"rounds": 8, "bands": 2, "momentum": 0.0} | wrong
    with pytest.raises(ConfigError, match="expected"):
        factorize(int(facts["rounds"]), bands=int(facts["bands"]), momentum=facts["momentum"])


@pytest.mark.parametrize("coefficients", [(), (1.0,), (1.0, 0.5, 0.3), (0.0, 1.0), (1.0, math.nan)])
def test_coefficients_that_do_not_fit_are_refused(coefficients: tuple[float, ...]) -> None:
    """One more than there are bands would break the promise."""
    with pytest.raises(ValidationError):
        BandedFactorization(rounds=8, bands=2, coefficients=coefficients)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("rounds", "bands"), [(1, 1), (3, 5), (6, 1), (7, 2), (8, 3), (9, 3), (8, 8)])
def test_the_worst_of_all_participations_moves_as_much_as_is_claimed(rounds: int, bands: int, momentum: float) -> None:
    found = factorize(rounds, bands=bands, momentum=momentum)
    worst = sensitivity(dense(found), apart=bands, most=rounds)
    assert worst == pytest.approx(math.sqrt(found.participations), rel=1e-12)


@pytest.mark.parametrize("apart", [1, 2])
def test_rounds_nearer_than_the_bands_would_break_the_claim(apart: int) -> None:
    """Columns overlap, and a client adds up under the noise of one: as often as before, but not as far apart."""
    found = factorize(9, bands=3)
    worst = sensitivity(dense(found), apart=apart, most=found.participations)
    assert worst > 1.15 * math.sqrt(found.participations)
    assert gaussian_epsilon(worst, 1e-5) > 1.2 * gaussian_epsilon(math.sqrt(found.participations), 1e-5)


def test_without_dividing_columns_the_noise_would_be_too_small() -> None:
    found = factorize(8, bands=3)
    toeplitz = sum(each * np.eye(8, k=-place) for place, each in enumerate(found.coefficients))
    assert sensitivity(np.asarray(toeplitz), apart=3, most=8) > 1.1 * math.sqrt(found.participations)


@settings(max_examples=50, deadline=None)
@given(st.data(), ROUNDS, BANDS, st.integers(1, 4))
def test_contributions_in_any_directions_move_no_further(
    data: st.DataObject, rounds: int, bands: int, dimensions: int
) -> None:
    found = factorize(rounds, bands=bands)
    seed, first = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.integers(0, rounds - 1))
    gaps = data.draw(st.lists(st.integers(bands, 2 * bands), max_size=rounds))
    chosen = [number for number in itertools.accumulate(gaps, initial=first) if number < rounds]
    rows = np.random.default_rng(seed).normal(size=(len(chosen), dimensions))
    update = np.zeros((rounds, dimensions))
    update[chosen] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    assert np.linalg.norm(dense(found) @ update) <= math.sqrt(found.participations) * (1 + 1e-12)


@pytest.mark.parametrize("died_after", [1, 4, 8])
def test_going_on_with_an_empty_memory_costs_nothing_more(died_after: int) -> None:
    """The matrix falls apart into two blocks; a client keeps its distance over the break."""
    found = factorize(9, bands=3)
    matrix = dense(found)
    matrix[died_after:, :died_after] = 0.0
    assert sensitivity(matrix, apart=3, most=9) <= math.sqrt(found.participations) * (1 + 1e-12)


@settings(max_examples=50, deadline=None)
@given(ROUNDS, BANDS, st.sampled_from([0.0, 0.5]))
def test_noise_in_a_stream_is_the_solution_of_the_whole_system(rounds: int, bands: int, momentum: float) -> None:
    found = factorize(rounds, bands=bands, momentum=momentum)
    source = SecureRandom(KEY)
    independent = np.array([source.normal(7) for _ in range(rounds)])
    expected = np.linalg.solve(dense(found), independent)
    np.testing.assert_allclose(drawn(found, 7), expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.data(), ROUNDS, BANDS)
def test_after_a_crash_noise_solves_the_block_that_is_left(data: st.DataObject, rounds: int, bands: int) -> None:
    found = factorize(rounds, bands=bands)
    first = data.draw(st.integers(1, rounds))
    source = SecureRandom(KEY)
    independent = np.array([source.normal(7) for _ in range(first, rounds + 1)])
    expected = np.linalg.solve(dense(found)[first - 1 :, first - 1 :], independent)
    np.testing.assert_allclose(drawn(found, 7, first_round=first), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("rounds", "bands"), [(1, 1), (1, 4), (5, 1)])
def test_a_single_band_or_round_is_plain_gaussian_noise(rounds: int, bands: int) -> None:
    source = SecureRandom(KEY)
    expected = np.array([source.normal(7) for _ in range(rounds)])
    assert np.array_equal(drawn(factorize(rounds, bands=bands), 7), expected)


def whitened(noise: Matrix, matrix: Matrix) -> tuple[float, float]:
    """How unlikely noise is if its covariance is ``(C^T C)^-1``: the largest deviation in its own errors, and a p."""
    white = matrix @ noise
    size = white.shape[1]
    error = np.sqrt((1.0 + np.eye(len(matrix))) / size)
    deviation = np.abs(white @ white.T / size - np.eye(len(matrix))) / error
    return float(deviation.max()), float(stats.kstest(white.reshape(-1), "norm").pvalue)


@pytest.mark.parametrize(("rounds", "bands"), [(6, 3), (5, 8), (4, 1)])
def test_the_noise_has_the_covariance_that_is_claimed(rounds: int, bands: int) -> None:
    found = factorize(rounds, bands=bands)
    deviation, p = whitened(drawn(found, 20_000), dense(found))
    assert deviation < 4.5
    assert p > UNLIKELY


@pytest.mark.parametrize("factor", [2 / 3, 3 / 2])
def test_noise_of_another_scale_would_be_noticed(factor: float) -> None:
    found = factorize(6, bands=3)
    deviation, p = whitened(factor * drawn(found, 20_000), dense(found))
    assert deviation > 4.5
    assert p < UNLIKELY


def test_noise_that_takes_nothing_back_or_forgets_too_soon_would_be_noticed() -> None:
    found, shorter = factorize(6, bands=3), factorize(6, bands=2)
    for noise in (drawn(factorize(6, bands=1), 20_000), drawn(shorter, 20_000)):
        deviation, _ = whitened(noise, dense(found))
        assert deviation > 4.5


def test_tensors_have_noise_of_their_own_in_their_shapes() -> None:
    noise = CorrelatedNoise(factorize(4, bands=2), {"b": (40, 100), "a": (4000,)}, noise=SecureRandom(KEY))
    row = noise.draw(1)
    assert {name: tuple(each.shape) for name, each in row.items()} == {"a": (4000,), "b": (40, 100)}
    assert {each.dtype for each in row.values()} == {torch.float64}
    assert abs(np.corrcoef(row["a"].numpy(), row["b"].reshape(-1).numpy())[0, 1]) < 4 / math.sqrt(4000)


def test_what_was_drawn_can_be_changed_without_changing_what_is_remembered() -> None:
    found = factorize(3, bands=3)
    noise = CorrelatedNoise(found, {"a": (5,)}, noise=SecureRandom(KEY))
    for number in range(1, 3):
        noise.draw(number)["a"].zero_()
    source = SecureRandom(KEY)
    expected = np.linalg.solve(dense(found), np.array([source.normal(5) for _ in range(3)]))
    np.testing.assert_allclose(noise.draw(3)["a"].numpy(), expected[2], rtol=1e-9)


def test_a_round_has_its_noise_once_and_in_order() -> None:
    """Two draws for one sum average out; rounds left out would bring a client's columns together."""
    noise = CorrelatedNoise(factorize(3, bands=2), {"a": (5,)}, noise=SecureRandom())
    noise.draw(1)
    for wrong in (1, 3):
        with pytest.raises(ValueError, match="expected round 2"):
            noise.draw(wrong)
    noise.draw(2)
    noise.draw(3)
    with pytest.raises(ValueError, match="round from 1 to 3"):
        noise.draw(4)


@pytest.mark.parametrize("first", [0, 4])
def test_a_first_round_that_there_is_not_is_refused(first: int) -> None:
    with pytest.raises(ValueError, match="round from 1 to 3"):
        CorrelatedNoise(factorize(3, bands=2), {"a": (5,)}, noise=SecureRandom(), first_round=first)


def test_no_two_runs_have_the_same_noise() -> None:
    found = factorize(3, bands=2)
    first, second = (CorrelatedNoise(found, {"a": (5,)}, noise=SecureRandom()).draw(1)["a"] for _ in range(2))
    assert not torch.equal(first, second)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), BANDS, st.integers(0, 2**63 - 1), st.sets(st.text(max_size=8), min_size=1, max_size=20))
def test_the_schedule_keeps_its_distance(rounds: int, bands: int, seed: int, clients: set[str]) -> None:
    history = {number: eligible(clients, number, bands=bands, seed=seed) for number in range(1, rounds + 1)}
    found = BandedFactorization(rounds=rounds, bands=bands, coefficients=(1.0,) * min(rounds, bands))
    for client in clients:
        rounds_of = [number for number, asked in history.items() if client in asked]
        assert all(later - earlier == bands for earlier, later in itertools.pairwise(rounds_of))
    often = Counter(itertools.chain.from_iterable(history.values()))
    assert all(rounds // bands <= often[client] <= found.participations for client in clients)


@settings(max_examples=50, deadline=None)
@given(st.sets(st.text(max_size=8), max_size=20), st.text(max_size=8), st.integers(1, 50))
def test_who_else_is_there_moves_nobody(clients: set[str], another: str, number: int) -> None:
    """Otherwise one client more would change everybody's rounds, and no bound on one client's share would hold."""
    without = eligible(clients - {another}, number, bands=5, seed=3)
    assert [each for each in eligible(clients | {another}, number, bands=5, seed=3) if each != another] == without


def test_rounds_share_the_clients_about_evenly_and_seeds_shuffle_them() -> None:
    clients = [f"client-{number}" for number in range(5000)]
    sizes = [len(eligible(clients, number, bands=10, seed=0)) for number in range(1, 11)]
    assert sum(sizes) == 5000
    assert stats.chisquare(sizes).pvalue > UNLIKELY
    assert eligible(clients, 1, bands=10, seed=0) != eligible(clients, 1, bands=10, seed=1)


@pytest.mark.parametrize(("rounds", "bands", "sigma"), [(1, 1, 2.0), (10, 3, 4.0), (40, 4, 6.0), (5, 9, 1.0)])
def test_the_cost_is_that_of_one_gaussian_release(rounds: int, bands: int, sigma: float) -> None:
    found = factorize(rounds, bands=bands)
    ours = epsilon_of(found, noise_multiplier=sigma, delta=1e-5)
    assert ours == gaussian_epsilon(math.sqrt(found.participations) / sigma, 1e-5)
    whole, pieces = PLDAccountant(), PLDAccountant()
    whole.compose(GaussianDpEvent(sigma / math.sqrt(found.participations)))
    pieces.compose(SelfComposedDpEvent(GaussianDpEvent(sigma), found.participations))
    assert ours == pytest.approx(whole.get_epsilon(1e-5), abs=2e-3)
    assert ours == pytest.approx(pieces.get_epsilon(1e-5), abs=5e-3)


def test_a_second_release_after_a_crash_adds_up() -> None:
    """Other bands for the rounds that are left: ``mu^2 = 4 / 3^2 + 2 / 4^2``."""
    events = [
        event_of(factorize(20, bands=5), noise_multiplier=3.0),
        event_of(factorize(8, bands=4), noise_multiplier=4),
    ]
    assert epsilon(events, delta=1e-6) == pytest.approx(gaussian_epsilon(math.sqrt(4 / 9 + 2 / 16), 1e-6), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.2, 10.0), st.sampled_from([1e-8, 1e-5]), st.integers(1, 200), BANDS)
def test_the_noise_for_a_target_is_enough_and_hardly_more(target: float, delta: float, rounds: int, bands: int) -> None:
    found = factorize(rounds, bands=bands)
    sigma = noise_for_factorization(found, target, delta=delta)
    assert epsilon_of(found, noise_multiplier=sigma, delta=delta) <= target
    assert epsilon_of(found, noise_multiplier=0.998 * sigma, delta=delta) > target


@settings(max_examples=50, deadline=None)
@given(ROUNDS, BANDS, st.sampled_from([0.0, 0.9]))
def test_the_expected_error_is_that_of_the_matrices(rounds: int, bands: int, momentum: float) -> None:
    found = factorize(rounds, bands=bands, momentum=momentum)
    error = expected_error(found, noise_multiplier=2.0, clip=0.5)
    correlated = root_mean_square(workload(found) @ np.linalg.inv(dense(found)))
    assert error.correlated == pytest.approx(correlated, rel=1e-9)
    assert error.independent == pytest.approx(root_mean_square(workload(found)), rel=1e-9)
    if min(rounds, bands) > 1:
        assert error.correlated < error.independent
    else:
        assert error.correlated == pytest.approx(error.independent)


@pytest.mark.parametrize(("rounds", "bands", "at_most"), [(100, 10, 0.42), (1000, 100, 0.17), (4000, 400, 0.10)])
def test_sums_carry_much_less_noise_for_the_same_epsilon(rounds: int, bands: int, at_most: float) -> None:
    error = expected_error(factorize(rounds, bands=bands), noise_multiplier=1.0)
    assert error.correlated < at_most * error.independent


def test_the_error_that_is_expected_is_the_error_that_comes() -> None:
    found, plain = factorize(30, bands=6), factorize(30, bands=1)
    error = expected_error(found, noise_multiplier=1.0)
    for each, expected in ((found, error.correlated), (plain, error.independent)):
        sums = np.cumsum(drawn(each, 5000), axis=0)
        assert math.sqrt(np.square(sums).mean()) == pytest.approx(expected, rel=0.03)


def test_coefficients_for_the_server_s_momentum_leave_less_error_under_it() -> None:
    meant = factorize(200, bands=20, momentum=0.9)
    other = meant.model_copy(update={"coefficients": factorize(200, bands=20).coefficients})
    ours, theirs = (expected_error(each, noise_multiplier=1.0).correlated for each in (meant, other))
    assert ours < 0.93 * theirs


CANARIES, BOUND, DELTA, SIGMA = 1600, 0.5, 1e-5, 2.0
RUN = factorize(12, bands=3)
NAMES = [f"canary-{number}" for number in range(CANARIES)]

TakesPart = Callable[[int], list[str]]


def scheduled(number: int) -> list[str]:
    return eligible(NAMES, number, bands=RUN.bands, seed=0)


def in_the_first_rounds(number: int) -> list[str]:
    """As often as by the schedule, one round after the other."""
    return NAMES if number <= RUN.participations else []


def attack(*, sigma: float, takes_part: TakesPart = scheduled, claimed: int = RUN.participations) -> Audit:
    """Run all rounds, and look along what each canary would have moved: ``C u`` for the rounds it took part in."""
    cohorts = [frozenset(takes_part(number)) for number in range(1, RUN.rounds + 1)]
    rounds_of = np.array([[name in cohort for name in NAMES] for cohort in cohorts], dtype=np.float64)  # (T, canaries)
    moved = dense(RUN) @ rounds_of
    moved /= np.linalg.norm(moved, axis=0)

    def release(cohort: list[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("t0", "t1"), (CANARIES,))
        noise = CorrelatedNoise(RUN, shapes, noise=SecureRandom(b"n" * 32))
        clipped = [clip(update, BOUND) for update in cohort]
        present = {name: torch.stack([each[name] for each in clipped]).sum(dim=0).numpy() for name in shapes}
        rows: dict[str, list[Matrix]] = {name: [] for name in shapes}
        for number in range(1, RUN.rounds + 1):
            for name, each in noise.draw(number).items():
                rows[name].append(present[name] * rounds_of[number - 1] + sigma * BOUND * each.numpy())
        return {name: torch.from_numpy((moved * (dense(RUN) @ np.array(rows[name]))).sum(axis=0)) for name in shapes}

    return audit(
        release,
        canaries=CANARIES,
        tensors=2,
        noise_multiplier=SIGMA / math.sqrt(claimed),
        delta=DELTA,
        random=SecureRandom(b"a" * 32),
    )


def test_an_attack_on_all_rounds_finds_what_is_claimed() -> None:
    found = attack(sigma=SIGMA)
    assert found.passes()
    assert found.mu == pytest.approx(math.sqrt(RUN.participations) / SIGMA, rel=0.15)
    assert found.epsilon_bound < epsilon_of(RUN, noise_multiplier=SIGMA, delta=DELTA)


def test_noise_sized_for_one_participation_is_caught() -> None:
    found = attack(sigma=SIGMA / math.sqrt(RUN.participations))
    assert not found.passes()
    assert found.mu == pytest.approx(RUN.participations / SIGMA, rel=0.15)


def test_a_claim_for_one_participation_is_caught() -> None:
    assert not attack(sigma=SIGMA, claimed=1).passes()


def test_clients_that_do_not_keep_their_distance_are_caught() -> None:
    found = attack(sigma=SIGMA, takes_part=in_the_first_rounds)
    assert not found.passes()
    assert found.mu > 1.3 * found.claimed_mu
