"""Sequential fine-tuning: one adapter and one head, trained on each task as if there were no others.

::

    theta_t, W_t = argmin CE over the examples of task t,  started from theta_{t-1}, W_{t-1}

With ``loss="seen"`` the softmax is over all classes seen so far, of which only the newest have examples: the shortest
way down is to never answer an old class again, and that is what is learned. With ``loss="local"`` it is over the task's
own classes, so old logits are only disturbed, by features that move under them and by scales that were never compared.

What is wrong with it: forgetting, by design. It is what the others must beat.

Reference: "Finetune" of Zhou et al., Class-incremental learning: a survey, 2024 (https://arxiv.org/abs/2302.03648).
"""

from typing import Literal

from torch import Tensor

from pomona.continual.encoder import Adapter, FrozenEncoder, States
from pomona.continual.heads import LinearHead
from pomona.continual.learner import TaskData
from pomona.continual.training import fresh_adapter, train_adapter
from pomona.mos_settings import LoopSettings
from pomona.seeds import seed_of

Loss = Literal["seen", "local"]

RANK, ALPHA = 8, 16.0


class SequentialFineTuning:
    """One adapter and one head that every task trains on.

    Attributes:
        adapter: As the last task left it.
        head: As the last task left it.
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        *,
        settings: LoopSettings,
        loss: Loss = "seen",
        rank: int = RANK,
        alpha: float = ALPHA,
        seed: int = 0,
    ) -> None:
        """Start with an adapter that changes nothing.

        Args:
            encoder: Gives the features.
            settings: How each task is trained.
            loss: Classes in the softmax, see above.
            rank: Of every layer's factors.
            alpha: LoRA alpha.
            seed: Of the adapter and the order of examples.
        """
        self._encoder, self._settings, self._loss, self._seed = encoder, settings, loss, seed
        self.adapter: Adapter = fresh_adapter(encoder, rank=rank, alpha=alpha, seed=seed)
        self.head = LinearHead.zeros(0, encoder.width)

    def learn(self, data: TaskData) -> None:
        """Train on the examples of the next task.

        Raises:
            ConfigError: Training diverged.
        """
        classes, known = len(data.task.classes), self.head.classes
        first = known if self._loss == "local" else 0
        trained = self.head.grown(known + classes).without(range(first))
        self.adapter, head = train_adapter(
            self._encoder,
            data.states,
            data.targets - first,
            start=self.adapter,
            head=trained,
            settings=self._settings,
            seed=seed_of(self._seed, data.task.number),
            trains="both",
        )
        self.head = self.head.joined(head) if first else head

    def predict(self, states: States) -> Tensor:
        """Return the class of the largest logit, ``(examples,)`` int64."""
        return self.head.logits(self._encoder.all_features(states, self.adapter)).argmax(1)
