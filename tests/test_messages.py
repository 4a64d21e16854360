"""Records and payloads as Flower messages: whatever the size, what goes in comes out, in as few objects as may be."""

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from pomona import messages
from pomona.errors import PayloadError
from pomona.messages import content_bytes, pack, tensors, unpack


@pytest.fixture(autouse=True)
def _small(flower_task: None, monkeypatch: pytest.MonkeyPatch) -> None:
    del flower_task
    monkeypatch.setattr(messages, "_INLINE_BYTES", 1000)


def message(content: RecordDict) -> Message:
    return Message(content, dst_node_id=1, message_type="train")


@pytest.mark.parametrize(("size", "objects"), [(0, 3), (1, 3), (1000, 3), (1001, 6), (50_000, 6)])
def test_a_payload_comes_out_as_it_went_in(size: int, objects: int) -> None:
    """Every object costs the server a request when it comes and another when it goes."""
    payload = bytes(number % 251 for number in range(size))
    packed = message(pack("update", '{"a": 1}', payload))
    assert unpack(packed) == ("update", '{"a": 1}', payload)
    assert size <= content_bytes(packed) <= size + 100
    assert len(get_all_nested_objects(packed)) == objects


@pytest.mark.parametrize(
    ("facts", "arrays", "reason"),
    [
        ({"kind": "update"}, None, "one record of facts"),
        ({"kind": "update", "json": "{}", "more": 1}, None, "one record of facts"),
        ({"kind": "update", "json": "{}", "payload": "text"}, None, "a payload of bytes, got str"),
        ({"kind": "update", "json": "{}", "payload": 3}, None, "a payload of bytes, got int"),
        ({"kind": "update", "json": "{}", "payload": b"one"}, tensors(b"two"), "expected one"),
        ({"kind": "update", "json": "{}"}, ArrayRecord(), "expected one"),
    ],
)
def test_other_contents_are_refused(facts: dict[str, str], arrays: ArrayRecord | None, reason: str) -> None:
    content = RecordDict({"facts": ConfigRecord({**facts})})
    if arrays is not None:
        content["tensors"] = arrays
    with pytest.raises(PayloadError, match=reason):
        unpack(message(content))


def test_the_size_of_what_cannot_be_read_is_known_too() -> None:
    """Replies are grouped by size before anybody looks into them."""
    content = RecordDict({"x": ConfigRecord({"y": b"12345", "z": [b"a", b"bc"], "n": 1}), "tensors": tensors(b"123")})
    assert content_bytes(message(content)) == 5 + 3 + 8 + 3
