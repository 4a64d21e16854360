"""Random numbers that nobody can foresee: noise and cohorts from ChaCha20 under a key of the operating system's.

Whoever can predict the noise can subtract it, and whoever can predict the cohort takes away the amplification by
sampling. So no seed comes from a configuration, none is ever stored, and noise and cohorts have streams of their own.
"""

import math
import secrets

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

_KEY_BYTES = 32
_NONCE_BYTES = 16
_WORD_BYTES = 8
_MANTISSA_BITS = 53
_SUMMANDS = 4  # of one normal number; see SecureRandom.normal
_BLOCK = 1 << 14  # normal numbers made at once: what is between fits the cache


class SecureRandom:
    """A stream of random numbers. Not for several threads at once.

    Args:
        key: 32 bytes, for tests alone; the operating system gives one otherwise.

    Raises:
        ValueError: The key has another length.
    """

    def __init__(self, key: bytes | None = None) -> None:
        key = secrets.token_bytes(_KEY_BYTES) if key is None else key
        if len(key) != _KEY_BYTES:
            raise ValueError(f"expected a key of {_KEY_BYTES} bytes, got {len(key)}")
        self._stream = Cipher(ChaCha20(key, bytes(_NONCE_BYTES)), mode=None).encryptor()

    def uniform(self, size: int) -> NDArray[np.float64]:
        """Return ``size`` numbers from (0, 1], multiples of 2^-53, all equally likely."""
        words = np.frombuffer(self._stream.update(bytes(_WORD_BYTES * size)), dtype="<u8")
        numbers = (words >> np.uint64(64 - _MANTISSA_BITS)).astype(np.float64)
        numbers += 1.0
        numbers *= 2.0**-_MANTISSA_BITS
        return numbers

    def normal(self, size: int) -> NDArray[np.float64]:
        """Return ``size`` standard normal numbers, float64.

        Each is half the sum of four from Box and Muller's transform. The floating-point grid under a single one gives
        away, now and then, what it was added to (Mironov 2012); of a sum of four, the way back is out of reach
        (Holohan and Braghin 2021, https://arxiv.org/abs/2107.10138).
        """
        numbers = np.empty(size + size % 2)
        for start in range(0, size, _BLOCK):
            self._fill(torch.from_numpy(numbers[start : start + _BLOCK]).view(2, -1))
        return numbers[:size]

    def _fill(self, out: torch.Tensor) -> None:
        """Write a block of normal numbers; torch's sines are several times as fast as numpy's."""
        uniform = torch.from_numpy(self.uniform(_SUMMANDS * out.numel())).view(2, _SUMMANDS, -1)
        radius = uniform[0].log_().mul_(-2.0).sqrt_()
        angle = uniform[1].mul_(2.0 * math.pi)
        torch.sum(torch.cos(angle).mul_(radius), 0, out=out[0])
        torch.sum(angle.sin_().mul_(radius), 0, out=out[1])
        out.div_(math.sqrt(_SUMMANDS))

    def chosen(self, count: int, rate: float) -> NDArray[np.bool_]:
        """Toss a coin for each of ``count``: Poisson sampling, every one with probability ``rate``, independently.

        Raises:
            ValueError: The rate is no probability above 0.
        """
        if not 0.0 < rate <= 1.0:
            raise ValueError(f"expected a rate in (0, 1], got {rate}")
        return np.asarray(self.uniform(count) <= rate)
