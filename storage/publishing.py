"""Publishing: one transaction writes the version and everything that says what it is made of."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime

import sqlalchemy as sa

from pomona.errors import BaseModelError, RegistryError, VersionConflict
from pomona.failpoints import reach
from pomona.storage import audit, rounds, versions
from pomona.storage import tables as t
from pomona.storage.records import NewImport, NewVersion, Version
from pomona.storage.rounds import REASON_LENGTH
from pomona.storage.values import json_value, metrics, real, text


def publish_round(connection: sa.Connection, new: NewVersion, sha256: str) -> Version:
    """Publish the result of an open round as the next version of the run's adapter.

    Raises:
        BaseModelError: It was not made on the run's base model.
        RegistryError: It is for another adapter, or weighs a client that has no accepted submission.
        VersionConflict: The round is closed already, or the adapter's newest version is not the one expected.
    """
    _require_run(connection, new)
    closed = rounds.close_round(
        connection,
        new.run_id,
        new.round_number,
        state="committed",
        bytes_down=new.bytes_down,
        bytes_up=new.bytes_up,
        seconds=new.seconds,
    )
    version_id = _insert_version(connection, new, sha256)
    if closed.parent_id is not None:
        edge = {"child_id": version_id, "parent_id": closed.parent_id, "kind": "parent", "coefficient": 1.0}
        connection.execute(sa.insert(t.lineage).values(**edge))
    scores = [{"version_id": version_id, "key": key, "value": value} for key, value in metrics(new.metrics).items()]
    if scores:
        connection.execute(sa.insert(t.metric), scores)
    _link_submissions(connection, new, version_id)
    reach("version-inserted")
    return versions.load(connection, t.version.c.id == version_id)[0]


def published(connection: sa.Connection, new: NewVersion | NewImport, sha256: str) -> Version | None:
    """Return the version that was published of this by a transaction nobody heard of, if there is one."""
    made = t.version.c.adapter_name == new.adapter, t.version.c.blob_sha256 == sha256
    if isinstance(new, NewVersion):
        of_round = t.version.c.run_id == new.run_id, t.version.c.round == new.round_number
        return next(iter(versions.load(connection, *made, *of_round)), None)
    newest = sa.select(sa.func.max(t.version.c.version)).filter_by(adapter_name=new.adapter).scalar_subquery()
    return next(iter(versions.load(connection, *made, t.version.c.version == newest)), None)


def publish_import(connection: sa.Connection, new: NewImport, sha256: str) -> Version:
    """Publish an adapter that no run made as the next version of its name; it has no parents.

    Raises:
        VersionConflict: The adapter's newest version is not the one expected.
    """
    rounds.add_base_model(connection, new.base_sha256, name=new.base_model, source=new.base_source)
    rounds.add_adapter(connection, new.adapter)
    values = {
        "base_sha256": new.base_sha256,
        "rank": new.rank,
        "kind": "import",
        "exactness": "exact",
        "retained_energy": 1.0,
        "run_id": None,
        "round": None,
        "recipe": json_value(new.recipe),
    }
    version_id = _insert_next(connection, new, sha256, values)
    return versions.load(connection, t.version.c.id == version_id)[0]


def _require_run(connection: sa.Connection, new: NewVersion) -> None:
    run = rounds.run(connection, new.run_id)
    if new.adapter != run.adapter:
        raise RegistryError(f"run {run.id} publishes versions of {run.adapter!r}, got one of {new.adapter!r}")
    if new.base_sha256 != run.base_sha256:
        raise BaseModelError(
            f"run {run.id} trains on base model {run.base_sha256[:12]}, got a version on {new.base_sha256[:12]}"
        )
    if real(new.retained_energy) is None or not math.isfinite(new.seconds):
        raise RegistryError(
            f"expected finite numbers, got retained_energy={new.retained_energy} and seconds={new.seconds}"
        )


def _insert_version(connection: sa.Connection, new: NewVersion, sha256: str) -> int:
    values = {
        "base_sha256": new.base_sha256,
        "rank": new.rank,
        "kind": "round",
        "exactness": new.exactness,
        "retained_energy": new.retained_energy,
        "run_id": new.run_id,
        "round": new.round_number,
        "recipe": json_value(new.recipe),
    }
    return _insert_next(connection, new, sha256, values)


def _insert_next(
    connection: sa.Connection, new: NewVersion | NewImport, sha256: str, values: Mapping[str, object]
) -> int:
    newest = connection.scalar(sa.select(sa.func.max(t.version.c.version)).filter_by(adapter_name=new.adapter)) or 0
    head = f"{new.adapter}/{newest}" if newest else ""
    if new.expected_head not in {None, head}:
        raise VersionConflict(
            f"expected {new.expected_head or 'no version'} to be the newest of {new.adapter}, found {head or 'none'}: "
            "somebody else published first; make yours from that one and publish again"
        )
    identity = {
        "adapter_name": new.adapter,
        "version": newest + 1,
        "blob_sha256": sha256,
        "bytes": len(new.payload),
        "created_at": datetime.now(UTC),
    }
    statement = sa.insert(t.version).values(**identity, **values).returning(t.version.c.id)
    version_id: int = connection.execute(statement).scalar_one()
    event = "version-imported" if isinstance(new, NewImport) else "version-published"
    made = {"sha256": sha256, "run": values["run_id"], "round": values["round"]}
    audit.append(connection, event, f"{new.adapter}/{newest + 1}", **made)
    return version_id


def _link_submissions(connection: sa.Connection, new: NewVersion, version_id: int) -> None:
    accepted = (
        t.submission.c.run_id == new.run_id,
        t.submission.c.round == new.round_number,
        t.submission.c.status == "accepted",
    )
    query = sa.select(t.submission.c.client, t.submission.c.id).where(*accepted)
    ids: dict[str, int] = {client: key for client, key in connection.execute(query)}  # noqa: C416
    if strangers := sorted({*new.weights, *new.quarantined} - set(ids)):
        raise RegistryError(
            f"round {new.round_number} of run {new.run_id} has no accepted submission of "
            f"{', '.join(map(repr, strangers))}, so they cannot have a weight; nothing was published"
        )
    for client, weight in new.weights.items():
        reason = text(new.reduced.get(client, ""), limit=REASON_LENGTH)
        values = {"version_id": version_id, "weight": real(weight), "reason": reason}
        connection.execute(sa.update(t.submission).where(t.submission.c.id == ids[client]).values(**values))
    for client, why in new.quarantined.items():
        values = {"status": "quarantined", "weight": 0.0, "reason": text(why, limit=REASON_LENGTH)}
        connection.execute(sa.update(t.submission).where(t.submission.c.id == ids[client]).values(**values))
