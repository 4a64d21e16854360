"""What is sent arrives bit for bit, and what was not sent by us is refused with a reason."""

import dataclasses
import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from pomona.adapters import AdapterUpdate, AdapterWeights, LoraFactors
from pomona.errors import PayloadError
from pomona.wire import decode_update, decode_weights, digest, encode_update, encode_weights

FIELDS = [field.name for field in dataclasses.fields(AdapterUpdate) if field.name != "weights"] + ["format"]


def bits(tensor: Tensor) -> list[int]:
    flat: list[int] = tensor.contiguous().view(torch.int32).flatten().tolist()
    return flat


def make_weights(seed: int = 0, *, rank: int = 2) -> AdapterWeights:
    gen = torch.Generator().manual_seed(seed)
    layers = {
        name: LoraFactors(a=torch.randn(rank, 5, generator=gen), b=torch.randn(4, rank, generator=gen))
        for name in ("encoder.1.query", "encoder.0.query")
    }
    return AdapterWeights(layers=layers, heads={"classifier.bias": torch.randn(3, generator=gen)})


def make_update(**changes: object) -> AdapterUpdate:
    update = AdapterUpdate(
        client="clinic-a",
        run_id="run-1",
        round_number=2,
        parent="notes/1",
        base_sha256="0" * 64,
        rank=2,
        alpha=4.0,
        rslora=False,
        num_examples=17,
        nonce="f" * 32,
        weights=make_weights(),
        train_loss=0.25,
    )
    return dataclasses.replace(update, **changes)  # type: ignore[arg-type]


def assert_same_weights(one: AdapterWeights, other: AdapterWeights) -> None:
    assert set(one.layers) == set(other.layers)
    assert set(one.heads) == set(other.heads)
    for name, factors in one.layers.items():
        assert other.layers[name].scale == factors.scale
        assert other.layers[name].a.shape == factors.a.shape
        assert other.layers[name].b.shape == factors.b.shape
        assert bits(other.layers[name].a) == bits(factors.a)
        assert bits(other.layers[name].b) == bits(factors.b)
    for name, head in one.heads.items():
        assert other.heads[name].shape == head.shape
        assert bits(other.heads[name]) == bits(head)


def test_weights_arrive_bit_for_bit() -> None:
    sent = make_weights()
    arrived, metadata = decode_weights(encode_weights(sent, metadata={"version": 3, "tags": ["a", "ü"]}))
    assert_same_weights(sent, arrived)
    assert list(arrived.layers) == ["encoder.0.query", "encoder.1.query"]
    assert metadata == {"version": 3, "tags": ["a", "ü"]}


@given(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
@settings(deadline=None)
def test_every_bit_pattern_arrives(patterns: list[int]) -> None:
    values = torch.frombuffer(bytearray(struct.pack("<6I", *patterns)), dtype=torch.float32)
    sent = AdapterWeights(
        layers={"q": LoraFactors(a=values[:2].reshape(1, 2), b=values[2:4].reshape(2, 1))},
        heads={"bias": values[4:]},
    )
    assert_same_weights(sent, decode_weights(encode_weights(sent))[0])


def test_values_that_are_not_finite_and_subnormal_ones_arrive() -> None:
    odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45, 3.4e38])
    arrived, _ = decode_weights(encode_weights(AdapterWeights(heads={"bias": odd})))
    assert bits(arrived.heads["bias"]) == bits(odd)


def test_an_update_arrives_as_it_was() -> None:
    sent = make_update(alpha=math.pi, rslora=True, parent="", num_examples=2**53 + 1, train_loss=1 / 3)
    arrived = decode_update(encode_update(sent))
    assert_same_weights(sent.weights, arrived.weights)
    weights = AdapterWeights()
    assert dataclasses.replace(arrived, weights=weights) == dataclasses.replace(sent, weights=weights)


