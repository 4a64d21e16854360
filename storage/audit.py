"""The audit log: one row for each change of the registry, in the transaction of that change, chained by hashes.

``sha256 = SHA-256(canonical JSON of [id, at, actor, event, subject, details, sha256 of the row before])``; the first
row follows on 64 zeros. Whoever changes, drops or inserts a row has to rewrite all that come after it, and cannot
rewrite a hash that somebody wrote down elsewhere: ``pomona registry audit --expect HASH`` finds out.
"""

import hashlib
import json
import os
import pwd
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache

import sqlalchemy as sa

from pomona.storage import tables as t

START = "0" * 64
ADVISORY_LOCK = 0x706F6D6F6E61  # "pomona"; held by whoever writes to a registry on PostgreSQL, or migrates it


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """One change.

    Attributes:
        id: From 1, without a gap.
        at: When it was made, in UTC.
        actor: Account of the operating system that made it.
        event: What was done, such as ``version-published``.
        subject: To what, such as ``demo/3``.
        details: More of it; JSON.
        previous: Hash of the record before.
        sha256: Hash of this one.
    """

    id: int
    at: datetime
    actor: str
    event: str
    subject: str
    details: Mapping[str, object]
    previous: str
    sha256: str


def wait_for_turn(connection: sa.Connection) -> None:
    """Let one transaction write at a time, as SQLite does by itself: the chain has one end.

    It comes first in a transaction; taken after a row's lock, two writers could wait for each other.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(_TAKE_LOCK)


def append(connection: sa.Connection, event: str, subject: str, **details: object) -> None:
    """Write down a change in the transaction that makes it, which has waited for its turn."""
    append_all(connection, event, [(subject, details)])


def append_all(connection: sa.Connection, event: str, what: Sequence[tuple[str, Mapping[str, object]]]) -> None:
    """Write down several changes of one kind, each a subject with its details, in their order."""
    number, previous = head(connection)
    records = []
    for subject, details in what:
        number += 1
        record = {
            "id": number,
            "at": datetime.now(UTC),
            "actor": _actor(),
            "event": event,
            "subject": subject,
            "details": details,
            "previous": previous,
        }
        previous = digest(record)
        records.append({**record, "sha256": previous})
    if records:
        connection.execute(_INSERT, records)


def head(connection: sa.Connection) -> tuple[int, str]:
    """Return id and hash of the newest record."""
    last = connection.execute(_LAST).first()
    return (last.id, last.sha256) if last else (0, START)


def holds(connection: sa.Connection, record: tuple[int, str]) -> bool:
    """Return whether the log has the record of that id and hash: the transaction that ended with it was committed."""
    number, sha256 = record
    return connection.execute(_SHA256_OF, {"of_id": number}).scalar() == sha256


def digest(record: Mapping[str, object]) -> str:
    """Return the hash of a record, from all its fields but ``sha256``."""
    at = record["at"]
    assert isinstance(at, datetime)
    parts = [record["id"], at.astimezone(UTC).isoformat(timespec="microseconds")]
    parts += [record[name] for name in ("actor", "event", "subject", "details", "previous")]
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def records(connection: sa.Connection, *, after: int = 0) -> Iterator[AuditRecord]:
    """Yield the records with a larger id, oldest first."""
    for row in connection.execute(sa.select(t.audit).where(t.audit.c.id > after).order_by(t.audit.c.id)):
        yield AuditRecord(**row._mapping)


def broken(connection: sa.Connection) -> Iterator[tuple[int, str]]:
    """Yield the id of each record that does not follow on the one before, and what is wrong with it."""
    previous, number = START, 0
    for record in records(connection):
        if record.id != number + 1:
            yield record.id, f"comes after {number}; {record.id - number - 1} before it are gone"
        if record.previous != previous:
            yield record.id, "does not follow on the record before it"
        facts = {name: getattr(record, name) for name in AuditRecord.__slots__}
        if digest(facts) != record.sha256:
            yield record.id, "was changed: its hash is another"
        previous, number = record.sha256, record.id


@cache
def _actor() -> str:
    number = os.geteuid()
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # an account without a name, as in containers
        return f"uid {number}"


_TAKE_LOCK = sa.select(sa.func.pg_advisory_xact_lock(ADVISORY_LOCK))
_LAST = sa.select(t.audit.c.id, t.audit.c.sha256).order_by(t.audit.c.id.desc()).limit(1)
_SHA256_OF = sa.select(t.audit.c.sha256).where(t.audit.c.id == sa.bindparam("of_id"))
_INSERT = sa.insert(t.audit)
