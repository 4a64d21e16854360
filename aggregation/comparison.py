"""How two adapters differ, layer by layer: in size, in direction, and in the spaces they read from and write to.

Factors say nothing by themselves, because ``(B M, M^-1 A)`` is the same update for every invertible ``M``; everything
here is a property of the products. A layer's change ``s B A`` is first brought into its singular value decomposition
``U S V^T`` with orthonormal ``U`` of shape ``(out, k)`` and ``V`` of shape ``(in, k)``, by thin QR of both factors and
the decomposition of their small core. Then, with ``C = U_1^T U_2`` and ``D = V_1^T V_2``, both ``(k_1, k_2)``::

    <W_1, W_2>_F    ==  sum_ij  s_1i s_2j C_ij D_ij
    ||W_1 - W_2||_F ==  ||R_B R_A^T||_F   of   [B_1 B_2] = Q_B R_B,  [s_1 A_1; -s_2 A_2]^T = Q_A R_A
    cos theta_i     ==  sigma_i(C)   between the column spaces,  sigma_i(D)   between the row spaces

The norm of the difference is not taken from the inner product, which would lose it in rounding where the two are
nearly equal. For the same reason angles below 45 degrees come from their sines, the singular values of
``U_2 - U_1 C`` (Bjorck and Golub 1973, https://doi.org/10.1090/S0025-5718-1973-0348991-3, section 3). Everything is
float64, and nothing is formed that is larger than the factors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.adapters import AdapterWeights, LoraFactors

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerComparison:
    """Two changes of one layer; one that an adapter does not have is a zero change.

    Attributes:
        norms: Frobenius norm of either.
        distance: Frobenius norm of their difference.
        cosine: Of the angle between them as vectors, in ``[-1, 1]``; 0 where one is zero.
        ranks: Numerical rank of either.
        stable_ranks: ``sum s_i^2 / s_1^2`` of either, 0 for a zero change.
        column_angles: Principal angles between the spaces they write to, in radians, ascending, as many as the
            smaller rank.
        row_angles: Likewise between the spaces they read from.
    """

    norms: tuple[float, float]
    distance: float
    cosine: float
    ranks: tuple[int, int]
    stable_ranks: tuple[float, float]
    column_angles: tuple[float, ...]
    row_angles: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadComparison:
    """Two states of a parameter that is trained whole.

    Attributes:
        norms: Euclidean norm of either, ``None`` where an adapter has no such head.
        distance: Norm of their difference, ``None`` where one is absent or they have different shapes.
        cosine: Of the angle between them, ``None`` likewise.
    """

    norms: tuple[float | None, float | None]
    distance: float | None
    cosine: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two adapters on one base model.

    Attributes:
        layers: By module name, in sorted order.
        heads: By parameter name, in sorted order.
        norms: Frobenius norm of either over all layers, heads left out.
        distance: That of the difference.
        cosine: Of the angle between them as vectors over all layers.
    """

    layers: dict[str, LayerComparison]
    heads: dict[str, HeadComparison]
    norms: tuple[float, float]
    distance: float
    cosine: float


@dataclass(frozen=True, slots=True)
class _Change:
    """``left @ diag(values) @ right.T``: orthonormal ``(out, k)``, descending ``(k,)``, orthonormal ``(in, k)``."""

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def norm(self) -> float:
        return _norm(self.values)


def compare_adapters(one: AdapterWeights, other: AdapterWeights) -> Comparison:
    """Compare two adapters on one base model.

    Cost: ``O((out + in) (r_1 + r_2)^2)`` per layer.

    Raises:
        ValueError: A layer has another shape in the other adapter, or factors, heads or products are not finite.

    Example:
        >>> one = AdapterWeights(layers={"q": LoraFactors(a=torch.eye(1, 4), b=torch.ones(3, 1))})
        >>> other = AdapterWeights(layers={"q": LoraFactors(a=torch.eye(2, 4)[1:], b=torch.ones(3, 1), scale=2.0)})
        >>> layer = compare_adapters(one, other).layers["q"]
        >>> round(layer.cosine, 12), round(layer.distance**2, 12), layer.ranks
        (0.0, 15.0, (1, 1))
        >>> [round(math.degrees(angle), 6) for angle in (*layer.column_angles, *layer.row_angles)]
        [0.0, 90.0]
    """
    names = sorted({*one.layers, *other.layers})
    layers = {name: compare_layers(one.layers.get(name), other.layers.get(name)) for name in names}
    norms = (math.hypot(*(x.norms[0] for x in layers.values())), math.hypot(*(x.norms[1] for x in layers.values())))
    return Comparison(
        layers=layers,
        heads={name: _compare_heads(one.heads, other.heads, name) for name in sorted({*one.heads, *other.heads})},
        norms=norms,
        distance=math.hypot(*(layer.distance for layer in layers.values())),
        cosine=_total_cosine(layers, norms),
    )


