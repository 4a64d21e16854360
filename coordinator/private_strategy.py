"""The strategy of a run under client-level privacy: updates become one sum, and nothing of a single one is kept.

No update is recorded, no client is named in a log or told apart in the registry, and neither how many answered nor how
long they took is written down: only the noised mean leaves this module.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from pomona.adapters import AdapterWeights
from pomona.coordinator.enrolment import Roster
from pomona.coordinator.method import Trained
from pomona.coordinator.private_method import PrivateMethod
from pomona.coordinator.replies import Reply
from pomona.coordinator.strategy import LoraStrategy
from pomona.errors import PayloadError
from pomona.manifest import AdapterManifest
from pomona.privacy.adaptive_clip import AdaptiveClip, next_bound
from pomona.privacy.clipping import joint_norm
from pomona.privacy.gaussian_sum import GaussianSum
from pomona.privacy.matrix_factorization import CorrelatedNoise
from pomona.privacy.plan import PrivacyPlan
from pomona.privacy.randomness import SecureRandom
from pomona.protocol import Invitation
from pomona.settings import RunSettings
from pomona.storage.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """What a round gives; all of it is noised, or public.

    Attributes:
        weights: The next global adapter.
        retained_energy: Share of the energy that truncation kept, per layer.
        clip: The bound of the round.
        next_clip: The bound of the round after it.
    """

    weights: AdapterWeights
    retained_energy: dict[str, float]
    clip: float
    next_clip: float


class PrivateStrategy(LoraStrategy):
    """The state of a private run between rounds, and in a round the sum.

    Attributes:
        clip: The bound ``C`` of the round that comes.
    """

    def __init__(
        self,
        *,
        settings: RunSettings,
        plan: PrivacyPlan,
        invitation: Invitation,
        manifest: AdapterManifest,
        registry: Registry,
        roster: Roster,
        weights: AdapterWeights,
    ) -> None:
        super().__init__(
            settings=settings,
            invitation=invitation,
            manifest=manifest,
            registry=registry,
            roster=roster,
            weights=weights,
        )
        self._plan, self._noise = plan, SecureRandom()
        self._method: PrivateMethod = PrivateMethod(settings, manifest, plan)
        self._adaptive = settings.privacy.adaptive_clip if settings.privacy else None
        self.clip = plan.clip
        self._rows: tuple[int, CorrelatedNoise] | None = None  # and the round whose turn it is
        self._open(0)

    def shapes(self, number: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what a client contributes in a round, by payload key."""
        return self._method.shapes(number)

    def widest_rank(self, number: int) -> int:
        """Return the rank of what is summed in a round."""
        return self._method.widest_rank(number)

    def begin(self) -> None:
        """Draw the global adapter that the first round starts from."""
        self.weights = self._method.begin(self.weights)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the round's messages to those of its cohort that are connected, and begin a sum for their answers."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._open(server_round)
        return messages

    def receive_all(self, replies: Sequence[tuple[str, Reply]]) -> list[str]:
        """Add some answers to the sum; those that are not what was asked for add nothing, and nobody is told which."""
        for client, reply in replies:
            with suppress(PayloadError):
                self._add(client, reply)
        return [""] * len(replies)

    def missed(self, clients: Sequence[str]) -> None:
        """Record nothing: who did not answer counts as zero, like who was not asked."""
        del clients

    def release(self, *, fresh: bool = False) -> Released:
        """Return what the round gives, once; the sum is forgotten.

        Args:
            fresh: The round is tried again, so its noise must take back none from before.

        Raises:
            ValueError: It was released before.
        """
        number = self._round.number
        return self.applied(number, self._sum.release(self._correlated(number, fresh=fresh)))

    def applied(self, number: int, mean: Mapping[str, Tensor]) -> Released:
        """Return what a round gives whose noised mean is known, by payload key."""
        weights, energy = self._method.apply(self.weights, mean, round_number=number)
        return Released(weights=weights, retained_energy=energy, clip=self.clip, next_clip=self._next_clip())

    def _correlated(self, number: int, *, fresh: bool) -> dict[str, Tensor] | None:
        """Return the noise of a round that goes with that of the rounds before, where the plan has such."""
        if self._plan.factorization is None:
            return None
        if self._rows is None or fresh or self._rows[0] != number:
            shapes = self._method.shapes(number)
            made = CorrelatedNoise(self._plan.factorization, shapes, noise=self._noise, first_round=number)
        else:
            made = self._rows[1]
        self._rows = number + 1, made
        return made.draw(number)

    def _open(self, number: int) -> None:
        self._sum = GaussianSum(
            self._method.shapes(number),
            bound=self.clip,
            noise_multiplier=self._plan.update_noise_multiplier,
            divisor=self._plan.divisor,
            noise=self._noise,
        )
        self._counted: set[str] = set()
        self._below = self._above = 0

    def _add(self, client: str, reply: Reply) -> None:
        self._round.nonces.clear()  # whether one counts must not depend on what another has sent
        update = self._verified(client, self._payload(client, reply))
        if client in self._counted:
            return
        moved = self._method.contribution(
            Trained(update, self._work_of(client)), self.weights, round_number=self._round.number
        )
        self._sum.add(moved)
        self._counted.add(client)
        below = joint_norm(moved) <= self.clip
        self._below, self._above = self._below + below, self._above + (not below)

    def _next_clip(self) -> float:
        if self._adaptive is None:
            return self.clip
        return next_bound(
            self.clip,
            below=self._below,
            above=self._above,
            expected=self._plan.divisor,
            clip=AdaptiveClip(
                quantile=self._adaptive.quantile,
                learning_rate=self._adaptive.learning_rate,
                count_noise=self._plan.count_noise,
            ),
            noise=self._noise,
        )
