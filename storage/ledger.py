"""The privacy ledger: what each population has spent, written before anything is released, chained by hashes.

A release is two rows. ``reserved`` is committed before a cohort is drawn, and counts as spent from then on, whatever
happens. ``released`` says with which bytes it ended, ``burned`` that it ended with none. A row is never changed, and
has the hash of its population's row before: ``sha256 = SHA-256(canonical JSON of the row and of that hash)``.

A population is the people, not the run: every run that asks them draws on one budget.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby

import sqlalchemy as sa

from pomona.errors import RegistryError, VersionConflict
from pomona.storage import audit
from pomona.storage import tables as t
from pomona.storage.records import LedgerEntry, Reservation
from pomona.storage.values import real

START = "0" * 64
_NUMBERS = ("epsilon", "delta", "budget", "noise_multiplier", "sample_rate")
_FIELDS = (
    "population", "seq", "at", "state", "run_id", "round", "attempt", "unit", "adjacency", "plan_sha256", "epsilon",
    "delta", "budget", "noise_multiplier", "sample_rate", "releases", "library", "release_sha256", "previous",
)  # fmt: skip


def entries(connection: sa.Connection, population: str | None = None) -> list[LedgerEntry]:
    """Return the rows of a population, or of all, in their order."""
    query = sa.select(t.ledger).order_by(t.ledger.c.population, t.ledger.c.seq)
    if population is not None:
        query = query.where(t.ledger.c.population == population)
    return [LedgerEntry(**row) for row in connection.execute(query).mappings()]


def reserve(connection: sa.Connection, new: Reservation, *, expected_head: str) -> LedgerEntry:
    """Write that a release is about to be made; it counts as spent from the commit on.

    Args:
        connection: A transaction that has waited for its turn.
        new: The release.
        expected_head: Hash of the population's last row, in view of which the budget was checked; :data:`START` for a
            population that has none.

    Raises:
        VersionConflict: Somebody else has written since.
        RegistryError: That attempt has a row already.
    """
    last = _last(connection, new.population)
    if (head := last.sha256 if last else START) != expected_head:
        raise VersionConflict(
            f"the privacy ledger of {new.population} has grown: expected its head {expected_head[:12]}, found "
            f"{head[:12]}; check the budget again in view of it"
        )
    if any(_is_of(each, new.run_id, new.round_number, new.attempt) for each in entries(connection, new.population)):
        raise RegistryError(
            f"attempt {new.attempt} of round {new.round_number} of run {new.run_id} is in the ledger of "
            f"{new.population} already; noise is never drawn again under one row"
        )
    facts = {name: real(getattr(new, name)) for name in _NUMBERS}
    if None in facts.values():
        raise RegistryError(f"expected finite numbers in a reservation, got {new}")
    return _append(
        connection,
        last,
        {
            "population": new.population,
            "state": "reserved",
            "run_id": new.run_id,
            "round": new.round_number,
            "attempt": new.attempt,
            "unit": new.unit,
            "adjacency": new.adjacency,
            "plan_sha256": new.plan_sha256,
            "releases": new.releases,
            "library": new.library,
            "release_sha256": None,
            **facts,
        },
    )


def settle(connection: sa.Connection, reserved: LedgerEntry, *, release_sha256: str | None) -> LedgerEntry:
    """Write how a reserved release ended: with these bytes, or with none; the same again returns the row there is.

    Raises:
        RegistryError: It was not reserved, or ended otherwise.
    """
    mine = [
        each
        for each in entries(connection, reserved.population)
        if _is_of(each, reserved.run_id, reserved.round, reserved.attempt)
    ]
    state = "burned" if release_sha256 is None else "released"
    if not mine or mine[0] != reserved:
        raise RegistryError(f"{_name(reserved)} was not reserved, so it cannot be {state}")
    for each in mine[1:]:
        if (each.state, each.release_sha256) == (state, release_sha256):
            return each
        raise RegistryError(f"{_name(reserved)} is {each.state} already, and cannot be {state}")
    same = ("population", "run_id", "round", "attempt", "unit", "adjacency", "plan_sha256", "releases", "library")
    facts = {name: getattr(reserved, name) for name in (*same, *_NUMBERS)}
    last = _last(connection, reserved.population)
    return _append(connection, last, {**facts, "state": state, "release_sha256": release_sha256})


def all_broken(connection: sa.Connection) -> Iterator[tuple[LedgerEntry, str]]:
    """Yield each row that does not follow on the one before of its population, and why."""
    for _, rows in groupby(entries(connection), key=lambda row: row.population):
        yield from broken(list(rows))


def broken(rows: Sequence[LedgerEntry]) -> Iterator[tuple[LedgerEntry, str]]:
    """Yield each row of one population that does not follow on the one before, and why."""
    previous, seq = START, 0
    for row in rows:
        if row.seq != seq + 1:
            yield row, f"comes after {seq}; {row.seq - seq - 1} before it are gone"
        if row.previous != previous:
            yield row, "does not follow on the row before it"
        if digest({name: getattr(row, name) for name in _FIELDS}) != row.sha256:
            yield row, "was changed: its hash is another"
        previous, seq = row.sha256, row.seq


def digest(row: Mapping[str, object]) -> str:
    """Return the hash of a row, from all its fields but ``sha256``."""
    at = row["at"]
    assert isinstance(at, datetime)
    parts = {name: row[name] for name in _FIELDS} | {"at": at.astimezone(UTC).isoformat(timespec="microseconds")}
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _append(connection: sa.Connection, last: LedgerEntry | None, facts: Mapping[str, object]) -> LedgerEntry:
    row = {
        **facts,
        "seq": last.seq + 1 if last else 1,
        "at": datetime.now(UTC),
        "previous": last.sha256 if last else START,
    }
    row["sha256"] = digest(row)
    connection.execute(sa.insert(t.ledger).values(**row))
    where = f"{row['population']}/{row['seq']}"
    audit.append(connection, f"privacy-{row['state']}", where, run=row["run_id"], round=row["round"])
    written = _last(connection, str(row["population"]))
    assert written is not None
    return written


def _last(connection: sa.Connection, population: str) -> LedgerEntry | None:
    query = sa.select(t.ledger).where(t.ledger.c.population == population).order_by(t.ledger.c.seq.desc()).limit(1)
    row = connection.execute(query).mappings().first()
    return LedgerEntry(**row) if row else None


def _is_of(entry: LedgerEntry, run_id: str, number: int, attempt: int) -> bool:
    return (entry.run_id, entry.round, entry.attempt) == (run_id, number, attempt)


def _name(entry: LedgerEntry) -> str:
    return f"attempt {entry.attempt} of round {entry.round} of run {entry.run_id} on {entry.population}"
