"""Joint training: one adapter and one head, trained on the examples of all tasks together.

::

    theta, W = argmin CE over the examples of tasks 1..t,  from a fresh start

What is wrong with it: it keeps everybody's examples, which is what continual learning must do without. It is the upper
bound that the others are measured against, for the same number of passes over each example.
"""

import torch
from torch import Tensor

from pomona.continual.baselines.sequential import ALPHA, RANK
from pomona.continual.encoder import Adapter, FrozenEncoder, States
from pomona.continual.heads import LinearHead
from pomona.continual.learner import TaskData
from pomona.continual.training import fresh_adapter, train_adapter
from pomona.errors import DataError
from pomona.mos_settings import LoopSettings


class JointTraining:
    """Keeps all examples, and trains afresh on all of them when it is asked after new ones came.

    Attributes:
        kept: The examples of all tasks.
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        *,
        settings: LoopSettings,
        rank: int = RANK,
        alpha: float = ALPHA,
        seed: int = 0,
    ) -> None:
        """Start without examples.

        Args:
            encoder: Gives the features.
            settings: How all tasks together are trained.
            rank: Of every layer's factors.
            alpha: LoRA alpha.
            seed: Of the adapter and the order of examples.
        """
        self._encoder, self._settings, self._seed = encoder, settings, seed
        self._start = fresh_adapter(encoder, rank=rank, alpha=alpha, seed=seed)
        self.kept: list[TaskData] = []
        self._model: tuple[Adapter, LinearHead] | None = None

    def learn(self, data: TaskData) -> None:
        """Keep the examples of the next task."""
        self.kept.append(data)
        self._model = None

    def predict(self, states: States) -> Tensor:
        """Return the class of the largest logit, ``(examples,)`` int64, after training if new examples came.

        Raises:
            DataError: Nothing was learned yet.
            ConfigError: Training diverged.
        """
        if not self.kept:
            raise DataError("nothing was learned yet")
        if self._model is None:
            self._model = train_adapter(
                self._encoder,
                sum((data.states for data in self.kept[1:]), self.kept[0].states),
                torch.cat([data.targets for data in self.kept]),
                start=self._start,
                head=LinearHead.zeros(sum(len(data.task.classes) for data in self.kept), self._encoder.width),
                settings=self._settings,
                seed=self._seed,
                trains="both",
            )
        adapter, head = self._model
        return head.logits(self._encoder.all_features(states, adapter)).argmax(1)
