"""SLAO: one adapter for all tasks; each trains from an orthogonal start and is then merged into it.

::

    start of task i:    A = Q^T,  Q R = QR(A_{i-1}^T) with R's diagonal positive,    B = B_{i-1}
    after task i:       A* = A_i,     B* <- B* + (B_i - B*) / sqrt(i)

``A_i, B_i`` are what training left, ``A*, B*`` what is used. ``A`` changes little from task to task and ``B`` a lot,
so ``A`` is replaced and ``B`` averaged, later tasks the less. What is kept does not grow with the tasks: one adapter,
where MOS keeps one for each task, and no choice between adapters at prediction. That is why it is among the baselines:
of the newer LoRA methods it is the one whose memory is constant, and it is two functions of the factors.

What is wrong with it: the average of factors is no average of updates, as ``A`` differs, and nothing ties the head of
an old class to the adapter that was merged over it.

Differs from the paper, which trains language models to generate and so has no head: classes are told apart by a head
aligned over statistics of every class, measured under the merged adapter, as SLCA's is.

Reference: Qiao and Mahdavi, Merge before forget: a single LoRA continual learning via continual merging, ICLR 2026,
section 4 (https://arxiv.org/abs/2512.23017).
"""

import math

import torch
from torch import Tensor

from pomona.adapters import LoraFactors
from pomona.continual.alignment import aligned_head
from pomona.continual.baselines.sequential import ALPHA, RANK
from pomona.continual.encoder import Adapter, FrozenEncoder, States
from pomona.continual.heads import LinearHead
from pomona.continual.learner import TaskData
from pomona.continual.statistics import ClassStatistics, class_statistics
from pomona.continual.training import fresh_adapter, train_adapter
from pomona.mos_settings import AlignmentSettings, LoopSettings
from pomona.seeds import generator_of, seed_of


def orthogonal_start(adapter: Adapter) -> Adapter:
    """Return what the next task trains from: the rows of ``A`` made orthonormal in their order, ``B`` as it is."""
    return {
        name: LoraFactors(a=_orthonormal_rows(each.a), b=each.b.clone(), scale=each.scale)
        for name, each in adapter.items()
    }


def merge_over_time(merged: Adapter, trained: Adapter, *, task: int) -> Adapter:
    """Return the merged adapter after task ``task``, counted from 1: its ``A``, and ``B`` moved by ``1/sqrt(task)``."""
    return {
        name: LoraFactors(
            a=each.a.clone(), b=torch.lerp(merged[name].b, each.b, 1.0 / math.sqrt(task)), scale=each.scale
        )
        for name, each in trained.items()
    }


class Slao:
    """One merged adapter, and a head aligned over statistics of all classes.

    Attributes:
        adapter: The merged one, which features are taken under.
        trained: What training left, which the next task starts from.
        head: Over all classes learned so far.
        statistics: Of each class, under the merged adapter of its time.
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        *,
        settings: LoopSettings,
        alignment: AlignmentSettings,
        rank: int = RANK,
        alpha: float = ALPHA,
        seed: int = 0,
    ) -> None:
        """Start with an adapter that changes nothing.

        Args:
            encoder: Gives the features.
            settings: How each task is trained.
            alignment: How the head is aligned after each task.
            rank: Of every layer's factors.
            alpha: LoRA alpha.
            seed: Of the adapter, the order of examples, and what is drawn.
        """
        self._encoder, self._settings, self._alignment, self._seed = encoder, settings, alignment, seed
        self.trained = fresh_adapter(encoder, rank=rank, alpha=alpha, seed=seed)
        self.adapter: Adapter = self.trained
        self.head = LinearHead.zeros(0, encoder.width)
        self.statistics: tuple[ClassStatistics, ...] = ()

    def learn(self, data: TaskData) -> None:
        """Train on the next task, merge, measure its classes, and align the head over all.

        Raises:
            ConfigError: Training diverged.
        """
        known, number = len(self.statistics), data.task.number
        classes = range(known, known + len(data.task.classes))
        self.trained, head = train_adapter(
            self._encoder,
            data.states,
            data.targets - known,
            start=orthogonal_start(self.trained),
            head=LinearHead.zeros(len(classes), self._encoder.width),
            settings=self._settings,
            seed=seed_of(self._seed, number),
            trains="both",
        )
        self.adapter = merge_over_time(self.adapter, self.trained, task=number)
        features = self._encoder.all_features(data.states, self.adapter)
        self.statistics += class_statistics(features, data.targets, classes)
        generator = generator_of("align", self._seed, number)
        self.head = aligned_head(self.head.joined(head), self.statistics, settings=self._alignment, generator=generator)

    def predict(self, states: States) -> Tensor:
        """Return the class of the largest logit, ``(examples,)`` int64."""
        return self.head.logits(self._encoder.all_features(states, self.adapter)).argmax(1)


def _orthonormal_rows(a: Tensor) -> Tensor:
    q, r = torch.linalg.qr(a.double().T)  # (in, rank), (rank, rank)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)
    columns: Tensor = q * signs
    return columns.T.float().contiguous()
