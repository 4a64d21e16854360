"""The records that travel through the whole system: LoRA factors, an adapter, and a client's update."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFactors:
    """A low-rank update ``scale * b @ a`` of one weight matrix.

    Attributes:
        a: Down-projection, shape ``(rank, in)``.
        b: Up-projection, shape ``(out, rank)``.
        scale: The factor in front of the product: ``alpha / rank`` for LoRA (Hu et al. 2021, section 4.1),
            ``alpha / sqrt(rank)`` for rsLoRA (Kalajdzievski 2023).
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ValueError(
                f"expected a: (rank, in) and b: (out, rank) with one rank, "
                f"got a: {tuple(self.a.shape)} and b: {tuple(self.b.shape)}"
            )

    @property
    def rank(self) -> int:
        """The inner dimension of the product."""
        return self.a.shape[0]

    def delta(self) -> Tensor:
        """Return the dense update, shape ``(out, in)``; for tests and small layers."""
        return self.scale * self.b @ self.a


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterWeights:
    """The trained part of a model: low-rank layers, and parameters trained whole.

    Attributes:
        layers: Factors by module name. A module that is absent has a zero update.
        heads: Parameters trained whole (a classifier), by parameter name.
    """

    layers: Mapping[str, LoraFactors] = field(default_factory=dict)
    heads: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of any layer, 0 when there is none."""
        return max((factors.rank for factors in self.layers.values()), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterUpdate:
    """What one client sends back after training, as the client states it: not yet verified.

    Attributes:
        client: Name of the client.
        run_id: The run it was trained for.
        round_number: The round it was trained for, from 1.
        parent: Reference of the global version it was trained on, ``""`` in the first round.
        base_sha256: Hash of the base model it was trained on.
        rank: LoRA rank of every layer.
        alpha: LoRA alpha; the factors themselves are unscaled.
        rslora: Whether the scale is ``alpha / sqrt(rank)`` rather than ``alpha / rank``.
        num_examples: Size of the client's training set.
        nonce: Random, new for every update, 32 hexadecimal digits.
        weights: The trained factors and heads.
        train_loss: Mean loss of the last local epoch.
    """

    client: str
    run_id: str
    round_number: int
    parent: str
    base_sha256: str
    rank: int
    alpha: float
    rslora: bool = False
    num_examples: int
    nonce: str
    weights: AdapterWeights
    train_loss: float = 0.0
