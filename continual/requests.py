"""Meet a request to forget on what was learned task after task: edit, and move what is stored along with the features.

::

    mu'_c = mu_c + mean_i ( f'(x_i) - f(x_i) )            over the examples of class c that are at hand

An edit changes the features of retained classes too, a little; statistics of the features before would then answer for
features that are no more. Where all examples of a class are at hand its statistics are taken anew; where some are, its
mean is moved by how far these moved, which is far less noisy than a mean of a few, and its covariance is kept. The
statistics of what is to be forgotten are left as they are until they are removed (:meth:`Knowledge.without`): moved,
they would tell the class again.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pomona.continual.discriminant import GaussianHead, gaussian_head
from pomona.continual.editing import Classifier, Examples
from pomona.continual.encoder import Adapter, FrozenEncoder
from pomona.continual.forgetting import ForgetSettings, Forgotten, forget_classes
from pomona.continual.heads import RidgeSums, random_projection, ridge_sums
from pomona.continual.knowledge import Knowledge, TaskKnowledge
from pomona.continual.statistics import ClassStatistics

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
    classifier = answering_classifier(knowledge, forget)
    found = forget_classes(encoder, classifier, examples, forget, settings=settings, seed=seed)
    edited = replace(knowledge, edits=(*knowledge.edits, found.adapter))
    retained = examples.subset(~examples.of(classifier.indices(forget)))
    edited, stale = _renewed(encoder, knowledge, edited, retained, forget)
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


def moved_statistics(kept: ClassStatistics, before: Tensor, after: Tensor) -> ClassStatistics:
    """Return the statistics of a class after its features moved.

    Args:
        kept: Of all examples of the class, before.
        before: Features of those at hand before, ``(examples, width)``; there may be none.
        after: The same after.
    """
    if not len(before):
        return kept
    if len(before) == kept.count:
        return ClassStatistics.of(after, moments=kept.moments)
    shift = (after.double() - before.double()).mean(0)
    mean, moved = kept.mean(), kept.mean() + shift
    outer = kept.count * (torch.outer(moved, moved) - torch.outer(mean, mean))
    moment = kept.moment + (outer if kept.moment.ndim == 2 else outer.diagonal())
    return ClassStatistics(kept.count, kept.total + kept.count * shift, moment)


def _renewed(
    encoder: FrozenEncoder, before: Knowledge, after: Knowledge, retained: Examples, forget: Collection[str]
) -> tuple[Knowledge, tuple[str, ...]]:
    """Return the knowledge after an edit with its statistics moved along, and the names of sums that stay behind."""
    tasks, stale, start = [], [], 0
    for position, task in enumerate(after.tasks):
        end = start + len(task.classes)
        rows = retained.subset((retained.targets >= start) & (retained.targets < end))
        targets, start = rows.targets - start, end
        first = _moves(encoder, before.adapter(0), after.adapter(0), rows)
        own = _moves(encoder, before.adapter(position), after.adapter(position), rows)
        moved = replace(
            task,
            statistics=_moved(task.statistics, own, targets),
            first=_moved(task.first, first, targets),
            ridge=_retaken(task, first[1], targets, before, forget),
        )
        if task.ridge is not None and moved.ridge is None:
            stale.append(f"the ridge sums of task {task.number}")
            moved = replace(moved, ridge=task.ridge)
        tasks.append(moved)
    return replace(after, tasks=tuple(tasks)), tuple(stale)


def _moves(encoder: FrozenEncoder, before: Adapter, after: Adapter, rows: Examples) -> tuple[Tensor, Tensor]:
    return encoder.all_features(rows.states, before), encoder.all_features(rows.states, after)


def _moved(
    statistics: tuple[ClassStatistics, ...], features: tuple[Tensor, Tensor], targets: Tensor
) -> tuple[ClassStatistics, ...]:
    before, after = features
    return tuple(moved_statistics(each, before[targets == i], after[targets == i]) for i, each in enumerate(statistics))


def _retaken(
    task: TaskKnowledge, features: Tensor, targets: Tensor, knowledge: Knowledge, forget: Collection[str]
) -> RidgeSums | None:
    """Return a task's ridge sums over retained examples alone, where all of those are at hand; else None."""
    if task.ridge is None or knowledge.settings.head != "ridge":
        return None
    counts = torch.bincount(targets, minlength=len(task.classes)).tolist()
    wanted = [0 if label in forget else each.count for label, each in zip(task.classes, task.first, strict=True)]
    if counts != wanted:
        return None
    if not any(wanted):
        return task.ridge - task.ridge
    projection = random_projection(features.shape[1], knowledge.settings.ridge_dimensions, seed=knowledge.settings.seed)
    return ridge_sums(features, targets, projection=projection, classes=len(task.classes))
