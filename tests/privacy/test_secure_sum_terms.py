"""Terms that cannot be kept are refused when they are made; what follows from the others is what is promised."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.privacy.secure_sum_in_memory import again, terms

from pomona.errors import ConfigError
from pomona.privacy.accounting import Event, epsilon
from pomona.privacy.secure_sum.terms import Terms, effective_noise_multiplier


@st.composite
def kept(draw: st.DrawFn) -> Terms:
    clients = draw(st.integers(3, 512))
    colluding = draw(st.integers(0, clients // 2 - 1))
    threshold = draw(st.integers((clients + colluding) // 2 + 1, clients))
    return terms(
        clients,
        colluding=colluding,
        threshold=threshold,
        least_survivors=draw(st.integers(threshold, clients)),
        dimensions=draw(st.integers(1, 10**6)),
        clip=draw(st.floats(0.5, 4)),
        noise_multiplier=draw(st.floats(0.5, 8)),
        fraction_bits=draw(st.integers(14, 20)),
    )


@given(kept())
def test_the_honest_shares_of_the_fewest_survivors_have_the_variance_that_is_promised(made: Terms) -> None:
    promised = (Fraction(made.noise_multiplier) * Fraction(made.clip) * 2**made.fraction_bits) ** 2
    honest = made.least_survivors - made.colluding
    assert promised <= honest * made.share_variance < promised + honest


@given(kept())
def test_no_sum_leaves_the_modulus(made: Terms) -> None:
    largest = made.clients * made.clip * 2**made.fraction_bits
    room = 2.0 ** (made.modulus_bits - 1) - largest
    assert room > 9 * math.sqrt(made.clients * made.share_variance)
    if made.modulus_bits == 64:  # no wider than it takes
        assert largest + 15 * math.sqrt(made.clients * made.share_variance) > 2.0**31


@given(kept())
def test_the_bound_before_rounding_leaves_room_for_it(made: Terms) -> None:
    half_a_step = 0.5 * 2.0**-made.fraction_bits
    assert made.clip / 2 <= made.rounded_clip < made.clip
    assert made.rounded_clip + math.sqrt(made.dimensions) * half_a_step == pytest.approx(made.clip, rel=1e-12)


@given(kept())
def test_the_account_is_for_what_was_asked(made: Terms) -> None:
    """Shares of at least 2 units make a sum that costs what one Gaussian does, to nine digits."""
    assert effective_noise_multiplier(made) == pytest.approx(made.noise_multiplier, rel=1e-3)
    assert effective_noise_multiplier(made) >= made.noise_multiplier * (1 - 1e-9)


def test_the_bound_of_a_sum_of_narrow_shares_is_the_papers() -> None:
    """Two honest shares of variance 4 in 1000 numbers: both terms of the bound, written out."""
    made = terms(
        2, dimensions=4, clip=4.0, noise_multiplier=math.sqrt(8) / 4 * (1 - 1e-12), fraction_bits=0, least_survivors=2
    )
    assert made.share_variance == 4
    tau = 10 * math.exp(-2 * math.pi**2 * 4 / 2)
    assert effective_noise_multiplier(made) == pytest.approx(1 / (4 / math.sqrt(8) + tau * 2), rel=1e-14)


def test_the_renyi_account_takes_the_multiplier() -> None:
    made = terms(20, noise_multiplier=2.0)
    cost = epsilon(
        [Event(noise_multiplier=effective_noise_multiplier(made), sample_rate=1.0, count=10)],
        delta=1e-5,
        accountant="rdp",
    )
    plain = epsilon([Event(noise_multiplier=2.0, sample_rate=1.0, count=10)], delta=1e-5, accountant="rdp")
    assert cost == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"threshold": 2}, "lies about who survived"),
        ({"threshold": 3, "colluding": 2}, "lies about who survived"),
        ({"threshold": 4, "least_survivors": 3}, "threshold <= least_survivors <= clients"),
        ({"least_survivors": 5}, "threshold <= least_survivors <= clients"),
        ({"threshold": 4, "least_survivors": 4, "colluding": 3}, "hides none"),
        ({"fraction_bits": 1, "noise_multiplier": 50.0, "dimensions": 100}, "more than half of clip"),
        ({"fraction_bits": 1}, "raise fraction_bits"),
        ({"fraction_bits": 30}, "lower fraction_bits"),
        ({"fraction_bits": 52, "clip": 1000.0, "noise_multiplier": 1e-12}, "lower fraction_bits"),
    ],
)
def test_what_cannot_be_kept_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        terms(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"clip": math.nan},
        {"clip": math.inf},
        {"clip": 0.0},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"dimensions": 0},
        {"clients": 513},
        {"colluding": -1},
        {"fraction_bits": 53},
        {"threshold": True},
        {"round_id": "a\nb"},
        {"more": 1},
    ],
)
def test_what_is_no_number_of_its_kind_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        terms(**changes)


def test_terms_travel() -> None:
    made = terms(7, clip=0.3)
    assert again(made) == made
    assert again(made).share_variance == made.share_variance
