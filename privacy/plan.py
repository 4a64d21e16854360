"""The plan: everything that a promise of privacy rests on, in one frozen record that has a hash.

A mechanism is made from the plan and from nothing else, so that noise, bound, sampler, divisor and account cannot
contradict each other. What cannot be promised is refused when the plan is made, with what would be sound instead.
"""

import hashlib
import json
import math
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pomona.errors import ConfigError
from pomona.privacy.accounting import Accountant, Event, epsilon, gaussian_epsilon, library, noise_for
from pomona.privacy.adaptive_clip import noise_beside_counting
from pomona.privacy.refusals import check
from pomona.privacy_settings import PrivacySettings
from pomona.settings import RunSettings

Mechanism = Literal["dp-lora", "dp-dylora", "ffa", "ffa-nested"]

_MECHANISMS: dict[str, Mechanism] = {"fedit": "dp-lora", "ffa": "ffa", "ffa-nested": "ffa-nested"}
_COUNT_NOISE_SHARE = 1 / 20


class PrivacyPlan(BaseModel):
    """What is promised, and what is done for it.

    Attributes:
        unit: Whose presence is hidden.
        mechanism: What is summed.
        adjacency: Neighbouring data differ by one unit that is there or not.
        sampler: Every enrolled unit is asked with probability ``sample_rate``, independently; absent ones count as
            zero.
        sample_rate: ``q``.
        amplified: Whether the account may count on the sampling, because the cohort is secret.
        population: Name of the population.
        population_size: ``N``.
        clip: Bound ``C`` on the joint norm; the first one, where it adapts.
        noise_multiplier: ``z``: what all releases of a round cost together.
        update_noise_multiplier: ``sigma``: of the noise on the sum, in units of ``clip``.
        count_noise: Of the count for an adaptive bound, 0 without one.
        divisor: ``q N``, public and fixed.
        ranks: ``[least, most]`` of the rank of a round.
        rounds: ``T``.
        accountant: Which account.
        library: That keeps it.
        delta: Of the promise.
        budget: Epsilon of the population.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    unit: Literal["client"]
    mechanism: Mechanism
    adjacency: Literal["add-or-remove-one"] = "add-or-remove-one"
    sampler: Literal["poisson"] = "poisson"
    sample_rate: float
    amplified: bool
    population: str
    population_size: int
    clip: float
    noise_multiplier: float
    update_noise_multiplier: float
    count_noise: float
    divisor: float
    ranks: tuple[int, int] | None
    rounds: int
    accountant: Accountant
    library: str
    delta: float
    budget: float

    @property
    def sha256(self) -> str:
        """The hash of the plan: of its canonical JSON."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def event(self, count: int = 1) -> Event:
        """Return so many rounds as the account sees them."""
        rate = self.sample_rate if self.amplified else 1.0
        return Event(noise_multiplier=self.noise_multiplier, sample_rate=rate, count=count)

    def epsilon_after(self, rounds: int) -> float:
        """Return what so many rounds of this plan cost, nothing else counted."""
        return epsilon([self.event(rounds)] if rounds else [], delta=self.delta, accountant=self.accountant)

    @property
    def epsilon_without_sampling(self) -> float:
        """What the plan costs where somebody knows who was asked in every round."""
        return gaussian_epsilon(math.sqrt(self.rounds) / self.noise_multiplier, self.delta)

    def noise_to_signal(self, dimensions: int) -> float:
        """Return ``sigma sqrt(d) / (q N)``: the norm of the noise on the mean over the largest norm of an update.

        Above 1 the noise is larger than anything that clients agree on; more clients help, or fewer trained numbers.
        """
        return self.update_noise_multiplier * math.sqrt(dimensions) / self.divisor


def plan_of(settings: RunSettings) -> PrivacyPlan:
    """Make the plan of a run.

    Raises:
        ConfigError: The run has no section ``privacy``, or what it asks for cannot be promised.
    """
    wanted = settings.privacy
    if wanted is None:
        raise ConfigError("expected a section [privacy] in the run file; without one nothing is promised")
    check(settings)
    if wanted.unit != "client" or wanted.population_size is None:
        raise ConfigError(f"expected privacy.unit='client' here, got {wanted.unit!r}")
    rate = wanted.sample_rate if wanted.cohort_secret else 1.0
    noise = wanted.noise_multiplier or noise_for(
        wanted.epsilon, delta=wanted.delta, sample_rate=rate, count=settings.rounds, accountant=wanted.accountant
    )
    expected = wanted.sample_rate * wanted.population_size
    count_noise = _count_noise(wanted, expected)
    plan = PrivacyPlan(
        unit="client",
        mechanism="dp-dylora" if wanted.ranks else _MECHANISMS[settings.aggregation.strategy],
        sample_rate=wanted.sample_rate,
        amplified=wanted.cohort_secret and wanted.sample_rate < 1.0,
        population=wanted.population,
        population_size=wanted.population_size,
        clip=wanted.clip,
        noise_multiplier=noise,
        update_noise_multiplier=noise_beside_counting(noise, count_noise=count_noise) if count_noise else noise,
        count_noise=count_noise,
        divisor=expected,
        ranks=wanted.ranks,
        rounds=settings.rounds,
        accountant=wanted.accountant,
        library=library(),
        delta=wanted.delta,
        budget=wanted.epsilon,
    )
    _check_budget(plan)
    return plan


def _count_noise(wanted: PrivacySettings, expected: float) -> float:
    if wanted.adaptive_clip is None:
        return 0.0
    return wanted.adaptive_clip.count_noise or expected * _COUNT_NOISE_SHARE


def _check_budget(plan: PrivacyPlan) -> None:
    if (cost := plan.epsilon_after(plan.rounds)) > plan.budget * (1 + 1e-9):
        raise ConfigError(
            f"{plan.rounds} rounds with noise multiplier {plan.noise_multiplier:g} cost epsilon {cost:.3g}, more than "
            f"privacy.epsilon={plan.budget:g}; raise the noise, lower the rounds, or leave out noise_multiplier"
        )
