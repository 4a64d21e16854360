"""From a client's tensors to the integers that are summed, and from their sum back to tensors.

:mod:`pomona.privacy.secure_sum.terms` has the formula. The clip is on the norm of the whole vector: a bound on each
number, as quantisers often have it, would let a client contribute ``sqrt(d)`` times as much.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.privacy.clipping import clip
from pomona.privacy.randomness import SecureRandom
from pomona.privacy.secure_sum.discrete_gaussian import discrete_gaussian
from pomona.privacy.secure_sum.terms import Terms


def contribution(update: Mapping[str, Tensor], terms: Terms, noise: SecureRandom) -> NDArray[np.int64]:
    """Return what a client adds to the sum: its clipped and rounded update, and its share of the noise.

    Args:
        update: The client's change, by name, of any floating-point type; one that is not finite counts as zero.
        terms: Of the sum.
        noise: Where the noise share comes from.

    Returns:
        Shape ``(terms.dimensions,)``, in units of the grid, tensors in the order of their names.

    Raises:
        ValueError: The update has another number of elements.
    """
    return rounded(update, terms) + discrete_gaussian(terms.dimensions, variance=terms.share_variance, noise=noise)


def rounded(update: Mapping[str, Tensor], terms: Terms) -> NDArray[np.int64]:
    """Return a client's update on the grid, without noise; its norm is at most ``clip 2^fraction_bits``.

    Raises:
        ValueError: The update has another number of elements.
    """
    elements = sum(tensor.numel() for tensor in update.values())
    if elements != terms.dimensions:
        raise ValueError(f"expected an update of {terms.dimensions} numbers, got {elements}")
    clipped = clip(update, terms.rounded_clip)
    flat = torch.cat([clipped[name].reshape(-1) for name in sorted(clipped)])
    return np.asarray(torch.round(flat * 2.0**terms.fraction_bits).to(torch.int64).numpy())


def restored(total: NDArray[np.int64], shapes: Mapping[str, tuple[int, ...]], terms: Terms) -> dict[str, Tensor]:
    """Return a sum as tensors, float64; nothing is divided.

    Args:
        total: As :meth:`~pomona.privacy.secure_sum.server.SecureSumServer.total` returns it.
        shapes: Of what a client contributes, by name.
        terms: Of the sum.

    Raises:
        ValueError: The shapes have another number of elements than the sum.
    """
    names = sorted(shapes)
    sizes = [math.prod(shapes[name]) for name in names]
    if sum(sizes) != total.size:
        raise ValueError(f"expected a sum of {sum(sizes)} numbers for these shapes, got {total.size}")
    values = torch.from_numpy(total.astype(np.float64) * 2.0**-terms.fraction_bits)
    return {name: part.reshape(shapes[name]) for name, part in zip(names, torch.split(values, sizes), strict=True)}
