"""RanPAC: ridge regression on random features of a frozen encoder.

::

    h(x) = relu(f(x) R),   y = argmax_c h(x) . w_c,   W = (sum h h^T + lambda I)^-1 sum h y^T

One pass over the data, no gradient. The model is a function of two sums, so it is the same whatever the order of the
tasks, however examples are spread over clients, and after somebody's sums were subtracted it is the one that never had
them. That is exact as long as features come from an encoder that was not trained on the data: :class:`RanPac` may be
given an adapter, and then who shaped that adapter is in every feature (RanPAC's first phase trains one on the first
task; see :mod:`pomona.continual.baselines.first_session`).

What is wrong with it: a Gram matrix takes ``dimensions^2`` float64 whatever is learned, 32 MB at 2,000, far more than
an adapter, and there are two, since ``lambda`` is chosen by one over examples that were held out; solving takes
``dimensions^3``. The features never adapt.

Differs from the paper in the number of random features, 10,000 there, and in what is held out to choose ``lambda``
(:func:`pomona.continual.heads.held_out`): there a random fifth of each task decides, so the order of tasks shows in the
result.

Reference: McDonnell et al., RanPAC: random projections and pre-trained models for continual learning, NeurIPS 2023,
eq. 5-9 (https://arxiv.org/abs/2307.02251).
"""

from torch import Tensor

from pomona.continual.encoder import NO_ADAPTER, Adapter, FrozenEncoder, States
from pomona.continual.heads import RidgeHead, RidgeSums, random_projection, ridge_head, ridge_sums
from pomona.continual.learner import TaskData
from pomona.errors import DataError

DIMENSIONS = 2000


class RanPac:
    """Ridge regression whose state is two sums.

    Attributes:
        sums: Over all examples learned and not forgotten; None before the first task.
    """

    def __init__(
        self, encoder: FrozenEncoder, *, adapter: Adapter = NO_ADAPTER, dimensions: int = DIMENSIONS, seed: int = 0
    ) -> None:
        """Start without examples.

        Args:
            encoder: Gives the features.
            adapter: What they are taken under, throughout.
            dimensions: Random features.
            seed: Of their projection; whoever adds sums must have the same.
        """
        self._encoder, self._adapter = encoder, adapter
        self._projection = random_projection(encoder.width, dimensions, seed=seed)
        self._head: RidgeHead | None = None
        self.sums: RidgeSums | None = None

    def sums_of(self, data: TaskData) -> RidgeSums:
        """Return what some examples add: all that a client need send."""
        features = self._encoder.all_features(data.states, self._adapter)
        classes = int(data.targets.max()) + 1
        return ridge_sums(features, data.targets, projection=self._projection, classes=classes)

    def learn(self, data: TaskData) -> None:
        """Add the examples of a task; tasks may come in any order."""
        self.add(self.sums_of(data))

    def add(self, sums: RidgeSums) -> None:
        """Add what :meth:`sums_of` gave, here or on a client.

        Raises:
            DataError: They are of another projection.
        """
        self.sums = sums if self.sums is None else self.sums + sums
        self._head = None

    def forget(self, sums: RidgeSums) -> None:
        """Take away what was added; the rest is as if that had never come.

        Raises:
            DataError: Nothing was added, or they are of another projection.
        """
        if self.sums is None:
            raise DataError("expected sums that were added before, nothing was")
        self.sums = self.sums - sums
        self._head = None

    @property
    def head(self) -> RidgeHead:
        """The solution for the sums as they are.

        Raises:
            DataError: There are no examples.
        """
        if self.sums is None:
            raise DataError("nothing was learned yet")
        if self._head is None:
            self._head = ridge_head(self.sums, projection=self._projection)
        return self._head

    def predict(self, states: States) -> Tensor:
        """Return the class of the highest score, ``(examples,)`` int64.

        Raises:
            DataError: There are no examples.
        """
        return self.head.logits(self._encoder.all_features(states, self._adapter)).argmax(1)
