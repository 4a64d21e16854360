"""Each way in which an update can be wrong is refused, with a reason that says what."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.adapters import AdapterUpdate, AdapterWeights, LoraFactors
from pomona.aggregation.verify import Enrolment, Expected, update_norm, verify_update
from pomona.errors import PayloadError, UpdateRejected
from pomona.manifest import AdapterManifest

BASE = "0123456789abcdef" * 4
LAYERS = {"encoder.0.query": (6, 4), "encoder.0.value": (3, 4)}
HEADS = {"classifier.weight": (2, 6), "classifier.bias": (2,)}
ENROLMENT = Enrolment(client="clinic-a", rank=2, alpha=8.0, rslora=False, num_examples=40)
EXPECTED = Expected(
    run_id="run-1",
    round_number=3,
    parent="notes/2",
    manifest=AdapterManifest(base_sha256=BASE, layers=LAYERS, heads=HEADS),
    max_update_norm=1e4,
    max_examples=1000,
    max_rank=8,
)


def make_weights(*, rank: int = 2, seed: int = 0) -> AdapterWeights:
    gen = torch.Generator().manual_seed(seed)
    return AdapterWeights(
        layers={
            name: LoraFactors(a=torch.randn(rank, in_, generator=gen), b=torch.randn(out, rank, generator=gen))
            for name, (out, in_) in LAYERS.items()
        },
        heads={name: torch.randn(*shape, generator=gen) for name, shape in HEADS.items()},
    )


def make_update(**changes: object) -> AdapterUpdate:
    update = AdapterUpdate(
        client="clinic-a",
        run_id="run-1",
        round_number=3,
        parent="notes/2",
        base_sha256=BASE,
        rank=2,
        alpha=8.0,
        num_examples=40,
        nonce="0" * 32,
        weights=make_weights(),
    )
    return dataclasses.replace(update, **changes)  # type: ignore[arg-type]


def reason_for(update: AdapterUpdate, *, enrolment: Enrolment = ENROLMENT, expected: Expected = EXPECTED) -> str:
    with pytest.raises(UpdateRejected) as caught:
        verify_update(update, enrolment=enrolment, expected=expected)
    assert caught.value.client == enrolment.client
    assert isinstance(caught.value, PayloadError)
    return caught.value.reason


def with_layer(name: str, factors: LoraFactors) -> AdapterUpdate:
    weights = make_weights()
    return make_update(weights=dataclasses.replace(weights, layers={**weights.layers, name: factors}))


def with_head(name: str, head: torch.Tensor) -> AdapterUpdate:
    weights = make_weights()
    return make_update(weights=dataclasses.replace(weights, heads={**weights.heads, name: head}))


def test_a_good_update_passes() -> None:
    verify_update(make_update(), enrolment=ENROLMENT, expected=EXPECTED)


def test_an_update_that_changes_nothing_passes() -> None:
    weights = make_weights()
    layers = {name: LoraFactors(a=factors.a, b=torch.zeros_like(factors.b)) for name, factors in weights.layers.items()}
    update = make_update(weights=dataclasses.replace(weights, layers=layers))
    verify_update(update, enrolment=ENROLMENT, expected=EXPECTED)


def test_a_rank_above_that_of_the_layer_passes() -> None:
    enrolment = dataclasses.replace(ENROLMENT, rank=7)
    update = make_update(rank=7, weights=make_weights(rank=7))
    verify_update(update, enrolment=enrolment, expected=EXPECTED)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"client": "clinic-b"}, "expected client 'clinic-a', the update says 'clinic-b'"),
        ({"run_id": "run-0"}, "expected run 'run-1', got 'run-0'"),
        ({"round_number": 2}, "stale: expected round 3, got 2"),
        ({"round_number": 4}, "from the future: expected round 3, got 4"),
        ({"parent": "notes/1"}, "another global version: expected parent 'notes/2', got 'notes/1'"),
        ({"parent": ""}, "another global version: expected parent 'notes/2', got ''"),
        ({"base_sha256": "0" * 64}, f"another base model: expected '{BASE}', got '{'0' * 64}'"),
        ({"rank": 0}, "expected rank of at least 1, got 0"),
        ({"rank": -2}, "expected rank of at least 1, got -2"),
        ({"rank": True}, "expected an integer rank, got True"),
        ({"rank": 2.0}, "expected an integer rank, got 2.0"),
        ({"rank": 4}, "enrolled with rank 2, got 4"),
        ({"rank": 9}, "rank 9 is above max_rank=8"),
        ({"alpha": 16.0}, "enrolled with alpha 8.0, got 16.0"),
        ({"alpha": math.nan}, "expected a finite alpha, got nan"),
        ({"alpha": math.inf}, "expected a finite alpha, got inf"),
        ({"rslora": True}, "enrolled with rslora=False, got True"),
        ({"num_examples": 41}, "enrolled with num_examples=40, got 41"),
        ({"num_examples": 39}, "enrolled with num_examples=40, got 39"),
        ({"num_examples": 0}, "expected num_examples of at least 1, got 0"),
        ({"num_examples": -1}, "expected num_examples of at least 1, got -1"),
        ({"num_examples": 2**63}, f"num_examples={2**63} is above max_examples=1000"),
        ({"num_examples": 40.0}, "expected an integer num_examples, got 40.0"),
        ({"num_examples": "40"}, "expected an integer num_examples, got '40'"),
        ({"num_examples": math.nan}, "expected an integer num_examples, got nan"),
        ({"train_loss": -math.inf}, "expected a finite train_loss, got -inf"),
    ],
)
def test_wrong_facts(changes: dict[str, object], reason: str) -> None:
    assert reason_for(make_update(**changes)) == reason


def test_an_enrolment_beyond_the_limits_of_the_run_does_not_help() -> None:
    large = dataclasses.replace(ENROLMENT, rank=9)
    assert "above max_rank=8" in reason_for(make_update(rank=9, weights=make_weights(rank=9)), enrolment=large)
    rich = dataclasses.replace(ENROLMENT, num_examples=1001)
    assert "above max_examples=1000" in reason_for(make_update(num_examples=1001), enrolment=rich)


def test_the_first_round_has_no_parent() -> None:
    first = dataclasses.replace(EXPECTED, round_number=1, parent="")
    verify_update(make_update(round_number=1, parent=""), enrolment=ENROLMENT, expected=first)
    assert "expected parent ''" in reason_for(make_update(round_number=1), expected=first)


def test_a_rank_that_the_tensors_do_not_have() -> None:
    assert (
        reason_for(make_update(weights=make_weights(rank=3))) == "layer 'encoder.0.query' has rank 3, the update says 2"
    )


def test_one_layer_of_another_rank() -> None:
    odd = LoraFactors(a=torch.ones(1, 4), b=torch.ones(3, 1))
    assert reason_for(with_layer("encoder.0.value", odd)) == "layer 'encoder.0.value' has rank 1, the update says 2"


def test_layers_have_the_ranks_of_the_pattern() -> None:
    """A client could train more than it was asked, or less, and say that it did not."""
    expected = dataclasses.replace(EXPECTED, rank_pattern=(("value", 0.5), ("query", 2.0)))
    weights = make_weights(rank=4)
    value = weights.layers["encoder.0.value"]
    layers = {**weights.layers, "encoder.0.value": LoraFactors(a=value.a[:1], b=value.b[:, :1].contiguous())}
    asked = make_update(weights=dataclasses.replace(weights, layers=layers))
    verify_update(asked, enrolment=ENROLMENT, expected=expected)
    assert reason_for(asked) == "layer 'encoder.0.query' has rank 4, the update says 2"
    assert reason_for(make_update(), expected=expected) == "layer 'encoder.0.query' has rank 2, the update says 4"
    wide = make_update(weights=weights)
    assert reason_for(wide, expected=expected) == "layer 'encoder.0.value' has rank 4, the update says 1"


def test_a_pattern_raises_no_limit_on_the_rank_of_a_client() -> None:
    expected = dataclasses.replace(EXPECTED, rank_pattern=(("query", 0.5), ("value", 0.5)))
    large = dataclasses.replace(ENROLMENT, rank=9)
    update = make_update(rank=9, weights=make_weights(rank=4))
    assert reason_for(update, enrolment=large, expected=expected) == "rank 9 is above max_rank=8"


def test_factors_that_are_scaled_already() -> None:
    scaled = LoraFactors(a=torch.ones(2, 4), b=torch.ones(3, 2), scale=4.0)
    assert "should have unscaled factors, got scale 4.0" in reason_for(with_layer("encoder.0.value", scaled))


def without(names: str, kind: str) -> AdapterUpdate:
    weights = make_weights()
    kept = {name: value for name, value in getattr(weights, kind).items() if name not in names}
    return make_update(weights=dataclasses.replace(weights, **{kind: kept}))


def test_a_missing_layer_and_a_missing_head() -> None:
    assert reason_for(without("encoder.0.value", "layers")) == "layer 'encoder.0.value' is missing (1 of 2 are)"
    assert reason_for(without("classifier.bias", "heads")) == "head 'classifier.bias' is missing (1 of 2 are)"
    assert reason_for(make_update(weights=AdapterWeights())).endswith("is missing (2 of 2 are)")


def test_an_extra_layer_and_an_extra_head() -> None:
    extra = LoraFactors(a=torch.ones(2, 4), b=torch.ones(3, 2))
    assert reason_for(with_layer("lm_head", extra)) == "layer 'lm_head' is not part of this run"
    assert reason_for(with_head("pooler", torch.ones(1))) == "head 'pooler' is not part of this run"


def test_a_misspelt_layer_is_given_its_right_name() -> None:
    weights = make_weights()
    layers = dict(weights.layers)
    layers["encoder.0.vlaue"] = layers.pop("encoder.0.value")
    reason = reason_for(make_update(weights=dataclasses.replace(weights, layers=layers)))
    assert reason == "layer 'encoder.0.vlaue' is not part of this run; did you mean 'encoder.0.value'?"


@pytest.mark.parametrize(
    ("factors", "reason"),
    [
        (
            LoraFactors(a=torch.ones(2, 5), b=torch.ones(3, 2)),
            "lora_A of layer 'encoder.0.value' should have shape (2, 4), got (2, 5)",
        ),
        (
            LoraFactors(a=torch.ones(2, 4), b=torch.ones(4, 2)),
            "lora_B of layer 'encoder.0.value' should have shape (3, 2), got (4, 2)",
        ),
        (
            LoraFactors(a=torch.ones(2, 3), b=torch.ones(4, 2)),  # transposed and swapped
            "lora_A of layer 'encoder.0.value' should have shape (2, 4), got (2, 3)",
        ),
        (
            LoraFactors(a=torch.ones(2, 4, dtype=torch.float64), b=torch.ones(3, 2)),
            "lora_A of layer 'encoder.0.value' should be float32, got torch.float64",
        ),
        (
            LoraFactors(a=torch.ones(2, 4), b=torch.ones(3, 2, dtype=torch.bfloat16)),
            "lora_B of layer 'encoder.0.value' should be float32, got torch.bfloat16",
        ),
    ],
)
def test_wrong_shapes_and_dtypes_of_a_layer(factors: LoraFactors, reason: str) -> None:
    assert reason_for(with_layer("encoder.0.value", factors)) == reason


def test_wrong_shapes_and_dtypes_of_a_head() -> None:
    assert reason_for(with_head("classifier.bias", torch.ones(1, 2))) == (
        "head 'classifier.bias' should have shape (2,), got (1, 2)"
    )
    assert reason_for(with_head("classifier.bias", torch.ones(2, dtype=torch.int64))) == (
        "head 'classifier.bias' should be float32, got torch.int64"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["a", "b", "head"])
@pytest.mark.parametrize("at", [0, -1])
def test_a_value_that_is_not_finite_anywhere(value: float, where: str, at: int) -> None:
    weights = make_weights()
    factors = weights.layers["encoder.0.value"]
    tensor = {"a": factors.a, "b": factors.b, "head": weights.heads["classifier.bias"]}[where]
    tensor.view(-1)[at] = value
    assert "has NaN or an infinity" in reason_for(make_update(weights=weights))


def test_the_norm_is_that_of_the_dense_update() -> None:
    weights = make_weights()
    layers = {name: dataclasses.replace(factors, scale=4.0) for name, factors in weights.layers.items()}
    dense = [(4.0 * f.b.double() @ f.a.double()).flatten() for f in layers.values()]
    everything = torch.cat([*dense, *(head.double().flatten() for head in weights.heads.values())])
    assert update_norm(layers, weights.heads) == pytest.approx(float(everything.norm()), rel=1e-12)
    assert update_norm({}, {}) == 0.0


@given(st.integers(0, 2**31), st.integers(1, 6), st.floats(-1e9, 1e9).filter(lambda c: abs(c) > 1e-9))
@settings(deadline=None, max_examples=60)
def test_the_norm_does_not_depend_on_how_the_factors_share_it(seed: int, rank: int, gauge: float) -> None:
    gen = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, 7, generator=gen, dtype=torch.float64)
    b = torch.randn(5, rank, generator=gen, dtype=torch.float64)
    expected = float((b @ a).norm())
    assert update_norm({"q": LoraFactors(a=a, b=b)}, {}) == pytest.approx(expected, rel=1e-9)
    other = LoraFactors(a=gauge * a, b=b / gauge)
    assert update_norm({"q": other}, {}) == pytest.approx(expected, rel=1e-9)


def limited(norm: float) -> Expected:
    return dataclasses.replace(EXPECTED, max_update_norm=norm)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f,
        lambda f: LoraFactors(a=f.a * 1024, b=f.b / 1024),  # a power of two: the same product, bit for bit
        lambda f: LoraFactors(a=f.a / 2**20, b=f.b * 2**20),
    ],
)
def test_the_limit_is_on_the_scaled_change_and_nothing_else(
    change: Callable[[LoraFactors], LoraFactors],
) -> None:
    weights = make_weights()
    layers = {name: change(factors) for name, factors in weights.layers.items()}
    update = make_update(weights=dataclasses.replace(weights, layers=layers))
    scaled = {name: dataclasses.replace(factors, scale=8.0 / 2) for name, factors in weights.layers.items()}
    norm = update_norm(scaled, weights.heads)
    verify_update(update, enrolment=ENROLMENT, expected=limited(norm * 1.000001))
    assert f"Frobenius norm {norm:.6g} is above" in reason_for(update, expected=limited(norm * 0.999999))


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    enrolment = dataclasses.replace(ENROLMENT, rslora=True)
    update = make_update(rslora=True)
    scale = 8.0 / math.sqrt(2)
    assert enrolment.scale == scale
    scaled = {name: dataclasses.replace(f, scale=scale) for name, f in update.weights.layers.items()}
    norm = update_norm(scaled, update.weights.heads)
    verify_update(update, enrolment=enrolment, expected=limited(norm * 1.000001))
    assert "Frobenius norm" in reason_for(update, enrolment=enrolment, expected=limited(norm * 0.999999))


def test_heads_count_in_the_norm() -> None:
    assert "Frobenius norm" in reason_for(with_head("classifier.bias", torch.tensor([2e4, 0.0])))


def test_the_largest_floats_are_refused_and_do_not_overflow() -> None:
    huge = LoraFactors(a=torch.full((2, 4), 3e38), b=torch.full((3, 2), 3e38))
    reason = reason_for(with_layer("encoder.0.value", huge))
    assert reason.startswith("Frobenius norm ")
    assert "inf" not in reason
    assert "above max_update_norm=10000" in reason
    assert "Frobenius norm" in reason_for(with_head("classifier.bias", torch.full((2,), 3e38)))


def test_a_norm_that_overflows_is_refused() -> None:
    enrolment = dataclasses.replace(ENROLMENT, alpha=1e308)
    assert "Frobenius norm" in reason_for(make_update(alpha=1e308), enrolment=enrolment)


def test_a_limit_that_is_no_number_accepts_nothing() -> None:
    assert "Frobenius norm" in reason_for(make_update(), expected=limited(math.nan))


def test_huge_factors_that_cancel_are_refused() -> None:
    """Their product is a rounding error apart from zero, and rounding can hide what is left of it."""
    a = torch.full((2, 4), 1e15)
    b = torch.tensor([[1e15, -1e15]] * 3)
    assert update_norm({"q": LoraFactors(a=a, b=b)}, {}) == 0.0
    hidden = b.clone()
    hidden[:, 1] += 2**27  # a few units in the last place: the true change is now far above the limit
    assert float((hidden.double() @ a.double()).norm()) > 1e20
    for attack in (b, hidden):
        reason = reason_for(with_layer("encoder.0.value", LoraFactors(a=a, b=attack)))
        assert "above max_update_norm" in reason or "cancel" in reason


def test_moderate_factors_that_cancel_pass() -> None:
    a = torch.full((2, 4), 3.0)
    b = torch.tensor([[2.0, -2.0]] * 3)
    update = with_layer("encoder.0.value", LoraFactors(a=a, b=b))
    verify_update(update, enrolment=ENROLMENT, expected=EXPECTED)


def test_verification_changes_nothing() -> None:
    update, untouched = make_update(), make_weights()
    verify_update(update, enrolment=ENROLMENT, expected=EXPECTED)
    for name, factors in untouched.layers.items():
        assert torch.equal(update.weights.layers[name].a, factors.a)
        assert torch.equal(update.weights.layers[name].b, factors.b)
