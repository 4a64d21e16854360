"""Three accounts that know nothing of each other agree: Opacus's, Google's, and closed forms."""

import math

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from pomona.errors import ConfigError
from pomona.privacy.accounting import Accountant, Event, epsilon, gaussian_delta, gaussian_epsilon, noise_for

# noise multiplier, sample rate, releases, delta
SETTINGS = [
    (1.0, 0.01, 500, 1e-5),
    (0.8, 0.005, 1000, 1e-6),
    (2.0, 0.2, 100, 1e-3),
    (4.0, 0.5, 50, 1e-2),
]


def event(noise: float, rate: float, count: int) -> Event:
    return Event(noise_multiplier=noise, sample_rate=rate, count=count)


@pytest.mark.parametrize(("noise", "rate", "count", "delta"), SETTINGS)
def test_two_libraries_agree(noise: float, rate: float, count: int, delta: float) -> None:
    """Opacus states the upper end of its error, 0.01 and what discretising adds."""
    account = PLDAccountant()
    account.compose(SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), count))
    other = account.get_epsilon(delta)
    ours = epsilon([event(noise, rate, count)], delta=delta)
    assert other - 1e-3 <= ours <= other + 0.02


@pytest.mark.parametrize(("noise", "rate", "count", "delta"), SETTINGS)
def test_renyi_states_more(noise: float, rate: float, count: int, delta: float) -> None:
    tight, loose = (epsilon([event(noise, rate, count)], delta=delta, accountant=each) for each in ("prv", "rdp"))
    assert tight < loose < 2 * tight + 0.1


@pytest.mark.parametrize(("mu", "delta", "expected"), [(0.25, 1e-5, 0.9263), (0.5, 1e-5, 1.9931)])
def test_a_gaussian_release_costs_what_is_known(mu: float, delta: float, expected: float) -> None:
    assert gaussian_epsilon(mu, delta) == pytest.approx(expected, abs=1e-4)


@given(st.floats(0.05, 8.0), st.floats(0.0, 20.0))
def test_the_closed_form_is_the_integral(mu: float, at_epsilon: float) -> None:
    """``delta = E_{x ~ N(mu, 1)} [1 - e^(eps - L(x))]_+`` with the privacy loss ``L(x) = mu x - mu^2/2``."""
    start = at_epsilon / mu + mu / 2
    expected, _ = quad(
        lambda x: norm.pdf(x - mu) * -math.expm1(min(0.0, at_epsilon - mu * x + mu**2 / 2)),
        start, max(start, mu) + 12, points=[min(max(start, mu), max(start, mu) + 11)], epsabs=1e-13, limit=200,
    )  # fmt: skip
    assert gaussian_delta(mu, at_epsilon) == pytest.approx(expected, rel=1e-4, abs=1e-10)


@given(st.floats(0.05, 8.0), st.floats(1e-12, 0.4))
def test_the_closed_form_is_inverted(mu: float, delta: float) -> None:
    found = gaussian_epsilon(mu, delta)
    assert gaussian_delta(mu, found) <= delta * (1 + 1e-9)
    if found > 0:
        assert gaussian_delta(mu, found * (1 - 1e-6)) >= delta * (1 - 1e-6)


def test_without_sampling_the_account_is_exact() -> None:
    assert epsilon([event(5.0, 1.0, 25)], delta=1e-5) == pytest.approx(gaussian_epsilon(1.0, 1e-5), rel=1e-9)
    mixed = [event(5.0, 1.0, 9), event(2.5, 1.0, 4)]
    assert epsilon(mixed, delta=1e-5) == pytest.approx(gaussian_epsilon(1.0, 1e-5), rel=1e-9)


def test_claiming_a_sample_that_was_not_drawn_would_understate_the_cost_many_times() -> None:
    """Why the plan couples the sampler with the account."""
    assert epsilon([event(1.0, 1.0, 500)], delta=1e-5) > 100 * epsilon([event(1.0, 0.02, 500)], delta=1e-5)


def test_nothing_costs_nothing() -> None:
    assert epsilon([], delta=1e-5) == 0.0


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_more_releases_cost_more_in_any_order(accountant: Accountant) -> None:
    first, second = event(1.0, 0.01, 100), event(2.0, 0.05, 40)
    both = epsilon([first, second], delta=1e-5, accountant=accountant)
    assert both == pytest.approx(epsilon([second, first], delta=1e-5, accountant=accountant), abs=1e-3)
    assert both > max(epsilon([each], delta=1e-5, accountant=accountant) for each in (first, second))


@settings(max_examples=15, deadline=None)
@given(
    st.floats(0.5, 20.0),
    st.sampled_from([1e-6, 1e-4]),
    st.sampled_from([0.01, 0.1, 1.0]),
    st.sampled_from([1, 20, 300]),
)
def test_the_noise_for_a_target_is_enough_and_hardly_more(target: float, delta: float, rate: float, count: int) -> None:
    noise = noise_for(target, delta=delta, sample_rate=rate, count=count, accountant="rdp")
    assert epsilon([event(noise, rate, count)], delta=delta, accountant="rdp") <= target
    less = epsilon([event(noise * 0.99, rate, count)], delta=delta, accountant="rdp")
    assert less > target or noise < 2e-3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"noise": 0.0}, "noise multiplier above 0"),
        ({"noise": math.nan}, "noise multiplier above 0"),
        ({"rate": 0.0}, "sample rate"),
        ({"rate": 1.5}, "sample rate"),
        ({"count": 0}, "at least one release"),
        ({"delta": 0.0}, "delta between 0 and 1"),
        ({"delta": 1.0}, "delta between 0 and 1"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, float], message: str) -> None:
    facts = {"noise": 1.0, "rate": 0.1, "count": 1, "delta": 1e-5} | wrong
    with pytest.raises(ConfigError, match=message):
        epsilon([event(facts["noise"], facts["rate"], int(facts["count"]))], delta=facts["delta"])


def test_a_target_that_no_noise_reaches_is_refused() -> None:
    with pytest.raises(ConfigError, match="no noise multiplier"):
        noise_for(1e-9, delta=1e-12, sample_rate=1.0, count=10_000)
