"""The plan: everything that a promise of privacy rests on, in one frozen record that has a hash.

A mechanism is made from the plan and from nothing else, so that noise, bound, sampler, divisor and account cannot
contradict each other. What cannot be promised is refused when the plan is made, with what would be sound instead.
"""

import hashlib
import json
import math
from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from pomona.errors import ConfigError
from pomona.privacy.accounting import Accountant, Event, epsilon, gaussian_epsilon, library, noise_for
from pomona.privacy.adaptive_clip import noise_beside_counting
from pomona.privacy.matrix_factorization import BandedFactorization, factorize
from pomona.privacy.refusals import check
from pomona.privacy.secure_sum.requests import terms_of
from pomona.privacy_settings import PrivacySettings
from pomona.protocol import SecureSumPrivacy, SumMechanism
from pomona.settings import RunSettings

Mechanism = Literal[SumMechanism, "dp-sgd", "local-gaussian", "ffa-tasks"]

_MECHANISMS: dict[str, SumMechanism] = {"fedit": "dp-lora", "ffa": "ffa", "ffa-nested": "ffa-nested"}
_COUNT_NOISE_SHARE = 1 / 20


class PrivacyPlan(BaseModel):
    """What is promised, and what is done for it.

    Attributes:
        unit: Whose presence is hidden.
        mechanism: What is summed; ``dp-sgd``: the gradients of a step of a client's training; ``local-gaussian``:
            nothing, each client's update is noised by itself; ``ffa-tasks``: as ``ffa`` in each task's rounds, and then
            sums of its features.
        trust: Who sees what a client sends: ``central`` the coordinator, ``distributed`` nobody.
        adjacency: Neighbouring data differ by one unit that is there or not; ``zero-out-one``: by what one unit
            contributes, which may be nothing, while it is known that it takes part; ``replace-one``: by what it has,
            which may be anything.
        sampler: ``poisson``: every enrolled unit is asked with probability ``sample_rate``, independently.
            ``min-separation``: it takes part in every ``b``-th round, by a public schedule. Absent ones count as zero.
        sample_rate: ``q``.
        amplified: Whether the account may count on the sampling, because the cohort is secret.
        population: Name of the population.
        population_size: ``N``; None where units are examples, of which the coordinator knows no number.
        clip: Bound ``C`` on the joint norm; the first one, where it adapts.
        sums_clip: Bound on the joint norm of a client's sums of features; None: there are none.
        noise_multiplier: ``z``: what all releases of a round cost together.
        update_noise_multiplier: ``sigma``: of the noise on the sum, in units of ``clip``; of a secure sum the least.
        count_noise: Of the count for an adaptive bound, 0 without one.
        divisor: ``q N``, public and fixed; of a step of training the batch size; of local noise ``sqrt(n) / 2`` for the
            least cohort, so that ``sigma sqrt(d)`` over it is the noise on a mean.
        ranks: ``[least, most]`` of the rank of a round.
        factorization: Of the noise of all rounds, for ``min-separation``.
        secure_sum: What clients are promised that trust nobody; None: they trust the coordinator.
        rounds: ``T``; of tasks, all of their releases.
        releases_per_round: One sum over clients, or as many as a client takes steps.
        spare_rounds: Releases beyond them that fit into the budget, for rounds that a crash cuts off.
        accountant: Which account.
        library: That keeps it.
        delta: Of the promise.
        budget: Epsilon of the population.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    unit: Literal["client", "example", "local"]
    mechanism: Mechanism
    trust: Literal["central", "distributed"] = "central"
    adjacency: Literal["add-or-remove-one", "zero-out-one", "replace-one"] = "add-or-remove-one"
    sampler: Literal["poisson", "min-separation"] = "poisson"
    sample_rate: float
    amplified: bool
    population: str
    population_size: int | None
    clip: float
    sums_clip: float | None = None
    noise_multiplier: float
    update_noise_multiplier: float
    count_noise: float
    divisor: float
    ranks: tuple[int, int] | None
    factorization: BandedFactorization | None = None
    secure_sum: SecureSumPrivacy | None = None
    rounds: int
    releases_per_round: int = 1
    spare_rounds: int = 0
    accountant: Accountant
    library: str
    delta: float
    budget: float

    @model_validator(mode="after")
    def _noise_is_paid_for(self) -> Self:
        self.check_noise()
        return self

    def check_noise(self) -> None:
        """Refuse less noise on the sum than what the account counts on.

        Simulations scale noise down to that of a larger cohort on the mean of a smaller one, and protect nobody.

        Raises:
            ConfigError: There is less.
        """
        if self.update_noise_multiplier < self.noise_multiplier * (1.0 - 1e-9):
            raise ConfigError(
                f"expected noise of at least {self.noise_multiplier:g} times the bound, which the account counts on, "
                f"got a plan with {self.update_noise_multiplier:g}; noise that is scaled down, as in a simulation of a "
                "larger population, promises nothing: make the plan from a run file"
            )

    @property
    def sha256(self) -> str:
        """The hash of the plan: of its canonical JSON, in which nothing stands of tasks where there are none."""
        absent = {"sums_clip"} if self.sums_clip is None else set[str]()
        text = json.dumps(self.model_dump(mode="json", exclude=absent), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def event(self, rounds: int = 1) -> Event:
        """Return so many rounds as the account sees them; of a factorization, all of them, which are one release."""
        rate = self.sample_rate if self.amplified else 1.0
        count = self.factorization.participations if self.factorization else rounds * self.releases_per_round
        return Event(noise_multiplier=self.noise_multiplier, sample_rate=rate, count=count)

    def releases_of(self, round_number: int, attempt: int) -> int:
        """Return how many releases are paid for an attempt at a round.

        All rounds of a factorization are paid with the first. One that is tried again has noise that takes back none
        from before, and is a release of its own.
        """
        if self.factorization is None:
            return self.releases_per_round
        if attempt > 1:
            return 1
        return self.factorization.participations if round_number == 1 else 0

    def epsilon_after(self, rounds: int) -> float:
        """Return what so many rounds of this plan cost, nothing else counted."""
        if rounds == 0:
            return 0.0
        again = max(0, rounds - self.rounds) if self.factorization else 0
        event = self.event(rounds)
        return epsilon([replace(event, count=event.count + again)], delta=self.delta, accountant=self.accountant)

    @property
    def epsilon_without_sampling(self) -> float:
        """What the plan costs where somebody knows who was asked in every round."""
        if self.secure_sum is not None:  # whose noise is not quite Gaussian
            return self.epsilon_after(self.rounds)
        return gaussian_epsilon(math.sqrt(self.event(self.rounds).count) / self.noise_multiplier, self.delta)

    def noise_to_signal(self, dimensions: int) -> float:
        """Return ``sigma sqrt(d) / (q N)``: the norm of the noise on the mean over the largest norm of an update.

        Above 1 the noise is larger than anything that clients agree on; more clients help, or fewer trained numbers.
        """
        noise, shares = self.update_noise_multiplier, self.secure_sum
        if shares is not None:  # all of them add a share, and fewer would be enough
            noise *= math.sqrt(shares.clients / (shares.least_survivors - shares.colluding))
        return noise * math.sqrt(dimensions) / self.divisor


def plan_of(settings: RunSettings) -> PrivacyPlan:
    """Make the plan of a run.

    Raises:
        ConfigError: The run has no section ``privacy``, or what it asks for cannot be promised.
    """
    wanted = settings.privacy
    if wanted is None:
        raise ConfigError("expected a section [privacy] in the run file; without one nothing is promised")
    check(settings)
    plan = {"client": _of_clients, "example": _of_examples, "local": _of_locals}[wanted.unit](settings, wanted)
    _check_budget(plan)
    return plan


def _of_clients(settings: RunSettings, wanted: PrivacySettings) -> PrivacyPlan:
    assert wanted.population_size is not None  # settings see to it
    made = _factorization(settings, wanted)
    amplified = wanted.cohort_secret and wanted.sample_rate < 1.0
    count = (made.participations if made else settings.exchanges) + wanted.spare_rounds
    noise = _noise(wanted, rate=wanted.sample_rate if amplified else 1.0, count=count)
    expected = wanted.sample_rate * wanted.population_size / (wanted.bands or 1)
    count_noise = _count_noise(wanted, expected)
    if settings.continual is not None:
        return _of_tasks(settings, wanted, noise=noise, amplified=amplified)
    mechanism: SumMechanism = "dp-dylora" if wanted.ranks else _MECHANISMS[settings.aggregation.strategy]
    if wanted.trust == "distributed":
        return _distributed(settings, wanted, mechanism, noise)
    return PrivacyPlan(
        **_common(settings, wanted),
        unit="client",
        sampler="min-separation" if made else "poisson",
        factorization=made,
        mechanism=mechanism,
        amplified=amplified,
        population_size=wanted.population_size,
        noise_multiplier=noise,
        update_noise_multiplier=noise_beside_counting(noise, count_noise=count_noise) if count_noise else noise,
        count_noise=count_noise,
        divisor=expected,
        ranks=wanted.ranks,
    )


def _of_tasks(settings: RunSettings, wanted: PrivacySettings, *, noise: float, amplified: bool) -> PrivacyPlan:
    """Plan for tasks one after another: each of their rounds is a release, and so are the sums of each."""
    assert wanted.population_size is not None  # settings see to it
    return PrivacyPlan(
        **_common(settings, wanted),
        unit="client",
        mechanism="ffa-tasks",
        amplified=amplified,
        population_size=wanted.population_size,
        sums_clip=wanted.sums_clip,
        noise_multiplier=noise,
        update_noise_multiplier=noise,
        count_noise=0.0,
        divisor=wanted.sample_rate * wanted.population_size,
        ranks=None,
    )


def _distributed(settings: RunSettings, wanted: PrivacySettings, mechanism: SumMechanism, noise: float) -> PrivacyPlan:
    """Plan for clients that see to their noise themselves: all of them are asked, and each is known to take part."""
    clients, chosen = wanted.population_size or 0, wanted.secure_sum
    threshold = chosen.threshold or (clients + chosen.colluding) // 2 + 1
    least = chosen.least_survivors or max(threshold, chosen.colluding + 2)
    if max(threshold, least) > clients:
        raise ConfigError(
            f"privacy: a secure sum of least_survivors={least} and threshold={threshold} never comes about with "
            f"population_size={clients}; lower them and colluding, or choose trust='central'"
        )
    promised = SecureSumPrivacy(
        mechanism=mechanism,
        clients=clients,
        threshold=threshold,
        least_survivors=least,
        colluding=chosen.colluding,
        clip=wanted.clip,
        noise_multiplier=noise,
        fraction_bits=chosen.fraction_bits,
        sums=settings.rounds + wanted.spare_rounds,
    )
    terms = terms_of(promised, round_id="plan", dimensions=1)  # refuses counts and grids that cannot be
    return PrivacyPlan(
        **_common(settings, wanted),
        unit="client",
        trust="distributed",
        adjacency="zero-out-one",
        mechanism=mechanism,
        amplified=False,
        population_size=clients,
        noise_multiplier=noise,
        update_noise_multiplier=terms.noise_multiplier,
        count_noise=0.0,
        divisor=float(clients),
        ranks=wanted.ranks,
        secure_sum=promised,
    )


def _of_examples(settings: RunSettings, wanted: PrivacySettings) -> PrivacyPlan:
    """Plan for records: who is in a batch never leaves the client, so sampling always hides it."""
    steps = settings.training.max_steps
    noise = _noise(wanted, rate=wanted.sample_rate, count=steps * (settings.rounds + wanted.spare_rounds))
    return PrivacyPlan(
        **_common(settings, wanted),
        unit="example",
        mechanism="dp-sgd",
        amplified=wanted.sample_rate < 1.0,
        population_size=None,
        noise_multiplier=noise,
        update_noise_multiplier=noise,
        count_noise=0.0,
        divisor=float(settings.training.batch_size),
        ranks=None,
        releases_per_round=steps,
    )


def _of_locals(settings: RunSettings, wanted: PrivacySettings) -> PrivacyPlan:
    """Plan for clients that noise their own updates: everybody sees who sent what, so nothing is amplified."""
    noise = _noise(wanted, rate=1.0, count=settings.rounds + wanted.spare_rounds)
    return PrivacyPlan(
        **_common(settings, wanted),
        unit="local",
        trust="distributed",
        adjacency="replace-one",
        mechanism="local-gaussian",
        amplified=False,
        population_size=None,
        noise_multiplier=noise,
        update_noise_multiplier=noise,
        count_noise=0.0,
        divisor=math.sqrt(settings.cohort.min_clients) / 2.0,
        ranks=None,
    )


def _common(settings: RunSettings, wanted: PrivacySettings) -> dict[str, Any]:
    return {
        "sample_rate": wanted.sample_rate,
        "population": wanted.population,
        "clip": wanted.clip,
        "rounds": settings.exchanges,
        "spare_rounds": wanted.spare_rounds,
        "accountant": wanted.accountant,
        "library": library(),
        "delta": wanted.delta,
        "budget": wanted.epsilon,
    }


def _factorization(settings: RunSettings, wanted: PrivacySettings) -> BandedFactorization | None:
    return factorize(settings.rounds, bands=wanted.bands) if wanted.bands else None


def _noise(wanted: PrivacySettings, *, rate: float, count: int) -> float:
    return wanted.noise_multiplier or noise_for(
        wanted.epsilon, delta=wanted.delta, sample_rate=rate, count=count, accountant=wanted.accountant
    )


def _count_noise(wanted: PrivacySettings, expected: float) -> float:
    if wanted.adaptive_clip is None:
        return 0.0
    return wanted.adaptive_clip.count_noise or expected * _COUNT_NOISE_SHARE


def _check_budget(plan: PrivacyPlan) -> None:
    releases = plan.rounds + plan.spare_rounds
    if (cost := plan.epsilon_after(releases)) > plan.budget * (1 + 1e-9):
        raise ConfigError(
            f"{releases} rounds with noise multiplier {plan.noise_multiplier:g} cost epsilon {cost:.3g}, more than "
            f"privacy.epsilon={plan.budget:g}; raise the noise, lower the rounds, or leave out noise_multiplier"
        )
