"""Pomona's side of the filling: 100,000 versions in minutes, by the rows that publishing them one by one writes."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from registry_content import ADAPTERS, BASES, BEGAN, Content, adapter_names, champions, contents
from safetensors.numpy import save

from pomona.storage import tables as t
from pomona.storage.engine import create_engine, writing
from pomona.storage.opening import open_registry
from pomona.storage.records import Exactness, NewVersion

PAYLOAD = save({"lora_A.layer": np.ones((2, 3), np.float32), "lora_B.layer": np.ones((4, 2), np.float32)})
_ROWS = 10_000
_MOMENTS = {"created_at", "opened_at", "closed_at", "started_at", "finished_at", "added_at", "moved_at"}


def base_sha256(name: str) -> str:
    """Return the hash that a base model of this name is given."""
    return hashlib.sha256(name.encode()).hexdigest()


def new_version(
    item: Content, *, run_id: str, payload: bytes = PAYLOAD, adapter: str = "", number: int = 0
) -> NewVersion:
    """Return a version as a coordinator publishes it."""
    exactness: Exactness = "exact" if item.exactness == "exact" else "truncated"
    return NewVersion(
        run_id=run_id,
        round_number=number or item.number,
        adapter=adapter or item.name,
        payload=payload,
        base_sha256=base_sha256(_base(item)),
        rank=item.rank,
        exactness=exactness,
        retained_energy=item.metrics["retained_energy_min"],
        recipe=_recipe(item),
        metrics=item.metrics,
        bytes_down=1000,
        bytes_up=2000,
        seconds=1.5,
    )


def fill_by_publishing(home: Path, versions: int, adapters: int, *, url: str | None = None) -> None:
    """Publish version after version."""
    with open_registry(home, url=url) as registry:
        for base in BASES:
            registry.add_base_model(base_sha256(base), base, "a benchmark")
        for item in contents(adapters, adapters):
            registry.start_run(
                run_id=item.run_id, adapter=item.name, base_sha256=base_sha256(_base(item)), settings_json="{}"
            )
        for item in contents(versions, adapters):
            parent = f"{item.name}/{item.number - 1}" if item.number > 1 else None
            registry.open_round(item.run_id, item.number, parent=parent, cohort=["anna", "bert"])
            version = registry.publish_round(new_version(item, run_id=item.run_id))
            for key, value in item.tags.items():
                registry.set_tag(version.ref, key, value)
        for item in contents(adapters, adapters):
            registry.finish_run(item.run_id, "finished")
        for name, number in champions(versions, adapters).items():
            registry.set_alias(name, "champion", number)


def fill(home: Path, versions: int, adapters: int = ADAPTERS, *, url: str | None = None) -> None:
    """Insert the same rows thousands at a time."""
    with open_registry(home, url=url) as registry:
        registry.blobs.put(PAYLOAD)
        for base in BASES:
            registry.add_base_model(base_sha256(base), base, "a benchmark")
    engine = create_engine(url or f"sqlite:///{home / 'registry.db'}", read_only=False)
    with writing(engine) as connection:
        names = adapter_names(adapters)
        connection.execute(sa.insert(t.adapter), [{"name": name, "created_at": BEGAN} for name in names])
        connection.execute(sa.insert(t.run), [_run(item) for item in contents(adapters, adapters)])
        for batch in _batches(contents(versions, adapters)):
            connection.execute(sa.insert(t.version), [_version(item) for item in batch])
            connection.execute(sa.insert(t.round_), [_round(item, adapters) for item in batch])
            edges = [_edge(item, adapters) for item in batch if item.number > 1]
            if edges:
                connection.execute(sa.insert(t.lineage), edges)
            for table, of in ((t.metric, "metrics"), (t.tag, "tags")):
                connection.execute(sa.insert(table), [row for item in batch for row in _pairs(item, of)])
        pointers = [
            _pointer(place, *each, adapters) for place, each in enumerate(champions(versions, adapters).items())
        ]
        connection.execute(sa.insert(t.alias), [{**row, "moved_at": BEGAN} for row in pointers])
        connection.execute(sa.insert(t.alias_history), [{**row, "moved_at": BEGAN} for row in pointers])
        if engine.dialect.name == "postgresql":  # ids were given, so the sequence is behind
            connection.execute(sa.text("SELECT setval('version_id_seq', (SELECT max(id) FROM version))"))
    engine.dispose()


def rows(home: Path, *, url: str | None = None) -> dict[str, list[list[str]]]:
    """Return every row of every table but the audit log, which no search reads; moments left out."""
    engine = create_engine(url or f"sqlite:///{home / 'registry.db'}", read_only=True)
    with engine.connect() as connection:
        found = {
            table.name: sorted(
                [repr(value) for name, value in row.items() if name not in _MOMENTS]
                for row in connection.execute(sa.select(table)).mappings()
            )
            for table in t.metadata.sorted_tables
            if table.name != "audit"
        }
    engine.dispose()
    return found


def _batches(items: Iterator[Content]) -> Iterator[Sequence[Content]]:
    batch: list[Content] = []
    for item in items:
        batch.append(item)
        if len(batch) == _ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _base(item: Content) -> str:
    return BASES[item.name.startswith("code")]


def _recipe(item: Content) -> Mapping[str, object]:
    return {
        "strategy": "flora-bounded",
        "task": "classification",
        "labels": ["yes", "no", "unknown"],
        "max_rank": 64,
        "energy": 1.0,
        "max_length": 128,
        "seed": item.place,
    }


def _run(item: Content) -> dict[str, Any]:
    return {
        "id": item.run_id,
        "adapter_name": item.name,
        "settings": "{}",
        "base_sha256": base_sha256(_base(item)),
        "state": "finished",
        "reason": "",
        "started_at": BEGAN,
        "finished_at": BEGAN,
        "initial_metrics": {},
    }


def _version(item: Content) -> dict[str, Any]:
    return {
        "id": item.place + 1,
        "adapter_name": item.name,
        "version": item.number,
        "blob_sha256": hashlib.sha256(PAYLOAD).hexdigest(),
        "bytes": len(PAYLOAD),
        "base_sha256": base_sha256(_base(item)),
        "rank": item.rank,
        "kind": "round",
        "exactness": item.exactness,
        "retained_energy": item.metrics["retained_energy_min"],
        "run_id": item.run_id,
        "round": item.number,
        "recipe": _recipe(item),
        "created_at": item.created_at,
    }


def _round(item: Content, adapters: int) -> dict[str, Any]:
    return {
        "run_id": item.run_id,
        "number": item.number,
        "state": "committed",
        "reason": "",
        "parent_id": item.place + 1 - adapters if item.number > 1 else None,
        "cohort": ["anna", "bert"],
        "cohort_size": 2,
        "opened_at": item.created_at,
        "closed_at": item.created_at,
        "bytes_down": 1000,
        "bytes_up": 2000,
        "seconds": 1.5,
    }


def _edge(item: Content, adapters: int) -> dict[str, Any]:
    place = item.place + 1
    return {"child_id": place, "parent_id": place - adapters, "kind": "parent", "coefficient": 1.0}


def _pairs(item: Content, of: str) -> Iterator[dict[str, Any]]:
    for key, value in (item.metrics if of == "metrics" else item.tags).items():
        yield {"version_id": item.place + 1, "key": key, "value": value}


def _pointer(place: int, name: str, number: int, adapters: int) -> dict[str, Any]:
    version_id = place + 1 + (number - 1) * adapters
    return {"adapter_name": name, "alias": "champion", "version_id": version_id}
