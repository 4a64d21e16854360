"""Records and payloads as Flower messages, both ways. The only module besides the apps that knows Flower's records."""

from typing import Final

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from pomona.errors import PayloadError

_KIND: Final = "kind"
_JSON: Final = "json"
_FACTS: Final = "facts"
_TENSORS: Final = "tensors"
_PAYLOAD: Final = "payload"
_STYPE: Final = "pomona.safetensors"
_MAX_JSON_CHARS = 1 << 20
_INLINE_BYTES = 1 << 20


def pack(kind: str, json: str, payload: bytes = b"") -> RecordDict:
    """Return the content of a message.

    A small payload travels within the facts. As an array it would be three objects more, and every object of a message
    costs the server a request when it comes and another when it goes, each with some queries.

    Args:
        kind: Name of the record class that ``json`` is one of.
        json: The record.
        payload: Tensors, one safetensors file; empty: none.
    """
    small = 0 < len(payload) <= _INLINE_BYTES
    content = RecordDict({_FACTS: ConfigRecord({_KIND: kind, _JSON: json, **({_PAYLOAD: payload} if small else {})})})
    if payload and not small:
        content[_TENSORS] = tensors(payload)
    return content


def tensors(payload: bytes) -> ArrayRecord:
    """Return a payload as Flower's record of arrays, which it cuts into chunks where it is large."""
    return ArrayRecord({_PAYLOAD: Array(dtype="uint8", shape=(len(payload),), stype=_STYPE, data=payload)})


def unpack(message: Message) -> tuple[str, str, bytes]:
    """Return the kind, the record's JSON and the payload of a message.

    Raises:
        PayloadError: The content is not what :func:`pack` makes.
    """
    facts = message.content.config_records.get(_FACTS)
    if facts is None or set(facts) - {_PAYLOAD} != {_KIND, _JSON}:
        raise PayloadError("expected a message with one record of facts, got another content")
    kind, json, small = facts[_KIND], facts[_JSON], facts.get(_PAYLOAD, b"")
    if not isinstance(kind, str) or not isinstance(json, str) or len(json) > _MAX_JSON_CHARS:
        raise PayloadError("expected the facts of a message as text of at most 1 MiB, got something else")
    if not isinstance(small, bytes):
        raise PayloadError(f"expected a payload of bytes, got {type(small).__name__}")
    arrays = message.content.array_records.get(_TENSORS)
    if arrays is None:
        return kind, json, small
    if small or set(arrays) != {_PAYLOAD} or arrays[_PAYLOAD].stype != _STYPE:
        raise PayloadError(f"expected one {_STYPE} payload, got {sorted(arrays)[:3]}")
    return kind, json, arrays[_PAYLOAD].data


def content_bytes(message: Message) -> int:
    """Return about how much memory the content of a message takes, whatever it is."""
    if not message.has_content():
        return 0
    records = message.content.array_records.values()
    arrays = sum(len(array.data) for record in records for array in record.values())
    return arrays + sum(_size(value) for record in message.content.config_records.values() for value in record.values())


def _size(value: object) -> int:
    if isinstance(value, (bytes, str)):
        return len(value)
    return sum(map(_size, value)) if isinstance(value, list) else 8
