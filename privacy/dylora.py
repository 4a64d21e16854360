"""DP-DyLoRA: one rank a round for everybody, drawn from public randomness; what a client contributes, and its effect.

Xu et al. 2024, https://arxiv.org/abs/2405.06368: DyLoRA (Valipour et al. 2023, https://arxiv.org/abs/2210.07558) trains
the first ``b`` components of nested factors ``A (R, in)``, ``B (out, R)``, so that one adapter serves every rank. A
client that chose ``b`` itself would break the promise: rows would be divided by how many trained them, and the bound on
its share of a row that few train is not ``C / n`` but up to ``C``. Here the server draws ``b_t`` once for all, before
anybody is asked, from what everybody may know. So a round is one Gaussian release of the joint change

::

    u_i = (A_i - A[:b], B_i - B[:, :b], head_i - head)    over all modules

whatever ``b_t`` is: epsilon does not depend on it, only the noise that is spread over ``b_t (out + in)`` numbers does.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pomona.adapters import AdapterWeights, LoraFactors
from pomona.manifest import HEAD, LORA_A, LORA_B, split_key
from pomona.seeds import seed_of


def rank_of_round(ranks: tuple[int, int], *, seed: int, round_number: int) -> int:
    """Return ``b_t``, uniform over ``ranks[0]`` to ``ranks[1]``; a function of the run's public seed and the round.

    Raises:
        ValueError: The least is above the most, or below 1.
    """
    least, most = ranks
    if not 1 <= least <= most:
        raise ValueError(f"expected ranks as (least, most), at least 1, got {ranks}")
    return least + seed_of("rank", seed, round_number) % (most - least + 1)


def prefix(weights: AdapterWeights, rank: int) -> AdapterWeights:
    """Return the first ``rank`` components of every layer (all of a narrower one), and the heads."""
    layers = {
        name: LoraFactors(a=each.a[:rank], b=each.b[:, :rank], scale=each.scale)
        for name, each in weights.layers.items()
    }
    return AdapterWeights(layers=layers, heads=weights.heads)


def contribution(after: AdapterWeights, before: AdapterWeights) -> dict[str, Tensor]:
    """Return what a client contributes: how far each factor and head moved, float64.

    Args:
        after: What the client trained, of the names and shapes of ``before``.
        before: What it started from.

    Returns:
        By payload key (``lora_A.<module>`` and so on).

    Raises:
        ValueError: Names or shapes differ.
    """
    old, new = _tensors(before), _tensors(after)
    expected, got = ({key: tuple(tensor.shape) for key, tensor in each.items()} for each in (old, new))
    if expected != got:
        raise ValueError(f"expected tensors {expected}, got {got}")
    return {key: new[key].to(torch.float64) - tensor.to(torch.float64) for key, tensor in old.items()}


def moved(before: AdapterWeights, by: Mapping[str, Tensor]) -> AdapterWeights:
    """Return weights moved by the noised mean of contributions, float32; what is wider than it keeps its other rows.

    Args:
        before: The whole adapter, of any rank from that of ``by`` on, with the scales that clients train with.
        by: As :func:`contribution` returns it, of a prefix.
    """
    layers = {
        name: LoraFactors(
            a=_added(each.a, by.get(f"{LORA_A}{name}")),
            b=_added(each.b.T, _transposed(by.get(f"{LORA_B}{name}"))).T.contiguous(),
            scale=each.scale,
        )
        for name, each in before.layers.items()
    }
    return AdapterWeights(
        layers=layers, heads={name: _added(head, by.get(f"{HEAD}{name}")) for name, head in before.heads.items()}
    )


def shapes_of(weights: AdapterWeights) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the contributions of clients who start from these weights, by payload key."""
    return {key: tuple(tensor.shape) for key, tensor in _tensors(weights).items()}


def _tensors(weights: AdapterWeights) -> dict[str, Tensor]:
    found = {f"{HEAD}{name}": head for name, head in weights.heads.items()}
    for name, each in weights.layers.items():
        found |= {f"{LORA_A}{name}": each.a, f"{LORA_B}{name}": each.b}
    for key in found:
        split_key(key)
    return found


def _added(tensor: Tensor, change: Tensor | None) -> Tensor:
    """Return a tensor with a change added to its first rows."""
    wide = tensor.to(torch.float64).clone()
    if change is not None:
        wide[: change.shape[0]] += change
    return wide.to(torch.float32)


def _transposed(change: Tensor | None) -> Tensor | None:
    return None if change is None else change.T