def compare_layers(one: LoraFactors | None, other: LoraFactors | None) -> LayerComparison:
    """Compare two changes of one layer, of any ranks; ``None`` is a zero change.

    Raises:
        ValueError: Both are ``None``, shapes differ, or factors or their products are not finite.
    """
    known = [factors for factors in (one, other) if factors is not None]
    shapes = {(factors.b.shape[0], factors.a.shape[1]) for factors in known}
    if len(shapes) != 1:
        raise ValueError(f"expected two changes of one layer, got the shapes (out, in) {sorted(shapes)}")
    first, second = _change(one, shapes), _change(other, shapes)
    across, along = first.left.T @ second.left, first.right.T @ second.right  # (k_1, k_2) each
    return LayerComparison(
        norms=(first.norm, second.norm),
        distance=_distance(one, other),
        cosine=_clamp(float((_direction(first)[:, None] * across * along * _direction(second)).sum())),
        ranks=(len(first.values), len(second.values)),
        stable_ranks=(_stable_rank(first.values), _stable_rank(second.values)),
        column_angles=principal_angles(first.left, second.left),
        row_angles=principal_angles(first.right, second.right),
    )


def principal_angles(one: Tensor, other: Tensor) -> tuple[float, ...]:
    """Return the principal angles between the spaces that two orthonormal bases span, in radians, ascending.

    Args:
        one: ``(n, k_1)``, columns orthonormal.
        other: ``(n, k_2)``, columns orthonormal.

    Returns:
        ``min(k_1, k_2)`` angles in ``[0, pi / 2]``, each exact to rounding however small it is.

    Example:
        >>> tilted = torch.tensor([[1.0], [1e-9]], dtype=torch.float64)
        >>> principal_angles(torch.eye(2, 1, dtype=torch.float64), tilted)
        (1e-09,)
    """
    if one.shape[1] < other.shape[1]:
        one, other = other, one
    if other.shape[1] == 0:
        return ()
    cosines = one.T @ other  # (k_1, k_2), k_1 >= k_2
    from_cosines = torch.linalg.svdvals(cosines).clamp(0.0, 1.0).arccos()
    from_sines = torch.linalg.svdvals(other - one @ cosines).flip(0).clamp(0.0, 1.0).arcsin()
    return tuple(torch.where(from_cosines < math.pi / 4, from_sines, from_cosines).tolist())


def _change(factors: LoraFactors | None, shapes: set[tuple[int, int]]) -> _Change:
    if factors is None:
        ((out, in_),) = shapes
        return _Change(_zeros(out, 0), _zeros(0), _zeros(in_, 0))
    q_b, r_b = torch.linalg.qr(factors.b.detach().double())  # (out, k), (k, r)
    q_a, r_a = torch.linalg.qr(factors.a.detach().double().T)  # (in, l), (l, r)
    left, values, right = torch.linalg.svd(_finite(factors.scale * r_b @ r_a.T), full_matrices=False)
    k = int((values > values[0] * max(q_b.shape[0], q_a.shape[0]) * _EPS).sum())
    return _Change(q_b @ left[:, :k], values[:k], q_a @ right[:k].T)


def _distance(one: LoraFactors | None, other: LoraFactors | None) -> float:
    signed = [(factors, sign) for factors, sign in ((one, 1.0), (other, -1.0)) if factors is not None]
    b = torch.cat([factors.b.detach().double() for factors, _ in signed], dim=1)
    a = torch.cat([sign * factors.scale * factors.a.detach().double() for factors, sign in signed])
    core = torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T
    return _norm(_finite(core).flatten())


def _direction(change: _Change) -> Tensor:
    """Return the singular values of the change over its norm; none for a zero change."""
    if not len(change.values):
        return change.values
    relative = change.values / change.values[0]
    direction: Tensor = relative / relative.norm()
    return direction


def _stable_rank(values: Tensor) -> float:
    return float((values / values[0]).square().sum()) if len(values) else 0.0


def _total_cosine(layers: Mapping[str, LayerComparison], norms: tuple[float, float]) -> float:
    if not all(norms):
        return 0.0
    shares = (x.cosine * (x.norms[0] / norms[0]) * (x.norms[1] / norms[1]) for x in layers.values())
    return _clamp(math.fsum(shares))


def _compare_heads(one: Mapping[str, Tensor], other: Mapping[str, Tensor], name: str) -> HeadComparison:
    first, second = (_finite(heads[name].detach().double()) if name in heads else None for heads in (one, other))
    norms = (None if first is None else _norm(first), None if second is None else _norm(second))
    if first is None or second is None or first.shape != second.shape:
        return HeadComparison(norms=norms, distance=None, cosine=None)
    return HeadComparison(
        norms=norms,
        distance=_norm(first - second),
        cosine=_clamp(float((_unit(first) * _unit(second)).sum())),
    )


def _unit(head: Tensor) -> Tensor:
    size = _norm(head)
    return head / size if size else head


def _norm(values: Tensor) -> float:
    """Return the Euclidean norm, without squaring what would overflow."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    return largest * float((values / largest).norm()) if largest else 0.0


def _finite(values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise ValueError("expected finite factors and heads with finite products, got NaN or an infinity")
    return values


def _clamp(cosine: float) -> float:
    return min(1.0, max(-1.0, cosine))


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)
