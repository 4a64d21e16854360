"""A registry's rows without its rounds: many versions at once, on either database."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.postgresql import fresh_database

from pomona.storage import schema
from pomona.storage import tables as t
from pomona.storage.engine import create_engine

SQLITE_ONLY = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a version is to have; ids and numbers follow from the order."""

    name: str = "demo"
    rank: int = 4
    kind: str = "round"
    exactness: str = "exact"
    retained_energy: float = 1.0
    run_id: str | None = None
    round: int | None = None
    bytes: int = 100
    sha256: str = "a" * 64
    base_model: str = "tiny"
    created_at: datetime = NOW
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    aliases: Sequence[str] = ()


@contextmanager
def database(kind: str, folder: Path, request: pytest.FixtureRequest) -> Iterator[sa.Engine]:
    """Lend an empty, migrated database; one of PostgreSQL is dropped afterwards."""
    if kind == "sqlite":
        yield from _prepared(f"sqlite:///{folder / 'registry.db'}")
        return
    with fresh_database(request.getfixturevalue("postgresql")) as url:
        yield from _prepared(url)


def _prepared(url: str) -> Iterator[sa.Engine]:
    engine = create_engine(url, read_only=False)
    schema.prepare(engine, lock=None, read_only=False)
    yield engine
    engine.dispose()


def fill(connection: sa.Connection, entries: Sequence[Entry]) -> None:
    """Insert versions with ids from 1, in order."""
    _insert(connection, t.base_model, [_base(name) for name in sorted({entry.base_model for entry in entries})])
    names = sorted({entry.name for entry in entries})
    _insert(connection, t.adapter, [{"name": name, "created_at": NOW} for name in names])
    runs = {entry.run_id: entry for entry in entries if entry.run_id is not None}
    _insert(connection, t.run, [_run(entry) for entry in runs.values()])
    numbers = dict.fromkeys(names, 0)
    rows: list[dict[str, object]] = []
    for place, entry in enumerate(entries, start=1):
        numbers[entry.name] += 1
        rows.append(_version(entry, place, numbers[entry.name]))
    _insert(connection, t.version, rows)
    for table, of in ((t.metric, "metrics"), (t.tag, "tags")):
        pairs = [(place, getattr(entry, of)) for place, entry in enumerate(entries, start=1)]
        _insert(connection, table, [_pair(place, *pair) for place, held in pairs for pair in held.items()])
    aliases = [(entry.name, alias, place) for place, entry in enumerate(entries, start=1) for alias in entry.aliases]
    _insert(connection, t.alias, [_alias(*item) for item in aliases])


def _insert(connection: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, object]]) -> None:
    if rows:
        connection.execute(sa.insert(table), rows)


def base_sha256(name: str) -> str:
    """Return the hash that a base model of this name is given."""
    return name.encode().hex().ljust(64, "0")[:64]


def _base(name: str) -> dict[str, object]:
    return {"sha256": base_sha256(name), "name": name, "source": "a test", "added_at": NOW}


def _run(entry: Entry) -> dict[str, object]:
    return {
        "id": entry.run_id,
        "adapter_name": entry.name,
        "settings": "{}",
        "base_sha256": base_sha256(entry.base_model),
        "state": "finished",
        "reason": "",
        "started_at": NOW,
        "finished_at": None,
        "initial_metrics": {},
    }


def _version(entry: Entry, place: int, number: int) -> dict[str, object]:
    return {
        "id": place,
        "adapter_name": entry.name,
        "version": number,
        "blob_sha256": entry.sha256,
        "bytes": entry.bytes,
        "base_sha256": base_sha256(entry.base_model),
        "rank": entry.rank,
        "kind": entry.kind,
        "exactness": entry.exactness,
        "retained_energy": entry.retained_energy,
        "run_id": entry.run_id,
        "round": entry.round,
        "recipe": {},
        "created_at": entry.created_at,
    }


def _pair(place: int, key: str, value: object) -> dict[str, object]:
    return {"version_id": place, "key": key, "value": value}


def _alias(name: str, alias: str, place: int) -> dict[str, object]:
    return {"adapter_name": name, "alias": alias, "version_id": place, "moved_at": NOW}
