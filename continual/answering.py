"""Answer from what is known: which class an example is of, and how sure that is.

The heads follow from the knowledge alone and are solved once for many examples. Features are taken under one adapter at
a time, so examples that go through the same adapter go through it together.
"""

import functools
import math

import torch
from torch import Tensor

from pomona.continual.discriminant import GaussianHead, gaussian_head
from pomona.continual.encoder import FrozenEncoder, States
from pomona.continual.heads import NormalEquations, RidgeHead, RidgeSums, random_projection, ridge_head
from pomona.continual.knowledge import Knowledge
from pomona.continual.merging import mean_adapter
from pomona.continual.published import overwrite
from pomona.continual.retrieval import likeliest, refined
from pomona.continual.training import stacked
from pomona.errors import DataError

_BATCH = 128
_RIDGE_SHARPNESS = 10.0  # ridge scores lie between 0 and 1, too close for a softmax


class Answerer:
    """The heads that follow from some knowledge, over an encoder; changes neither.

    With ``official_compat`` it does change the knowledge's adapters, as the published code does.
    """

    def __init__(self, encoder: FrozenEncoder, knowledge: Knowledge) -> None:
        """Solve nothing yet."""
        self._encoder = encoder
        self._knowledge = knowledge
        self._settings = knowledge.settings
        self._task_of = knowledge.task_of

    def scores(self, states: States) -> Tensor:
        """Return the probability of each class, ``(examples, classes)`` float32, in learning order.

        Raises:
            DataError: Nothing is known.
        """
        if not self._knowledge.classes:
            raise DataError("nothing is known yet, or all was forgotten; learn a task first")
        if not len(states):
            return torch.zeros(0, len(self._knowledge.classes))
        return self._answers(states).float()

    def features(self, position: int, states: States) -> Tensor:
        """Return features under the adapter of one task and all edits, ``(examples, width)``."""
        if not self._settings.official_compat:
            return self._encoder.all_features(states, self._knowledge.adapter(position))
        adapters = [task.adapter for task in self._knowledge.tasks]
        parts = []
        for start in range(0, len(states), _BATCH):
            overwrite(adapters, position, weight=self._settings.merge_weight, blocks=self._settings.adapted_blocks)
            batch = states.subset(range(start, min(start + _BATCH, len(states))))
            parts.append(self._encoder.all_features(batch, self._knowledge.adapter(position)))
        return torch.cat(parts)

    def _answers(self, states: States) -> Tensor:
        match self._settings.head:
            case "aligned":
                return self._aligned(states)
            case "combined":
                return self._combined(states)
            case "gaussian":
                return self._general(self.features(0, states)).softmax(1)
            case "ridge":
                return self._ridge_scores(self.features(0, states))
            case "ridge-own":
                return self._ridge_scores(self._mean_features(states))

    def _aligned(self, states: States) -> Tensor:
        """The paper's two stages: prototypes under the first adapter, the head under the retrieved one."""
        cosines = self._knowledge.prototypes().logits(self.features(0, states))
        logits = self._knowledge.head.logits
        retrieved = refined(
            self._task_of[cosines.argmax(1)],
            lambda task, chosen: logits(self.features(task, states.subset(chosen.tolist()))),
            self._task_of,
            steps=self._settings.refinement_steps,
        )
        found = retrieved.logits.softmax(1)
        return (found + (len(self._knowledge.tasks) * cosines).softmax(1)) / 2 if self._settings.ensemble else found

    def _combined(self, states: States) -> Tensor:
        """The general head chooses tasks; the own head of each chosen task has its say about its classes."""
        general = self._general(self.features(0, states)).log_softmax(1)
        tasks = likeliest(general, self._task_of, most=self._settings.experts)
        found = torch.full_like(general, -math.inf)
        for task in sorted(set(tasks.flatten().tolist()) & set(self._task_of.tolist())):  # others have no class left
            chosen = (tasks == task).any(1).nonzero().flatten()
            columns = (self._task_of == task).nonzero().flatten()
            own = self._own(task, states.subset(chosen.tolist()))
            found[chosen[:, None], columns] = general[chosen[:, None], columns] + self._settings.expert_weight * own
        return found.softmax(1)

    def _own(self, task: int, states: States) -> Tensor:
        head = self._knowledge.tasks[task].head
        if head.classes == 1:
            return torch.zeros(len(states), 1, dtype=torch.float64)
        return head.logits(self.features(task, states)).double().log_softmax(1)

    def _general(self, features: Tensor) -> Tensor:
        return self._gaussian.logits(features) / self._settings.temperature

    def _ridge_scores(self, features: Tensor) -> Tensor:
        return (self._ridge.logits(features) * _RIDGE_SHARPNESS).softmax(1)

    def _mean_features(self, states: States) -> Tensor:
        mean = mean_adapter([task.adapter for task in self._knowledge.tasks])
        return self._encoder.all_features(states, stacked(mean, self._knowledge.edit))

    @functools.cached_property
    def _gaussian(self) -> GaussianHead:
        settings = self._settings
        return gaussian_head(self._knowledge.first, prior=settings.prior, sphere_examples=settings.sphere_examples)

    @functools.cached_property
    def _ridge(self) -> RidgeHead:
        sums = [task.ridge for task in self._knowledge.tasks if task.ridge is not None]
        if len(sums) < len(self._knowledge.tasks):
            raise DataError("expected sums of random features of every task; they were learned for another head")
        projection = random_projection(self._encoder.width, self._settings.ridge_dimensions, seed=self._settings.seed)
        return ridge_head(_side_by_side(sums), projection=projection)


def _side_by_side(sums: list[RidgeSums]) -> RidgeSums:
    """Return the sums of all tasks' examples, from those of each task with its own columns."""
    total, held_out = (
        NormalEquations(
            torch.stack([part.gram for part in parts]).sum(0),
            torch.cat([part.cross for part in parts], dim=1),
            sum(part.count for part in parts),
        )
        for parts in ([each.total for each in sums], [each.held_out for each in sums])
    )
    return RidgeSums(total, held_out)
