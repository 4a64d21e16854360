"""SLCA-style: one adapter that learns slowly, and a head aligned over all classes after each task.

::

    theta_t = a few slow steps from theta_{t-1} on task t, by local cross-entropy
    N(mu_c, Sigma_c)  of the features of each new class c under theta_t, kept from then on
    W = argmin CE over features drawn from all N(mu_c, Sigma_c)

The slower the adapter, the longer the statistics of old classes stay true; the head learns at its own rate.

What is wrong with it: statistics of a class are never measured again, while its features go on moving under every later
task. It trades how much is learned against how long it stays true, by one learning rate.

Differs from the paper: LoRA where that trains the whole backbone, and features of length 1 where that normalises logits
(:mod:`pomona.continual.alignment`).

Reference: Zhang et al., SLCA, ICCV 2023, section 3 (https://arxiv.org/abs/2303.05118).
"""

from torch import Tensor

from pomona.continual.alignment import aligned_head
from pomona.continual.baselines.sequential import ALPHA, RANK, SequentialFineTuning
from pomona.continual.encoder import Adapter, FrozenEncoder, States
from pomona.continual.heads import LinearHead
from pomona.continual.learner import TaskData
from pomona.continual.statistics import ClassStatistics, class_statistics
from pomona.mos_settings import AlignmentSettings, LoopSettings
from pomona.seeds import generator_of


class Slca:
    """Sequential fine-tuning with statistics of each class, and a head that they align.

    Attributes:
        head: Over all classes learned so far.
        statistics: Of each class, under the adapter of its own task.
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
            settings: How each task is trained; ``learning_rate`` is the slow one.
            alignment: How the head is aligned after each task but the first.
            rank: Of every layer's factors.
            alpha: LoRA alpha.
            seed: Of the adapter, the order of examples, and what is drawn.
        """
        self._encoder, self._alignment, self._seed = encoder, alignment, seed
        self._tuned = SequentialFineTuning(encoder, settings=settings, loss="local", rank=rank, alpha=alpha, seed=seed)
        self.head = LinearHead.zeros(0, encoder.width)
        self.statistics: tuple[ClassStatistics, ...] = ()

    @property
    def adapter(self) -> Adapter:
        """The adapter as the last task left it."""
        return self._tuned.adapter

    @property
    def unaligned_head(self) -> LinearHead:
        """The rows that the tasks trained, each among its own classes."""
        return self._tuned.head

    def learn(self, data: TaskData) -> None:
        """Train on the next task, measure its classes, and align the head over all.

        Raises:
            ConfigError: Training diverged.
        """
        known = len(self.statistics)
        self._tuned.learn(data)
        features = self._encoder.all_features(data.states, self.adapter)
        classes = range(known, known + len(data.task.classes))
        self.statistics += class_statistics(features, data.targets, classes)
        self.head = self.unaligned_head
        if known:
            generator = generator_of("align", self._seed, data.task.number)
            self.head = aligned_head(self.head, self.statistics, settings=self._alignment, generator=generator)

    def predict(self, states: States) -> Tensor:
        """Return the class of the largest logit, ``(examples,)`` int64."""
        return self.head.logits(self._encoder.all_features(states, self.adapter)).argmax(1)
