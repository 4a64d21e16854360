"""The Gaussian mechanism on a sum over clients: clip each, add, put noise on the sum, divide by a public number."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pomona.privacy.clipping import clip
from pomona.privacy.randomness import SecureRandom


class GaussianSum:
    """A sum that can be read once, with noise.

    ``( sum_i clip(u_i, C) + N(0, sigma^2 C^2 I) ) / n`` (McMahan et al. 2018, https://arxiv.org/abs/1710.06963,
    algorithm 1 with the fixed denominator). Adding or removing a client moves the sum by at most ``C``. The divisor is
    public and fixed before anybody is asked: one that is counted from replies would be released without noise. Noise
    does not depend on who answered, so an empty cohort releases noise.

    Args:
        shapes: Of what a client contributes, by name.
        bound: The clipping bound ``C``, above 0.
        noise_multiplier: ``sigma``, above 0.
        divisor: ``n``, the expected size of the cohort, above 0.
        noise: Where the noise comes from.

    Raises:
        ValueError: A number is not above 0 and finite.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        bound: float,
        noise_multiplier: float,
        divisor: float,
        noise: SecureRandom,
    ) -> None:
        for name, value in (("bound", bound), ("noise_multiplier", noise_multiplier), ("divisor", divisor)):
            if not (value > 0.0 and math.isfinite(value)):
                raise ValueError(f"expected a {name} above 0, got {value}")
        self._bound, self._noise_multiplier, self._divisor, self._noise = bound, noise_multiplier, divisor, noise
        self._sum = {name: torch.zeros(shapes[name], dtype=torch.float64) for name in sorted(shapes)}
        self._released = False

    def add(self, update: Mapping[str, Tensor]) -> None:
        """Add what one client contributes; one that is not finite adds nothing.

        Raises:
            ValueError: Names or shapes are others, or the sum was released.
        """
        if self._released:
            raise ValueError("the sum was released; noise drawn again for it would average out")
        expected = {name: tuple(tensor.shape) for name, tensor in self._sum.items()}
        if (got := {name: tuple(tensor.shape) for name, tensor in update.items()}) != expected:
            raise ValueError(f"expected tensors {expected}, got {got}")
        for name, tensor in clip(update, self._bound).items():
            self._sum[name] += tensor

    def release(self, standard: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the noised mean, float64, once; the sum without noise is forgotten.

        Args:
            standard: Noise in units of ``sigma C`` that was drawn elsewhere, where that of one release depends on
                others; None: independent normal numbers.

        Raises:
            ValueError: It was released before, or the noise has other shapes.
        """
        if self._released:
            raise ValueError("the sum was released; noise drawn again for it would average out")
        drawn = self._normal() if standard is None else dict(standard)
        if {name: each.shape for name, each in drawn.items()} != {name: each.shape for name, each in self._sum.items()}:
            raise ValueError("expected noise of the shapes of the sum")
        self._released = True
        scale = self._noise_multiplier * self._bound
        released = {name: (total + scale * drawn[name]) / self._divisor for name, total in self._sum.items()}
        self._sum = {}
        return released

    def _normal(self) -> dict[str, Tensor]:
        return {
            name: torch.from_numpy(self._noise.normal(total.numel())).reshape(total.shape)
            for name, total in self._sum.items()
        }
