"""Spending a population's privacy: each release is checked against the budget and written down as spent before it."""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pomona.errors import ConfigError, PrivacyBudgetExhausted, RegistryDamaged, VersionConflict
from pomona.privacy.accounting import Event, epsilon
from pomona.privacy.plan import PrivacyPlan, plan_of
from pomona.settings import RunSettings
from pomona.storage import ledger, ledger_witness
from pomona.storage.records import LedgerEntry, Reservation
from pomona.storage.registry import Registry

_LOOKS, _LOOK_S = 5, 0.1
_ATTEMPTS = 50  # runs on one population that write at once take turns


def check_privacy(registry: Registry, settings: RunSettings, *, run_id: str) -> PrivacyPlan:
    """Return the plan of a run that is about to begin, or to go on.

    Raises:
        ConfigError: It cannot be promised, or the run was begun under another plan.
        PrivacyBudgetExhausted: Its rounds, or where it goes on its next one, cost more than the budget.
        RegistryDamaged: The ledger is not whole.
    """
    plan = plan_of(settings)
    mine = [row for row in registry.ledger(plan.population) if row.run_id == run_id]
    if others := {(row.plan_sha256, row.library) for row in mine} - {(plan.sha256, plan.library)}:
        (sha256, library) = min(others)
        raise ConfigError(
            f"run {run_id} was begun under the plan {sha256[:12]} (accounts by {library}), and would go on under "
            f"{plan.sha256[:12]} ({plan.library}); install what it was begun with, or start a new run"
        )
    if len({row.round for row in mine if row.state == "released"}) < plan.rounds:
        _check_goes_on(registry, plan, mine) if mine else check_run_fits(registry, plan, rounds=plan.rounds)
    return plan


def _check_goes_on(registry: Registry, plan: PrivacyPlan, mine: Sequence[LedgerEntry]) -> None:
    """Check that the next release of a run that was begun is not one too many."""
    over = {row.round for row in mine if row.state == "released"}
    number = max(over, default=0) + 1
    tried = sum(row.state == "reserved" and row.round == number for row in mine)
    _cost(whole_ledger(registry, plan.population), plan, plan.releases_of(number, tried + 1))


def check_run_fits(registry: Registry, plan: PrivacyPlan, *, rounds: int) -> float:
    """Return what so many more rounds of a plan would have cost its population in the end.

    Raises:
        ConfigError: Its releases do not add up with those that there were.
        PrivacyBudgetExhausted: More than its budget; nothing was spent.
        RegistryDamaged: The ledger is not whole.
    """
    rows = whole_ledger(registry, plan.population)
    return _cost(rows, plan, plan.event(rounds).count)


def reserve(registry: Registry, plan: PrivacyPlan, *, run_id: str, round_number: int) -> LedgerEntry:
    """Write down one release of a plan as spent, and return its row; only then may a cohort be drawn for it.

    An earlier attempt at the round that released nothing stays spent.

    Raises:
        ConfigError: It does not add up with the releases that there were, or has less noise than it pays for.
        PrivacyBudgetExhausted: It would cost more than the budget.
        VersionConflict: Other runs on the population were first, 50 times.
        RegistryDamaged: The ledger is not whole.
    """
    plan.check_noise()
    for _ in range(_ATTEMPTS):
        rows = whole_ledger(registry, plan.population)
        attempt = 1 + sum(row.state == "reserved" and (row.run_id, row.round) == (run_id, round_number) for row in rows)
        releases = plan.releases_of(round_number, attempt)
        new = Reservation(
            population=plan.population,
            run_id=run_id,
            round_number=round_number,
            attempt=attempt,
            unit=plan.unit,
            adjacency=plan.adjacency,
            plan_sha256=plan.sha256,
            epsilon=_cost(rows, plan, releases),
            delta=plan.delta,
            budget=plan.budget,
            noise_multiplier=plan.event().noise_multiplier,
            sample_rate=plan.event().sample_rate,
            releases=releases,
            library=plan.library,
        )
        with suppress(VersionConflict):
            reserved = registry.reserve_release(new, expected_head=rows[-1].sha256 if rows else ledger.START)
            ledger_witness.keep(witness_folder(registry), reserved)
            return reserved
    raise VersionConflict(f"other runs on {plan.population} were first, {_ATTEMPTS} times; try again")


