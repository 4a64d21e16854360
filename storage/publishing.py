"""Publishing: one transaction writes the version and everything that says what it is made of."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import get_args

import sqlalchemy as sa

from pomona.errors import BaseModelError, RegistryError, VersionConflict
from pomona.failpoints import reach
from pomona.storage import audit, certificates, rounds, versions
from pomona.storage import tables as t
from pomona.storage.certificates import NewCertificate
from pomona.storage.learned import ClosedRound, NewLearned
from pomona.storage.quarantine import quarantine
from pomona.storage.records import NewImport, NewVersion, Parent, ParentKind, Version
from pomona.storage.rounds import REASON_LENGTH
from pomona.storage.values import json_value, metrics, real, text


def publish_round(connection: sa.Connection, new: NewVersion, sha256: str) -> Version:
    """Publish the result of an open round as the next version of the run's adapter.

    Raises:
        BaseModelError: It was not made on the run's base model.
        RegistryError: It is for another adapter, weighs a client that has no accepted submission, or its parents cannot
            be: the version that clients trained on is missing, one is named twice, or a coefficient is no number.
        AdapterNotFound: There is no such parent.
        VersionConflict: The round is closed already, or the adapter's newest version is not the one expected.
    """
    _require_run(connection, new)
    edges = _edges_of_round(connection, new, _close(connection, new))
    version_id = _insert_version(connection, new, sha256)
    _draw(connection, version_id, edges)
    _score(connection, version_id, new.metrics)
    _link_submissions(connection, new, version_id, quarantined=new.quarantined)
    reach("version-inserted")
    return versions.load(connection, t.version.c.id == version_id)[0]


def publish_import(connection: sa.Connection, new: NewImport, sha256: str) -> Version:
    """Publish an adapter that no run made as the next version of its name.

    Raises:
        AdapterNotFound: There is no such parent.
        RegistryError: A parent is named twice, or its coefficient is no number.
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
    edges = list(_edges(connection, new.parents))
    version_id = _insert_next(connection, new, sha256, values)
    _draw(connection, version_id, edges)
    return versions.load(connection, t.version.c.id == version_id)[0]


def publish_learned(
    connection: sa.Connection,
    new: NewLearned,
    sha256: str,
    *,
    certificate: NewCertificate | None = None,
    quarantined: Sequence[str] = (),
) -> Version:
    """Publish what was learned of a task, or is left after a request, with its certificate and what that makes unfit.

    Raises:
        AdapterNotFound: There is no such parent, or no such version to put into quarantine.
        BaseModelError: It was not made on the base model of the run that it is of.
        RegistryError: A parent is named twice, the certificate says what none can, or the round that it closes is of
            another adapter, or weighs a client that has no accepted submission.
        VersionConflict: The adapter's newest version is not the one expected, or the round is closed already.
    """
    rounds.add_base_model(connection, new.base_sha256, name=new.base_model, source=new.base_source)
    rounds.add_adapter(connection, new.adapter)
    values = {
        "base_sha256": new.base_sha256,
        "rank": new.rank,
        "kind": new.kind,
        "exactness": new.exactness,
        "retained_energy": 1.0,
        "run_id": new.closes.run_id if new.closes else None,
        "round": new.closes.round_number if new.closes else None,
        "recipe": json_value(new.recipe),
    }
    if new.closes is not None:
        _require_own_run(connection, new.closes.run_id, adapter=new.adapter, base_sha256=new.base_sha256)
        _close(connection, new.closes)
    edges = list(_edges(connection, new.parents))
    version_id = _insert_next(connection, new, sha256, values)
    _draw(connection, version_id, edges)
    _score(connection, version_id, new.metrics)
    if new.closes is not None:
        _link_submissions(connection, new.closes, version_id)
    (version,) = versions.load(connection, t.version.c.id == version_id)
    if certificate is not None:
        certificates.record(connection, replace(certificate, version=version.ref))
    if quarantined:
        what = f"{', '.join(certificate.subjects)} was to be forgotten" if certificate else "it was replaced"
        why = f"{what}; {version.ref} goes on without"
        quarantine(connection, quarantined, why, instead=version.ref)
    reach("version-inserted")
    return versions.resolve(connection, version.ref)


def _edges(connection: sa.Connection, parents: Sequence[Parent]) -> Iterator[dict[str, object]]:
    seen = set[tuple[int, str]]()
    for parent in parents:
        if parent.kind not in get_args(ParentKind) or real(parent.coefficient) is None:
            raise RegistryError(
                f"expected a parent of kind {', '.join(get_args(ParentKind))} with a finite coefficient, got {parent}"
            )
        parent_id = versions.resolve(connection, parent.ref).id
        if (parent_id, parent.kind) in seen:
            raise RegistryError(
                f"{parent.ref} is named twice as a parent of kind {parent.kind}; add its coefficients up"
            )
        seen.add((parent_id, parent.kind))
        yield {"parent_id": parent_id, "kind": parent.kind, "coefficient": float(parent.coefficient)}


