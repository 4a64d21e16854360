"""Check the header of a safetensors payload before any library parses the bytes. Imports no torch.

A payload is ``length (8 bytes, little-endian) | header (JSON, length bytes) | data``; the header gives every
tensor a dtype, a shape and a half-open range of the data. Libraries differ in what they let pass (a key given
twice, a tensor without elements, a million tensors), so one strict reading decides here what a payload says:
every tensor has elements, and together they cover the data exactly, without overlap or hole.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from pomona.errors import PayloadError

_PREFIX_BYTES = 8
_METADATA = "__metadata__"
_MAX_NAME = 300
_MAX_DIMS = 8
_MAX_ELEMENTS = 2**63 - 1
_ITEM_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies in a payload.

    Attributes:
        dtype: In safetensors' notation, such as ``F32``.
        shape: Every dimension is at least 1; a scalar has none.
        start: First byte, counted from the start of the payload.
        end: One past the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadHeader:
    """What a payload contains.

    Attributes:
        tensors: By name, in the order of the header.
        metadata: Free text by key.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def read_header(
    payload: bytes,
    *,
    max_header_bytes: int = 1 << 20,
    max_tensors: int = 4096,
    dtypes: Collection[str] = ("F32",),
) -> PayloadHeader:
    """Read and check the header; the tensors' values are not looked at.

    Args:
        payload: The whole payload: its length is part of the check.
        max_header_bytes: Refuse a longer header unread.
        max_tensors: Refuse more tensors.
        dtypes: The dtypes that are allowed.

    Raises:
        PayloadError: The bytes are not exactly one well-formed payload within the limits.
        ValueError: ``dtypes`` names one that is not known here.

    Example:
        >>> header = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
        >>> read_header(len(header).to_bytes(8, "little") + header + bytes(8)).tensors["x"].shape
        (2,)
    """
    if unknown := set(dtypes) - set(_ITEM_BYTES):
        raise ValueError(f"expected dtypes among {sorted(_ITEM_BYTES)}, got {sorted(unknown)}")
    if len(payload) < _PREFIX_BYTES:
        raise PayloadError(f"expected at least {_PREFIX_BYTES} bytes, got {len(payload)}")
    length = int.from_bytes(payload[:_PREFIX_BYTES], "little")
    data_start = _PREFIX_BYTES + length
    if length > max_header_bytes:
        raise PayloadError(
            f"expected a safetensors header of at most {max_header_bytes} bytes, the first 8 say {length}"
        )
    if data_start > len(payload):
        raise PayloadError(
            f"the header should have {length} bytes, but {len(payload) - _PREFIX_BYTES} follow its length"
        )
    try:
        text = payload[_PREFIX_BYTES:data_start].decode("utf-8")
    except UnicodeDecodeError as error:
        raise PayloadError(f"the header is not UTF-8: {error}") from error
    if not text.startswith("{"):
        raise PayloadError(f"the header should start with '{{', it starts with {text[:8]!r}")
    entries = parse_object(text, source="the header")
    metadata = _read_metadata(entries.pop(_METADATA, {}))
    if len(entries) > max_tensors:
        raise PayloadError(f"expected at most {max_tensors} tensors, got {len(entries)}")
    tensors = {name: _read_tensor(name, entry, data_start=data_start, dtypes=dtypes) for name, entry in entries.items()}
    _check_layout(tensors, start=data_start, end=len(payload))
    return PayloadHeader(tensors=tensors, metadata=metadata)