def test_arrived_tensors_can_be_changed_without_touching_the_payload() -> None:
    payload = encode_weights(make_weights())
    before = digest(payload)
    weights, _ = decode_weights(payload)
    weights.heads["classifier.bias"].zero_()
    assert digest(payload) == before
    assert_same_weights(make_weights(), decode_weights(payload)[0])


def test_equal_inputs_have_equal_bytes() -> None:
    one = make_weights()
    other = AdapterWeights(
        layers=dict(reversed(list(one.layers.items()))),
        heads={name: head.clone() for name, head in one.heads.items()},
    )
    payload = encode_weights(one, metadata={"a": 1, "b": [2]})
    assert encode_weights(other, metadata={"b": [2], "a": 1}) == payload
    assert encode_weights(one, metadata={"a": 2, "b": [2]}) != payload
    assert encode_update(make_update()) == encode_update(make_update())


def test_strides_do_not_show() -> None:
    straight = torch.arange(6.0).reshape(2, 3)
    turned = straight.T.contiguous().T
    assert turned.stride() != straight.stride()
    b = torch.ones(1, 2)
    payloads = [encode_weights(AdapterWeights(layers={"q": LoraFactors(a=a, b=b)})) for a in (straight, turned)]
    assert payloads[0] == payloads[1]


def test_safetensors_reads_the_same_tensors() -> None:
    weights = make_weights()
    tensors = load(encode_weights(weights))
    assert set(tensors) == {
        "lora_A.encoder.0.query",
        "lora_B.encoder.0.query",
        "lora_A.encoder.1.query",
        "lora_B.encoder.1.query",
        "head.classifier.bias",
    }
    assert torch.equal(tensors["lora_B.encoder.1.query"], weights.layers["encoder.1.query"].b)


def test_tied_heads_are_sent_twice() -> None:
    tied = torch.ones(2)
    arrived, _ = decode_weights(encode_weights(AdapterWeights(heads={"one": tied, "other": tied})))
    assert set(arrived.heads) == {"one", "other"}


def test_trained_parameters_can_be_sent() -> None:
    a, b = torch.nn.Parameter(torch.ones(1, 2)), torch.nn.Parameter(torch.ones(3, 1))
    arrived, _ = decode_weights(encode_weights(AdapterWeights(layers={"q": LoraFactors(a=a, b=b)})))
    assert not arrived.layers["q"].a.requires_grad


def test_modules_arrive_in_sorted_order_whoever_wrote_them() -> None:
    entries = {
        f"{kind}.{module}": {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * i, 4 * i + 4]}
        for i, (kind, module) in enumerate((k, m) for m in ("q", "k") for k in ("lora_B", "lora_A"))
    }
    header = json.dumps(entries).encode()
    payload = len(header).to_bytes(8, "little") + header + struct.pack("<4f", 1, 2, 3, 4)
    layers = decode_weights(payload)[0].layers
    assert list(layers) == ["k", "q"]
    assert (layers["q"].b.item(), layers["q"].a.item()) == (1.0, 2.0)


def test_digest_is_sha256() -> None:
    assert digest(b"abc") == hashlib.sha256(b"abc").hexdigest()


