"""Decide whether one client's update may take part in a round.

Nothing a client states is believed: every fact is compared with what it enrolled with and what the round
asked for, every tensor with the manifest of the run. The size of an update is that of the change it makes,
found from ``r x r`` products without forming it::

    ||B A||_F^2  ==  trace(B^T B  A A^T)  ==  sum((B^T B) * (A A^T))

and not that of its factors, which say nothing: ``(B / c, c A)`` is the same update for every ``c``.
"""

import difflib
import itertools
import math
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pomona.adapters import AdapterUpdate, LoraFactors
from pomona.errors import UpdateRejected
from pomona.manifest import AdapterManifest
from pomona.ranks import RankPattern, layer_rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolment:
    """What a client said once, when it joined; it is held to it.

    Attributes:
        client: Name.
        rank: LoRA rank of every layer.
        alpha: LoRA alpha.
        rslora: Whether the scale is ``alpha / sqrt(rank)`` rather than ``alpha / rank``.
        num_examples: Size of its training set.
    """

    client: str
    rank: int
    alpha: float
    rslora: bool
    num_examples: int

    @property
    def scale(self) -> float:
        """The factor in front of ``B A`` (Hu et al. 2021, section 4.1; Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the round asked for.

    Attributes:
        run_id: The run.
        round_number: The round, from 1.
        parent: Reference of the global version that was sent out, ``""`` in the first round.
        manifest: The layers and heads that every update has.
        max_update_norm: Largest Frobenius norm over all layers and heads.
        max_examples: Largest number of examples that a client may claim.
        max_rank: Largest rank that a client may have.
        rank_pattern: Of the run's training: which layers have another rank than their client.
        factors_count: The strategy averages or keeps the factors themselves, so that each is held to
            ``max_update_norm`` too: ``(B / c, c A)`` is the same update, and not the same mean.
    """

    run_id: str
    round_number: int
    parent: str
    manifest: AdapterManifest
    max_update_norm: float
    max_examples: int
    max_rank: int
    rank_pattern: RankPattern = ()
    factors_count: bool = False


def verify_update(update: AdapterUpdate, *, enrolment: Enrolment, expected: Expected) -> None:
    """Return if the update may be used, and say why if not.

    A second copy of an update passes: whether a client has already answered is known to the caller.

    Raises:
        UpdateRejected: With the first thing that is wrong: its origin, its claims, its tensors, or its size.
    """
    # lazily, in this order: each check may rely on those before it
    reasons = itertools.chain(
        _wrong_origin(update, enrolment, expected),
        _wrong_claims(update, enrolment, expected),
        _wrong_tensors(update, expected.manifest, expected.rank_pattern),
        _wrong_size(update, enrolment, expected),
    )
    for reason in reasons:
        raise UpdateRejected(enrolment.client, reason)


def update_norm(layers: Mapping[str, LoraFactors], heads: Mapping[str, Tensor]) -> float:
    """Return the Frobenius norm of an update over all its layers, scales applied, and heads.

    Not finite where the squares overflow float64.

    Example:
        >>> factors = LoraFactors(a=torch.ones(1, 4), b=torch.ones(4, 1), scale=0.75)
        >>> update_norm({"query": factors}, {"head.bias": torch.full((4,), 2.0)})
        5.0
    """
    return math.sqrt(_squared_norm(layers, heads)[0])


def _wrong_origin(update: AdapterUpdate, enrolment: Enrolment, expected: Expected) -> Iterator[str]:
    base = expected.manifest.base_sha256
    if update.client != enrolment.client:
        yield f"expected client {enrolment.client!r}, the update says {update.client!r}"
    if update.run_id != expected.run_id:
        yield f"expected run {expected.run_id!r}, got {update.run_id!r}"
    if update.round_number != expected.round_number:
        when = "stale" if update.round_number < expected.round_number else "from the future"
        yield f"{when}: expected round {expected.round_number}, got {update.round_number}"
    if update.parent != expected.parent:
        yield f"another global version: expected parent {expected.parent!r}, got {update.parent!r}"
    if update.base_sha256 != base:
        yield f"another base model: expected {base!r}, got {update.base_sha256!r}"


