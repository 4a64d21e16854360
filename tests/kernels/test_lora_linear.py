"""The fused layer against its formula and against PEFT's own, and its gradients against finite differences."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.config import LoraConfig
from torch import Tensor, nn
from torch.testing import assert_close

from pomona.kernels.lora_linear import lora_linear, lora_linear_reference

Layer = Callable[..., Tensor]


@dataclass(frozen=True)
class Inputs:
    """One layer with everything that goes into it, in float64."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    trainable: tuple[Tensor, Tensor, float]
    frozen: tuple[Tensor, Tensor] | None


def make_inputs(
    *,
    lead: tuple[int, ...] = (5,),
    in_: int = 4,
    out: int = 3,
    rank: int = 2,
    frozen_rank: int = 3,
    bias: bool = True,
    scale: float = 1.75,
    seed: int = 0,
) -> Inputs:
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    return Inputs(
        x=randn(*lead, in_),
        weight=randn(out, in_),
        bias=randn(out) if bias else None,
        trainable=(randn(rank, in_), randn(out, rank), scale),
        frozen=(randn(frozen_rank, in_), randn(out, frozen_rank)) if frozen_rank else None,
    )


def dense(i: Inputs) -> Tensor:
    """The layer with every adapter merged into its weight: slow and obviously right."""
    a, b, scale = i.trainable
    weight = i.weight + scale * b @ a
    if i.frozen is not None:
        weight = weight + i.frozen[1] @ i.frozen[0]
    y = torch.einsum("...k,nk->...n", i.x, weight)
    return y if i.bias is None else y + i.bias


@st.composite
def layers(draw: st.DrawFn) -> Inputs:
    lead = tuple(draw(st.lists(st.integers(0, 4), min_size=0, max_size=3)))
    return make_inputs(
        lead=lead,
        in_=draw(st.integers(1, 6)),
        out=draw(st.integers(1, 6)),
        rank=draw(st.integers(1, 8)),
        frozen_rank=draw(st.integers(0, 8)),
        bias=draw(st.booleans()),
        scale=draw(st.floats(-4, 4)),
        seed=draw(st.integers(0, 2**31)),
    )


@given(layers())
@settings(deadline=None, max_examples=100)
def test_the_output_is_that_of_the_merged_weight(i: Inputs) -> None:
    """A wrong transpose, scale or missing frozen block shows at some shape."""
    for layer in (lora_linear, lora_linear_reference):
        y = layer(i.x, i.weight, i.bias, i.trainable, i.frozen)
        assert y.shape == (*i.x.shape[:-1], i.weight.shape[0])
        assert_close(y, dense(i), rtol=1e-10, atol=1e-10)


@given(layers())
@settings(deadline=None, max_examples=60)
def test_gradients_are_those_that_autograd_finds_for_the_merged_weight(i: Inputs) -> None:
    """The hand-written backward pass forgets a term or a scale."""
    x, a, b = (tensor.clone().requires_grad_() for tensor in (i.x, *i.trainable[:2]))
    at = Inputs(x, i.weight, i.bias, (a, b, i.trainable[2]), i.frozen)
    upstream = torch.randn(dense(at).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((dense(at) * upstream).sum(), (x, a, b))
    found = torch.autograd.grad(
        (lora_linear(at.x, at.weight, at.bias, at.trainable, at.frozen) * upstream).sum(), (x, a, b)
    )
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "i",
    [
        pytest.param(make_inputs(frozen_rank=0), id="no frozen adapter"),
        pytest.param(make_inputs(), id="frozen adapter"),
        pytest.param(make_inputs(bias=False), id="no bias"),
        pytest.param(make_inputs(lead=(2, 3)), id="three dimensions"),
        pytest.param(make_inputs(lead=()), id="one vector"),
        pytest.param(make_inputs(lead=(0,)), id="no rows"),
        pytest.param(make_inputs(rank=1, frozen_rank=1), id="rank 1"),
        pytest.param(make_inputs(rank=7), id="rank above the width"),
    ],
)
@pytest.mark.parametrize("input_needs_gradient", [True, False])
def test_gradients_are_those_of_finite_differences(i: Inputs, *, input_needs_gradient: bool) -> None:
    """Training would walk in another direction than down."""
    x = i.x.clone().requires_grad_(input_needs_gradient)
    a, b = (tensor.clone().requires_grad_() for tensor in i.trainable[:2])

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, i.weight, i.bias, (a, b, i.trainable[2]), i.frozen)

    assert torch.autograd.gradcheck(layer, (x, a, b), raise_exception=True)


