"""The cells of the privacy benchmark, and the run that each of them is."""

from dataclasses import dataclass
from typing import Any, Literal

from privacy_noise import RoundNoise, of_plan, simulated, without
from privacy_population import MAX_LENGTH, Federation, Population

from pomona.privacy.plan import PrivacyPlan, plan_of
from pomona.settings import RunSettings

Setting = Literal["none", "population", "simulated", "silos"]

CLIENTS = 2_000
COHORT = 30
ROUNDS = 12
POPULATION: dict[str, Any] = {"population_size": CLIENTS, "delta": 4e-4, "sample_rate": COHORT / CLIENTS}
SUPPOSED: dict[str, Any] = {"population_size": 1_000_000, "delta": 9.9e-7, "sample_rate": 5_000 / 1_000_000}
SILOS, SILO_ROUNDS, SILO_STEPS, SILO_BATCH = 5, 4, 4, 192

METHODS: dict[str, dict[str, Any]] = {
    "dp-lora": {"strategy": "fedit", "rank": 4, "max_rank": 4},
    "dp-dylora": {"strategy": "fedit", "rank": 4, "max_rank": 4},
    "ffa-nested": {"strategy": "ffa-nested", "max_rank": 8},
    "example-level": {"strategy": "fedit", "rank": 1, "max_rank": 1},
    "full": {"strategy": "fedit", "rank": 4, "max_rank": 4},  # of which the plan alone is used
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What is chosen on the validation split; rates of AdamW on the clients, and the bound."""

    learning_rate: float
    head_learning_rate: float
    clip: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One cell: ``none`` promises nothing, ``population`` is real, ``simulated`` only supposes a population."""

    method: str
    setting: Setting
    epsilon: float | None
    seed: int


def cases(methods: list[str], seeds: list[int]) -> list[Case]:
    """Return the cells of the table, in the order in which they are run: what says least comes last."""
    groups: list[list[tuple[Setting, float | None]]] = [
        [("none", None), ("simulated", 2.0), ("silos", 8.0), ("silos", 2.0)],
        [("population", 8.0), ("population", 2.0)],
    ]
    return [
        Case(method=method, setting=setting, epsilon=epsilon, seed=seed)
        for group in groups
        for seed in seeds
        for method in methods
        for setting, epsilon in group
        if setting == "none" or (setting == "silos") == (method == "example-level")
    ]


def settings_of(case: Case, choice: Choice, *, rounds: int) -> RunSettings:
    """Return the run file of a cell, as settings; that of ``none`` only lends its plan's shape."""
    silos = case.method == "example-level"
    privacy = {"population": "benchmark", "epsilon": case.epsilon or 8.0, "clip": choice.clip}
    if silos:
        rows = 6_706 // SILOS
        privacy |= {"unit": "example", "delta": 1e-5, "sample_rate": SILO_BATCH / rows}
    else:
        privacy |= {"unit": "client", **(SUPPOSED if case.setting == "simulated" else POPULATION)}
    if case.method == "dp-dylora":
        privacy["ranks"] = [1, METHODS[case.method]["rank"]]
    training = {"learning_rate": choice.learning_rate, "head_learning_rate": choice.head_learning_rate}
    training |= {"batch_size": SILO_BATCH, "max_steps": SILO_STEPS} if silos else {}
    return RunSettings.model_validate(
        {
            "name": "benchmark",
            "rounds": rounds,
            "seed": case.seed,
            "model": {"max_length": MAX_LENGTH},
            "training": training,
            "aggregation": METHODS[case.method],
            "privacy": privacy,
        }
    )


def noise_of(case: Case, plan: PrivacyPlan) -> RoundNoise:
    """Return what is done to the sums of a cell."""
    if case.setting == "none":
        return without(cohort=COHORT)
    return simulated(plan, cohort=COHORT) if case.setting == "simulated" else of_plan(plan)


def federation_of(population: Population, case: Case, choice: Choice, *, rounds: int) -> Federation:
    """Return the run of a cell of client-level privacy. Its noise is that of :data:`ROUNDS` rounds, or of more."""
    plan = plan_of(settings_of(case, choice, rounds=max(rounds, ROUNDS)))
    settings = settings_of(case, choice, rounds=rounds)
    shares = population.shares(CLIENTS, case.seed)
    return Federation(settings, plan, noise_of(case, plan), shares, COHORT / CLIENTS)
