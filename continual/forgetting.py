"""Forget classes with a group-sparse adapter: GS-LoRA (Zhao et al. 2024) and GS-LoRA++ (Zhao et al. 2025).

::

    L = L_r + beta [bound - L_f]_+  +  w_f [bound_D - D_f]_+ + w_r D_r,     prox on the blocks (groups.py)

``L_r`` and ``L_f`` are cross-entropies of retained and of forgotten examples (arXiv:2403.11530); ``D`` is the
divergence ``KL(softmax(prototype) || softmax(feature))`` of an example from its class's prototype before the edit
(arXiv:2501.09705), and ``w_f = w_r = 0`` is GS-LoRA. What is forgotten is pushed no further than the bound,
because an unbounded push wrecks what is retained.

Two things are relative here that the papers state as figures for their own head and width. The bound is
``ln K + margin``: ``ln K`` is the loss of a guess among ``K`` classes. And ``bound_D`` is a share of the divergence
between examples and the prototypes of other classes.

An edit that lowers an accuracy is *behavioural*: the classifier stops telling the class, which does not show that its
examples left no trace. :mod:`pomona.continual.verification` looks for traces, and
:meth:`pomona.continual.knowledge.Knowledge.without` removes the class from where it is stored rather than learned.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, relu

from pomona.continual.edit_rounds import EditOwner, EditState, GradientShare, Losses, advance, is_done, start_edit
from pomona.continual.editing import Classifier, Edited, Examples, Step, features_of, to_forget, with_adapter
from pomona.continual.encoder import Adapter, FrozenEncoder
from pomona.continual.groups import changed_groups, groups_of, shrink_groups
from pomona.continual.heads import class_means
from pomona.errors import ConfigError
from pomona.forget_settings import ForgetSettings


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What forgetting gives.

    Attributes:
        adapter: The forget-adapter alone.
        classifier: The classifier with the forget-adapter stacked on each of its adapters; the head keeps its rows.
        groups_total: Blocks that the adapter could change.
        groups_changed: Blocks that it changes; in the others its factors are exactly zero.
        losses: Of each step.
    """

    adapter: Adapter
    classifier: Classifier
    groups_total: int
    groups_changed: tuple[str, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Prototypes:
    means: Tensor  # (classes, width)
    bound: float


def forget_classes(
    encoder: FrozenEncoder,
    classifier: Classifier,
    examples: Examples,
    forget: Collection[str],
    *,
    settings: ForgetSettings,
    seed: int,
) -> Forgotten:
    """Train a forget-adapter over a classifier; what is given is left as it is.

    Requests follow each other by passing on ``classifier`` of the one before, and no examples of what was forgotten
    before. Classes that are retained without an example are neither protected nor harmed on purpose.

    Args:
        encoder: The frozen encoder.
        classifier: With a row of its head for every class.
        examples: Of the classes to forget and of those to retain; a few of each do.
        forget: The classes to forget.
        settings: Weights, bounds, steps.
        seed: The same seed gives the same bytes.

    Raises:
        DataError: A class is unknown, all classes would go, or examples of the forgotten or of the others are missing.
        ConfigError: The loss became NaN or infinite.
    """
    to_forget(classifier, examples, forget)
    owner = forget_owner(encoder, classifier, examples, forget, settings=settings, seed=seed, alone=True)
    state = start_edit(encoder, rank=settings.rank, seed=seed)
    while not is_done(state, settings):
        state = forget_step(state, [owner.share(state.number, state.adapter)], settings)
    return forgotten_at(state, classifier)


def forget_owner(
    encoder: FrozenEncoder,
    classifier: Classifier,
    examples: Examples,
    forget: Collection[str],
    *,
    settings: ForgetSettings,
    seed: int,
    alone: bool = False,
) -> EditOwner:
    """Return an owner of some of the examples: it may have rows to forget, rows to retain, or both.

    Args:
        encoder: The frozen encoder.
        classifier: With a row of its head for every class.
        examples: Of this owner.
        forget: The classes to forget.
        settings: Weights, bounds, steps.
        seed: Of the order of examples.
        alone: Whether these are all the examples that there are.

    Raises:
        DataError: A class is unknown, or all classes would go.
        ConfigError: There are other owners, and ``push`` or ``pull`` need prototypes of all examples.
    """
    prototypes: _Prototypes | None = None
    if settings.push or settings.pull:
        if not alone:
            raise ConfigError(
                "push and pull need prototypes of all examples, which are not at one place; set both to 0"
            )
        prototypes = _prototypes(encoder, classifier, examples, settings)
    forgotten = examples.of(classifier.indices(forget))
    answers = _answers_before(encoder, classifier, examples, forget) if settings.retention == "answers" else None
    return EditOwner(
        encoder, classifier, examples, forgotten,
        losses=_losses(settings, prototypes, answers), settings=settings, seed=seed,
    )  # fmt: skip


def forget_step(state: EditState, shares: Sequence[GradientShare], settings: ForgetSettings) -> EditState:
    """Take one step, and after it the proximal one, so that blocks of what all owners get are exactly zero.

    Raises:
        DataError: Nobody has rows to retain, or nobody has rows to forget.
        ConfigError: The loss became NaN or infinite.
    """
    return advance(state, shares, settings, after_step=partial(_shrink, settings=settings))


def forgotten_at(state: EditState, classifier: Classifier) -> Forgotten:
    """Return what was trained."""
    return forgotten_by(Edited(state.adapter, with_adapter(classifier, state.adapter), state.losses))


def forgotten_by(edited: Edited) -> Forgotten:
    """Return an edit with the blocks that it changes."""
    return Forgotten(
        adapter=edited.adapter,
        classifier=edited.classifier,
        groups_total=len(groups_of(edited.adapter)),
        groups_changed=changed_groups(edited.adapter),
        losses=edited.losses,
    )


def chance_bound(classes: int, margin: float) -> float:
    """Return ``ln K + margin``, the loss in nats above which an example counts as forgotten."""
    return math.log(classes) + margin


def bounded_loss(losses: Tensor, bound: float, *, hinge: Literal["example", "batch"]) -> Tensor:
    """Return ``[bound - L]_+`` over the mean loss, or the mean of it over examples; zero once all are forgotten."""
    return relu(bound - losses).mean() if hinge == "example" else relu(bound - losses.mean())


def divergence(prototypes: Tensor, features: Tensor) -> Tensor:
    """Return ``KL(softmax(prototype) || softmax(feature))`` row by row, both scaled to unit variance.

    Args:
        prototypes: ``(examples, width)``.
        features: ``(examples, width)`` of length 1.

    Returns:
        ``(examples,)``, at least zero up to rounding.
    """
    scale = math.sqrt(features.shape[1])
    wanted, found = (torch.log_softmax(each * scale, dim=1) for each in (prototypes, features))
    return (wanted.exp() * (wanted - found)).sum(1)


def _losses(settings: ForgetSettings, prototypes: _Prototypes | None, answers: Tensor | None) -> Losses:
    return Losses(
        retain=partial(_retention, settings=settings, prototypes=prototypes, answers=answers),
        forget=partial(_forgetting, settings=settings, prototypes=prototypes),
    )


def _retention(
    step: Step, *, settings: ForgetSettings, prototypes: _Prototypes | None, answers: Tensor | None
) -> Tensor:
    loss = cross_entropy(step.logits, step.targets if answers is None else answers[step.rows])
    if prototypes is None:
        return loss
    return loss + settings.pull * divergence(prototypes.means[step.targets], step.features).mean()


def _forgetting(step: Step, *, settings: ForgetSettings, prototypes: _Prototypes | None) -> Tensor:
    losses = cross_entropy(step.logits, step.targets, reduction="none")
    bound = chance_bound(step.logits.shape[1], settings.margin)
    loss = settings.beta * bounded_loss(losses, bound, hinge=settings.hinge)
    if prototypes is None:
        return loss
    away = divergence(prototypes.means[step.targets], step.features).mean()
    return loss + settings.push * relu(prototypes.bound - away)


def _shrink(number: int, learning_rate: float, adapter: Adapter, *, settings: ForgetSettings) -> Adapter:
    if not settings.sparsity or number < settings.warm_up * settings.steps:
        return adapter
    return shrink_groups(adapter, strength=settings.sparsity, learning_rate=learning_rate)


def _answers_before(
    encoder: FrozenEncoder, classifier: Classifier, examples: Examples, forget: Collection[str]
) -> Tensor:
    """Return the probabilities of the classes to retain before the edit, ``(examples, classes)`` float32."""
    with torch.no_grad():
        logits = classifier.logits(features_of(encoder, classifier, examples)).float()
    logits[:, sorted(classifier.indices(forget))] = -math.inf
    return logits.softmax(1)


def _prototypes(
    encoder: FrozenEncoder, classifier: Classifier, examples: Examples, settings: ForgetSettings
) -> _Prototypes:
    """Return class means before the edit, and the bound of the push."""
    features = features_of(encoder, classifier, examples)
    means = class_means(features, examples.targets, classes=len(classifier.classes))
    present = sorted(set(examples.targets.tolist()))
    others = [
        divergence(means[each].expand(len(features), -1), features)[examples.targets != each].mean() for each in present
    ]
    return _Prototypes(means, settings.push_bound * float(torch.stack(others).mean()))