def test_what_is_frozen_gets_no_gradient() -> None:
    """Memory and time would go into gradients that nobody uses, and an optimiser could apply them."""
    i = make_inputs()
    assert i.bias is not None
    assert i.frozen is not None
    a, b = (tensor.clone().requires_grad_() for tensor in i.trainable[:2])
    stuck = [tensor.requires_grad_() for tensor in (i.weight, i.bias, *i.frozen)]
    lora_linear(i.x, i.weight, i.bias, (a, b, 2.0), i.frozen).square().sum().backward()  # type: ignore[no-untyped-call]
    assert [tensor.grad for tensor in stuck] == [None] * 4
    assert a.grad is not None
    assert b.grad is not None
    assert i.x.grad is None


def test_an_input_without_gradient_costs_no_gradient_of_it() -> None:
    i = make_inputs()
    a, b = (tensor.clone().requires_grad_() for tensor in i.trainable[:2])
    (grad,) = torch.autograd.grad(lora_linear(i.x, i.weight, i.bias, (a, b, 2.0), i.frozen).sum(), (a,))
    assert_close(grad, 2.0 * b.sum(0)[:, None] * i.x.sum(0)[None, :])


def test_no_rows_give_gradients_of_zero() -> None:
    """An empty batch would crash, or leave ``None`` where an optimiser expects a gradient."""
    i = make_inputs(lead=(0,))
    a, b = (tensor.clone().requires_grad_() for tensor in i.trainable[:2])
    y = lora_linear(i.x, i.weight, i.bias, (a, b, 2.0), i.frozen)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert y.shape == (0, 3)
    assert a.grad is not None
    assert b.grad is not None
    assert not a.grad.any()
    assert not b.grad.any()


def test_the_inputs_are_left_as_they_were() -> None:
    """The products are summed in place: into a fresh tensor, never into an argument."""
    i = make_inputs()
    tensors = [i.x, i.weight, *i.trainable[:2], *(i.frozen or ())]
    before = [tensor.clone() for tensor in tensors]
    a, b = (tensor.requires_grad_() for tensor in i.trainable[:2])
    lora_linear(i.x, i.weight, i.bias, (a, b, 2.0), i.frozen).square().sum().backward()  # type: ignore[no-untyped-call]
    for now, then in zip(tensors, before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_gradients_equal_those_of_pefts_own_layer(*, rslora: bool, bias: bool) -> None:
    """An adapter trained here would not be the adapter that others load with peft."""
    torch.manual_seed(3)
    base = nn.Linear(6, 5, bias=bias).double()
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, init_lora_weights=False)
    peft = PeftLinear(base, adapter_name="local", r=4, lora_alpha=6, config=config).double()
    frozen_config = LoraConfig(r=3, lora_alpha=3, init_lora_weights=False)
    peft.update_layer("global", 3, lora_alpha=3, config=frozen_config)
    peft.double().set_adapter(["local", "global"])
    a, b = peft.lora_A["local"].weight, peft.lora_B["local"].weight
    frozen = peft.lora_A["global"].weight, peft.lora_B["global"].weight
    for tensor in (a, b, *frozen):
        nn.init.normal_(tensor)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    scale = 6 / (2 if rslora else 4)
    ours = lora_linear(x, base.weight, base.bias, (a, b, scale), frozen)  # type: ignore[arg-type]
    theirs = peft(x)
    assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad(ours, (x, a, b), upstream),  # type: ignore[arg-type]
        torch.autograd.grad(theirs, (x, a, b), upstream),  # type: ignore[arg-type]
        strict=True,
    ):
        assert_close(one, other, rtol=1e-11, atol=1e-11)


@given(layers().filter(lambda i: i.x.dim() > 1 and len(i.x) > 0), st.sampled_from(["both", "a", "b"]))
@settings(deadline=None, max_examples=60)
def test_with_factors_of_its_own_each_example_gets_its_own_gradient(i: Inputs, trains: str) -> None:
    """What example-level privacy bounds would be something else than what an example adds."""
    a, b, scale = i.trainable
    upstream = torch.randn(dense(i).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = [
        factor.expand(len(i.x), *factor.shape).requires_grad_() if trains in {"both", name} else factor
        for name, factor in (("a", a), ("b", b))
    ]
    leaves = [factor for factor in own if factor.requires_grad]
    y = lora_linear(i.x, i.weight, i.bias, (own[0], own[1], scale), i.frozen)
    assert torch.equal(y, lora_linear(i.x, i.weight, i.bias, i.trainable, i.frozen))
    found = torch.autograd.grad((y * upstream).sum(), leaves)
    for k, (x, up) in enumerate(zip(i.x, upstream, strict=True)):
        shared = [factor.clone().requires_grad_(trains in {"both", name}) for name, factor in (("a", a), ("b", b))]
        alone = Inputs(x, i.weight, i.bias, (shared[0], shared[1], scale), i.frozen)
        expected = torch.autograd.grad((dense(alone) * up).sum(), [each for each in shared if each.requires_grad])
        for one, other in zip(found, expected, strict=True):
            assert_close(one[k], other, rtol=1e-9, atol=1e-9)
