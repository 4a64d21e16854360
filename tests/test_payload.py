"""The header check against the payloads that libraries let pass, and against plain garbage."""

import io
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Mapping

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from pomona.errors import PayloadError
from pomona.payload import TensorInfo, parse_object, read_header


def frame(header: str | bytes, data: bytes = b"") -> bytes:
    """Put a header in front of data, whatever it says."""
    raw = header if isinstance(header, bytes) else header.encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(shape: object, offsets: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def payload(tensors: Mapping[str, object], data: bytes) -> bytes:
    return frame(json.dumps(tensors), data)


GOOD = {"a": entry([2], [0, 8]), "b": entry([1, 1], [8, 12])}


def test_reads_what_safetensors_writes() -> None:
    written = save({"x": torch.ones(2, 3), "y": torch.tensor(1.0)}, {"note": "kept"})
    header = read_header(written)
    assert header.metadata == {"note": "kept"}
    assert {name: info.shape for name, info in header.tensors.items()} == {"x": (2, 3), "y": ()}
    x = header.tensors["x"]
    assert written[x.start : x.end] == torch.ones(2, 3).numpy().tobytes()


def test_offsets_are_counted_from_the_start_of_the_payload() -> None:
    good = payload(GOOD, bytes(12))
    start = len(good) - 12
    assert read_header(good).tensors["b"] == TensorInfo(dtype="F32", shape=(1, 1), start=start + 8, end=start + 12)


def test_nothing_at_all_is_a_payload_without_tensors() -> None:
    assert read_header(frame("{}")).tensors == {}


def test_a_wider_set_of_dtypes_can_be_allowed() -> None:
    written = save({"x": torch.zeros(3, dtype=torch.bfloat16)})
    with pytest.raises(PayloadError, match=r"dtype F32, got 'BF16'"):
        read_header(written)
    assert read_header(written, dtypes=("F32", "BF16")).tensors["x"].dtype == "BF16"
    with pytest.raises(PayloadError, match="should have dtype F32"):
        read_header(payload({"a": entry([1], [0, 4], ["F32"])}, bytes(4)), dtypes={"F32"})
    with pytest.raises(ValueError, match="F7"):
        read_header(written, dtypes=("F7",))


def _torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"x": torch.ones(2)}, buffer)
    return buffer.getvalue()


NESTED = "[" * 100_000 + "]" * 100_000

