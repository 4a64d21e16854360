"""Inner products, norms, cosines and distances of low-rank updates of unequal rank, from small products alone.

The factors of two clients have no coordinates in common: ranks differ, and ``(B M, M^-1 A)`` is the same update for
every invertible ``M``. Their products have, but ``(out, in)`` matrices are large. Neither is needed, because::

    <s_i B_i A_i, s_j B_j A_j>_F  ==  s_i s_j trace((B_i^T B_j) (A_j A_i^T))

is a sum over ``r_i x r_j`` entries, and whatever else is Euclidean follows from those inner products, the Gram matrix
of a cohort. Parameters trained whole take part by their difference from the current global ones, since that is what a
client changes. A layer or head that a client does not have is a zero change.

Large factors that cancel in their product could hide a change from that sum: its rounding error is a share of 1e-16 of
``||A_i|| ||B_i|| ||A_j|| ||B_j||``, and a norm is its root. So each client's factors are first brought into a form that
cannot cancel: with thin QR, ``A^T = Q R``, it is ``(s B R^T) Q^T``. What may still be rounding, a small multiple of
``1e-16 ||A|| ||B||``, is counted as part of the norm: no update looks smaller than it is. A distance is the root of a
difference, and says nothing below about 1e-8 of the two norms.
"""

import math
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pomona.adapters import AdapterWeights, LoraFactors

_ROUNDING = 1e-9  # relative, of a sum of weights
_SAME = 1e-7  # relative; updates closer than this are equal as far as a Gram matrix can tell
_SMOOTHING = 1e-6  # of the typical distance between clients
_CONVERGED = 1e-10  # relative change of every coefficient
_MAX_STEPS = 1000
_ROWS = 256  # of a Gram product at a time: enough for a fast multiplication, few enough to keep
_LARGEST = sys.float_info.max / 4  # a squared distance is at most four times the largest entry


def gram_matrix(updates: Sequence[AdapterWeights], *, heads: Mapping[str, Tensor]) -> Tensor:
    """Return all inner products of a cohort's updates, summed over layers and heads.

    For ``R`` the sum of all clients' ranks, a layer costs ``O((out + in) R^2)`` operations and ``O((out + in) R)``
    memory in float64, a head of ``n`` entries ``O(n K^2)`` and ``O(n K)``. Nothing is formed that is larger than the
    factors; dense layers would need ``out * in`` per client.

    Args:
        updates: One update per client; layers with the scales of training, heads as trained.
        heads: The current global heads, by parameter name.

    Returns:
        ``(K, K)``, float64, symmetric.

    Raises:
        ValueError: There are no updates, the shapes of a layer or head differ, a head is not a global one, or an
            update has NaN or an infinity or is so large that its square is none of float64.

    Example:
        >>> one = AdapterWeights(layers={"q": LoraFactors(a=torch.ones(1, 4), b=torch.ones(3, 1))})
        >>> other = AdapterWeights(layers={"q": LoraFactors(a=torch.ones(2, 4), b=torch.ones(3, 2), scale=-0.5)})
        >>> gram_matrix([one, other], heads={}).tolist()
        [[12.0, -12.0], [-12.0, 12.0]]
    """
    if not updates:
        raise ValueError("expected at least one update, got none")
    upper = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name in sorted({name for update in updates for name in update.layers}):
        held = {k: update.layers[name] for k, update in enumerate(updates) if name in update.layers}
        _add_layer(upper, name, held)
    changes = [head_changes(update.heads, current=heads) for update in updates]
    for name in sorted({name for change in changes for name in change}):
        _add_head(upper, {k: change[name] for k, change in enumerate(changes) if name in change})
    gram = upper.triu() + upper.triu(1).T
    for k, squared in enumerate(gram.diagonal().tolist()):
        if not squared <= _LARGEST:  # NaN is not
            raise ValueError(f"expected finite updates of a size that can be squared, update {k} is not")
    return gram


def inner_product(one: AdapterWeights, other: AdapterWeights, *, heads: Mapping[str, Tensor]) -> float:
    """Return the inner product of two updates; see :func:`gram_matrix`.

    Example:
        >>> one = AdapterWeights(layers={"q": LoraFactors(a=torch.ones(1, 4), b=torch.ones(3, 1), scale=0.5)})
        >>> inner_product(one, one, heads={}), inner_product(one, AdapterWeights(), heads={})
        (3.0, 0.0)
    """
    return float(gram_matrix([one, other], heads=heads)[0, 1])


