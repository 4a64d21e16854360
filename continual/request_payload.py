"""What coordinator and owners send each other for one request to forget, as bytes: factors down; gradients, scores up.

Made and read as the payloads of a task are (:mod:`pomona.continual.share_payload`): the reader knows which tensors
there must be, and takes no others. An owner's gradients may be anything that is finite and no longer than allowed.
Right answers are no more than examples. How features moved goes up too: :mod:`pomona.continual.moves_payload`.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pomona.adapters import LoraFactors
from pomona.continual.edit_rounds import EditState, Gradient, GradientShare
from pomona.continual.encoder import Adapter
from pomona.continual.packing import within
from pomona.continual.scores import Scores
from pomona.continual.share_payload import (
    Facts,
    Shapes,
    bytes_of,
    check_tensors,
    decode_tensors,
    encode_tensors,
    read_facts,
)
from pomona.errors import PayloadError
from pomona.manifest import LORA_A, LORA_B
from pomona.protocol import ClientName, Reference
from pomona.settings import Sha256

_RETAINED, _FORGOTTEN = "retained.", "forgotten."

Rows = Annotated[int, Field(ge=0, le=2**31)]
MeanLoss = Annotated[float, Field(ge=0, le=torch.finfo(torch.float32).max)]  # times rows it is still finite in float64


class RequestFacts(Facts):
    """What an owner states of what it sends; nothing of it is believed.

    Attributes:
        client: Its name.
        parent: Reference of the version that is edited.
        base_sha256: Hash of the base model it has.
        number: Steps that were taken before.
        nonce: Random, new each time.
    """

    client: ClientName
    parent: Reference
    base_sha256: Sha256
    number: Rows
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class GradientFacts(RequestFacts):
    """Of gradients; rows of 0 say that the owner has none of the kind.

    Attributes:
        retained: Rows to retain.
        forgotten: Rows to forget.
        retained_loss: Mean loss on those to retain, 0 where there are none.
        forgotten_loss: Mean loss on those to forget, likewise.
    """

    format: Literal["edit-gradients/1"] = "edit-gradients/1"
    retained: Rows
    forgotten: Rows
    retained_loss: MeanLoss
    forgotten_loss: MeanLoss

    @model_validator(mode="after")
    def _has_rows(self) -> "GradientFacts":
        if not self.retained + self.forgotten:
            raise ValueError("expected rows of some kind, got none")
        return self


class ScoresFacts(RequestFacts):
    """Of scores."""

    format: Literal["edit-scores/1"] = "edit-scores/1"


def encode_edit(adapter: Adapter) -> bytes:
    """Encode the factors that the next gradients are taken at; their scale is not sent."""
    return encode_tensors(_factors(adapter), {})


def decode_edit(payload: bytes, like: Adapter) -> Adapter:
    """Read what :func:`encode_edit` made, or anything else.

    Args:
        payload: The bytes.
        like: An edit of the same encoder and rank, such as :func:`pomona.continual.edit_rounds.start_edit` gives.

    Raises:
        PayloadError: The bytes are not that, or a number is not finite.
    """
    shapes = _factor_shapes(like)
    tensors, _ = decode_tensors(payload, most=bytes_of(shapes))
    check_tensors(tensors, shapes)
    return {
        name: LoraFactors(a=tensors[LORA_A + name], b=tensors[LORA_B + name], scale=each.scale)
        for name, each in like.items()
    }


def encode_gradients(share: GradientShare, facts: RequestFacts) -> bytes:
    """Encode an owner's share of a step."""
    tensors: dict[str, Tensor] = {}
    told: dict[str, object] = {}
    for prefix, each in ((_RETAINED, share.retained), (_FORGOTTEN, share.forgotten)):
        kind = prefix.removesuffix(".")
        tensors |= _factors(each.factors, prefix) if each else {}
        told |= {kind: each.rows if each else 0, f"{kind}_loss": each.loss if each else 0.0}
    return encode_tensors(tensors, GradientFacts.model_validate({**facts.model_dump(), **told}).model_dump(mode="json"))