def _wrong_claims(update: AdapterUpdate, enrolment: Enrolment, expected: Expected) -> Iterator[str]:
    rank, count = update.rank, update.num_examples
    for name, value in (("rank", rank), ("num_examples", count)):
        if type(value) is not int:  # True and 1.0 equal 1 in Python
            yield f"expected an integer {name}, got {value!r}"
        if value < 1:
            yield f"expected {name} of at least 1, got {value}"
    if rank > expected.max_rank:
        yield f"rank {rank} is above max_rank={expected.max_rank}"
    if rank != enrolment.rank:
        yield f"enrolled with rank {enrolment.rank}, got {rank}"
    if not math.isfinite(update.alpha):
        yield f"expected a finite alpha, got {update.alpha}"
    if update.alpha != enrolment.alpha:
        yield f"enrolled with alpha {enrolment.alpha}, got {update.alpha}"
    if update.rslora is not enrolment.rslora:
        yield f"enrolled with rslora={enrolment.rslora}, got {update.rslora}"
    if count > expected.max_examples:
        yield f"num_examples={count} is above max_examples={expected.max_examples}"
    if count != enrolment.num_examples:
        yield f"enrolled with num_examples={enrolment.num_examples}, got {count}"
    if not math.isfinite(update.train_loss):
        yield f"expected a finite train_loss, got {update.train_loss}"


def _wrong_tensors(update: AdapterUpdate, manifest: AdapterManifest, rank_pattern: RankPattern) -> Iterator[str]:
    layers, heads = update.weights.layers, update.weights.heads
    yield from _wrong_names("layer", layers, manifest.layers)
    yield from _wrong_names("head", heads, manifest.heads)
    for name, (out, in_) in manifest.layers.items():
        factors, rank = layers[name], layer_rank(rank_pattern, name, update.rank)
        if factors.rank != rank:
            yield f"layer {name!r} has rank {factors.rank}, the update says {rank}"
        if factors.scale != 1.0:
            yield f"layer {name!r} should have unscaled factors, got scale {factors.scale}"
        yield from _wrong_tensor(f"lora_A of layer {name!r}", factors.a, (rank, in_))
        yield from _wrong_tensor(f"lora_B of layer {name!r}", factors.b, (out, rank))
    for name, shape in manifest.heads.items():
        yield from _wrong_tensor(f"head {name!r}", heads[name], shape)


def _wrong_names(kind: str, names: Collection[str], expected: Collection[str]) -> Iterator[str]:
    missing = sorted(set(expected) - set(names))
    if extra := sorted(set(names) - set(expected)):
        close = difflib.get_close_matches(extra[0], missing, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        yield f"{kind} {extra[0]!r} is not part of this run{hint}"
    if missing:
        yield f"{kind} {missing[0]!r} is missing ({len(missing)} of {len(expected)} are)"


def _wrong_tensor(what: str, tensor: Tensor, shape: tuple[int, ...]) -> Iterator[str]:
    if tuple(tensor.shape) != tuple(shape):
        yield f"{what} should have shape {tuple(shape)}, got {tuple(tensor.shape)}"
    if tensor.dtype != torch.float32:
        yield f"{what} should be float32, got {tensor.dtype}"
    if not bool(torch.isfinite(tensor).all()):
        yield f"{what} has NaN or an infinity"


def _wrong_size(update: AdapterUpdate, enrolment: Enrolment, expected: Expected) -> Iterator[str]:
    layers = {name: replace(factors, scale=enrolment.scale) for name, factors in update.weights.layers.items()}
    squared, error = _squared_norm(layers, update.weights.heads)
    norm, limit = math.sqrt(squared), expected.max_update_norm
    if not norm <= limit:  # NaN is not
        yield f"Frobenius norm {norm:.6g} is above max_update_norm={limit:g}"
    if expected.factors_count:
        yield from _wrong_factors(layers, limit)
    # factors can be huge and cancel; what float64 leaves of their product is then rounding and proves nothing
    if not math.sqrt(squared + error) <= limit:
        yield f"its factors cancel so far that a norm within max_update_norm={limit:g} cannot be shown"


def _wrong_factors(layers: Mapping[str, LoraFactors], limit: float) -> Iterator[str]:
    for name, factors in layers.items():
        sizes = float(factors.a.double().norm()), factors.scale * float(factors.b.double().norm())
        if not max(sizes) <= limit:
            yield f"the factors of layer {name!r} have norms {sizes[0]:.6g} and {sizes[1]:.6g}, above {limit:g}"


def _squared_norm(layers: Mapping[str, LoraFactors], heads: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return the squared norm, and a bound on its rounding error (Higham 2002, section 3.1)."""
    squared = math.fsum(float(head.double().square().sum()) for head in heads.values())
    error = 0.0
    for factors in layers.values():
        a, b = factors.scale * factors.a.double(), factors.b.double()
        gram_a, gram_b = a @ a.T, b.T @ b  # (r, r), (r, r)
        product = float((gram_a * gram_b).sum())
        squared += 0.0 if product < 0.0 else product  # rounding can end below 0; NaN stays
        terms = a.shape[1] + b.shape[0] + factors.rank**2
        error += terms * sys.float_info.epsilon * float(gram_a.trace() * gram_b.trace())
    return squared, error
