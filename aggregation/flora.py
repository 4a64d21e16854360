"""Exact aggregation of LoRA adapters of unequal rank, by stacking, and its optimal compression.

Averaging the factors separately is wrong, because a mean of products is not the product
of the means. Stacking keeps the sum exact at the price of rank::

    sum_k w_k s_k B_k A_k  ==  [B_1 ... B_K] @ [w_1 s_1 A_1; ...; w_K s_K A_K]

The published method merges that stack into the base model every round and sends it to every client. Here
the global adapter is one more block of the stack, and the whole is cut back to a bounded rank: aggregation is
exact, truncation is optimal (Eckart and Young 1936), and what it gave up is reported. It is lossless only
where the bound is at least the rank of the sum.

Reference: Wang et al., FLoRA, NeurIPS 2024, eq. 5 (https://arxiv.org/abs/2409.05976).
"""

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pomona.adapters import LoraFactors


def stack(updates: Sequence[LoraFactors], *, weights: Sequence[float]) -> LoraFactors:
    """Stack the updates of one layer into one adapter that equals their weighted sum.

    The weights and scales go into ``a`` only, so ``b`` stays a plain concatenation.
    Nothing is normalised here: pass weights that sum to one for a mean, or ones for a sum
    (the sum is what a clip bound of one client is a sensitivity of).

    Args:
        updates: One adapter per client, all for the same layer; ranks may differ.
        weights: One finite weight per update.

    Returns:
        An adapter of rank ``sum(u.rank for u in updates)`` with ``scale == 1``.

    Raises:
        ValueError: There are no updates, not one finite weight per update, or they are for different layers.

    Example:
        >>> one = LoraFactors(a=torch.ones(1, 2), b=torch.ones(3, 1))
        >>> both = stack([one, one], weights=[0.25, 0.75])
        >>> both.rank, torch.equal(both.delta(), one.delta())
        (2, True)
    """
    if not updates:
        raise ValueError("stack needs at least one update, got none")
    _check_weights(updates, weights)
    shapes = {(u.b.shape[0], u.a.shape[1]) for u in updates}
    if len(shapes) != 1:
        raise ValueError(f"expected updates of one layer, got the shapes (out, in) {sorted(shapes)}")
    return LoraFactors(
        a=torch.cat([w * u.scale * u.a for u, w in zip(updates, weights, strict=True)], dim=0),
        b=torch.cat([u.b for u in updates], dim=1),
    )


def recompress(update: LoraFactors, *, rank: int) -> tuple[LoraFactors, float]:
    """Return the closest adapter of at most ``rank``, and how much was lost.

    With thin QR of both factors, ``B = Q_B R_B`` and ``A^T = Q_A R_A``, the SVD of the small core
    ``R_B R_A^T = U S V^T`` gives that of the product, ``(Q_B U) S (Q_A V)^T``; its first ``rank`` terms are
    the best approximation in the Frobenius and the spectral norm (Eckart and Young 1936). The dense
    ``(out, in)`` matrix is formed only where the stacked rank ``R`` has reached ``min(out, in)``.
    Cost: ``O((out + in) * R**2)``. Computed in float64, which is cheap at this size; the result has the dtype
    of the factors, at least float32.

    Args:
        update: An adapter of any rank, finite.
        rank: The largest rank of the result, at least 1.

    Returns:
        The truncated adapter, and the relative Frobenius error in ``[0, 1]``. The adapter has scale 1, a rank
        of at least 1 and at most the numerical rank of the product, ``sqrt(S)`` in either factor, and the
        largest entry of each column of ``b`` positive, so that equal inputs give equal bytes.

    Raises:
        ValueError: ``rank`` is below 1, or the product is not finite.

    Example:
        >>> twice = LoraFactors(a=torch.ones(2, 3), b=torch.ones(4, 2))
        >>> small, lost = recompress(twice, rank=8)
        >>> small.rank, lost
        (1, 0.0)
    """
    if rank < 1:
        raise ValueError(f"expected a rank of at least 1, got {rank}")
    left, singular_values, right = _thin_svd(update)
    dtype = _result_dtype([update])
    return _truncate(left, singular_values, right, rank=rank, dtype=dtype), _lost(singular_values, rank)


def truncation_rank(singular_values: Tensor, *, max_rank: int, energy: float) -> int:
    """Return the smallest rank that keeps a share of the energy, within ``1`` and ``max_rank``.

    The energy of the first ``r`` singular values is ``sum_{i <= r} s_i^2 / sum_i s_i^2``.

    Args:
        singular_values: One dimension, descending, not negative.
        max_rank: The bound on the result, which wins over ``energy``; at least 1.
        energy: Share to keep, in ``(0, 1]``; 1 keeps every value that is not zero.

    Raises:
        ValueError: ``max_rank`` or ``energy`` is out of range.

    Example:
        >>> truncation_rank(torch.tensor([3.0, 1.0, 0.0]), max_rank=8, energy=0.9)
        1
        >>> truncation_rank(torch.tensor([3.0, 1.0, 0.0]), max_rank=8, energy=1.0)
        2
    """
    _check_limits(max_rank, energy)
    present = int(torch.count_nonzero(singular_values))
    if present == 0:
        return 1
    # a sum in floating point reaches its total before small terms are in it, so 1 is not left to the sum
    if energy == 1.0:
        return min(present, max_rank)
    kept = (singular_values.double() / singular_values[0]).square().cumsum(dim=0)
    return min(int((kept < energy * kept[-1]).sum()) + 1, present, max_rank)