def decode_gradients(
    payload: bytes, state: EditState, *, most: float, max_rows: int
) -> tuple[GradientFacts, GradientShare]:
    """Read what :func:`encode_gradients` made of a state, or anything else.

    Args:
        payload: The bytes.
        state: Where the edit is.
        most: Frobenius norm that a gradient of either kind may have, over all layers.
        max_rows: Rows of either kind that an owner may have.

    Raises:
        PayloadError: The bytes are not that, a number is not finite, or a gradient is longer.
    """
    both = {**_factor_shapes(state.adapter, _RETAINED), **_factor_shapes(state.adapter, _FORGOTTEN)}
    tensors, stated = decode_tensors(payload, most=bytes_of(both))
    facts = read_facts(GradientFacts, stated)
    rows = {_RETAINED: facts.retained, _FORGOTTEN: facts.forgotten}
    check_tensors(tensors, {key: each for key, each in both.items() if rows[key[: key.index(".") + 1]]})
    if facts.number != state.number or max(rows.values()) > max_rows:
        raise PayloadError(
            f"expected gradients of step {state.number} over at most {max_rows} rows of a kind, "
            f"got step {facts.number} over {facts.retained} and {facts.forgotten}"
        )
    losses = {_RETAINED: facts.retained_loss, _FORGOTTEN: facts.forgotten_loss}
    found = {
        prefix: _gradient(within(tensors, prefix), state.adapter, count, losses[prefix], most=most) if count else None
        for prefix, count in rows.items()
    }
    return facts, GradientShare(found[_RETAINED], found[_FORGOTTEN])


def encode_scores(scores: Sequence[Scores], classes: Sequence[str], facts: RequestFacts) -> bytes:
    """Encode scores of the same examples, such as those before and after an edit."""
    right = [[each.right.get(label, 0) for label in classes] for each in scores]
    tensors = {"right": torch.tensor(right), "counts": torch.tensor([scores[0].counts.get(c, 0) for c in classes])}
    return encode_tensors(tensors, ScoresFacts.model_validate(facts.model_dump()).model_dump(mode="json"))


def decode_scores(
    payload: bytes, classes: Sequence[str], *, sets: int, max_rows: int
) -> tuple[ScoresFacts, tuple[Scores, ...]]:
    """Read what :func:`encode_scores` made, or anything else.

    Args:
        payload: The bytes.
        classes: That are scored, in order.
        sets: Scores that there must be.
        max_rows: Examples that an owner may have.

    Raises:
        PayloadError: The bytes are not that, or more answers are right than there are examples.
    """
    shapes: Shapes = {"right": (torch.int64, (sets, len(classes))), "counts": (torch.int64, (len(classes),))}
    tensors, stated = decode_tensors(payload, most=bytes_of(shapes))
    check_tensors(tensors, shapes)
    right, counts = tensors["right"], tensors["counts"]
    if int(right.min()) < 0 or bool((right > counts).any()) or sum(counts.tolist()) > max_rows:
        raise PayloadError(f"expected right answers among at most {max_rows} examples, got others")
    there = {label: count for label, count in zip(classes, counts.tolist(), strict=True) if count}
    found = [Scores(dict(zip(classes, row, strict=True)), there) for row in right.tolist()]
    return read_facts(ScoresFacts, stated), tuple(found)


def _gradient(tensors: Mapping[str, Tensor], like: Adapter, rows: int, loss: float, *, most: float) -> Gradient:
    factors = {name: LoraFactors(a=tensors[LORA_A + name], b=tensors[LORA_B + name]) for name in like}
    norm = sum(float(each.double().square().sum()) for each in tensors.values()) ** 0.5
    if not norm <= most:
        raise PayloadError(f"a gradient has the Frobenius norm {norm:.6g}, expected at most {most:g}")
    return Gradient(rows, loss, factors)


def _factors(adapter: Adapter, prefix: str = "") -> dict[str, Tensor]:
    found = {f"{prefix}{LORA_A}{name}": each.a for name, each in adapter.items()}
    return found | {f"{prefix}{LORA_B}{name}": each.b for name, each in adapter.items()}


def _factor_shapes(adapter: Adapter, prefix: str = "") -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {key: (torch.float32, tuple(each.shape)) for key, each in _factors(adapter, prefix).items()}