def _edges_of_round(connection: sa.Connection, new: NewVersion, trained_on: int | None) -> list[dict[str, object]]:
    edges = list(_edges(connection, new.parents))
    if trained_on is None or trained_on in {edge["parent_id"] for edge in edges}:
        return edges
    if edges:
        raise RegistryError(
            f"the clients of round {new.round_number} of run {new.run_id} trained on another version than the parents "
            f"{', '.join(parent.ref for parent in new.parents)}; name it among them"
        )
    return [{"parent_id": trained_on, "kind": "parent", "coefficient": 1.0}]


def _score(connection: sa.Connection, version_id: int, values: Mapping[str, float]) -> None:
    scores = [{"version_id": version_id, "key": key, "value": value} for key, value in metrics(values).items()]
    if scores:
        connection.execute(sa.insert(t.metric), scores)


def _draw(connection: sa.Connection, version_id: int, edges: Sequence[Mapping[str, object]]) -> None:
    if edges:
        connection.execute(sa.insert(t.lineage), [{"child_id": version_id, **edge} for edge in edges])


def _close(connection: sa.Connection, new: NewVersion | ClosedRound) -> int | None:
    """Commit the round of a version, and return the id of the version that it was opened on."""
    closed = rounds.close_round(
        connection,
        new.run_id,
        new.round_number,
        state="committed",
        bytes_down=new.bytes_down,
        bytes_up=new.bytes_up,
        seconds=new.seconds,
    )
    parent_id: int | None = closed.parent_id
    return parent_id


def _require_own_run(connection: sa.Connection, run_id: str, *, adapter: str, base_sha256: str) -> None:
    run = rounds.run(connection, run_id)
    if adapter != run.adapter:
        raise RegistryError(f"run {run.id} publishes versions of {run.adapter!r}, got one of {adapter!r}")
    if base_sha256 != run.base_sha256:
        raise BaseModelError(
            f"run {run.id} trains on base model {run.base_sha256[:12]}, got a version on {base_sha256[:12]}"
        )


def _require_run(connection: sa.Connection, new: NewVersion) -> None:
    _require_own_run(connection, new.run_id, adapter=new.adapter, base_sha256=new.base_sha256)
    if real(new.retained_energy) is None or not math.isfinite(new.seconds):
        raise RegistryError(
            f"expected finite numbers, got retained_energy={new.retained_energy} and seconds={new.seconds}"
        )


def _insert_version(connection: sa.Connection, new: NewVersion, sha256: str) -> int:
    values = {
        "base_sha256": new.base_sha256,
        "rank": new.rank,
        "kind": new.kind,
        "exactness": new.exactness,
        "retained_energy": new.retained_energy,
        "run_id": new.run_id,
        "round": new.round_number,
        "recipe": json_value(new.recipe),
    }
    return _insert_next(connection, new, sha256, values)


def _insert_next(
    connection: sa.Connection, new: NewVersion | NewImport | NewLearned, sha256: str, values: Mapping[str, object]
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


def _link_submissions(
    connection: sa.Connection,
    new: NewVersion | ClosedRound,
    version_id: int,
    *,
    quarantined: Mapping[str, str] = MappingProxyType({}),
) -> None:
    accepted = (
        t.submission.c.run_id == new.run_id,
        t.submission.c.round == new.round_number,
        t.submission.c.status == "accepted",
    )
    query = sa.select(t.submission.c.client, t.submission.c.id).where(*accepted)
    ids: dict[str, int] = {client: key for client, key in connection.execute(query)}  # noqa: C416
    if strangers := sorted({*new.weights, *quarantined} - set(ids)):
        raise RegistryError(
            f"round {new.round_number} of run {new.run_id} has no accepted submission of "
            f"{', '.join(map(repr, strangers))}, so they cannot have a weight; nothing was published"
        )
    for client, weight in new.weights.items():
        reason = text(new.reduced.get(client, ""), limit=REASON_LENGTH)
        values = {"version_id": version_id, "weight": real(weight), "reason": reason}
        connection.execute(sa.update(t.submission).where(t.submission.c.id == ids[client]).values(**values))
    for client, why in quarantined.items():
        values = {"status": "quarantined", "weight": 0.0, "reason": text(why, limit=REASON_LENGTH)}
        connection.execute(sa.update(t.submission).where(t.submission.c.id == ids[client]).values(**values))