def burn_unsettled(registry: Registry, rows: Sequence[LedgerEntry]) -> None:
    """Write of every reservation among some rows that has not ended that nothing came of it; it stays spent."""
    settled = {row.attempt for row in rows if row.state != "reserved"}
    for row in rows:
        if row.state == "reserved" and row.attempt not in settled:
            registry.settle_release(row, release_sha256=None)


def rows_of_round(registry: Registry, population: str, *, run_id: str, round_number: int) -> list[LedgerEntry]:
    """Return what a population's ledger has of a round, oldest first."""
    return [row for row in registry.ledger(population) if (row.run_id, row.round) == (run_id, round_number)]


def spent(rows: Sequence[LedgerEntry]) -> list[Event]:
    """Return what was reserved, whether or not anything was released, as the account sees it."""
    counts = Counter[tuple[float, float]]()
    for row in rows:
        if row.state == "reserved":
            counts[row.noise_multiplier, row.sample_rate] += row.releases
    return [
        Event(noise_multiplier=noise, sample_rate=rate, count=count)
        for (noise, rate), count in sorted(counts.items())
        if count
    ]


def whole_ledger(registry: Registry, population: str, *, releasing: bool = True) -> list[LedgerEntry]:
    """Return a population's ledger.

    Args:
        registry: Where it is.
        population: Whose it is.
        releasing: Compare it with what this machine has seen of it.

    Raises:
        RegistryDamaged: It is not whole, or shorter than this machine has seen it, so what was spent is not known.
    """
    folder, reason = witness_folder(registry), ""
    for _ in range(_LOOKS):
        before = ledger_witness.seen(folder, population)
        rows = registry.ledger(population)
        for row, found in ledger.broken(rows):
            raise RegistryDamaged(
                f"the privacy ledger of {population} is not whole, so what was spent is not known: row {row.seq} "
                f"{found}; run `pomona registry verify`, and restore the ledger before anything is released"
            )
        reason = ledger_witness.objection(folder, population, rows, before) if releasing else ""
        if not reason:
            return rows
        time.sleep(_LOOK_S)  # another run may have written its first row, and be about to remember it
    raise RegistryDamaged(reason)


def witness_folder(registry: Registry) -> Path:
    """Return where this machine keeps what it has seen of ledgers: beside the registry's blobs."""
    return registry.blobs.root.parent / ledger_witness.FOLDER


def _check_kind(rows: Sequence[LedgerEntry], plan: PrivacyPlan) -> None:
    """Refuse to add up what does not add up: other promises, or releases that were chosen in view of earlier ones.

    Privacy random variables compose for releases that were fixed beforehand (Renyi divergences, and Gaussian releases
    without sampling, for any), and another plan was made when something was out already.
    """
    if other := next((row for row in rows if (row.unit, row.adjacency) != (plan.unit, plan.adjacency)), None):
        raise ConfigError(
            f"the budget of {plan.population} is of releases that hide each {other.unit} ({other.adjacency}), and this "
            f"run hides each {plan.unit} ({plan.adjacency}), which is another promise; name another privacy.population"
        )
    sampled = plan.amplified or any(row.sample_rate < 1.0 for row in rows)
    if plan.accountant == "prv" and sampled and any(row.plan_sha256 != plan.sha256 for row in rows):
        raise ConfigError(
            f"{plan.population} has releases under another plan, so what comes now was chosen in view of them, which "
            "accountant='prv' cannot count; choose privacy.accountant='rdp'"
        )


def _cost(rows: Sequence[LedgerEntry], plan: PrivacyPlan, releases: int) -> float:
    _check_kind(rows, plan)
    budget = min([plan.budget, *(row.budget for row in rows)])
    delta = min([plan.delta, *(row.delta for row in rows)])
    events = [*spent(rows), *([replace(plan.event(), count=releases)] if releases else [])]
    cost = epsilon(events, delta=delta, accountant=plan.accountant)
    if cost > budget * (1 + 1e-9):
        before = epsilon(spent(rows), delta=delta, accountant=plan.accountant)
        raise PrivacyBudgetExhausted(
            f"population {plan.population} has spent epsilon {before:.4g} of {budget:g} at delta {delta:g}; "
            f"{releases} more release{'s' * (releases != 1)} would make it {cost:.4g}. Lower the rounds or raise "
            "the noise; a budget is not raised afterwards"
        )
    return cost