def head_changes(heads: Mapping[str, Tensor], *, current: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a client changed in the parameters that are trained whole.

    Args:
        heads: The client's, by parameter name.
        current: The global ones that it started from.

    Returns:
        ``heads[name] - current[name]`` in float64, for each that the client has.

    Raises:
        ValueError: A head is not a global one, or has another shape.

    Example:
        >>> head_changes({"bias": torch.ones(2)}, current={"bias": torch.full((2,), 0.75)})
        {'bias': tensor([0.2500, 0.2500], dtype=torch.float64)}
    """
    for name, head in heads.items():
        if name not in current:
            raise ValueError(f"head {name!r} is none of the global ones: {sorted(current)}")
        if head.shape != current[name].shape:
            raise ValueError(f"head {name!r} should have shape {tuple(current[name].shape)}, got {tuple(head.shape)}")
    return {name: head.detach().double() - current[name].detach().double() for name, head in heads.items()}


def add_head_changes(
    heads: Mapping[str, Tensor], updates: Sequence[Mapping[str, Tensor]], *, weights: Sequence[float]
) -> dict[str, Tensor]:
    """Add the clients' changes of the parameters trained whole to the global ones.

    ``theta + sum_k w_k (theta_k - theta)``, the same sum as that of the layers. A weighted mean of the ``theta_k``
    divides by ``sum(w)`` and so takes back what a defence took off: if it scaled all updates down, as if it had none.

    Args:
        heads: The current global ones, by parameter name.
        updates: One mapping per client; one that is absent is not changed.
        weights: ``w_k``, one per client, finite.

    Returns:
        Every global one, in sorted order, float32, summed in float64 and rounded once.

    Raises:
        ValueError: Not one finite weight per client, a head is not a global one, or has another shape.

    Example:
        >>> add_head_changes({"bias": torch.ones(2)}, [{"bias": torch.full((2,), 9.0)}], weights=[0.25])
        {'bias': tensor([3., 3.])}
    """
    if len(updates) != len(weights):
        raise ValueError(f"got {len(updates)} updates but {len(weights)} weights")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"expected finite weights, got {list(weights)}")
    total = {name: heads[name].detach().double() for name in sorted(heads)}
    for update, weight in zip(updates, weights, strict=True):
        for name, change in head_changes(update, current=heads).items():
            if weight != 0.0:  # what is in quarantine may be anything, and 0 times infinity is NaN
                total[name] = total[name] + weight * change
    return {name: head.float() for name, head in total.items()}


def norms(gram: Tensor) -> Tensor:
    """Return the Frobenius norm of each update, ``(K,)``, from their Gram matrix.

    Raises:
        ValueError: ``gram`` is not square, not float64, or not finite.
    """
    return _squared_norms(gram).sqrt()


def cosines(gram: Tensor) -> Tensor:
    """Return the cosine of each pair of updates, ``(K, K)`` in ``[-1, 1]``, from their Gram matrix.

    A zero update has no direction; its cosine with any, itself too, is 0.

    Raises:
        ValueError: ``gram`` is not square, not float64, or not finite.
    """
    norm = norms(gram)
    divisor = torch.where(norm > 0.0, norm, torch.inf)
    return (gram / divisor[:, None] / divisor).clamp(-1.0, 1.0)


def squared_distances(gram: Tensor) -> Tensor:
    """Return ``||u_i - u_j||^2 = g_ii + g_jj - 2 g_ij`` of each pair of updates, ``(K, K)``, from their Gram matrix.

    The difference of near equal updates cancels, and rounding then ends on either side of 0; below is set to 0.

    Raises:
        ValueError: ``gram`` is not square, not float64, or not finite.
    """
    squared = _squared_norms(gram)
    return (squared[:, None] + squared - 2.0 * gram).clamp(min=0.0)


def distances(gram: Tensor) -> Tensor:
    """Return the Frobenius distance of each pair of updates, ``(K, K)``, from their Gram matrix.

    Raises:
        ValueError: ``gram`` is not square, not float64, or not finite.
    """
    return squared_distances(gram).sqrt()


def distances_to(gram: Tensor, coefficients: Tensor) -> Tensor:
    """Return the distance of each update from a linear combination of them, ``(K,)``, from their Gram matrix.

    With ``c`` the coefficients, ``||u_k - sum_j c_j u_j||^2 = g_kk - 2 (G c)_k + c^T G c``, at least 0 as in
    :func:`squared_distances`.

    Args:
        gram: ``(K, K)``, float64.
        coefficients: ``(K,)``, float64.

    Raises:
        ValueError: ``gram`` is not square, not float64, or not finite.

    Example:
        >>> points = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
        >>> distances_to(points @ points.T, torch.tensor([0.75, 0.25], dtype=torch.float64)).tolist()
        [0.5, 1.5]
    """
    products = gram @ coefficients
    squared = _squared_norms(gram) - 2.0 * products + coefficients @ products
    return squared.clamp(min=0.0).sqrt()


def median_coefficients(gram: Tensor, weights: Tensor) -> Tensor:
    """Return the convex combination of updates that is their geometric median, from their Gram matrix.

    The point ``z`` that minimises ``sum_k p_k ||u_k - z||``, by the smoothed Weiszfeld algorithm: until it settles,
    ``z = sum_k c_k u_k`` with ``c_k`` proportional to ``p_k / max(nu, ||u_k - z||)`` (Pillutla et al., Robust
    aggregation for federated learning, 2022, https://arxiv.org/abs/1912.13445). ``z`` is never formed, its distances
    follow from ``G`` and ``c``. Cost: ``O(K^2)`` for each of at most 1000 steps. ``nu`` is a millionth of the typical
    distance between two clients.

    Args:
        gram: ``(K, K)``, float64.
        weights: ``p_k``, ``(K,)``, float64, positive.

    Returns:
        ``c``, ``(K,)``, float64, not negative, summing to one. Where updates that are equal hold half of the weight,
        they are the median, and the others' coefficients are 0.

    Raises:
        ValueError: ``gram`` is not square, not float64, or not finite.

    Example:
        >>> points = torch.tensor([[1.0], [1.0], [9.0]], dtype=torch.float64)
        >>> median_coefficients(points @ points.T, torch.ones(3, dtype=torch.float64)).tolist()
        [0.5, 0.5, 0.0]
    """
    spread = _weighted_median(distances(gram), weights)  # of each client from the others
    together = spread <= _SAME * norms(gram)
    if bool(together.any()):  # a point that has half of the weight on it is a geometric median
        return _normalised(weights * together)
    # an attacker's size must not decide this; it is that of a typical client as long as most are honest
    smoothing = _SMOOTHING * _weighted_median(spread[None], weights)
    # from the mean, where Weiszfeld usually starts, it takes many steps to leave an update of enormous size
    point = _normalised(weights / spread)
    for _ in range(_MAX_STEPS):
        previous, point = point, _normalised(weights / distances_to(gram, point).clamp(min=smoothing))
        if bool(((point - previous).abs() <= _CONVERGED * point).all()):
            break
    return point


def _add_layer(upper: Tensor, name: str, held: Mapping[int, LoraFactors]) -> None:
    """Add one layer's inner products to the upper triangle, and what is not one below; ``held`` ascends by client."""
    shapes = {(factors.b.shape[0], factors.a.shape[1]) for factors in held.values()}
    if len(shapes) != 1:
        raise ValueError(f"expected one shape (out, in) of layer {name!r}, got {sorted(shapes)}")
    clients, forms = torch.tensor(list(held)), [_without_cancelling(factors) for factors in held.values()]
    a, b = torch.cat([form[0] for form in forms]), torch.cat([form[1] for form in forms], dim=1)  # (R, in), (out, R)
    upper[clients, clients] += torch.tensor([form[2] for form in forms], dtype=torch.float64).square()
    owner = torch.repeat_interleave(clients, torch.tensor([len(form[0]) for form in forms]))  # (R,)
    for start in range(0, len(owner), _ROWS):
        rows = slice(start, start + _ROWS)
        # earlier rows are in the triangle already, or of the same client and so orthogonal
        products = (a[rows] @ a[start:].T) * (b[:, rows].T @ b[:, start:])  # (rows, R - start)
        by_client = products.new_zeros(len(products), len(upper)).index_add_(1, owner[start:], products)
        upper.index_add_(0, owner[rows], by_client)


def _without_cancelling(factors: LoraFactors) -> tuple[Tensor, Tensor, float]:
    """Return ``A'``, its rows orthonormal, and ``B'`` of the same change, and a bound on the rounding error of that."""
    a, b = factors.a.detach().double(), factors.scale * factors.b.detach().double()
    q, r = torch.linalg.qr(a.T)  # (in, k), (k, rank)
    terms = sum(a.shape) + b.shape[0]
    return q.T, b @ r.T, terms * sys.float_info.epsilon * float(a.norm()) * float(b.norm())


def _add_head(upper: Tensor, held: Mapping[int, Tensor]) -> None:
    holders = torch.tensor(list(held))
    changes = torch.stack([change.flatten() for change in held.values()])  # (holders, n)
    upper[holders[:, None], holders] += changes @ changes.T


def _squared_norms(gram: Tensor) -> Tensor:
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.dtype != torch.float64:
        raise ValueError(f"expected a square float64 Gram matrix, got {tuple(gram.shape)} of {gram.dtype}")
    if not bool((gram.abs() <= _LARGEST).all()):  # NaN is not
        raise ValueError("expected a Gram matrix that is finite and far from overflow, got NaN or a larger entry")
    return gram.diagonal().clamp(min=0.0)


def _weighted_median(rows: Tensor, weights: Tensor) -> Tensor:
    """Return the lower median of each row, ``(rows, K)`` to ``(rows,)``."""
    ascending, order = rows.sort(dim=1)
    reached = weights[order].cumsum(dim=1) >= 0.5 * (1.0 - _ROUNDING) * weights.sum()
    return ascending.gather(1, reached.int().argmax(dim=1, keepdim=True)).squeeze(1)


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum()
