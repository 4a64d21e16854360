"""Masks are uniform, nobody guesses them, and those of a pair cancel."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tests.privacy.secure_sum_in_memory import terms

from pomona.errors import PayloadError
from pomona.privacy.secure_sum import keys, masking
from pomona.privacy.secure_sum.terms import Terms

KEY = bytes(range(32))
WIDTHS = {32: 16, 64: 24}  # bits of the words, and a grid that takes them
UNLIKELY = 1e-4

widths = pytest.mark.parametrize("bits", WIDTHS)


def of_width(bits: int, dimensions: int = 8) -> Terms:
    made = terms(512, dimensions=dimensions, fraction_bits=WIDTHS[bits])
    assert made.modulus_bits == bits
    return made


@widths
def test_a_mask_is_the_keystream(bits: int) -> None:
    stream = Cipher(ChaCha20(KEY, bytes(16)), mode=None).encryptor().update(bytes(8 * bits // 8))
    expected = [int.from_bytes(stream[at : at + bits // 8], "little") for at in range(0, len(stream), bits // 8)]
    assert masking.expanded(KEY, of_width(bits)).tolist() == expected


@widths
def test_every_bit_of_a_mask_is_a_fair_coin(bits: int) -> None:
    mask = masking.expanded(KEY, of_width(bits, 20_000))
    for shift in range(0, bits, 8):
        octets = (mask >> np.array(shift, dtype=mask.dtype)) & np.array(255, dtype=mask.dtype)
        assert stats.chisquare(np.bincount(octets.astype(int), minlength=256)).pvalue > UNLIKELY


def test_flowers_generator_would_not_do() -> None:
    """Its seeds of any length are 32 bits, which can be tried out, and the highest value never comes."""
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    seed, other = KEY, KEY[4:] + KEY[:4]  # the words are folded by xor
    assert seed != other
    assert np.array_equal(pseudo_rand_gen(seed, 256, [(50,)])[0], pseudo_rand_gen(other, 256, [(50,)])[0])
    assert pseudo_rand_gen(seed, 4, [(10_000,)])[0].max() == 2
    assert masking.expanded(seed, of_width(32)).tolist() != masking.expanded(other, of_width(32)).tolist()


@widths
@given(st.lists(st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,5}\Z"), min_size=1, max_size=6, unique=True))
@settings(deadline=None, max_examples=25)
def test_what_pairs_share_cancels_in_the_sum(bits: int, clients: list[str]) -> None:
    made = of_width(bits)
    private = {name: keys.private_key() for name in clients}
    total = masking.zeros(made)
    for name in clients:
        shared = (
            (
                peer,
                masking.expanded(
                    keys.mask_key(private[name], keys.public_key(private[peer]), round_id="r", between=(name, peer)),
                    made,
                ),
            )
            for peer in clients
            if peer != name
        )
        total += masking.pairwise(name, shared, made)
    assert not total.any()


@widths
@given(st.lists(st.integers(-(2**31) + 1, 2**31 - 1), min_size=8, max_size=8))
@settings(deadline=None)
def test_masks_come_off_and_negative_numbers_survive(bits: int, values: list[int]) -> None:
    made = of_width(bits)
    own, shared = masking.expanded(KEY, made), masking.expanded(KEY[::-1], made)
    words = masking.masked(np.array(values, dtype=np.int64), own, shared)
    assert masking.signed(words - own - shared).tolist() == values
    assert np.array_equal(masking.words_of(masking.bytes_of(words), made), words)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_vector_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(PayloadError, match="a vector of 32 bytes"):
        masking.words_of(bytes(size), of_width(32))


def test_keys_are_for_one_purpose_round_pair_and_direction() -> None:
    mine, theirs = keys.private_key(), keys.private_key()
    public = keys.public_key(theirs)
    derived = {
        keys.mask_key(mine, public, round_id="r", between=("a", "b")),
        keys.mask_key(mine, public, round_id="s", between=("a", "b")),
        keys.mask_key(mine, public, round_id="r", between=("a", "c")),
        keys.sealing_key(mine, public, round_id="r", sender="a", recipient="b"),
        keys.sealing_key(mine, public, round_id="r", sender="b", recipient="a"),
    }
    assert len(derived) == 5
    both = keys.mask_key(theirs, keys.public_key(mine), round_id="r", between=("b", "a"))
    assert both == keys.mask_key(mine, public, round_id="r", between=("a", "b"))


def test_a_key_that_agrees_with_everybody_is_refused() -> None:
    """With a point of low order the agreed key is zero, whoever agrees: a mask that the server knows."""
    assert keys.is_public_key(keys.public_key(KEY))
    for point in (bytes(32), bytes([1, *bytes(31)])):
        assert not keys.is_public_key(point)
        with pytest.raises(PayloadError, match="agree with everybody"):
            keys.mask_key(keys.private_key(), point, round_id="r", between=("a", "b"))


def test_sealed_texts_open_under_their_key_alone() -> None:
    sealed = keys.seal(KEY, b"shares")
    assert keys.unseal(KEY, sealed) == b"shares"
    for key, text in ((KEY[::-1], sealed), (KEY, sealed[:-1] + bytes([sealed[-1] ^ 1])), (KEY, b"")):
        with pytest.raises(PayloadError, match="does not open"):
            keys.unseal(key, text)
