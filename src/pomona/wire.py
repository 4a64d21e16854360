"""Turn adapters and updates into bytes and back, bit for bit.

A payload is one safetensors file in float32. Its keys are those of :mod:`pomona.manifest`; everything that
is not a tensor travels as one JSON object under the metadata key ``pomona``, its keys sorted, so that equal
inputs have equal bytes and one SHA-256. Decoding checks the form only: whether the values are finite, small
enough and the ones that were asked for is for :mod:`pomona.aggregation.verify` to say.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save
from torch import Tensor

from pomona.adapters import AdapterUpdate, AdapterWeights, LoraFactors
from pomona.errors import PayloadError
from pomona.manifest import HEAD, LORA_A, LORA_B, split_key
from pomona.payload import TensorInfo, parse_object, read_header

_METADATA_KEY = "pomona"
_WIDENED_EXACTLY = (torch.float32, torch.bfloat16, torch.float16)


Factor = Literal["a", "b"]


def encode_weights(
    weights: AdapterWeights, *, metadata: Mapping[str, object] | None = None, without: Factor | None = None
) -> bytes:
    """Encode an adapter; equal adapters and metadata give equal bytes.

    Args:
        weights: Factors with scale 1, so that ``b @ a`` is all that a reader needs; float32, or a narrower
            float, which is widened.
        metadata: Anything that JSON can say, finite numbers only.
        without: A factor that the reader has already.

    Raises:
        ValueError: A scale is not 1, a dtype would have to be rounded, a tensor or its name could not be read
            back, or the metadata are no JSON.
    """
    tensors: dict[str, Tensor] = {}
    for module, factors in weights.layers.items():
        if factors.scale != 1.0:
            raise ValueError(f"layer {module!r} should have scale 1, got {factors.scale}; fold it into b first")
        if without != "a":
            tensors[LORA_A + module] = factors.a
        if without != "b":
            tensors[LORA_B + module] = factors.b
    tensors |= {HEAD + name: tensor for name, tensor in weights.heads.items()}
    try:
        text = json.dumps(dict(metadata or {}), sort_keys=True, allow_nan=False, separators=(",", ":"))
    except TypeError as error:
        raise ValueError(f"metadata should be JSON: {error}") from error
    payload = save({key: _to_float32(key, tensor) for key, tensor in tensors.items()}, {_METADATA_KEY: text})
    try:
        read_header(payload)
        for key in tensors:
            split_key(key)
    except (PayloadError, ValueError) as error:
        raise ValueError(f"the adapter cannot be sent, nobody could read it back: {error}") from error
    return payload


def decode_weights(
    payload: bytes,
    *,
    allow_empty_layers: bool = True,
    known: Mapping[str, Tensor] | None = None,
    known_factor: Factor | None = None,
) -> tuple[AdapterWeights, dict[str, object]]:
    """Decode an adapter and its metadata; NaN and infinities are decoded as they are.

    Args:
        payload: What :func:`encode_weights` made, or anything else.
        allow_empty_layers: Accept an adapter without low-rank layers.
        known: By module, the factor that did not travel.
        known_factor: Which that is; None: both travel.

    Returns:
        The adapter, modules in sorted order, all scales 1; and the metadata, ``{}`` if there are none.

    Raises:
        PayloadError: The bytes are not a well-formed adapter.

    Example:
        >>> factors = LoraFactors(a=torch.ones(1, 3), b=torch.zeros(2, 1))
        >>> payload = encode_weights(AdapterWeights(layers={"query": factors}), metadata={"version": 3})
        >>> weights, metadata = decode_weights(payload)
        >>> list(weights.layers), weights.rank, metadata
        (['query'], 1, {'version': 3})
    """
    header = read_header(payload)
    if unknown := set(header.metadata) - {_METADATA_KEY}:
        raise PayloadError(f"expected no metadata but {_METADATA_KEY!r}, got {sorted(unknown)[0][:80]!r}")
    metadata = parse_object(header.metadata.get(_METADATA_KEY, "{}"), source="the metadata")
    found: dict[str, dict[str, Tensor]] = {"lora_A": {}, "lora_B": {}, "head": {}}
    for key, info in sorted(header.tensors.items()):
        try:
            kind, name = split_key(key)
        except ValueError as error:
            raise PayloadError(str(error)) from error
        found[kind][name] = _read_tensor(payload, info)
    down, up = found["lora_A"], found["lora_B"]
    if known_factor == "a":
        down = _completed(down, known or {}, up, kind=LORA_A)
    if known_factor == "b":
        up = _completed(up, known or {}, down, kind=LORA_B)
    layers = _pair(down, up)
    if not layers and not allow_empty_layers:
        raise PayloadError("expected an adapter with low-rank layers, got none")
    return AdapterWeights(layers=layers, heads=found["head"]), metadata


def encode_update(update: AdapterUpdate, *, without: Factor | None = None) -> bytes:
    """Encode a client's update, its factors unscaled (``scale == 1`` in the record).

    Args:
        update: The update.
        without: A factor that was not trained, which the coordinator has.

    Raises:
        ValueError: As in :func:`encode_weights`, or a field could not be read back.
    """
    facts = {name: getattr(update, name) for name in _UpdateFacts.model_fields if name != "format"}
    try:
        stated = _UpdateFacts(format=_UPDATE_FORMAT, **facts)
    except ValidationError as error:
        raise ValueError(f"the update cannot be sent: {_explain(error)}") from error
    return encode_weights(update.weights, metadata=stated.model_dump(), without=without)


def decode_update(
    payload: bytes, *, known: Mapping[str, Tensor] | None = None, known_factor: Factor | None = None
) -> AdapterUpdate:
    """Decode what a client states; types are checked, claims are not.

    Args:
        payload: What :func:`encode_update` made, or anything else.
        known: By module, the factor that was not trained.
        known_factor: Which that is; None: both travel.

    Raises:
        PayloadError: The bytes are not a well-formed update.
    """
    weights, metadata = decode_weights(payload, known=known, known_factor=known_factor)
    try:
        stated = _UpdateFacts.model_validate(metadata)
    except ValidationError as error:
        raise PayloadError(f"the update's metadata are malformed: {_explain(error)}") from error
    return AdapterUpdate(weights=weights, **stated.model_dump(exclude={"format"}))


def digest(payload: bytes) -> str:
    """Return the SHA-256 of a payload, 64 hexadecimal digits."""
    return hashlib.sha256(payload).hexdigest()


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("should hold printable characters only")
    return text


_UPDATE_FORMAT: Literal["update/1"] = "update/1"
_Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Printable = AfterValidator(_printable)
_Name = Annotated[str, Field(min_length=1, max_length=100), _Printable]
_Reference = Annotated[str, Field(max_length=200), _Printable]


class _UpdateFacts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    format: Literal["update/1"]
    client: _Name
    run_id: _Name
    round_number: _Int64
    parent: _Reference
    base_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    rank: _Int64
    alpha: float
    rslora: bool
    num_examples: _Int64
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    train_loss: float


def _to_float32(key: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in _WIDENED_EXACTLY:
        raise ValueError(f"{key} should be float32, got {tensor.dtype}; convert it where the rounding is meant")
    # a copy, because safetensors refuses tensors that share memory (tied weights)
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _read_tensor(payload: bytes, info: TensorInfo) -> Tensor:
    # cut by the header that was checked: a second parser could read the same bytes differently
    data = bytearray(memoryview(payload)[info.start : info.end])
    return torch.frombuffer(data, dtype=torch.float32).reshape(info.shape)


def _completed(
    found: Mapping[str, Tensor], known: Mapping[str, Tensor], other: Mapping[str, Tensor], *, kind: str
) -> dict[str, Tensor]:
    if found:
        raise PayloadError(f"expected no {kind}*, which was not trained, got {kind}{sorted(found)[0]}")
    return {module: known[module] for module in other if module in known}


def _pair(down: Mapping[str, Tensor], up: Mapping[str, Tensor]) -> dict[str, LoraFactors]:
    if lonely := sorted(down.keys() ^ up.keys()):
        present, absent = (LORA_A, LORA_B) if lonely[0] in down else (LORA_B, LORA_A)
        raise PayloadError(f"{present}{lonely[0]} came without {absent}{lonely[0]}")
    layers = {}
    for module, a in down.items():
        try:
            layers[module] = LoraFactors(a=a, b=up[module])
        except ValueError as error:
            raise PayloadError(f"layer {module!r}: {error}") from error
    return layers


def _explain(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, item['loc']))[:80]}: {item['msg']}, got {str(item['input'])[:80]!r}"
        for item in error.errors(include_url=False)[:5]
    )
