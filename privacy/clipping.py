"""Clipping: one bound for everything a client contributes, all layers, both factors and the head together."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_SAFETY = 1.0 - 2.0**-40  # so that rounding cannot carry a norm above its bound


def joint_norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm over all elements of all tensors, in float64.

    ``||u|| = m sqrt(sum (u_j / m)^2)`` with ``m = max |u_j|``, so that nothing overflows or vanishes on the way; NaN
    where an element is NaN, infinity where one is infinite or the norm is too large for a float64.
    """
    values = [tensor.to(torch.float64).reshape(-1) for tensor in tensors.values() if tensor.numel()]
    largest = max((float(each.abs().max()) for each in values), default=0.0)
    if any(bool(each.isnan().any()) for each in values):
        return math.nan
    if largest == 0.0 or math.isinf(largest):
        return largest
    return largest * math.sqrt(sum(float((each / largest).square().sum()) for each in values))


def clip(tensors: Mapping[str, Tensor], bound: float) -> dict[str, Tensor]:
    """Return what a client contributes to a sum: ``u min(1, C / ||u||)``, or zeros where ``u`` is not finite.

    The norm is over all tensors at once. Clipping each tensor to ``C`` by itself would let a client contribute
    ``C sqrt(number of tensors)``, and the noise would be too small by that factor. A NaN compares false with every
    bound, and so would pass unclipped.

    Args:
        tensors: The client's change, by name, of any floating-point type.
        bound: ``C``, above 0.

    Returns:
        The same names, float64; their joint norm is at most ``bound``.

    Raises:
        ValueError: The bound is not above 0 and finite.
    """
    _check(bound)
    norm = joint_norm(tensors)
    if not math.isfinite(norm):
        return {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in tensors.items()}
    wide = {name: tensor.to(torch.float64) for name, tensor in tensors.items()}
    if norm <= bound * _SAFETY:
        return wide
    # divided first: of a huge norm, bound / norm is denormal and has few digits
    return {name: tensor / norm * (bound * _SAFETY) for name, tensor in wide.items()}


def clipped_sum(gradients: Sequence[Tensor], bound: float) -> list[Tensor]:
    """Return ``sum_i g_i min(1, C / ||g_i||)`` over examples; one whose gradient is not finite adds nothing.

    What :func:`clip` does to one client, for a batch of examples at once. The norm of an example is over all tensors.

    Args:
        gradients: One tensor for each parameter, ``(examples, *shape)``, of a type no wider than float32: of float64,
            what is beyond 1e150 counts as not finite.
        bound: ``C``, above 0.

    Returns:
        One tensor for each parameter, ``shape``, float64. An example more or less moves them by at most ``bound``.

    Raises:
        ValueError: The bound is not above 0 and finite.
    """
    _check(bound)
    rows = [gradient.flatten(1) for gradient in gradients]
    norms = torch.stack([torch.linalg.vector_norm(row, dim=1, dtype=torch.float64) for row in rows]).norm(dim=0)
    if not bool((finite := norms.isfinite()).all()):
        rows, norms = [row[finite] for row in rows], norms[finite]  # zero times NaN would be NaN
    factors = (bound * _SAFETY / norms).clamp(max=1.0)
    sums = [factors @ row.double() for row in rows]
    return [total.reshape(gradient.shape[1:]) for total, gradient in zip(sums, gradients, strict=True)]


def _check(bound: float) -> None:
    if not (bound > 0.0 and math.isfinite(bound)):
        raise ValueError(f"expected a clipping bound above 0, got {bound}")