def parse_object(text: str, *, source: str) -> dict[str, object]:
    """Parse a JSON object without leniency: no key twice, no NaN, no number that overflows.

    Args:
        text: JSON.
        source: What the text is, for the error.

    Raises:
        PayloadError: The text is no JSON object, or not a strict one.

    Example:
        >>> parse_object('{"n": 1, "n": 2}', source="the header")
        Traceback (most recent call last):
        pomona.errors.PayloadError: the header has the key 'n' twice
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in pairs:
            if key in found:
                raise PayloadError(f"{source} has the key {_quote(key)} twice")
            found[key] = value
        return found

    try:
        parsed: object = json.loads(
            text, object_pairs_hook=unique, parse_constant=_finite_float, parse_float=_finite_float
        )
    except RecursionError as error:
        raise PayloadError(f"{source} is nested too deeply") from error
    except ValueError as error:
        raise PayloadError(f"{source} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise PayloadError(f"{source} should be a JSON object, got {type(parsed).__name__}")
    return parsed


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is not finite")
    return value


def _read_metadata(entry: object) -> dict[str, str]:
    if not isinstance(entry, dict):
        raise PayloadError(f"{_METADATA} should be an object, got {type(entry).__name__}")
    for key, value in entry.items():
        if not isinstance(value, str):
            raise PayloadError(f"{_METADATA}[{_quote(key)}] should be text, got {type(value).__name__}")
    return entry


def _read_tensor(name: str, entry: object, *, data_start: int, dtypes: Collection[str]) -> TensorInfo:
    if not 0 < len(name) <= _MAX_NAME:
        raise PayloadError(f"expected a tensor name of 1 to {_MAX_NAME} characters, got {len(name)}")
    if not name.isprintable():
        raise PayloadError(f"tensor name {_quote(name)} has a character that cannot be printed")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise PayloadError(f"tensor {_quote(name)} should have exactly dtype, shape and data_offsets")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise PayloadError(
            f"tensor {_quote(name)} should have dtype {' or '.join(sorted(dtypes))}, got {_quote(str(dtype))}"
        )
    shape = _read_integers(entry["shape"], what=f"shape of tensor {_quote(name)}")
    offsets = _read_integers(entry["data_offsets"], what=f"data_offsets of tensor {_quote(name)}")
    if len(offsets) != 2:
        raise PayloadError(f"tensor {_quote(name)} should have two data_offsets, got {len(offsets)}")
    expected = _count_elements(name, shape) * _ITEM_BYTES[dtype]
    start, end = offsets
    if end - start != expected:
        raise PayloadError(
            f"tensor {_quote(name)} of dtype {dtype} and shape {shape} takes {expected} bytes, "
            f"its data_offsets span {end - start}"
        )
    return TensorInfo(dtype=dtype, shape=shape, start=data_start + start, end=data_start + end)


def _read_integers(entry: object, *, what: str) -> tuple[int, ...]:
    if not isinstance(entry, list) or len(entry) > _MAX_DIMS:
        raise PayloadError(f"{what} should be a list of at most {_MAX_DIMS} integers")
    for item in entry:
        if type(item) is not int or not 0 <= item <= _MAX_ELEMENTS:  # True is an int in Python
            raise PayloadError(f"{what} should hold integers from 0 to 2^63 - 1, got {_quote(str(item))}")
    return tuple(entry)


def _count_elements(name: str, shape: Iterable[int]) -> int:
    count = math.prod(shape)
    if count == 0:
        raise PayloadError(f"tensor {_quote(name)} has no elements")
    if count > _MAX_ELEMENTS:
        raise PayloadError(f"tensor {_quote(name)} overflows: {count} elements")
    return count


def _check_layout(tensors: Mapping[str, TensorInfo], *, start: int, end: int) -> None:
    cursor = start
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        if info.start < cursor:
            raise PayloadError(f"tensor {_quote(name)} overlaps the one before it by {cursor - info.start} bytes")
        if info.start > cursor:
            raise PayloadError(f"a hole of {info.start - cursor} bytes lies before tensor {_quote(name)}")
        cursor = info.end
    if cursor > end:
        raise PayloadError(f"the payload is truncated: expected {cursor} bytes, got {end}")
    if cursor < end:
        raise PayloadError(f"{end - cursor} trailing bytes belong to no tensor")


def _quote(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