ATTACKS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "at least 8 bytes, got 0"),
    "short": (b"\x02\0\0\0", "at least 8 bytes, got 4"),
    "pickle": (pickle.dumps({"x": 1}), "header of at most"),
    "torch file": (_torch_file(), "header of at most"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff", "but 2 follow its length"),
    "header length 2^62": ((2**62).to_bytes(8, "little") + b"{}", "the first 8 say 4611686018427387904"),
    "header length above the limit": (frame(b"{" + b" " * (1 << 20)), "header of at most 1048576 bytes"),
    "header beyond the payload": ((100).to_bytes(8, "little") + b"{}", "should have 100 bytes, but 2 follow"),
    "not UTF-8": (frame(b'{"\xff": 1}'), "not UTF-8"),
    "UTF-16": (frame("{}".encode("utf-16")), "not UTF-8"),
    "no header": (frame(""), r"start with '\{'"),
    "leading space": (frame(" {}"), r"start with '\{'"),
    "a list": (frame("[]"), r"start with '\{'"),
    "not JSON": (frame("{]"), "not JSON"),
    "two objects": (frame("{}{}"), "not JSON"),
    "NaN": (frame('{"a": NaN}'), "not finite"),
    "a number that overflows": (frame('{"a": 1e999}'), "not finite"),
    "an integer of 5000 digits": (frame('{"a": ' + "1" * 5000 + "}"), "not JSON"),
    "deep nesting": (frame('{"a": ' + NESTED + "}"), "nested too deeply"),
    "duplicate tensor": (
        frame('{"a": %s, "a": %s}' % ((json.dumps(GOOD["a"]),) * 2), bytes(8)),
        "key 'a' twice",
    ),
    "duplicate field": (
        frame('{"a": {"dtype": "F32", "shape": [2], "shape": [1], "data_offsets": [0, 4]}}', bytes(4)),
        "key 'shape' twice",
    ),
    "duplicate metadata": (frame('{"__metadata__": {"x": "1", "x": "2"}}'), "key 'x' twice"),
    "escaped duplicate": (frame(r'{"__metadata__": {"x": "1", "\u0078": "2"}}'), "key 'x' twice"),
    "metadata are a list": (payload({"__metadata__": []}, b""), "__metadata__ should be an object"),
    "metadata hold a number": (payload({"__metadata__": {"x": 1}}, b""), "should be text, got int"),
    "metadata hold an object": (payload({"__metadata__": {"x": {}}}, b""), "should be text, got dict"),
    "metadata with a long key": (
        payload({"__metadata__": {"x" * 100_000: 1}}, b""),
        "should be text, got int",
    ),
    "tensor is a number": (payload({"a": 1}, b""), "exactly dtype, shape and data_offsets"),
    "missing field": (payload({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "exactly dtype"),
    "extra field": (payload({"a": {**entry([1], [0, 4]), "x": 1}}, bytes(4)), "exactly dtype"),
    "dtype F64": (payload({"a": entry([1], [0, 8], "F64")}, bytes(8)), "dtype F32, got 'F64'"),
    "dtype F8": (payload({"a": entry([1], [0, 1], "F8_E4M3")}, bytes(1)), "got 'F8_E4M3'"),
    "dtype made up": (payload({"a": entry([1], [0, 4], "float")}, bytes(4)), "got 'float'"),
    "dtype no text": (payload({"a": entry([1], [0, 4], ["F32"])}, bytes(4)), "should have dtype F32"),
    "shape no list": (payload({"a": entry(2, [0, 8])}, bytes(8)), "shape of tensor 'a' should be a list"),
    "negative dimension": (payload({"a": entry([-1, -2], [0, 8])}, bytes(8)), "2.63 - 1, got '-1'"),
    "boolean dimension": (payload({"a": entry([True], [0, 4])}, bytes(4)), "got 'True'"),
    "float dimension": (payload({"a": entry([2.0], [0, 8])}, bytes(8)), "got '2.0'"),
    "text dimension": (payload({"a": entry(["2"], [0, 8])}, bytes(8)), "got '2'"),
    "nine dimensions": (payload({"a": entry([1] * 9, [0, 4])}, bytes(4)), "at most 8 integers"),
    "dimension of 2^63": (payload({"a": entry([2**63], [0, 8])}, bytes(8)), "9223372036854775808"),
    "product overflows": (payload({"a": entry([2**32, 2**32], [0, 0])}, b""), "overflows"),
    "product wraps to the right size": (payload({"a": entry([2**62, 4, 2], [0, 8])}, bytes(8)), "overflows"),
    "no elements": (payload({"a": entry([0], [0, 0])}, b""), "no elements"),
    "no elements, huge": (payload({"a": entry([2**62, 0], [0, 0])}, b""), "no elements"),
    "one offset": (payload({"a": entry([1], [4])}, bytes(4)), "two data_offsets, got 1"),
    "negative offset": (payload({"a": entry([2], [-8, 0])}, bytes(8)), "got '-8'"),
    "boolean offset": (payload({"a": entry([1], [False, 4])}, bytes(4)), "got 'False'"),
    "offsets reversed": (payload({"a": entry([2], [8, 0])}, bytes(8)), "span -8"),
    "offsets and shape disagree": (payload({"a": entry([3], [0, 8])}, bytes(8)), "takes 12 bytes.*span 8"),
    "overlap": (payload({**GOOD, "b": entry([1], [4, 8])}, bytes(8)), "overlaps"),
    "one range twice": (payload({"a": entry([2], [0, 8]), "b": entry([2], [0, 8])}, bytes(8)), "overlaps"),
    "hole": (
        payload({**GOOD, "b": entry([1], [12, 16])}, bytes(16)),
        "hole of 4 bytes lies before tensor 'b'",
    ),
    "hole at the start": (payload({"a": entry([1], [4, 8])}, bytes(8)), "hole of 4 bytes"),
    "truncated": (payload(GOOD, bytes(11)), "truncated"),
    "trailing bytes": (payload(GOOD, bytes(13)), "1 trailing bytes"),
    "data without tensors": (frame("{}", b"x"), "1 trailing bytes"),
    "name with NUL": (payload({"../passwd\0": entry([1], [0, 4])}, bytes(4)), "cannot be printed"),
    "name with newline": (payload({"a\nb": entry([1], [0, 4])}, bytes(4)), "cannot be printed"),
    "name with right-to-left mark": (
        payload({"a\u202eb": entry([1], [0, 4])}, bytes(4)),
        "cannot be printed",
    ),
    "name with half a character": (frame(r'{"\ud800": {}}'), "cannot be printed"),
    "name too long": (payload({"a" * 301: entry([1], [0, 4])}, bytes(4)), "1 to 300 characters, got 301"),
    "name empty": (payload({"": entry([1], [0, 4])}, bytes(4)), "1 to 300 characters, got 0"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_refuses(name: str) -> None:
    attack, reason = ATTACKS[name]
    with pytest.raises(PayloadError, match=reason) as caught:
        read_header(attack)
    assert len(str(caught.value)) < 400


def test_the_longest_name_and_the_most_tensors_still_pass() -> None:
    assert read_header(payload({"a" * 300: entry([1], [0, 4])}, bytes(4)))
    tensors = {f"t{i}": entry([1], [4 * i, 4 * i + 4]) for i in range(5)}
    assert len(read_header(payload(tensors, bytes(20)), max_tensors=5).tensors) == 5
    with pytest.raises(PayloadError, match="at most 4 tensors, got 5"):
        read_header(payload(tensors, bytes(20)), max_tensors=4)


def test_300_000_empty_tensors_are_refused_at_once() -> None:
    attack = payload({f"t{i}": entry([0], [0, 0]) for i in range(300_000)}, b"")
    start = time.process_time()
    with pytest.raises(PayloadError, match="header of at most"):
        read_header(attack)
    assert time.process_time() - start < 0.05


def test_as_many_tensors_as_fit_a_header_are_refused_by_count() -> None:
    attack = payload({f"t{i}": entry([0], [0, 0]) for i in range(16_000)}, b"")
    assert len(attack) < 1 << 20
    with pytest.raises(PayloadError, match="at most 4096 tensors, got 16000"):
        read_header(attack)


def test_refuses_what_safetensors_lets_pass() -> None:
    """Guards the reason this module exists."""
    twice = frame(
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}',
        bytes(8),
    )
    assert load(twice)["a"].shape == (1, 2)
    with pytest.raises(PayloadError, match="twice"):
        read_header(twice)


def test_needs_no_torch() -> None:
    code = "import sys, pomona.payload; sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[1]", "object, got list"), ("1", "got int"), ("", "not JSON"), ("null", "NoneType")],
)
def test_parse_object_wants_an_object(text: str, reason: str) -> None:
    with pytest.raises(PayloadError, match=f"the note.*{reason}"):
        parse_object(text, source="the note")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
DIMENSIONS = st.lists(st.integers(-1, 4), max_size=3)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16"]) | JSON,
        "shape": DIMENSIONS | JSON,
        "data_offsets": st.lists(st.integers(-4, 32), min_size=2, max_size=2) | JSON,
    }
)


@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRIES | JSON, max_size=3),
    st.binary(max_size=32),
)
@example({"a": entry([2], [0, 8])}, bytes(8))
@settings(deadline=None, max_examples=200)
def test_any_header_is_read_or_refused_and_what_is_read_covers_the_data(header: dict[str, object], data: bytes) -> None:
    attack = payload(header, data)
    try:
        tensors = read_header(attack).tensors
    except PayloadError:
        return
    assert sum(info.end - info.start for info in tensors.values()) == len(data)
    assert set(load(attack)) == set(tensors)


@given(st.binary(max_size=64))
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    for attack in (raw, frame(raw)):
        try:
            read_header(attack)
        except PayloadError:
            continue
