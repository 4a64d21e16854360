"""Apply the defence of a run to the updates of a round. The defences themselves are in :mod:`.robust`.

What is judged is the change that a client made, ``s B A - s B_0 A_0`` with what it started from, and the change of its
heads; for a fresh adapter ``B_0 = 0``. The weights that come out are used as they are, in a sum of changes.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from pomona.adapters import AdapterWeights, LoraFactors
from pomona.aggregation.flora import stack
from pomona.aggregation.geometry import gram_matrix, head_changes
from pomona.aggregation.robust import (
    Defended,
    fltrust,
    geometric_median,
    median_bound,
    multi_krum,
    norm_bounding,
    trimmed_mean,
    trusted,
)
from pomona.aggregation_settings import DefenceSettings


def change(trained: AdapterWeights, *, start: Mapping[str, LoraFactors], heads: Mapping[str, Tensor]) -> AdapterWeights:
    """Return what a client changed.

    Args:
        trained: Its factors with the scale of its training, and its heads.
        start: What its adapter was before the first step; empty: nothing (``B = 0``).
        heads: The global ones that it started from.
    """
    layers = {
        name: stack([_wide(factors), _wide(start[name])], weights=[1.0, -1.0]) if name in start else factors
        for name, factors in trained.layers.items()
    }
    return AdapterWeights(layers=layers, heads=head_changes(trained.heads, current=heads))


def _wide(factors: LoraFactors) -> LoraFactors:
    return LoraFactors(a=factors.a.double(), b=factors.b.double(), scale=factors.scale)  # scaled, float32 may overflow


def defend(
    changes: Sequence[AdapterWeights],
    *,
    weights: Sequence[float],
    settings: DefenceSettings,
    trusted_change: AdapterWeights | None = None,
) -> Defended:
    """Return what each client counts for.

    Args:
        changes: One per client, see :func:`change`.
        weights: ``p_k``.
        settings: Kind of defence and what it assumes.
        trusted_change: What the coordinator learns itself, for ``fltrust``.

    Raises:
        ValueError: There are too few clients for what the defence assumes, or no change to trust.
    """
    if settings.kind == "none":
        return trusted(weights)
    compared = list(changes)
    if settings.kind == "fltrust":
        if trusted_change is None:
            raise ValueError("fltrust needs a trusted change, got none")
        compared.append(trusted_change)
    shapes = {name: head for each in compared for name, head in each.heads.items()}
    gram = gram_matrix(compared, heads={name: head.new_zeros(head.shape) for name, head in shapes.items()})
    match settings.kind:
        case "norm-bounding":
            bound = median_bound(gram, factor=settings.norm_factor)
            return norm_bounding(gram, weights=weights, bound=bound)
        case "multi-krum":
            selected = len(changes) - settings.attackers
            return multi_krum(gram, weights=weights, attackers=settings.attackers, selected=selected)
        case "trimmed-mean":
            return trimmed_mean(gram, weights=weights, trimmed=settings.attackers)
        case "geometric-median":
            return geometric_median(gram, weights=weights)
        case "fltrust":
            return fltrust(gram, weights=weights)
