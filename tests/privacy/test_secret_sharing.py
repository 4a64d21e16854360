"""So many shares tell the secret, whichever they are; one fewer is consistent with every secret."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pomona.errors import PayloadError
from pomona.privacy.secure_sum.secret_sharing import SHARE_BYTES, combine, split

PRIME = 2**521 - 1
SECRET = bytes(range(32))
secret_bytes = st.binary(min_size=32, max_size=32)


@st.composite
def sharings(draw: st.DrawFn) -> tuple[bytes, int, dict[int, bytes]]:
    holders = draw(st.integers(1, 9))
    threshold = draw(st.integers(1, holders))
    secret = draw(st.one_of(secret_bytes, st.sampled_from([bytes(32), b"\xff" * 32])))
    shares = split(secret, threshold=threshold, holders=holders)
    order = draw(st.permutations(range(1, holders + 1)))
    return secret, threshold, {holder: shares[holder - 1] for holder in order}


def through(points: dict[int, int], at: int) -> int:
    """The polynomial of least degree through points, at a place: Lagrange's formula written out."""
    total = 0
    for x, y in points.items():
        term = y
        for other in points.keys() - {x}:
            term = term * (at - other) * pow(x - other, -1, PRIME) % PRIME
        total += term
    return total % PRIME


@given(sharings(), st.data())
@settings(deadline=None)
def test_any_shares_from_the_threshold_on_tell_the_secret(
    sharing: tuple[bytes, int, dict[int, bytes]], data: st.DataObject
) -> None:
    secret, threshold, shares = sharing
    taken = data.draw(st.integers(threshold, len(shares)))
    assert combine(dict(list(shares.items())[:taken])) == secret


@given(sharings(), secret_bytes)
@settings(deadline=None)
def test_one_share_fewer_fits_every_secret(sharing: tuple[bytes, int, dict[int, bytes]], other: bytes) -> None:
    """For any secret there is one last share with which those that are known tell it."""
    _, threshold, shares = sharing
    known = dict(list(shares.items())[: threshold - 1])
    missing = next(holder for holder in shares if holder not in known)
    points = {holder: int.from_bytes(share) for holder, share in known.items()} | {0: int.from_bytes(other)}
    assert combine(known | {missing: through(points, missing).to_bytes(SHARE_BYTES)}) == other


def test_a_share_alone_looks_like_any_number() -> None:
    low = [split(SECRET, threshold=2, holders=2)[0][-1] for _ in range(5000)]
    assert stats.chisquare(np.bincount(low, minlength=256)).pvalue > 1e-6


def test_with_a_threshold_of_one_every_share_is_the_secret() -> None:
    assert all(int.from_bytes(share) == int.from_bytes(SECRET) for share in split(SECRET, threshold=1, holders=3))


@given(sharings(), st.data())
@settings(deadline=None)
def test_a_changed_share_is_not_taken_for_the_secret(
    sharing: tuple[bytes, int, dict[int, bytes]], data: st.DataObject
) -> None:
    secret, _, shares = sharing
    victim = data.draw(st.sampled_from(sorted(shares)))
    changed = (int.from_bytes(shares[victim]) + 1) % PRIME
    try:
        assert combine(shares | {victim: changed.to_bytes(SHARE_BYTES)}) != secret
    except PayloadError as error:
        assert "do not combine" in str(error)  # noqa: PT017 - either will do


@pytest.mark.parametrize("share", [b"", bytes(SHARE_BYTES - 1), PRIME.to_bytes(SHARE_BYTES), b"\xff" * SHARE_BYTES])
def test_what_is_no_share_is_refused(share: bytes) -> None:
    with pytest.raises(PayloadError, match="a share of 66 bytes"):
        combine({1: share})


@pytest.mark.parametrize(("threshold", "holders"), [(0, 3), (4, 3), (-1, 3)])
def test_a_threshold_that_nobody_reaches_is_refused(threshold: int, holders: int) -> None:
    with pytest.raises(ValueError, match="threshold from 1 to 3"):
        split(SECRET, threshold=threshold, holders=holders)


@pytest.mark.parametrize("secret", [b"", bytes(31), bytes(33)])
def test_a_secret_of_another_length_is_refused(secret: bytes) -> None:
    with pytest.raises(ValueError, match="secret of 32 bytes"):
        split(secret, threshold=1, holders=1)
