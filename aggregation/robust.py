"""Weigh poisoned updates down, or out, across clients of unequal rank.

Every defence here reads the Gram matrix of a cohort (see ``geometry``) and the base weights ``p_k``, and returns the
weight ``w_k`` that each client has after it, for any aggregation that is exact, such as the sum by stacking::

    G' = G + sum_k w_k s_k B_k A_k

Heads take the same weights by ``geometry.add_head_changes``. A client that counts for less than before is given the
reason, and one that counts for nothing is quarantined, never dropped in silence.

None of this detects an attack; each bounds what an update can do. An attacker who knows the defence can stay within
what it lets pass (Baruch et al. 2019, https://arxiv.org/abs/1902.06156), and where clients' data differ much an honest
minority lies far out as well. Where ``p_k`` follows from what clients claim, an attacker claims more: the published
methods have ``p_k = 1 / K``. Weights and reasons tell of single updates: they are not for runs with central privacy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.aggregation.geometry import cosines, distances_to, median_coefficients, norms, squared_distances

_ROUNDING = 1e-9  # relative; a weight is lowered only if by more than this
_ORTHOGONAL = 1e-10  # a cosine this small is rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Defended:
    """What a defence leaves of a cohort, in its order.

    Attributes:
        weights: ``w_k`` of each client, finite and not negative; to be used as they are, not normalised again.
        reasons: Why ``w_k`` is less than ``p_k``, ``""`` where it is not.

    Raises:
        ValueError: Not one reason per weight, a weight out of range, or a weight of 0 without a reason.

    Example:
        >>> Defended(weights=(1.0, 0.0), reasons=("", "norm 9 is above the bound 0")).quarantined
        (1,)
    """

    weights: tuple[float, ...]
    reasons: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.reasons):
            raise ValueError(f"got {len(self.weights)} weights but {len(self.reasons)} reasons")
        for k, (weight, reason) in enumerate(zip(self.weights, self.reasons, strict=True)):
            if not (math.isfinite(weight) and weight >= 0.0):
                raise ValueError(f"expected finite weights that are not negative, got {weight} for client {k}")
            if weight == 0.0 and not reason:
                raise ValueError(f"client {k} would be dropped without a reason")

    @property
    def quarantined(self) -> tuple[int, ...]:
        """The positions of the clients that do not count at all."""
        return tuple(k for k, weight in enumerate(self.weights) if weight == 0.0)


def trusted(weights: Sequence[float]) -> Defended:
    """Return a cohort as it is."""
    return Defended(weights=tuple(weights), reasons=("",) * len(weights))


def median_bound(gram: Tensor, *, factor: float) -> float:
    """Return ``factor`` times the median norm of a cohort, a bound for :func:`norm_bounding`.

    Of an even number of norms the lower middle one is the median, so that attackers with large updates need more than
    half of the cohort to move the bound, not half of it.

    Raises:
        ValueError: ``factor`` is not finite and positive, or ``gram`` is no Gram matrix.

    Example:
        >>> median_bound(torch.tensor([4.0, 9.0, 1e8], dtype=torch.float64).diag(), factor=2.0)
        6.0
    """
    if not (math.isfinite(factor) and factor > 0.0):
        raise ValueError(f"expected a finite factor above 0, got {factor}")
    return factor * float(norms(gram).median())


def norm_bounding(gram: Tensor, *, weights: Sequence[float], bound: float) -> Defended:
    """Scale every update that is larger than a bound down to it.

    ``w_k = p_k min(1, M / ||u_k||)`` for the bound ``M`` (Sun et al. 2019, Can you really backdoor federated learning?,
    section 4, https://arxiv.org/abs/1911.07963). A client moves the aggregate by at most ``p_k M``; the direction in
    which it does is not looked at.

    Args:
        gram: ``(K, K)``, float64.
        weights: ``p_k``, one per client, finite and positive.
        bound: ``M``, finite and not negative: given, or from :func:`median_bound`.

    Raises:
        ValueError: An argument is out of range, or there is not one weight per client.

    Example:
        >>> gram = torch.tensor([1.0, 1.0, 100.0], dtype=torch.float64).diag()
        >>> norm_bounding(gram, weights=[0.25, 0.25, 0.5], bound=2.0)
        Defended(weights=(0.25, 0.25, 0.1), reasons=('', '', 'norm 10 is above the bound 2: scaled by 0.2'))
    """
    base = _base_weights(gram, weights)
    if not (math.isfinite(bound) and bound >= 0.0):
        raise ValueError(f"expected a finite bound that is not negative, got {bound}")
    norm = norms(gram)
    scale = torch.where(norm > bound, bound / norm, 1.0)
    reasons = [
        f"norm {size:.4g} is above the bound {bound:.4g}: scaled by {factor:.4g}"
        for size, factor in zip(norm.tolist(), scale.tolist(), strict=True)
    ]
    return _defended(base, base * scale, reasons)


def krum_scores(gram: Tensor, *, attackers: int) -> Tensor:
    """Return the Krum score of each client, ``(K,)``: the sum of its squared distances to its closest others.

    With ``f`` attackers assumed, those are the ``K - f - 2`` closest (Blanchard et al., NeurIPS 2017, section 4).

    Raises:
        ValueError: ``attackers`` is negative, there are fewer than ``2 f + 3`` clients, or ``gram`` is no Gram matrix.

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [3.0], [9.0]], dtype=torch.float64)
        >>> krum_scores(points @ points.T, attackers=0).tolist()
        [10.0, 5.0, 13.0, 100.0]
    """
    others = squared_distances(gram).fill_diagonal_(torch.inf)
    clients, needed = len(others), 2 * attackers + 3
    if attackers < 0:
        raise ValueError(f"expected a number of attackers of at least 0, got {attackers}")
    if clients < needed:
        raise ValueError(f"Krum needs at least {needed} clients to withstand {attackers} attackers, got {clients}")
    return others.sort(dim=1).values[:, : clients - attackers - 2].sum(dim=1)


def multi_krum(gram: Tensor, *, weights: Sequence[float], attackers: int, selected: int) -> Defended:
    """Keep the clients that lie closest to many others, by :func:`krum_scores`, and quarantine the rest.

    ``w_k = p_k sum(p) / sum_{j kept} p_j`` for the ``m`` lowest scores, 0 for the rest: with equal weights Multi-Krum,
    and Krum for ``m = 1`` (Blanchard et al., Machine learning with adversaries, NeurIPS 2017, sections 4 and 6,
    https://arxiv.org/abs/1703.02757). Of equal scores the earlier client's is the better.

    Args:
        gram: ``(K, K)``, float64.
        weights: ``p_k``, one per client, finite and positive.
        attackers: ``f``, how many are assumed; ``K >= 2 f + 3``.
        selected: ``m``, how many are kept, from 1 to ``K - f``.

    Raises:
        ValueError: An argument is out of range, or there is not one weight per client.

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [3.0], [9.0]], dtype=torch.float64)
        >>> multi_krum(points @ points.T, weights=[0.25] * 4, attackers=0, selected=2).weights
        (0.5, 0.5, 0.0, 0.0)
    """
    base = _base_weights(gram, weights)
    scores = krum_scores(gram, attackers=attackers)
    if not 1 <= selected <= len(base) - attackers:
        raise ValueError(f"expected selected from 1 to {len(base) - attackers} (all but attackers), got {selected}")
    order = scores.argsort(stable=True).tolist()
    reasons = [
        f"Krum score {score:.4g} is number {order.index(k) + 1} of {len(base)} and {selected} are kept"
        for k, score in enumerate(scores.tolist())
    ]
    return _kept(base, order[:selected], reasons)


def geometric_median(gram: Tensor, *, weights: Sequence[float]) -> Defended:
    """Weigh the clients such that their sum is the geometric median of the updates.

    ``w_k = sum(p) c_k`` with ``c`` of :func:`geometry.median_coefficients` (Pillutla et al., Robust aggregation for
    federated learning, 2022, https://arxiv.org/abs/1912.13445). Where attackers have a share ``a < 1/2`` of the
    weight and all honest updates lie within ``d`` of some point, the median does within ``d (1 - a) / sqrt(1 - 2 a)``,
    however large the others are (Minsker 2015, lemma 2.1, https://arxiv.org/abs/1308.1334). Whoever has half of the
    weight *is* the median, and all others weigh nothing: cap weights first.

    Args:
        gram: ``(K, K)``, float64.
        weights: ``p_k``, one per client, finite and positive.

    Raises:
        ValueError: An argument is out of range, or there is not one weight per client.

    Example:
        >>> points = torch.tensor([[1.0], [1.0], [50.0]], dtype=torch.float64)
        >>> geometric_median(points @ points.T, weights=[0.25, 0.25, 0.25]).weights
        (0.375, 0.375, 0.0)
    """
    base = _base_weights(gram, weights)
    point = median_coefficients(gram, base)
    reweighted = base.sum() * point
    facts = zip(distances_to(gram, point).tolist(), reweighted.tolist(), weights, strict=True)
    reasons = [
        f"distance {away:.4g} from the geometric median: weight {weight:.4g} of {before:.4g}"
        for away, weight, before in facts
    ]
    return _defended(base, reweighted, reasons)


def trimmed_mean(gram: Tensor, *, weights: Sequence[float], trimmed: int) -> Defended:
    """Quarantine the clients farthest from the geometric median, and keep the mean of the rest.

    The trimmed mean of Yin et al. (ICML 2018, definition 2, https://arxiv.org/abs/1803.01498) sorts every coordinate on
    its own and cuts its ``f`` largest and ``f`` smallest values. Updates of unequal rank have no common coordinates
    short of dense matrices, so here whole clients are cut, ``f`` of them, by a distance that no choice of coordinates
    changes. The guarantee is another one too, not the rates of that paper: if at most ``f`` updates are poisoned, each
    one kept is no farther from the geometric median than the farthest honest one. A change confined to a few entries,
    which sorting entries would cut, passes if it is small beside the whole update. ``f`` clients are always cut, in an
    honest cohort too; of equal distances the earlier client's is the better.

    Args:
        gram: ``(K, K)``, float64.
        weights: ``p_k``, one per client, finite and positive; ``w_k = p_k sum(p) / sum_{j kept} p_j``.
        trimmed: ``f``, how many are cut, at least 0; ``K >= 2 f + 1``.

    Raises:
        ValueError: An argument is out of range, or there is not one weight per client.

    Example:
        >>> points = torch.tensor([[1.0], [2.0], [3.0], [-80.0], [2.5]], dtype=torch.float64)
        >>> trimmed_mean(points @ points.T, weights=[0.125] * 5, trimmed=1).weights
        (0.15625, 0.15625, 0.15625, 0.0, 0.15625)
    """
    base = _base_weights(gram, weights)
    clients, needed = len(base), 2 * trimmed + 1
    if trimmed < 0:
        raise ValueError(f"expected to trim at least 0 clients, got {trimmed}")
    if clients < needed:
        raise ValueError(f"a mean trimmed by {trimmed} needs at least {needed} clients, got {clients}")
    away = distances_to(gram, median_coefficients(gram, base))
    reasons = [
        f"distance {distance:.4g} from the geometric median is among the {trimmed} largest"
        for distance in away.tolist()
    ]
    return _kept(base, away.argsort(stable=True).tolist()[: clients - trimmed], reasons)


def fltrust(gram: Tensor, *, weights: Sequence[float]) -> Defended:
    """Trust each client as far as its update points where the server's own does, at the server's length.

    The server trains on a small clean set and so has an update ``u_0`` itself, of any rank. With trust scores
    ``t_k = p_k max(0, cos(u_k, u_0))``, ``w_k = sum(p) t_k / sum(t) * ||u_0|| / ||u_k||`` (Cao et al., FLTrust, NDSS
    2021, section IV, https://arxiv.org/abs/2012.13995). The aggregate is at most as long as ``sum(p) ||u_0||``,
    whatever the share of attackers. Where nobody is trusted all weights are 0 and the round changes nothing.

    Args:
        gram: ``(K + 1, K + 1)``, float64; the server's update is the last one.
        weights: ``p_k``, one per client, finite and positive; none for the server.

    Raises:
        ValueError: An argument is out of range, there is not one weight per client, or the server's update is zero.

    Example:
        >>> points = torch.tensor([[3.0, 0.0], [-3.0, 4.0], [1.5, 0.0]], dtype=torch.float64)
        >>> fltrust(points @ points.T, weights=[0.5, 0.5])
        Defended(weights=(0.5, 0.0), reasons=('', 'cosine -0.6 to the trusted update: it points elsewhere'))
    """
    base = _base_weights(gram, weights, extra_rows=1)
    *sizes, trusted_size = norms(gram).tolist()
    if trusted_size == 0.0:
        raise ValueError("expected a trusted update that changes something, its norm is 0")
    cosine = cosines(gram)[:-1, -1]
    trust = base * torch.where(cosine > _ORTHOGONAL, cosine, 0.0)
    share = trust / trust.sum() if bool(trust.any()) else trust
    length = torch.tensor([trusted_size / size if size > 0.0 else 0.0 for size in sizes], dtype=torch.float64)
    reweighted = base.sum() * share * length
    facts = zip(cosine.tolist(), sizes, reweighted.tolist(), weights, strict=True)
    reasons = [_distrust(*fact, trusted_size=trusted_size) for fact in facts]
    return _defended(base, reweighted, reasons)


def _distrust(cosine: float, size: float, weight: float, before: float, *, trusted_size: float) -> str:
    if size == 0.0:
        return "it changes nothing, so it has no direction that could be trusted"
    if weight == 0.0:
        return f"cosine {cosine:.3g} to the trusted update: it points elsewhere"
    return (
        f"cosine {cosine:.3g} to the trusted update, norm {size:.4g} against {trusted_size:.4g}: "
        f"weight {weight:.4g} of {before:.4g}"
    )


def _kept(base: Tensor, positions: Sequence[int], reasons: Sequence[str]) -> Defended:
    kept = torch.zeros_like(base)
    kept[list(positions)] = base[list(positions)]
    return _defended(base, kept * (base.sum() / kept.sum()), reasons)


def _defended(base: Tensor, weights: Tensor, reasons: Sequence[str]) -> Defended:
    """Keep the reasons of those whose weight is lower than before."""
    lowered = (weights < base * (1.0 - _ROUNDING)).tolist()
    return Defended(
        weights=tuple(weights.tolist()),
        reasons=tuple(reason if low else "" for reason, low in zip(reasons, lowered, strict=True)),
    )


def _base_weights(gram: Tensor, weights: Sequence[float], *, extra_rows: int = 0) -> Tensor:
    if not weights:
        raise ValueError("expected at least one client, got none")
    expected = (len(weights) + extra_rows,) * 2
    if tuple(gram.shape) != expected:
        raise ValueError(f"{len(weights)} weights need a Gram matrix of {expected}, got {tuple(gram.shape)}")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0.0):
            raise ValueError(f"expected finite weights above 0, got {weight}")
    return torch.tensor(weights, dtype=torch.float64)
