"""Spending a population's privacy: each release is checked against the budget and written down as spent before it."""

from collections import Counter
from collections.abc import Sequence

from pomona.errors import PrivacyBudgetExhausted, RegistryDamaged, VersionConflict
from pomona.privacy.accounting import Event, epsilon
from pomona.privacy.plan import PrivacyPlan
from pomona.storage import ledger
from pomona.storage.records import LedgerEntry, Reservation
from pomona.storage.registry import Registry

_ATTEMPTS = 50  # runs on one population that write at once take turns


def check_run_fits(registry: Registry, plan: PrivacyPlan, *, rounds: int) -> float:
    """Return what so many more rounds of a plan would have cost its population in the end.

    Raises:
        PrivacyBudgetExhausted: More than its budget; nothing was spent.
        RegistryDamaged: The ledger is not whole.
    """
    rows = _rows(registry, plan)
    return _cost(rows, plan, rounds)


def reserve(registry: Registry, plan: PrivacyPlan, *, run_id: str, round_number: int) -> LedgerEntry:
    """Write down one release of a plan as spent, and return its row; only then may a cohort be drawn for it.

    An earlier attempt at the round that released nothing stays spent.

    Raises:
        PrivacyBudgetExhausted: It would cost more than the budget.
        VersionConflict: Other runs on the population were first, 50 times.
        RegistryDamaged: The ledger is not whole.
    """
    for _ in range(_ATTEMPTS):
        rows = _rows(registry, plan)
        new = Reservation(
            population=plan.population,
            run_id=run_id,
            round_number=round_number,
            attempt=1
            + sum(row.state == "reserved" and (row.run_id, row.round) == (run_id, round_number) for row in rows),
            plan_sha256=plan.sha256,
            epsilon=_cost(rows, plan, 1),
            delta=plan.delta,
            budget=plan.budget,
            noise_multiplier=plan.event().noise_multiplier,
            sample_rate=plan.event().sample_rate,
            library=plan.library,
        )
        try:
            return registry.reserve_release(new, expected_head=rows[-1].sha256 if rows else ledger.START)
        except VersionConflict:
            continue
    raise VersionConflict(f"other runs on {plan.population} were first, {_ATTEMPTS} times; try again")


def spent(rows: Sequence[LedgerEntry]) -> list[Event]:
    """Return what was reserved, whether or not anything was released, as the account sees it."""
    counts = Counter((row.noise_multiplier, row.sample_rate) for row in rows if row.state == "reserved")
    return [
        Event(noise_multiplier=noise, sample_rate=rate, count=count) for (noise, rate), count in sorted(counts.items())
    ]


def _rows(registry: Registry, plan: PrivacyPlan) -> list[LedgerEntry]:
    rows = registry.ledger(plan.population)
    for row, found in ledger.broken(rows):
        raise RegistryDamaged(
            f"the privacy ledger of {plan.population} is not whole, so what was spent is not known: row {row.seq} "
            f"{found}; run `pomona registry verify`, and restore the ledger before anything is released"
        )
    return rows


def _cost(rows: Sequence[LedgerEntry], plan: PrivacyPlan, rounds: int) -> float:
    budget = min([plan.budget, *(row.budget for row in rows)])
    delta = min([plan.delta, *(row.delta for row in rows)])
    events = [*spent(rows), plan.event(rounds)]
    cost = epsilon(events, delta=delta, accountant=plan.accountant)
    if cost > budget * (1 + 1e-9):
        before = epsilon(spent(rows), delta=delta, accountant=plan.accountant)
        raise PrivacyBudgetExhausted(
            f"population {plan.population} has spent epsilon {before:.4g} of {budget:g} at delta {delta:g}; "
            f"{rounds} more round{'s' * (rounds != 1)} would make it {cost:.4g}. Lower the rounds or raise the noise; "
            "a budget is not raised afterwards"
        )
    return cost
