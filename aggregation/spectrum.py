"""A report on the spectrum of an update: how large it is, and in how few directions.

Poisoned adapters have been told from clean ones by the singular values of their products, which crowd into fewer
directions (Puertolas Merenciano et al. 2026, https://arxiv.org/abs/2602.15195). That holds for attackers who do not
mind being seen, so this is a report for people to read and to compare over rounds, and no verdict.

With thin QR of both factors, ``B = Q_B R_B`` and ``A^T = Q_A R_A``, the singular values of ``s B A`` are those of the
core ``s R_B R_A^T``, which is at most ``(rank, rank)``; the ``(out, in)`` matrix is never formed.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.adapters import AdapterWeights, LoraFactors
from pomona.aggregation.geometry import head_changes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpectrum:
    """The spectrum of one layer's change; everything is 0 for a zero change.

    Attributes:
        singular_values: ``sigma_i`` in descending order, as many as the least of rank, ``out`` and ``in``.
        norm: Frobenius norm, ``sqrt(sum sigma_i^2)``.
        stable_rank: ``sum sigma_i^2 / sigma_1^2``, at most the rank and hardly moved by small values (Rudelson and
            Vershynin 2007, https://arxiv.org/abs/math/0503442, where it is called the numerical rank).
        effective_rank: ``exp(-sum q_i log q_i)`` with ``q_i = sigma_i / sum sigma``, at most the rank (Roy and
            Vetterli, EUSIPCO 2007, section 2).
        top_share: Share of the energy in the first direction, ``sigma_1^2 / sum sigma_i^2``.
    """

    singular_values: tuple[float, ...]
    norm: float
    stable_rank: float
    effective_rank: float
    top_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSpectrum:
    """The report on one update; ``dataclasses.asdict`` of it is plain JSON.

    Attributes:
        layers: By module name, in sorted order.
        norm: Frobenius norm over all layers, and the changes of heads.
        relative_norm: ``norm`` over the median norm of the cohort, ``None`` where that is 0.
    """

    layers: dict[str, LayerSpectrum]
    norm: float
    relative_norm: float | None


def summary(update: UpdateSpectrum) -> dict[str, float]:
    """Return a report in four numbers, those over layers of the layers that change.

    Returns:
        ``norm``; the median ``stable_rank`` and ``effective_rank``; the largest ``top_share``.
    """
    changed = [layer for layer in update.layers.values() if layer.norm > 0.0]
    if not changed:
        return {"norm": update.norm, "stable_rank": 0.0, "effective_rank": 0.0, "top_share": 0.0}
    return {
        "norm": update.norm,
        "stable_rank": statistics.median(layer.stable_rank for layer in changed),
        "effective_rank": statistics.median(layer.effective_rank for layer in changed),
        "top_share": max(layer.top_share for layer in changed),
    }


def layer_spectrum(factors: LoraFactors) -> LayerSpectrum:
    """Return the spectrum of one layer's change ``s B A``.

    Cost: ``O((out + in) r^2)``, in float64.

    Raises:
        ValueError: The factors or the core of their product are not finite.

    Example:
        >>> report = layer_spectrum(LoraFactors(a=torch.eye(2, 5), b=torch.tensor([[3.0, 0.0], [0.0, 4.0]]), scale=2.0))
        >>> [round(value, 12) for value in report.singular_values], round(report.norm, 12)
        ([8.0, 6.0], 10.0)
        >>> round(report.stable_rank, 12), round(report.top_share, 12)
        (1.5625, 0.64)
    """
    values = _singular_values(factors)
    if not bool(values.any()):
        return LayerSpectrum(
            singular_values=tuple(values.tolist()), norm=0.0, stable_rank=0.0, effective_rank=0.0, top_share=0.0
        )
    relative = values / values[0]  # squares of large values would overflow
    energy, shares = float(relative.square().sum()), relative / relative.sum()
    return LayerSpectrum(
        singular_values=tuple(values.tolist()),
        norm=float(values[0]) * math.sqrt(energy),
        stable_rank=energy,
        effective_rank=math.exp(-float(torch.xlogy(shares, shares).sum())),
        top_share=1.0 / energy,
    )


def update_spectrum(update: AdapterWeights, *, heads: Mapping[str, Tensor], median_norm: float) -> UpdateSpectrum:
    """Return the report on one client's update.

    Args:
        update: Layers with the scales of training, heads as trained.
        heads: The current global heads, by parameter name.
        median_norm: The median norm of the cohort, finite and not negative; ``geometry.norms`` has the norms.

    Raises:
        ValueError: The update is not finite, a head is not a global one or has another shape, or ``median_norm`` is out
            of range.

    Example:
        >>> update = AdapterWeights(layers={"q": LoraFactors(a=torch.ones(1, 4), b=torch.ones(4, 1))})
        >>> round(update_spectrum(update, heads={}, median_norm=2.0).relative_norm, 12)
        2.0
    """
    if not (math.isfinite(median_norm) and median_norm >= 0.0):
        raise ValueError(f"expected a finite median norm that is not negative, got {median_norm}")
    layers = {name: layer_spectrum(update.layers[name]) for name in sorted(update.layers)}
    changes = head_changes(update.heads, current=heads)
    norm = math.hypot(*(layer.norm for layer in layers.values()), *(float(c.norm()) for c in changes.values()))
    if not math.isfinite(norm):
        raise ValueError("expected a finite update, got NaN or an infinity in a head, or a norm beyond float64")
    return UpdateSpectrum(layers=layers, norm=norm, relative_norm=norm / median_norm if median_norm > 0.0 else None)


def _singular_values(factors: LoraFactors) -> Tensor:
    a, b = factors.a.detach().double(), factors.b.detach().double()
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("expected finite factors, got NaN or an infinity")
    r_a, r_b = torch.linalg.qr(a.T, mode="r").R, torch.linalg.qr(b, mode="r").R  # (min(in, r), r), (min(out, r), r)
    core = factors.scale * r_b @ r_a.T
    if not bool(torch.isfinite(core).all()):
        raise ValueError("expected factors with a finite product, got NaN or an infinity")
    values: Tensor = torch.linalg.svdvals(core)
    return values
