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


def pack(kind: str, json: str, payload: bytes = b"") -> RecordDict:
    """Return the content of a message.

    Args:
        kind: Name of the record class that ``json`` is one of.
        json: The record.
        payload: Tensors, one safetensors file; empty: none.
    """
    content = RecordDict({_FACTS: ConfigRecord({_KIND: kind, _JSON: json})})
    if payload:
        array = Array(dtype="uint8", shape=(len(payload),), stype=_STYPE, data=payload)
        content[_TENSORS] = ArrayRecord({_PAYLOAD: array})
    return content


def unpack(message: Message) -> tuple[str, str, bytes]:
    """Return the kind, the record's JSON and the payload of a message.

    Raises:
        PayloadError: The content is not what :func:`pack` makes.
    """
    facts = message.content.config_records.get(_FACTS)
    if facts is None or set(facts) != {_KIND, _JSON}:
        raise PayloadError("expected a message with one record of facts, got another content")
    kind, json = facts[_KIND], facts[_JSON]
    if not isinstance(kind, str) or not isinstance(json, str) or len(json) > _MAX_JSON_CHARS:
        raise PayloadError("expected the facts of a message as text of at most 1 MiB, got something else")
    tensors = message.content.array_records.get(_TENSORS)
    if tensors is None:
        return kind, json, b""
    if set(tensors) != {_PAYLOAD} or tensors[_PAYLOAD].stype != _STYPE:
        raise PayloadError(f"expected one {_STYPE} payload, got {sorted(tensors)[:3]}")
    return kind, json, tensors[_PAYLOAD].data
