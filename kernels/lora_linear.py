"""One linear layer under a frozen and a trainable adapter, as one autograd function.

::

    y  = x W^T + bias + x A_f^T B_f^T + s x A^T B^T
    dx = dy W + (dy B_f) A_f + s (dy B) A,     dA = s (dy B)^T x,     dB = s dy^T (x A^T)

The two adapters are stacked, ``A_c = [A; A_f]`` and ``B_c = [s B, B_f]``, so that each pass over the activations
is one product of ``rank + frozen rank`` columns instead of two; only ``x`` and the thin ``x A^T`` are kept for the
backward pass. Neither ``W`` nor a merged copy of it is written.

Differential privacy of examples needs the gradient of each example instead of their sum. It comes from the same two
products, taken example by example, where each example is given factors of its own, all equal.

Shapes: ``M`` rows of ``x``, ``K`` inputs, ``N`` outputs, ``r`` trainable and ``f`` frozen rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    trainable: tuple[Tensor, Tensor, float],
    frozen: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the layer's output by the formula, for tests; same arguments as :func:`lora_linear`."""
    a, b, scale = trainable
    y = torch.nn.functional.linear(x, weight, bias) + scale * (x @ a.T) @ b.T
    return y if frozen is None else y + (x @ frozen[0].T) @ frozen[1].T


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    trainable: tuple[Tensor, Tensor, float],
    frozen: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the output of a linear layer under its adapters.

    Args:
        x: Inputs ``(..., K)``.
        weight: Frozen weight ``(N, K)``; gets no gradient.
        bias: Frozen bias ``(N,)``, or None.
        trainable: ``A (r, K)``, ``B (N, r)`` and the scale ``s``; factors that require gradients get them. A factor
            may be an expanded view with one copy for each example, ``(examples, r, K)`` or ``(examples, N, r)``, where
            the examples are the first dimension of ``x``; its gradient is that of each example by itself.
        frozen: ``A_f (f, K)`` and ``B_f (N, f)`` with their scale folded in, or None.

    Returns:
        Outputs ``(..., N)``.
    """
    a, b, scale = trainable
    frozen_a, frozen_b = frozen if frozen is not None else (None, None)
    return _LoraLinear.apply(x, weight, bias, a, b, scale, frozen_a, frozen_b)  # type: ignore[no-any-return, no-untyped-call]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        frozen_a: Tensor | None,
        frozen_b: Tensor | None,
    ) -> Tensor:
        ctx.examples = [len(factor) if factor.dim() == 3 else None for factor in (a, b)]  # type: ignore[attr-defined]
        a, b = (factor[0] if factor.dim() == 3 else factor for factor in (a, b))
        rows = x.reshape(-1, x.shape[-1])
        a_all = a if frozen_a is None else torch.cat([a, frozen_a])
        b_all = b * scale if frozen_b is None else torch.cat([b * scale, frozen_b], dim=1)
        hidden = rows @ a_all.T  # (M, r + f)
        y = torch.nn.functional.linear(rows, weight, bias).addmm_(hidden, b_all.T)
        ctx.save_for_backward(rows, weight, a_all, b_all, hidden[:, : a.shape[0]])
        ctx.scale, ctx.shape = scale, x.shape  # type: ignore[attr-defined]
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's context
        rows, weight, a_all, b_all, hidden = ctx.saved_tensors
        dy = grads[0].reshape(-1, weight.shape[0])
        rank = hidden.shape[1]
        d_hidden = dy @ b_all  # (M, r + f), scale included
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(d_hidden, a_all).view(ctx.shape)
        da = _product(d_hidden[:, :rank], rows, ctx.examples[0]) if ctx.needs_input_grad[3] else None
        db = _product(dy, hidden, ctx.examples[1]).mul_(ctx.scale) if ctx.needs_input_grad[4] else None
        return dx, None, None, da, db, None, None, None


def _product(left: Tensor, right: Tensor, examples: int | None) -> Tensor:
    """Return ``left^T right``, or that of each example's rows by themselves."""
    if examples is None:
        return left.T @ right
    return left.reshape(examples, -1, left.shape[1]).mT @ right.reshape(examples, -1, right.shape[1])
