"""First-session adaptation: an adapter trained on the first task, and then a method that trains nothing.

::

    theta = argmin CE over the examples of task 1;    afterwards features are f(x; theta), for ever

With class means this is APER, with ridge regression it is RanPAC as published. The first task tells the encoder what
kind of examples to expect; nothing is ever moved again, so nothing is forgotten.

What is wrong with it: what the first task is decides everything, and whoever was in it is in every feature, so leaving
is no longer a subtraction.

Reference: APER, Zhou et al., Revisiting class-incremental learning with pre-trained models, 2023, section 4.2
(https://arxiv.org/abs/2303.07338); phase 1 of RanPAC, McDonnell et al., NeurIPS 2023, Algorithm 1
(https://arxiv.org/abs/2307.02251).
"""

from collections.abc import Callable

from torch import Tensor

from pomona.continual.baselines.sequential import ALPHA, RANK, SequentialFineTuning
from pomona.continual.encoder import Adapter, FrozenEncoder, States
from pomona.continual.learner import Learner, TaskData
from pomona.errors import DataError
from pomona.mos_settings import LoopSettings


class FirstSession:
    """A learner that is made once the first task has shaped the features.

    Attributes:
        rest: What learns all tasks, the first too, under the adapter; None before.
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        make: Callable[[Adapter], Learner],
        *,
        settings: LoopSettings,
        rank: int = RANK,
        alpha: float = ALPHA,
        seed: int = 0,
    ) -> None:
        """Start with an adapter that changes nothing.

        Args:
            encoder: Gives the features.
            make: Makes what learns from features under an adapter, such as SimpleCil or RanPac.
            settings: How the first task is trained.
            rank: Of every layer's factors.
            alpha: LoRA alpha.
            seed: Of the adapter and the order of examples.
        """
        self._tuned = SequentialFineTuning(encoder, settings=settings, rank=rank, alpha=alpha, seed=seed)
        self._make = make
        self.rest: Learner | None = None

    @property
    def adapter(self) -> Adapter:
        """What the first task left."""
        return self._tuned.adapter

    def learn(self, data: TaskData) -> None:
        """Train the adapter if this is the first task; then let the rest learn it.

        Raises:
            ConfigError: Training diverged.
        """
        if self.rest is None:
            self._tuned.learn(data)
            self.rest = self._make(self.adapter)
        self.rest.learn(data)

    def predict(self, states: States) -> Tensor:
        """Return the class that the rest predicts, ``(examples,)`` int64.

        Raises:
            DataError: Nothing was learned yet.
        """
        if self.rest is None:
            raise DataError("nothing was learned yet")
        return self.rest.predict(states)
