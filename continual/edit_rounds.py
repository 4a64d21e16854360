"""An edit in rounds: owners give gradients on their own rows, and the average of those takes one step of Adam.

::

    g = sum_k n_k g_k / sum_k n_k  +  sum_k m_k h_k / sum_k m_k          theta <- after_step( Adam(theta, g) )

Owner ``k`` has ``n_k`` rows to retain and ``m_k`` to forget, and ``g_k`` and ``h_k`` are gradients of mean losses over
a batch of either; with rows of one kind it gives one gradient. Where a batch is all rows, and the loss a mean over
examples, ``g`` is the gradient on the pooled rows, however they are spread. What is done after a step, such as a
proximal step that makes whole blocks zero, is done to the average, so it holds for what comes out.

Nothing is kept between rounds but :class:`EditState`: an owner that was away comes back, and an edit that was cut off
goes on to the same bytes. With one owner this is how an edit is trained where all rows are at hand.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from pomona.adapters import LoraFactors
from pomona.continual.editing import Classifier, Examples, Loss, endless_rows, step_of, trainable_adapter
from pomona.continual.encoder import Adapter, FrozenEncoder
from pomona.errors import ConfigError, DataError
from pomona.forget_settings import EditSettings
from pomona.seeds import seed_of

AfterStep = Callable[[int, float, Adapter], Adapter]

_BETAS, _EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True, slots=True)
class Gradient:
    """Of the mean loss over some of an owner's rows of one kind.

    Attributes:
        rows: That the owner has of the kind, at least 1: what the gradient counts for.
        loss: The mean loss.
        factors: For each layer, of the shapes of its factors; a scale is of no account.
    """

    rows: int
    loss: float
    factors: Adapter


@dataclass(frozen=True, slots=True)
class GradientShare:
    """What an owner gives for one step.

    Attributes:
        retained: On rows to retain; None: it has none.
        forgotten: On rows to forget, likewise.
    """

    retained: Gradient | None
    forgotten: Gradient | None


@dataclass(frozen=True, slots=True)
class EditState:
    """Where an edit is.

    Attributes:
        number: Steps that were taken.
        adapter: The fresh factors.
        first: Adam's mean of gradients, of the same shapes.
        second: Its mean of their squares.
        losses: Of each step.
    """

    number: int
    adapter: Adapter
    first: Adapter
    second: Adapter
    losses: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Losses:
    """Means over the examples of a step.

    Attributes:
        retain: Of examples to retain.
        forget: Of examples to forget.
    """

    retain: Loss
    forget: Loss


class EditOwner:
    """One owner's rows; its gradients depend on nothing but these, the step's number and the factors."""

    def __init__(
        self,
        encoder: FrozenEncoder,
        classifier: Classifier,
        examples: Examples,
        forgotten: Tensor,
        *,
        losses: Losses,
        settings: EditSettings,
        seed: int,
    ) -> None:
        """Draw the order of rows.

        Args:
            encoder: The frozen encoder.
            classifier: What is edited.
            examples: Those of this owner.
            forgotten: Which of them are to be forgotten, ``(examples,)`` bool.
            losses: To be made small.
            settings: Steps and batches.
            seed: Of the order.
        """
        self._encoder, self._classifier, self._examples = encoder, classifier, examples
        self._losses = losses
        lengths = [len(row) for row in examples.states.rows]
        self._rows = {
            kind: list(islice(endless_rows(lengths, chosen, size, seed_of(kind, seed)), settings.steps))
            for kind, chosen, size in (
                ("retained", ~forgotten, settings.batch_size),
                ("forgotten", forgotten, settings.forget_batch_size),
            )
            if bool(chosen.any())
        }
        self._counts = {"retained": int((~forgotten).sum()), "forgotten": int(forgotten.sum())}

    def share(self, number: int, adapter: Adapter) -> GradientShare:
        """Return the gradients of a step.

        Args:
            number: From 0.
            adapter: The factors before it; is not changed.
        """
        return GradientShare(
            self._gradient("retained", number, adapter, self._losses.retain),
            self._gradient("forgotten", number, adapter, self._losses.forget),
        )

    def _gradient(self, kind: str, number: int, adapter: Adapter, loss: Loss) -> Gradient | None:
        if kind not in self._rows:
            return None
        trained = {
            name: LoraFactors(a=_leaf(each.a), b=_leaf(each.b), scale=each.scale) for name, each in adapter.items()
        }
        rows = self._rows[kind][number]
        gone = torch.full((len(rows),), kind == "forgotten")
        value = loss(step_of(self._encoder, self._classifier, self._examples, trained, rows, gone, number))
        found = torch.autograd.grad(value, [each for factors in trained.values() for each in (factors.a, factors.b)])
        pairs = zip(trained, found[::2], found[1::2], strict=True)
        return Gradient(
            self._counts[kind], float(value.detach()), {name: LoraFactors(a=a, b=b) for name, a, b in pairs}
        )


def start_edit(encoder: FrozenEncoder, *, rank: int, seed: int) -> EditState:
    """Return factors whose product is zero, and no steps taken."""
    fresh = {
        name: LoraFactors(a=each.a.detach(), b=each.b.detach(), scale=each.scale)
        for name, each in trainable_adapter(encoder, rank=rank, seed=seed).items()
    }
    return EditState(0, fresh, _zeros(fresh), _zeros(fresh))


def is_done(state: EditState, settings: EditSettings) -> bool:
    """Return whether all steps were taken, or nothing is left to train: a layer that is zero stays so."""
    return state.number >= settings.steps or not any(map(_alive, state.adapter.values()))


def advance(
    state: EditState,
    shares: Sequence[GradientShare],
    settings: EditSettings,
    *,
    after_step: AfterStep | None = None,
) -> EditState:
    """Take one step on the gradients of all owners, summed in their order.

    Args:
        state: Before; is not changed.
        shares: Of the owners.
        settings: Steps and learning rate, which falls along a cosine.
        after_step: Given the step's number, its learning rate and the factors, returns what to go on with.

    Raises:
        DataError: Nobody has rows to retain, or nobody has rows to forget.
        ConfigError: The loss became NaN or infinite.
    """
    kinds = [[each for each in found if each is not None] for found in _by_kind(shares)]
    if not all(kinds):
        raise DataError(
            f"expected owners with rows to retain and with rows to forget, got {len(kinds[0])} and {len(kinds[1])}"
        )
    loss = sum(sum(each.rows * each.loss for each in kind) / sum(each.rows for each in kind) for kind in kinds)
    if not math.isfinite(loss):
        raise ConfigError(f"forgetting diverged at step {state.number}, its loss is {loss}; lower learning_rate")
    rate = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * state.number / settings.steps))
    moved = {
        name: _adam(
            (each, state.first[name], state.second[name]),
            _mean(kinds, lambda gradient, name=name: gradient.factors[name]),  # type: ignore[misc]
            number=state.number + 1,
            rate=rate,
        )
        for name, each in state.adapter.items()
    }
    adapter, first, second = ({name: parts[i] for name, parts in moved.items()} for i in range(3))
    left = adapter if after_step is None else after_step(state.number, rate, adapter)
    return EditState(state.number + 1, left, first, second, (*state.losses, loss))


def _by_kind(shares: Sequence[GradientShare]) -> tuple[list[Gradient | None], list[Gradient | None]]:
    return [each.retained for each in shares], [each.forgotten for each in shares]


def _mean(kinds: Sequence[Sequence[Gradient]], factors: Callable[[Gradient], LoraFactors]) -> LoraFactors:
    """Return the sum over kinds of the mean over rows, summed in float64."""
    a, b = torch.zeros(()).double(), torch.zeros(()).double()
    for kind in kinds:
        rows = sum(each.rows for each in kind)
        for each in kind:
            a = a + factors(each).a.double() * (each.rows / rows)
            b = b + factors(each).b.double() * (each.rows / rows)
    return LoraFactors(a=a.float(), b=b.float())


def _adam(
    at: tuple[LoraFactors, LoraFactors, LoraFactors], gradient: LoraFactors, *, number: int, rate: float
) -> tuple[LoraFactors, LoraFactors, LoraFactors]:
    """Return factors and both moments after step ``number``, from 1; what is zero is left as it is."""
    factors, first, second = at
    if not _alive(factors):
        return at
    a = _adam_step(factors.a, first.a, second.a, gradient.a, number=number, rate=rate)
    b = _adam_step(factors.b, first.b, second.b, gradient.b, number=number, rate=rate)
    return (
        LoraFactors(a=a[0], b=b[0], scale=factors.scale),
        LoraFactors(a=a[1], b=b[1]),
        LoraFactors(a=a[2], b=b[2]),
    )


def _adam_step(
    at: Tensor, first: Tensor, second: Tensor, gradient: Tensor, *, number: int, rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    first = _BETAS[0] * first + (1 - _BETAS[0]) * gradient
    second = _BETAS[1] * second + (1 - _BETAS[1]) * gradient.square()
    size = (second / (1 - _BETAS[1] ** number)).sqrt() + _EPSILON
    return at - rate * (first / (1 - _BETAS[0] ** number)) / size, first, second


def _alive(factors: LoraFactors) -> bool:
    return bool(factors.a.any()) or bool(factors.b.any())


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def _zeros(adapter: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    return {name: LoraFactors(a=torch.zeros_like(each.a), b=torch.zeros_like(each.b)) for name, each in adapter.items()}
