"""What an adapter of a run must look like, and how its tensors are named. Imports no torch.

A payload is one safetensors file. Its keys say what a tensor is by prefix, never by shape:
``lora_A.<module>`` is ``(rank, in)``, ``lora_B.<module>`` is ``(out, rank)`` and ``head.<parameter>`` is a
parameter that is trained whole. ``<module>`` and ``<parameter>`` are the names of the base model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LORA_A = "lora_A."
LORA_B = "lora_B."
HEAD = "head."

Kind = Literal["lora_A", "lora_B", "head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterManifest:
    """The layers that are adapted and the parameters that are trained whole.

    Attributes:
        base_sha256: Hash of the base model's weights, 64 hexadecimal digits.
        layers: Adapted linear layers by module name, each ``(out, in)``.
        heads: Parameters trained whole, by parameter name, each with its shape.
    """

    base_sha256: str
    layers: Mapping[str, tuple[int, int]]
    heads: Mapping[str, tuple[int, ...]]


def split_key(key: str) -> tuple[Kind, str]:
    """Split a payload key into its kind and the module or parameter it belongs to.

    Raises:
        ValueError: The key has none of the three prefixes, or nothing after it.
    """
    for prefix, kind in _PREFIXES.items():
        if key.startswith(prefix) and len(key) > len(prefix):
            return kind, key[len(prefix) :]
    raise ValueError(f"expected a key that starts with {', '.join(_PREFIXES)}, got {key!r}")


_PREFIXES: dict[str, Kind] = {LORA_A: "lora_A", LORA_B: "lora_B", HEAD: "head"}
