"""Masks that hide a vector and cancel in the sum, in whole words modulo ``2^32`` or ``2^64``.

Client ``i`` sends ``y_i = x_i + PRG(b_i) + sum_{j > i} PRG(s_ij) - sum_{j < i} PRG(s_ij)`` (Bonawitz et al. 2017,
section 4, double masking). What a pair shares cancels where both sent. The self mask is what protects a client whose
vector comes after the others were asked to uncover the masks it shares with them.

The generator is the ChaCha20 keystream under a key of 256 bits. A simulation's generator would not do: Flower's
``pseudo_rand_gen`` folds its seed into 32 bits for a Mersenne Twister, so that every mask can be found by trying all,
and never draws the highest value of its range.
"""

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from pomona.errors import PayloadError
from pomona.privacy.secure_sum.terms import Terms

Words = NDArray[np.unsignedinteger]

_NONCE = bytes(16)  # of keys that make one mask each


def expanded(key: bytes, terms: Terms) -> Words:
    """Return the mask of a key: words that nobody without the key can tell from uniform ones.

    Args:
        key: 32 bytes, of no other use.
        terms: Of the sum.

    Returns:
        Shape ``(terms.dimensions,)``, of ``terms.modulus_bits``.
    """
    silence = bytes(terms.dimensions * terms.modulus_bits // 8)
    return words_of(Cipher(ChaCha20(key, _NONCE), mode=None).encryptor().update(silence), terms)


def pairwise(name: str, masks: Iterable[tuple[str, Words]], terms: Terms) -> Words:
    """Return what a client adds for those it shares masks with: plus for later names, minus for earlier ones.

    Args:
        name: Of the client.
        masks: Name of the other, and the mask they share; one at a time is held.
        terms: Of the sum.
    """
    total = zeros(terms)
    for peer, mask in masks:
        if name < peer:
            total += mask
        else:
            total -= mask
    return total


def masked(vector: NDArray[np.int64], own: Words, shared: Words) -> Words:
    """Return a vector under its two masks, modulo the words' size."""
    return np.asarray(vector.astype(own.dtype) + own + shared)


def zeros(terms: Terms) -> Words:
    """Return an empty sum."""
    return np.zeros(terms.dimensions, dtype=_dtype(terms))


def signed(words: Words) -> NDArray[np.int64]:
    """Return the integers nearest 0 that are congruent to the words."""
    return words.view(f"i{words.itemsize}").astype(np.int64)


def words_of(payload: bytes, terms: Terms) -> Words:
    """Return the words in bytes, each little-endian.

    Raises:
        PayloadError: They are more or fewer than the sum has.
    """
    expected = terms.dimensions * terms.modulus_bits // 8
    if len(payload) != expected:
        raise PayloadError(f"expected a vector of {expected} bytes, got {len(payload)}")
    return np.frombuffer(payload, dtype=_dtype(terms))


def bytes_of(words: Words) -> bytes:
    """Return words as bytes, each little-endian."""
    return words.astype(words.dtype.newbyteorder("<")).tobytes()


def _dtype(terms: Terms) -> np.dtype[np.unsignedinteger]:
    return np.dtype(f"<u{terms.modulus_bits // 8}")
