"""What one client adds to the sum of a round, the same for whoever computes it: the coordinator, or the client itself.

==========  =================================================
mechanism   contribution ``u_i``, before it is clipped
==========  =================================================
dp-lora     ``A_i - A, B_i - B, head_i - head``
dp-dylora   the same, of the first ``b_t`` components
ffa         ``B_i - B, head_i - head``
ffa-nested  ``s_i pad(B_i - B), head_i - head``, with ``B = 0``
==========  =================================================

With orthonormal rows in ``A_t`` the norm of ``s_i B_i`` is that of the update ``s_i B_i A_t``, so the last clips what
the client changes. What becomes of the mean is in :mod:`pomona.coordinator.private_method`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pomona.adapters import AdapterWeights
from pomona.manifest import HEAD, LORA_A, LORA_B, AdapterManifest
from pomona.privacy import dylora
from pomona.protocol import SumMechanism
from pomona.settings import TrainingSettings

Shapes = Mapping[str, tuple[int, ...]]


def shapes(
    mechanism: SumMechanism, manifest: AdapterManifest, *, training: TrainingSettings, rank: int
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a contribution, by payload key (``lora_A.<module>`` and so on).

    Args:
        mechanism: What is summed.
        manifest: Of the adapter.
        training: Whose pattern gives each layer its rank.
        rank: That all clients of the round train; where each has its own, the largest that one may have.
    """
    found: dict[str, tuple[int, ...]] = {f"{HEAD}{name}": shape for name, shape in manifest.heads.items()}
    for name, (out, in_) in manifest.layers.items():
        wide = training.layer_rank(name, rank)
        found[f"{LORA_B}{name}"] = (out, wide)
        if mechanism in {"dp-lora", "dp-dylora"}:
            found[f"{LORA_A}{name}"] = (wide, in_)
    return found


def contribution(
    mechanism: SumMechanism, after: AdapterWeights, before: AdapterWeights, *, scale: float, into: Shapes
) -> dict[str, Tensor]:
    """Return what a client contributes before it is clipped, float64, by payload key.

    Args:
        mechanism: What is summed.
        after: What the client trained.
        before: What it started from, in the same parameters: names and shapes of ``after``.
        scale: What stands in front of ``B A`` on the client.
        into: Shapes of a contribution in this round.

    Raises:
        ValueError: Names or shapes differ, or do not fit into a contribution.
    """
    moves = dylora.contribution(after, before)
    if not into.keys() <= moves.keys():
        raise ValueError(f"expected tensors {sorted(into)}, got {sorted(moves)}")
    if mechanism != "ffa-nested":
        return {key: moves[key] for key in into}
    return {key: _padded(scale * moves[key], into[key]) if key.startswith(LORA_B) else moves[key] for key in into}


def _padded(b: Tensor, shape: tuple[int, ...]) -> Tensor:
    if b.shape[0] != shape[0] or b.shape[1] > shape[1]:
        raise ValueError(f"expected a B of at most {shape}, got {tuple(b.shape)}")
    wide = torch.zeros(shape, dtype=torch.float64)
    wide[:, : b.shape[1]] = b
    return wide
