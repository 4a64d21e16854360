"""Runs, their clients, rounds and submissions: functions of a connection that return records."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import sqlalchemy as sa

from pomona.errors import AdapterNotFound, BaseModelError, ConfigError, VersionConflict
from pomona.storage import audit, versions
from pomona.storage import tables as t
from pomona.storage.records import Client, Round, Run, RunState, SubmissionStatus
from pomona.storage.values import count, metrics, read_metrics, text

_NAME_LENGTH = 200
REASON_LENGTH = 2000

_ROUND = (t.round_.c.run_id == sa.bindparam("in_run"), t.round_.c.number == sa.bindparam("in_round"))
_LOCKED_ROUND = sa.select(t.round_).where(*_ROUND).with_for_update()


def start_run(
    connection: sa.Connection, *, run_id: str, adapter: str, base_sha256: str, settings_json: str, learns: bool = False
) -> Run:
    """Begin a run, or take up again one of the same id, adapter, base model and settings.

    Raises:
        BaseModelError: The base model was not added.
        VersionConflict: Another run has that id, or the adapter was learned task after task and the run does not learn
            so, or the other way round.
    """
    facts = {"adapter_name": adapter, "base_sha256": base_sha256, "settings": settings_json}
    existing = connection.execute(sa.select(t.run).filter_by(id=run_id)).mappings().one_or_none()
    if existing is not None:
        if different := [name for name, value in facts.items() if existing[name] != value]:
            raise VersionConflict(
                f"run {run_id} exists with other {', '.join(different)}; resume it as it was, or choose another id"
            )
        if existing["state"] != "running":
            resumed = {"state": "running", "reason": "", "finished_at": None}
            connection.execute(sa.update(t.run).where(t.run.c.id == run_id).values(**resumed))
            audit.append(connection, "run-resumed", run_id)
        return run(connection, run_id)
    if connection.scalar(sa.select(t.base_model.c.sha256).filter_by(sha256=base_sha256)) is None:
        raise BaseModelError(f"base model {base_sha256[:12]} is not in the registry; add it before the run")
    _refuse_others(connection, adapter, learns=learns)
    now = datetime.now(UTC)
    add_adapter(connection, adapter)
    connection.execute(
        sa.insert(t.run).values(id=run_id, state="running", reason="", started_at=now, initial_metrics={}, **facts)
    )
    audit.append(connection, "run-started", run_id, adapter=adapter, base_sha256=base_sha256)
    return run(connection, run_id)


def _refuse_others(connection: sa.Connection, adapter: str, *, learns: bool) -> None:
    """Rounds cannot go on from what was learned task after task, nor can tasks from what rounds or imports made."""
    learned = t.version.c.kind.in_(("task", "forget"))
    others = ~learned if learns else learned
    query = sa.select(t.version.c.version).where(t.version.c.adapter_name == adapter, others).limit(1)
    if (number := connection.scalar(query)) is not None:
        what = "was not learned task after task, so tasks" if learns else "was learned task after task, and rounds"
        raise VersionConflict(f"{adapter}/{number} {what} cannot go on from it; choose another name for the run")


def add_base_model(connection: sa.Connection, sha256: str, *, name: str, source: str) -> None:
    """Make a base model known; one that is known keeps its first name."""
    if connection.scalar(sa.select(t.base_model.c.sha256).filter_by(sha256=sha256)) is None:
        facts = {"sha256": sha256, "name": name, "source": source, "added_at": datetime.now(UTC)}
        connection.execute(sa.insert(t.base_model).values(**facts))
        audit.append(connection, "base-model-added", sha256, name=name)


def add_adapter(connection: sa.Connection, name: str) -> None:
    """Make an adapter known; one that is known stays as it is."""
    if connection.scalar(sa.select(t.adapter.c.name).filter_by(name=name)) is None:
        connection.execute(sa.insert(t.adapter).values(name=name, created_at=datetime.now(UTC)))


def run(connection: sa.Connection, run_id: str) -> Run:
    """Return one run.

    Raises:
        AdapterNotFound: There is no such run.
    """
    if found := runs(connection, t.run.c.id == run_id):
        return found[0]
    raise AdapterNotFound(f"there is no run {run_id!r}; `pomona registry runs` lists them")


def runs(connection: sa.Connection, *where: sa.ColumnElement[bool]) -> list[Run]:
    """Return the runs that satisfy every condition, oldest first."""
    query = sa.select(t.run).where(*where).order_by(t.run.c.started_at, t.run.c.id)
    return [
        Run(
            id=row.id,
            adapter=row.adapter_name,
            base_sha256=row.base_sha256,
            settings_json=row.settings,
            state=row.state,
            reason=row.reason,
            started_at=row.started_at,
            finished_at=row.finished_at,
            initial_metrics=read_metrics(row.initial_metrics),
        )
        for row in connection.execute(query)
    ]


def finish_run(connection: sa.Connection, run_id: str, state: RunState, reason: str) -> Run:
    """Record how a run ended, once."""
    before = run(connection, run_id)
    reason = text(reason, limit=REASON_LENGTH)
    if (before.state, before.reason) == (state, reason):
        return before
    ended = {"state": state, "reason": reason, "finished_at": datetime.now(UTC)}
    connection.execute(sa.update(t.run).where(t.run.c.id == run_id).values(**ended))
    audit.append(connection, f"run-{state}", run_id)
    return run(connection, run_id)


def set_initial_metrics(connection: sa.Connection, run_id: str, values: Mapping[str, float]) -> None:
    """Record the scores before the first round, once."""
    run(connection, run_id)
    scores = metrics(values)
    if connection.scalar(sa.select(t.run.c.initial_metrics).where(t.run.c.id == run_id)) == scores:
        return
    connection.execute(sa.update(t.run).where(t.run.c.id == run_id).values(initial_metrics=scores))
    audit.append(connection, "run-scored", run_id)


def enrol_client(
    connection: sa.Connection, run_id: str, *, name: str, rank: int, num_examples: int, excluded: str
) -> Client:
    """Record a client, or what it says now if it enrolled before.

    Raises:
        ConfigError: The name is empty or too long.
    """
    if not 0 < len(name) <= _NAME_LENGTH:
        raise ConfigError(f"expected a client name of 1 to {_NAME_LENGTH} characters, got {len(name)}")
    run(connection, run_id)
    name = text(name, limit=_NAME_LENGTH)
    facts = {
        "rank": count(rank),
        "num_examples": count(num_examples),
        "excluded": text(excluded, limit=REASON_LENGTH),
    }
    known = (t.client.c.run_id == run_id, t.client.c.name == name)
    before = connection.execute(sa.select(t.client).where(*known)).mappings().first()
    if before is not None and {key: before[key] for key in facts} == facts:
        return Client(**before)
    if not connection.execute(sa.update(t.client).where(*known).values(**facts)).rowcount:
        connection.execute(sa.insert(t.client).values(run_id=run_id, name=name, **facts))
    audit.append(connection, "client-enrolled", f"{run_id}: {name}", rank=facts["rank"], excluded=bool(excluded))
    return clients(connection, run_id, *known)[0]


def clients(connection: sa.Connection, run_id: str, *where: sa.ColumnElement[bool]) -> list[Client]:
    """Return the clients of a run, by name."""
    query = sa.select(t.client).where(t.client.c.run_id == run_id, *where).order_by("name")
    return [Client(**row) for row in connection.execute(query).mappings()]


def open_round(
    connection: sa.Connection, run_id: str, number: int, *, parent: str | None, cohort: Sequence[str]
) -> Round:
    """Open a round, open a failed one again, or return the one that is open already, with its own cohort.

    One that was frozen before it failed stays frozen: what it is made of was settled, and clients were told.

    Raises:
        VersionConflict: The round is committed, or is open on another parent.
    """
    run(connection, run_id)
    parent_id = versions.resolve(connection, parent).id if parent else None
    state = {
        "state": "open",
        "reason": "",
        "parent_id": parent_id,
        "cohort": [text(name, limit=_NAME_LENGTH) for name in cohort],
        "cohort_size": len(cohort),
        "opened_at": datetime.now(UTC),
        "closed_at": None,
    }
    row = connection.execute(_select_round(run_id, number)).one_or_none()
    if row is None:
        nothing = {"bytes_down": 0, "bytes_up": 0, "seconds": 0.0}
        connection.execute(sa.insert(t.round_).values(run_id=run_id, number=number, **state, **nothing))
        audit.append(connection, "round-opened", f"{run_id}/{number}", parent=parent)
    elif row.state == "committed" or (row.state == "open" and row.parent_id != parent_id):
        raise VersionConflict(f"round {number} of run {run_id} is {row.state} already, on its own parent")
    elif row.state == "failed":
        connection.execute(sa.update(t.round_).where(*_is_round(run_id, number)).values(**state))
        audit.append(connection, "round-opened", f"{run_id}/{number}", parent=parent)
    return rounds(connection, run_id, number)[0]


def close_round(
    connection: sa.Connection, run_id: str, number: int, **values: str | int | float
) -> sa.Row[tuple[object, ...]]:
    """Write the end of an open round and return its row as it was.

    Raises:
        AdapterNotFound: There is no such round.
        VersionConflict: It is closed already.
    """
    row = lock_round(connection, run_id, number)
    if row.state != "open":
        won = connection.scalar(
            sa.select(versions.REF).where(t.version.c.run_id == run_id, t.version.c.round == number)
        )
        what = f"{row.state} already{f' as {won}' if won else ''}"
        raise VersionConflict(f"round {number} of run {run_id} is {what}; it was closed before")
    values_at = {**values, "closed_at": datetime.now(UTC)}
    connection.execute(sa.update(t.round_).where(*_is_round(run_id, number)).values(**values_at))
    return row


def freeze_round(connection: sa.Connection, run_id: str, number: int) -> Round:
    """Let an open round take no more updates; what is accepted by now is what its version is made of.

    Raises:
        AdapterNotFound: There is no such round.
        VersionConflict: It is closed already.
    """
    row = lock_round(connection, run_id, number)
    if row.state != "open":
        raise VersionConflict(f"round {number} of run {run_id} is {row.state} already; it was closed before")
    if row.frozen_at is None:
        frozen = {"frozen_at": datetime.now(UTC)}
        connection.execute(sa.update(t.round_).where(*_is_round(run_id, number)).values(**frozen))
        audit.append(connection, "round-frozen", f"{run_id}/{number}")
    return rounds(connection, run_id, number)[0]


def fail_round(connection: sa.Connection, run_id: str, number: int, reason: str) -> Round:
    """Close an open round without a version."""
    close_round(connection, run_id, number, state="failed", reason=text(reason, limit=REASON_LENGTH))
    audit.append(connection, "round-failed", f"{run_id}/{number}")
    return rounds(connection, run_id, number)[0]


def lock_round(connection: sa.Connection, run_id: str, number: int) -> sa.Row[tuple[object, ...]]:
    """Return the row of a round and keep others from changing it until the transaction ends.

    Raises:
        AdapterNotFound: There is no such round.
    """
    row = connection.execute(_LOCKED_ROUND, {"in_run": run_id, "in_round": number}).one_or_none()
    if row is None:
        raise AdapterNotFound(f"run {run_id!r} has no round {number}; open it first")
    return row


def rounds(connection: sa.Connection, run_id: str, number: int | None = None) -> list[Round]:
    """Return the rounds of a run, or one of them, with what they published."""
    query = (
        sa.select(t.round_, versions.REF.label("parent"))
        .outerjoin(t.version, t.version.c.id == t.round_.c.parent_id)
        .where(t.round_.c.run_id == run_id)
        .order_by(t.round_.c.number)
    )
    publishes = [t.version.c.run_id == run_id]
    if number is not None:
        query = query.where(t.round_.c.number == number)
        publishes.append(t.version.c.round == number)
    published = {item.round_number: item for item in versions.load(connection, *publishes)}
    counts = _count_submissions(connection, run_id, number)
    return [
        Round(
            run_id=row.run_id,
            number=row.number,
            state=row.state,
            reason=row.reason,
            parent=row.parent,
            cohort=tuple(row.cohort),
            opened_at=row.opened_at,
            frozen_at=row.frozen_at,
            closed_at=row.closed_at,
            bytes_down=row.bytes_down,
            bytes_up=row.bytes_up,
            seconds=row.seconds,
            accepted=counts.get((row.number, "accepted"), 0),
            rejected=counts.get((row.number, "rejected"), 0),
            late=counts.get((row.number, "late"), 0),
            quarantined=counts.get((row.number, "quarantined"), 0),
            version=published.get(row.number),
        )
        for row in connection.execute(query)
    ]


def _count_submissions(
    connection: sa.Connection, run_id: str, number: int | None
) -> dict[tuple[int, SubmissionStatus], int]:
    columns = (t.submission.c.round, t.submission.c.status)
    query = sa.select(*columns, sa.func.count()).where(t.submission.c.run_id == run_id).group_by(*columns)
    if number is not None:
        query = query.where(t.submission.c.round == number)
    return {(number, status): amount for number, status, amount in connection.execute(query)}


def _select_round(run_id: str, number: int) -> sa.Select[tuple[object, ...]]:
    return sa.select(t.round_).where(*_is_round(run_id, number))


def _is_round(run_id: str, number: int) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return t.round_.c.run_id == run_id, t.round_.c.number == number
