"""What two processes must draw alike: seeds, and the factors that everybody starts a round from."""

import hashlib
import math

import torch
from torch import Tensor


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed that is a function of its parts, the same on every machine."""
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_of(*parts: object) -> torch.Generator:
    """Return a CPU generator seeded by :func:`seed_of`."""
    return torch.Generator().manual_seed(seed_of(*parts))


def fresh_a(module: str, rank: int, in_features: int, *, seed: int) -> Tensor:
    """Return the down-projection that every client starts a round from, ``(rank, in)``.

    Uniform in ``[-1/sqrt(in), 1/sqrt(in)]``, which is PEFT's Kaiming initialisation. One stream of numbers fills
    the rows in order, so a smaller rank gets the first rows of a larger one.
    """
    bound = 1.0 / math.sqrt(in_features)
    return (torch.rand(rank, in_features, generator=generator_of("lora_A", seed, module)) * 2 - 1) * bound


def orthonormal_a(module: str, rank: int, in_features: int, *, seed: int) -> Tensor:
    """Return a down-projection with orthonormal rows, ``(rank, in)``, that knows nothing of any data.

    Gram-Schmidt (by QR in float64) on normal rows, so a smaller rank gets the first rows of a larger one. With
    ``A A^T = I`` the norm of ``B A`` is that of ``B``: clipping ``B`` is clipping the update.

    Raises:
        ValueError: More rows than a space of ``in`` dimensions has directions.
    """
    if rank > in_features:
        raise ValueError(f"expected at most {in_features} orthonormal rows, got rank {rank}")
    generator = generator_of("orthonormal_A", seed, module)
    # row by row, because torch draws the numbers of one call in blocks that depend on how many there are
    rows = torch.stack([torch.randn(in_features, generator=generator, dtype=torch.float64) for _ in range(rank)])
    q, r = torch.linalg.qr(rows.T)  # (in, rank), (rank, rank)
    columns: Tensor = q * r.diagonal().sign()
    return columns.T.float().contiguous()
