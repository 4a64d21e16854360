"""What is known, as bytes for those who forget a part of it together.

An owner needs all of it: gradients go through what answers, and right answers are counted by it. Statistics of classes
are of people where examples are, and those of all classes go to every owner that takes part.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from pomona.adapters import LoraFactors
from pomona.continual.encoder import Adapter
from pomona.continual.heads import RidgeSums
from pomona.continual.knowledge import Knowledge, TaskKnowledge
from pomona.continual.share_payload import decode_tensors, encode_tensors
from pomona.continual.statistics import ClassStatistics
from pomona.errors import PayloadError
from pomona.manifest import AdapterManifest

Shape = tuple[int, ...]


def encode_known(knowledge: Knowledge) -> bytes:
    """Encode what is known, scales of adapters folded in."""
    return encode_tensors(*knowledge.to_tensors())


def decode_known(payload: bytes, manifest: AdapterManifest, *, width: int, classes: Collection[str]) -> Knowledge:
    """Read what :func:`encode_known` made for an encoder, or anything else.

    Args:
        payload: The bytes.
        manifest: Layers that an adapter has here.
        width: Of features.
        classes: That may be known.

    Raises:
        PayloadError: The bytes are not that, a number is not finite, or a part is of another encoder.
    """
    tensors, facts = decode_tensors(payload)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise PayloadError(f"{name[:80]} has NaN or an infinity")
    knowledge = Knowledge.from_tensors(tensors, facts)
    if strange := sorted(set(knowledge.classes) - set(classes)):
        raise PayloadError(f"expected knowledge of classes of the run, got {strange[0][:80]!r}")
    if not knowledge.tasks:
        raise PayloadError("expected knowledge of some tasks, got none")
    _check("the head", {"weight": knowledge.head.weight}, {"weight": (len(knowledge.classes), width)})
    for edit in knowledge.edits:
        _check_adapter(edit, manifest)
    for task in knowledge.tasks:
        _check_task(task, knowledge, manifest, width)
    return knowledge


def _check_task(task: TaskKnowledge, knowledge: Knowledge, manifest: AdapterManifest, width: int) -> None:
    _check_adapter(task.adapter, manifest)
    moment: Shape = (width,) if knowledge.settings.moments == "diagonal" else (width, width)
    for each in (*task.statistics, *task.first):
        _check_statistics(each, width, moment)
    if task.classes:
        _check(f"task {task.number}", {"head": task.head.weight}, {"head": (len(task.classes), width)})
    if task.ridge is not None:
        _check_ridge(task.ridge, knowledge.settings.ridge_dimensions, len(task.classes))


def _check_adapter(adapter: Adapter, manifest: AdapterManifest) -> None:
    if strange := sorted(adapter.keys() - manifest.layers.keys()):
        raise PayloadError(f"expected adapters on layers of this encoder, got {strange[0][:80]!r}")
    for name, factors in adapter.items():
        outputs, inputs = manifest.layers[name]
        rank = _rank(factors)
        _check(name, {"A": factors.a, "B": factors.b}, {"A": (rank, inputs), "B": (outputs, rank)})


def _rank(factors: LoraFactors) -> int:
    return factors.a.shape[0] if factors.a.ndim else 0


def _check_statistics(each: ClassStatistics, width: int, moment: Shape) -> None:
    found = {"total": each.total, "moment": each.moment}
    _check("statistics", found, {"total": (width,), "moment": moment}, dtype=torch.float64)
    if each.count < 1:
        raise PayloadError(f"expected statistics of examples, got of {each.count}")


def _check_ridge(sums: RidgeSums, side: int, classes: int) -> None:
    for part in (sums.total, sums.held_out):
        found, expected = {"gram": part.gram, "cross": part.cross}, {"gram": (side, side), "cross": (side, classes)}
        _check("sums of random features", found, expected, dtype=torch.float64)


def _check(
    what: str, found: Mapping[str, Tensor], expected: Mapping[str, Shape], *, dtype: torch.dtype = torch.float32
) -> None:
    for name, tensor in found.items():
        if (tuple(tensor.shape), tensor.dtype) != (expected[name], dtype):
            raise PayloadError(
                f"expected {name} of {what[:80]} as {dtype} of shape {expected[name]}, got {tensor.dtype} of "
                f"{tuple(tensor.shape)}"
            )
