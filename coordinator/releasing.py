"""One release under client-level privacy, whatever is summed: paid for, drawn, written down, in this order.

::

    reserve in the ledger -> make the noised bytes -> write them -> ledger: released, with their hash

Wherever a process dies, what was reserved stays spent. What was released is found again by its hash, and is free; what
came to nothing is burned.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pomona.coordinator.spending import burn_unsettled, reserve, rows_of_round
from pomona.errors import AdapterNotFound, BlobCorrupt, PomonaError
from pomona.failpoints import reach
from pomona.privacy.plan import PrivacyPlan
from pomona.privacy.randomness import SecureRandom
from pomona.storage.records import LedgerEntry
from pomona.storage.registry import Registry


@dataclass(frozen=True, slots=True)
class Paid:
    """What was released.

    Attributes:
        payload: Nothing but noised sums, what follows from them, and public facts.
        row: Of the ledger, that paid for it.
    """

    payload: bytes
    row: LedgerEntry


def released_before(registry: Registry, plan: PrivacyPlan, *, run_id: str, number: int) -> Paid | None:
    """Return what another process released under a number of a run; burn what came to nothing."""
    mine = rows_of_round(registry, plan.population, run_id=run_id, round_number=number)
    for row in (row for row in mine if row.state == "released"):
        paid = next(each for each in mine if (each.state, each.attempt) == ("reserved", row.attempt))
        with contextlib.suppress(AdapterNotFound, BlobCorrupt):
            return Paid(registry.blobs.get(str(row.release_sha256)), paid)
    burn_unsettled(registry, mine)
    return None


def release(
    registry: Registry, plan: PrivacyPlan, *, run_id: str, number: int, noised: Callable[[LedgerEntry], bytes]
) -> Paid:
    """Pay for a release, make it, and write it down.

    Args:
        registry: Has ledger and blobs.
        plan: What is promised.
        run_id: The run.
        number: Of the release in the run, from 1.
        noised: Asks a cohort, given the row that pays for it, and returns the bytes; is called when it is paid.

    Raises:
        PrivacyBudgetExhausted: It would cost more than the budget; nobody was asked.
        PomonaError: Whatever ``noised`` raises; what was paid stays spent.
    """
    reserved = reserve(registry, plan, run_id=run_id, round_number=number)
    reach("release-reserved")
    try:
        payload = noised(reserved)
        sha256 = registry.blobs.put(payload)
    except Exception:
        with contextlib.suppress(PomonaError):
            registry.settle_release(reserved, release_sha256=None)
        raise
    reach("release-written")
    registry.settle_release(reserved, release_sha256=sha256)
    reach("release-settled")
    return Paid(payload, reserved)


def paid_by(row: LedgerEntry, plan: PrivacyPlan, *, clip: float) -> dict[str, object]:
    """Return what a release says of what paid for it, and of the bound that it was under."""
    return {
        "population": plan.population,
        "plan_sha256": plan.sha256,
        "ledger_seq": row.seq,
        "ledger_sha256": row.sha256,
        "clip": clip,
    }


def poisson_cohort(members: Iterable[str], plan: PrivacyPlan, coins: SecureRandom) -> list[str]:
    """Return who is asked, of all that are enrolled: a coin for each, whoever is connected."""
    names = sorted(members)
    return [name for name, chosen in zip(names, coins.chosen(len(names), plan.sample_rate), strict=True) if chosen]
