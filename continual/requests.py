"""Meet a request to forget on what was learned task after task: edit, and move what is stored along with the features.

The examples may be at one place or with several owners. Owners share gradients of the edit
(:mod:`pomona.continual.edit_rounds`), sums of how far features moved (:mod:`pomona.continual.moves`), and nothing else;
what is published follows from the sums. :func:`forget_in_knowledge` is the case of one owner.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from pomona.continual.discriminant import GaussianHead, gaussian_head
from pomona.continual.edit_rounds import EditState, GradientShare, is_done, start_edit
from pomona.continual.editing import Classifier, Examples, to_forget
from pomona.continual.encoder import FrozenEncoder
from pomona.continual.forgetting import Forgotten, forget_owner, forget_step, forgotten_at
from pomona.continual.knowledge import Knowledge
from pomona.continual.moves import TaskMoves, moves_of, renewed, summed_moves
from pomona.forget_settings import ForgetSettings

CONFIDENCE = 4.0  # nats


@dataclass(frozen=True, slots=True)
class MetRequest:
    """What a request leaves.

    Attributes:
        edited: The knowledge with the edit, all rows and statistics still there: what the edit alone does.
        left: The same without the classes: what is to be used.
        forgotten: The edit itself.
        stale: Names of sums that could not be renewed, because not all examples that they count are at hand.
    """

    edited: Knowledge
    left: Knowledge
    forgotten: Forgotten
    stale: tuple[str, ...]


def forget_in_knowledge(
    encoder: FrozenEncoder,
    knowledge: Knowledge,
    examples: Examples,
    forget: Collection[str],
    *,
    settings: ForgetSettings,
    seed: int,
) -> MetRequest:
    """Forget classes that were learned task after task; what is given is left as it is.

    Args:
        encoder: The one that all tasks were learned with.
        knowledge: Of all tasks so far.
        examples: Of the classes to forget and of those to retain; targets are places in the learning order.
        forget: The classes to forget.
        settings: Of forgetting.
        seed: The same seed gives the same bytes.

    Raises:
        DataError: A class is unknown, all classes would go, or examples of the forgotten or of the others are missing.
        ConfigError: The loss became NaN or infinite.
    """
    to_forget(answering_classifier(knowledge, forget), examples, forget)
    owner = RequestOwner(encoder, knowledge, examples, forget, settings=settings, seed=seed, alone=True)
    state = start_edit(encoder, rank=settings.rank, seed=seed)
    while not is_done(state, settings):
        state = forget_step(state, [owner.gradients(state)], settings)
    return meet(knowledge, forget, state, [owner.moves(state)])


class RequestOwner:
    """One owner's part in a request: it may have examples to forget, examples to retain, or both."""

    def __init__(
        self,
        encoder: FrozenEncoder,
        knowledge: Knowledge,
        examples: Examples,
        forget: Collection[str],
        *,
        settings: ForgetSettings,
        seed: int,
        alone: bool = False,
    ) -> None:
        """Draw the order of examples.

        Args:
            encoder: The one that all tasks were learned with.
            knowledge: Of all tasks so far.
            examples: Of this owner; targets are places in the learning order.
            forget: The classes to forget.
            settings: Of forgetting.
            seed: Of the order, the same for all owners.
            alone: Whether these are all the examples that there are.

        Raises:
            DataError: A class is unknown, or all classes would go.
            ConfigError: Prototypes are asked for, and not all examples are here.
        """
        self._encoder, self._knowledge, self._examples, self._forget = encoder, knowledge, examples, forget
        classifier = answering_classifier(knowledge, forget)
        self._edit = forget_owner(encoder, classifier, examples, forget, settings=settings, seed=seed, alone=alone)

    def gradients(self, state: EditState) -> GradientShare:
        """Return the owner's share of the next step."""
        return self._edit.share(state.number, state.adapter)

    def moves(self, state: EditState) -> tuple[TaskMoves, ...]:
        """Return how the features of its retained examples moved."""
        after = with_edit(self._knowledge, state)
        return moves_of(self._encoder, self._knowledge, after, self._examples, self._forget)


def with_edit(knowledge: Knowledge, state: EditState) -> Knowledge:
    """Return knowledge with the edit's adapter stacked on every task's, its statistics as they were."""
    return replace(knowledge, edits=(*knowledge.edits, state.adapter))


def meet(
    knowledge: Knowledge, forget: Collection[str], state: EditState, moves: Sequence[tuple[TaskMoves, ...]]
) -> MetRequest:
    """Return what a request leaves.

    Args:
        knowledge: Before the request.
        forget: The classes to forget.
        state: After all steps.
        moves: Of every owner, in an order that does not depend on when they came.
    """
    edited, stale = renewed(with_edit(knowledge, state), summed_moves(moves), forget)
    found = forgotten_at(state, answering_classifier(knowledge, forget))
    return MetRequest(edited, edited.without(tuple(forget)), found, stale)


def answering_classifier(knowledge: Knowledge, forget: Collection[str]) -> Classifier:
    """Return the classifier to edit: what the knowledge's head answers with, and what gradients can go through.

    A head aligned over all tasks answers under each task's adapter. All others choose the class, or its task, by
    features under the first adapter; the classes' normal distributions there stand for them. On the examples that they
    were taken of these are sure by dozens of nats, where a cross-entropy has no gradient left, so their logits are
    scaled down until a class to forget stands out by :data:`CONFIDENCE`.

    Args:
        knowledge: Before the request.
        forget: The classes to forget.
    """
    settings = knowledge.settings
    if settings.head == "aligned":
        adapters = tuple(knowledge.adapter(position) for position in range(len(knowledge.tasks)))
        return Classifier(knowledge.classes, adapters, knowledge.head, tuple(knowledge.task_of.tolist()))
    head = gaussian_head(knowledge.first, prior=settings.prior, sphere_examples=settings.sphere_examples)
    sharpness = min(1.0 / settings.temperature, CONFIDENCE / _lead(head, knowledge.classes, forget))
    return Classifier(knowledge.classes, (knowledge.adapter(0),), head, sharpness=sharpness)


def _lead(head: GaussianHead, classes: tuple[str, ...], forget: Collection[str]) -> float:
    """Return by how much a class to forget leads at its own mean before the likeliest other; the most of all."""
    wanted = [i for i, label in enumerate(classes) if label in forget]
    logits = head.logits(head.means[wanted])
    own = torch.nn.functional.one_hot(torch.tensor(wanted), len(classes)).bool()
    leads = logits[own] - logits.masked_fill(own, -torch.inf).max(1).values
    return max(float(leads.max()), torch.finfo(torch.float32).tiny)
