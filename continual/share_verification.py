"""Decide whether the sums that an owner states can be sums of features.

Features have length 1, so whatever examples there are, with ``n`` of a class, ``s`` their sum and ``S`` their moments::

    tr S = n,      [n s^T; s S] is positive semi-definite,      n >= 0, and all are 0 where n is

and likewise for random features ``h = relu(f R)`` with ``G = sum h h^T`` and ``Q = sum h y^T``: ``[G Q; Q^T diag(n)]``
is positive semi-definite, no entry is negative, and the held-out part is within the whole. Sums that pass are those of
some features, or of a mixture of such; whose examples they are of, no check can say.
"""

import torch
from torch import Tensor

from pomona.adapters import AdapterWeights
from pomona.aggregation.verify import update_norm
from pomona.continual.encoder import Adapter
from pomona.continual.heads import LinearHead, RidgeSums, random_projection
from pomona.continual.knowledge import TaskKnowledge
from pomona.continual.statistics import ClassStatistics
from pomona.errors import PayloadError
from pomona.mos_settings import MosSettings

_LENGTH_TOLERANCE = 1e-4  # features are float32: their squared lengths are 1 within a few units in the last place
_ROUNDING = 1e-9


def verify_sums(part: TaskKnowledge, *, num_examples: int, settings: MosSettings) -> None:
    """Do nothing if sums can be those of so many examples.

    Args:
        part: Of one owner; all numbers are finite, no count is negative.
        num_examples: That the owner states.
        settings: Of the stream.

    Raises:
        PayloadError: With the first thing that is wrong.
    """
    counts = [each.count for each in part.statistics]
    if counts != [each.count for each in part.first] or sum(counts) != num_examples:
        raise PayloadError(f"expected counts of {num_examples} examples, the same under both adapters, got {counts}")
    for label, own, first in zip(part.classes, part.statistics, part.first, strict=True):
        check_class(label, own)
        if first is not own:
            check_class(label, first)
    if part.ridge is not None:
        check_ridge(part.ridge, counts, settings, width=part.head.weight.shape[1])


def verify_adapter(adapter: Adapter, head: LinearHead, *, most: float) -> None:
    """Do nothing if an adapter and its head are no larger than allowed, as Frobenius norm over all layers and the head.

    Raises:
        PayloadError: They are.
    """
    weights = AdapterWeights(layers=adapter, heads={"weight": head.weight, "bias": head.bias})
    norm = update_norm(weights.layers, weights.heads)
    if not norm <= most:
        raise PayloadError(f"Frobenius norm {norm:.6g} is above max_update_norm={most:g}")


def check_class(label: str, kept: ClassStatistics) -> None:
    """Do nothing if statistics can be those of features of length 1.

    Raises:
        PayloadError: They cannot.
    """
    n, spread = kept.count, kept.moment if kept.moment.ndim == 1 else kept.moment.diagonal()
    if n == 0:
        if bool(kept.total.any()) or bool(kept.moment.any()):
            raise PayloadError(f"class {label!r} has no examples, but sums that are not zero")
        return
    largest = max(float(kept.total.abs().max()), float(kept.moment.abs().max()))
    if not (abs(float(spread.sum()) - n) <= _LENGTH_TOLERANCE * n and largest <= n * (1 + _LENGTH_TOLERANCE)):
        raise PayloadError(
            f"expected features of length 1, those of class {label!r} have a mean square of {float(spread.sum()) / n:g}"
            f" and sums up to {largest:g} over {n} examples"
        )
    if kept.moment.ndim == 1:
        lowest = float((kept.moment - kept.total.square() / n).min())
    else:
        corner, side = kept.total.new_tensor([[float(n)]]), kept.total[None]
        lowest = _lowest(torch.cat([torch.cat([corner, side], 1), torch.cat([side.T, kept.moment], 1)]))
    if not lowest >= -_ROUNDING * n:
        raise PayloadError(f"the sums of class {label!r} are no sums of features: a variance would be {lowest:.3g}")


def check_ridge(sums: RidgeSums, counts: list[int], settings: MosSettings, *, width: int) -> None:
    """Do nothing if sums can be those of random features of so many examples of each class.

    Raises:
        PayloadError: They cannot.
    """
    total, held_out = sums.total, sums.held_out
    if total.count != sum(counts) or held_out.count > total.count:
        raise PayloadError(f"expected ridge sums of {sum(counts)} examples, got {total.count} and {held_out.count}")
    projection = random_projection(width, settings.ridge_dimensions, seed=settings.seed)
    scale = float(torch.linalg.matrix_norm(projection, 2)) ** 2 * max(total.count, 1)
    parts = (total.gram, total.cross, held_out.gram, held_out.cross)
    largest = max(float(total.gram.trace()), *(float(part.abs().max()) for part in parts))
    if not largest <= scale * (1 + _LENGTH_TOLERANCE):
        raise PayloadError("expected ridge sums of features of length 1, got larger ones")
    fitted = total - held_out
    joint = torch.cat(
        [
            torch.cat([total.gram, total.cross], 1),
            torch.cat([total.cross.T, torch.tensor(counts, dtype=torch.float64).diag()], 1),
        ]
    )
    least = [float(each.min()) for part in (held_out, fitted) for each in (part.gram, part.cross)]
    lowest = min(*least, *map(_lowest, (joint, held_out.gram, fitted.gram)))
    if not lowest >= -_ROUNDING * scale:
        raise PayloadError(f"the ridge sums are no sums of random features: one would be {lowest:.3g}")


def _lowest(symmetric: Tensor) -> float:
    return float(torch.linalg.eigvalsh(symmetric)[0])