def test_narrow_floats_are_widened_and_wide_ones_refused() -> None:
    third = torch.full((2,), 1 / 3)
    arrived, _ = decode_weights(encode_weights(AdapterWeights(heads={"bias": third.bfloat16()})))
    assert torch.equal(arrived.heads["bias"], third.bfloat16().float())
    for wide in (third.double(), torch.ones(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"head\.bias should be float32, got torch"):
            encode_weights(AdapterWeights(heads={"bias": wide}))


@pytest.mark.parametrize(
    ("weights", "metadata", "reason"),
    [
        (
            AdapterWeights(layers={"q": LoraFactors(a=torch.ones(1, 2), b=torch.ones(2, 1), scale=2.0)}),
            {},
            "scale 1",
        ),
        (
            AdapterWeights(layers={"q": LoraFactors(a=torch.ones(0, 2), b=torch.ones(2, 0))}),
            {},
            "no elements",
        ),
        (AdapterWeights(heads={"a\nb": torch.ones(1)}), {}, "cannot be printed"),
        (AdapterWeights(heads={"": torch.ones(1)}), {}, "expected a key that starts with"),
        (AdapterWeights(heads={"n" * 300: torch.ones(1)}), {}, "1 to 300 characters"),
        (AdapterWeights(), {"loss": math.nan}, "not JSON compliant"),
        (AdapterWeights(), {"when": object()}, "metadata should be JSON"),
    ],
    ids=["scale", "rank 0", "control character", "no name", "long name", "NaN", "object"],
)
def test_what_could_not_be_read_back_is_not_sent(
    weights: AdapterWeights, metadata: Mapping[str, object], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        encode_weights(weights, metadata=metadata)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"alpha": math.inf}, "alpha: .*finite"),
        ({"train_loss": math.nan}, "train_loss: .*finite"),
        ({"nonce": "F" * 32}, "nonce"),
        ({"client": ""}, "client"),
        ({"num_examples": True}, "num_examples"),
    ],
)
def test_an_update_that_could_not_be_read_back_is_not_sent(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be sent: {reason}"):
        encode_update(make_update(**changes))


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"lora_A.q": torch.ones(1, 2)}, r"lora_A\.q came without lora_B\.q"),
        ({"lora_B.q": torch.ones(2, 1)}, r"lora_B\.q came without lora_A\.q"),
        ({"lora_A.q": torch.ones(1, 2), "lora_B.k": torch.ones(2, 1)}, "lora_B.k came without lora_A.k"),
        ({"lora_A.q": torch.ones(2, 2), "lora_B.q": torch.ones(2, 1)}, "layer 'q': .*one rank"),
        ({"lora_A.q": torch.ones(2, 1), "lora_B.q": torch.ones(1, 2, 1)}, "layer 'q'"),
        ({"lora_A.q": torch.tensor(1.0), "lora_B.q": torch.tensor(1.0)}, "layer 'q'"),
        ({"weight": torch.ones(1)}, "expected a key that starts with"),
        ({"lora_A.": torch.ones(1)}, "expected a key that starts with"),
        ({"head.x": torch.ones(1, dtype=torch.float64)}, "dtype F32, got 'F64'"),
        ({"head.x": torch.ones(1, dtype=torch.int32)}, "dtype F32, got 'I32'"),
    ],
)
def test_refuses_tensors_that_are_no_adapter(tensors: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(PayloadError, match=reason):
        decode_weights(save(tensors))


def test_layers_can_be_demanded() -> None:
    payload = encode_weights(AdapterWeights(heads={"bias": torch.ones(1)}))
    assert decode_weights(payload)[0].layers == {}
    with pytest.raises(PayloadError, match="low-rank layers, got none"):
        decode_weights(payload, allow_empty_layers=False)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"pomona": "[]"}, "should be a JSON object"),
        ({"pomona": "{"}, "not JSON"),
        ({"pomona": '{"a": 1, "a": 2}'}, "key 'a' twice"),
        ({"pomona": '{"a": {"b": 1, "b": 2}}'}, "key 'b' twice"),
        ({"pomona": '{"a": Infinity}'}, "not finite"),
        ({"pomona": '{"a": ' + "[" * 50_000 + "]" * 50_000 + "}"}, "nested too deeply"),
        ({"pomona": "{}", "other": "x"}, "no metadata but 'pomona', got 'other'"),
    ],
)
def test_refuses_malformed_metadata(metadata: dict[str, str], reason: str) -> None:
    with pytest.raises(PayloadError, match=reason):
        decode_weights(save({"head.x": torch.ones(1)}, metadata))


def resent(change: Callable[[dict[str, object]], object]) -> bytes:
    """Encode an update, then change its metadata behind the encoder's back."""
    payload = encode_update(make_update())
    _, metadata = decode_weights(payload)
    change(metadata)
    return save(load(payload), {"pomona": json.dumps(metadata)})