def aggregate_layers(
    global_layers: Mapping[str, LoraFactors],
    updates: Sequence[Mapping[str, LoraFactors]],
    *,
    weights: Sequence[float],
    max_rank: int,
    energy: float,
) -> tuple[dict[str, LoraFactors], dict[str, float]]:
    """Add the clients' updates to the global adapter, layer by layer.

    With the global adapter as one more block of the stack (eq. 5 of the paper)::

        G' = truncate(G + sum_k p_k s_k B_k A_k)

    Blocks that are exactly zero are left out, so a layer that no client changed comes back as the same record
    with the same tensors. A client without a layer has a zero update of it, and a layer that is neither in
    the global adapter nor changed by a client is absent from the result. The order of clients moves the
    result by rounding only; pass them in sorted order where bytes must be equal.

    Args:
        global_layers: The global adapter by module name, empty before the first round.
        updates: One mapping per client, by module name; scales are those of training.
        weights: One finite weight ``p_k`` per client, summing to one for a mean.
        max_rank: Rank of the result in each layer, at most.
        energy: As in :func:`truncation_rank`.

    Returns:
        The new global adapter by module name, scales 1 where a client changed it, float32 (float64 if an
        input is); and the share of energy kept per layer in ``[0, 1]``, 1.0 where truncation lost nothing.

    Raises:
        ValueError: Not one finite weight per client, shapes of a layer differ, or limits are out of range.

    Example:
        >>> update = {"query": LoraFactors(a=torch.ones(1, 3), b=torch.ones(2, 1), scale=2.0)}
        >>> layers, retained = aggregate_layers({}, [update], weights=[1.0], max_rank=4, energy=1.0)
        >>> layers["query"].rank, torch.allclose(layers["query"].delta(), update["query"].delta()), retained
        (1, True, {'query': 1.0})
    """
    _check_weights(updates, weights)
    _check_limits(max_rank, energy)
    layers: dict[str, LoraFactors] = {}
    retained: dict[str, float] = {}
    for name in sorted({*global_layers, *(name for update in updates for name in update)}):
        current = global_layers.get(name)
        blocks = [
            (update[name], weight)
            for update, weight in zip(updates, weights, strict=True)
            if name in update and weight != 0.0 and not _is_zero(update[name])
        ]
        if not blocks:
            if current is not None:
                layers[name], retained[name] = current, 1.0
            continue
        if current is not None:
            blocks = [(current, 1.0), *blocks]
        # widened first: weights are then applied and blocks summed in float64, and rounding happens once
        stacked = stack([_widen(factors) for factors, _ in blocks], weights=[weight for _, weight in blocks])
        left, singular_values, right = _thin_svd(stacked)
        rank = truncation_rank(singular_values, max_rank=max_rank, energy=energy)
        dtype = _result_dtype([factors for factors, _ in blocks])
        layers[name] = _truncate(left, singular_values, right, rank=rank, dtype=dtype)
        retained[name] = 1.0 - _lost(singular_values, rank) ** 2
    return layers, retained


def _check_weights(updates: Sequence[object], weights: Sequence[float]) -> None:
    if len(updates) != len(weights):
        raise ValueError(f"got {len(updates)} updates but {len(weights)} weights")
    for weight in weights:
        if not math.isfinite(weight):
            raise ValueError(f"expected finite weights, got {weight}")


def _check_limits(max_rank: int, energy: float) -> None:
    if max_rank < 1:
        raise ValueError(f"expected max_rank of at least 1, got {max_rank}")
    if not 0.0 < energy <= 1.0:
        raise ValueError(f"expected energy in (0, 1], got {energy}")


def _is_zero(factors: LoraFactors) -> bool:
    return factors.scale == 0.0 or not bool(factors.a.any()) or not bool(factors.b.any())


def _widen(factors: LoraFactors) -> LoraFactors:
    return LoraFactors(a=factors.a.double(), b=factors.b.double(), scale=factors.scale)


def _result_dtype(updates: Sequence[LoraFactors]) -> torch.dtype:
    dtypes = [tensor.dtype for update in updates for tensor in (update.a, update.b)]
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def _thin_svd(update: LoraFactors) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(out, k)``, ``(k,)``, ``(k, in)`` in float64, ``k >= 1`` the numerical rank of the product."""
    b, a = update.scale * update.b.double(), update.a.double()
    out, in_ = b.shape[0], a.shape[1]
    if 0 < update.rank < min(out, in_):
        q_b, r_b = torch.linalg.qr(b)  # (out, R), (R, R)
        q_a, r_a = torch.linalg.qr(a.T)  # (in, R), (R, R)
        core_left, singular_values, core_right = _finite_svd(r_b @ r_a.T)
        left, right = q_b @ core_left, core_right @ q_a.T
    else:
        left, singular_values, right = _finite_svd(b @ a)
    noise = singular_values[0] * max(out, in_) * torch.finfo(torch.float64).eps
    k = max(1, int((singular_values > noise).sum()))
    left, right = left[:, :k], right[:k]
    sign = left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign()  # (1, k)
    return left * sign, singular_values[:k], sign.T * right


def _finite_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("expected finite factors with a finite product, got NaN or an infinity")
    left, singular_values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, singular_values, right


def _truncate(left: Tensor, singular_values: Tensor, right: Tensor, *, rank: int, dtype: torch.dtype) -> LoraFactors:
    root = singular_values[:rank].sqrt()
    return LoraFactors(
        a=(root[:, None] * right[:rank]).to(dtype).contiguous(),
        b=(left[:, :rank] * root).to(dtype).contiguous(),
    )


def _lost(singular_values: Tensor, rank: int) -> float:
    if not bool(singular_values.any()):
        return 0.0
    relative = singular_values / singular_values[0]  # squares of large values would overflow
    return float(relative[rank:].norm() / relative.norm())
