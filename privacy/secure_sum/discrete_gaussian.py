"""Integers from the discrete Gaussian, exactly: ``P[x] ~ exp(-x^2 / (2 s^2))``.

Canonne, Kamath and Steinke 2020, https://arxiv.org/abs/2004.00010, algorithms 2 and 3: propose from a discrete Laplace
of scale ``t``, accept with ``exp(-(|y| - s^2/t)^2 / (2 s^2))``. Theirs decides each such coin with a series of coins
of rational probability, one after another. Here a uniform number of 53 bits is compared with ``exp`` in float64, all
coins at once; where the two are so close that rounding could decide, further bits and an ``exp`` of as many digits as
it takes decide instead. So the law is the exact one, at the speed of float64. ``t`` is a power of two here, which any
``t`` may be: it changes how many proposals are accepted, between 55 and 76 in 100, and nothing else.
"""

from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from pomona.privacy.randomness import SecureRandom

_BITS = 53
_BLOCK = 1 << 17  # proposals at a time: what they take in memory does not grow with what is asked for
_MARGIN = 2.0**-47  # some 60 times what rounding can do to an exponent and its exp

_Exact = Callable[[int], Fraction]


def discrete_gaussian(size: int, *, variance: int, noise: SecureRandom) -> NDArray[np.int64]:
    """Return independent integers from the discrete Gaussian around 0.

    Args:
        size: How many.
        variance: ``s^2``, from 1 to 2^52. The variance of what is returned is at most that, and from ``s^2 = 4`` on the
            same to more than 30 digits.
        noise: Where randomness comes from.

    Raises:
        ValueError: The variance is out of range.
    """
    if not 1 <= variance <= 2**52:
        raise ValueError(f"expected a variance from 1 to 2^52, got {variance}")
    scale_bits = ((variance - 1).bit_length() + 1) // 2  # the least t = 2^bits that is at least s
    taken, missing = [np.zeros(0, dtype=np.int64)], size
    while missing:
        proposed = _discrete_laplace(min(3 * missing + 16, _BLOCK), scale_bits, noise)
        taken.append(proposed[_accepted(proposed, variance, scale_bits, noise)][:missing])
        missing -= taken[-1].size
    return np.concatenate(taken)


def _accepted(proposed: NDArray[np.int64], variance: int, scale_bits: int, noise: SecureRandom) -> NDArray[np.bool_]:
    scale = 1 << scale_bits
    distance = np.abs(proposed).astype(np.float64) * scale - variance  # of exact numbers, rounded once
    exponents = (distance / scale) ** 2 / (2.0 * variance)

    def exact(at: int) -> Fraction:
        return Fraction((abs(int(proposed[at])) * scale - variance) ** 2, 2 * variance * scale**2)

    return _heads(exponents, exact, noise)


def _discrete_laplace(size: int, scale_bits: int, noise: SecureRandom) -> NDArray[np.int64]:
    """Return at most ``size`` integers with ``P[x] ~ exp(-|x| / 2^scale_bits)`` (algorithm 2)."""
    scale = 1 << scale_bits
    low = _words(size, noise) >> (_BITS - scale_bits)
    low = low[_heads(low / scale, lambda at: Fraction(int(low[at]), scale), noise)]
    value = low + scale * _geometric(low.size, noise)
    negative = _words(value.size, noise) >> (_BITS - 1) == 1
    signed = np.where(negative, -value, value)
    return np.asarray(signed[~(negative & (value == 0))])  # else 0 would come up twice as often


def _geometric(size: int, noise: SecureRandom) -> NDArray[np.int64]:
    """Return how often a coin of probability ``1/e`` shows heads before it first shows tails."""
    count = np.zeros(size, dtype=np.int64)
    running = np.arange(size)
    while running.size:
        running = running[_heads(np.ones(running.size), lambda _: Fraction(1), noise)]
        count[running] += 1
    return count


def _heads(exponents: NDArray[np.float64], exact: _Exact, noise: SecureRandom) -> NDArray[np.bool_]:
    """Toss a coin of probability ``exp(-x)`` for each ``x``; ``exact`` gives the ``x`` of a place as a fraction."""
    words = _words(exponents.size, noise)
    drawn, likely = words * 2.0**-_BITS, np.exp(-exponents)
    heads = drawn < likely
    for at in np.flatnonzero(np.abs(drawn - likely) <= _MARGIN):
        heads[at] = _is_below(int(words[at]), exact(int(at)), noise)
    return heads


def _is_below(word: int, exponent: Fraction, noise: SecureRandom) -> bool:
    """Say whether a uniform number is below ``exp(-exponent)``; ``word`` is its first 53 bits, and more are drawn."""
    bits = _BITS
    while True:
        with localcontext() as context:
            context.prec = bits // 3 + 8  # decimal digits, of which the last may be off
            power = Fraction((-Decimal(exponent.numerator) / exponent.denominator).exp())
        error = Fraction(10) ** (1 - context.prec)
        if Fraction(word + 1, 1 << bits) <= power - error:
            return True
        if Fraction(word, 1 << bits) >= power + error:
            return False
        word, bits = (word << _BITS) | int(_words(1, noise)[0]), bits + _BITS


def _words(size: int, noise: SecureRandom) -> NDArray[np.int64]:
    """Return integers of 53 bits, all equally likely."""
    return (noise.uniform(size) * 2.0**_BITS).astype(np.int64) - 1
