"""What is known as tensors with names: factors, statistics of classes, sums of random features.

A symmetric matrix is kept as its upper triangle, row by row. Factors have the names of every payload.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pomona.adapters import LoraFactors
from pomona.continual.encoder import Adapter
from pomona.continual.heads import NormalEquations, RidgeSums
from pomona.continual.statistics import ClassStatistics
from pomona.manifest import LORA_A, LORA_B


def adapter_to_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return an adapter's factors by their names in a payload, scale folded into ``B``."""
    tensors = {f"{LORA_A}{name}": factors.a for name, factors in sorted(adapter.items())}
    return tensors | {
        f"{LORA_B}{name}": factors.b if factors.scale == 1.0 else factors.scale * factors.b
        for name, factors in sorted(adapter.items())
    }


def adapter_from_tensors(tensors: Mapping[str, Tensor]) -> Adapter:
    """Read what :func:`adapter_to_tensors` gave, among other tensors."""
    names = sorted(key.removeprefix(LORA_A) for key in tensors if key.startswith(LORA_A))
    return {name: LoraFactors(a=tensors[f"{LORA_A}{name}"], b=tensors[f"{LORA_B}{name}"]) for name in names}


def statistics_to_tensors(classes: Sequence[ClassStatistics]) -> dict[str, Tensor]:
    """Return the statistics of some classes side by side: ``count``, ``total`` and ``moment``; nothing for none."""
    if not classes:
        return {}
    moments = [each.moment if each.moment.ndim == 1 else _upper(each.moment) for each in classes]
    return {
        "count": torch.tensor([each.count for each in classes]),
        "total": torch.stack([each.total for each in classes]),
        "moment": torch.stack(moments),
    }


def statistics_from_tensors(tensors: Mapping[str, Tensor]) -> tuple[ClassStatistics, ...]:
    """Read what :func:`statistics_to_tensors` gave."""
    if not tensors:
        return ()
    rows = zip(tensors["count"].tolist(), tensors["total"], tensors["moment"], strict=True)
    return tuple(
        ClassStatistics(count, total, moment if moment.shape == total.shape else square(moment))
        for count, total, moment in rows
    )


def ridge_to_tensors(sums: RidgeSums | None) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return sums of random features, and how many examples each counts; nothing for None."""
    parts = [] if sums is None else [("total", sums.total), ("held_out", sums.held_out)]
    tensors = {f"{name}.gram": _upper(part.gram) for name, part in parts}
    tensors |= {f"{name}.cross": part.cross for name, part in parts if part.cross.numel()}
    return tensors, {name: part.count for name, part in parts}


def ridge_from_tensors(tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> RidgeSums | None:
    """Read what :func:`ridge_to_tensors` gave."""
    if not counts:
        return None
    found = []
    for name in ("total", "held_out"):
        gram = square(tensors[f"{name}.gram"])
        cross = tensors.get(f"{name}.cross", gram.new_zeros(len(gram), 0))
        found.append(NormalEquations(gram, cross, counts[name]))
    return RidgeSums(*found)


def within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _upper(matrix: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric matrix, row by row."""
    return matrix[tuple(torch.triu_indices(*matrix.shape))]


def square(upper: Tensor) -> Tensor:
    """Return the symmetric matrix of an upper triangle, row by row."""
    side = _side(upper)
    matrix = upper.new_zeros(side, side)
    rows, columns = torch.triu_indices(side, side)
    matrix[rows, columns] = upper
    matrix[columns, rows] = upper
    return matrix


def _side(upper: Tensor) -> int:
    side = (math.isqrt(8 * len(upper) + 1) - 1) // 2
    if side * (side + 1) // 2 != len(upper):
        raise ValueError(f"expected the triangle of a square matrix, got {len(upper)} entries")
    return side