def test_an_update_that_was_only_resent_is_accepted() -> None:
    assert decode_update(resent(lambda metadata: None)).num_examples == 17


MALFORMED: dict[str, list[object]] = {
    "num_examples": [True, 17.0, 1.5, "17", None, [17], 2**63, -(2**63) - 1, 1e308],
    "round_number": [True, 2.0, "2", None, {}],
    "rank": [True, 2.0, "2"],
    "alpha": ["4", None, True, [4.0]],
    "rslora": [0, 1, "false", None],
    "train_loss": ["0", None, "x" * 100_000],
    "nonce": ["", "f" * 31, "f" * 33, "F" * 32, "g" * 32, "f" * 32 + "\n", 1],
    "base_sha256": ["", "0" * 63, "0" * 65, "G" * 64, 0],
    "client": ["", "x" * 101, "a\nb", "a\0", "a\u202eb", "\ud800", 1, None],
    "run_id": ["", "x" * 101, "a\tb", 1],
    "parent": ["x" * 201, "a\nb", None],
    "format": ["update/2", "", None, 1],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param(field, value, id=f"{field}-{number}")
        for field, values in MALFORMED.items()
        for number, value in enumerate(values)
    ],
)
def test_refuses_a_wrong_type_or_form(field: str, value: object) -> None:
    attack = resent(lambda metadata: metadata.update({field: value}))
    with pytest.raises(PayloadError, match=f"metadata are malformed: {field}") as caught:
        decode_update(attack)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("field", FIELDS)
def test_refuses_a_missing_field(field: str) -> None:
    with pytest.raises(PayloadError, match=f"{field}: Field required"):
        decode_update(resent(lambda metadata: metadata.pop(field)))


def test_refuses_an_unknown_field() -> None:
    with pytest.raises(PayloadError, match="extra: Extra inputs are not permitted"):
        decode_update(resent(lambda metadata: metadata.update(extra=1)))


def test_claims_are_left_to_verification() -> None:
    odd = decode_update(resent(lambda metadata: metadata.update(rank=-1, num_examples=0, round_number=-5, alpha=-1)))
    assert (odd.rank, odd.num_examples, odd.round_number, odd.alpha) == (-1, 0, -5, -1.0)


VALID = encode_update(make_update())
HEADER_END = 8 + int.from_bytes(VALID[:8], "little")


def decodes_or_refuses(payload: bytes) -> None:
    try:
        update = decode_update(payload)
    except PayloadError:
        return
    encode_update(update)


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=200)
def test_random_bytes_are_decoded_or_refused(raw: bytes) -> None:
    decodes_or_refuses(raw)
    decodes_or_refuses(len(raw).to_bytes(8, "little") + raw)


@given(st.data())
@settings(deadline=None, max_examples=400)
def test_a_mutated_update_is_decoded_or_refused(data: st.DataObject) -> None:
    mutated = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        # mostly in the header, where a change has meaning
        at = data.draw(st.integers(0, min(HEADER_END, len(mutated))) | st.integers(0, len(mutated)))
        match data.draw(st.sampled_from(["replace", "insert", "delete", "copy"])):
            case "replace":
                mutated[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
            case "insert":
                mutated[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case "delete":
                del mutated[at : at + data.draw(st.integers(1, 40))]
            case _:
                mutated[at:at] = mutated[at : at + data.draw(st.integers(1, 40))]
    if data.draw(st.booleans()):
        # keep the length honest so that the change is seen by the parser behind it
        end = mutated.rfind(b"}", 0, max(HEADER_END, 9)) + 1
        mutated[:8] = max(end - 8, 0).to_bytes(8, "little")
    decodes_or_refuses(bytes(mutated))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40)


@given(st.sampled_from(FIELDS), SCALARS | st.lists(SCALARS, max_size=2))
@settings(deadline=None, max_examples=300)
def test_any_metadata_are_decoded_or_refused(field: str, value: object) -> None:
    decodes_or_refuses(resent(lambda metadata: metadata.update({field: value})))
