"""Runs, their clients, rounds and submissions: functions of a connection that return records."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import sqlalchemy as sa

from pomona.errors import AdapterNotFound, BaseModelError, ConfigError, VersionConflict
from pomona.storage import tables as t
from pomona.storage import versions
from pomona.storage.records import Client, NewSubmission, Round, Run, RunState, Submission, SubmissionStatus
from pomona.storage.values import count, json_value, metrics, read_metrics, real, text

_NAME_LENGTH = 200
_NONCE_LENGTH = 64
REASON_LENGTH = 2000


def start_run(connection: sa.Connection, *, run_id: str, adapter: str, base_sha256: str, settings_json: str) -> Run:
    """Begin a run, or take up again one of the same id, adapter, base model and settings.

    Raises:
        BaseModelError: The base model was not added.
        VersionConflict: Another run has that id.
    """
    facts = {"adapter_name": adapter, "base_sha256": base_sha256, "settings": settings_json}
    existing = connection.execute(sa.select(t.run).filter_by(id=run_id)).mappings().one_or_none()
    if existing is not None:
        if different := [name for name, value in facts.items() if existing[name] != value]:
            raise VersionConflict(
                f"run {run_id} exists with other {', '.join(different)}; resume it as it was, or choose another id"
            )
        resumed = {"state": "running", "reason": "", "finished_at": None}
        connection.execute(sa.update(t.run).where(t.run.c.id == run_id).values(**resumed))
        return run(connection, run_id)
    if connection.scalar(sa.select(t.base_model.c.sha256).filter_by(sha256=base_sha256)) is None:
        raise BaseModelError(f"base model {base_sha256[:12]} is not in the registry; add it before the run")
    now = datetime.now(UTC)
    add_adapter(connection, adapter)
    connection.execute(
        sa.insert(t.run).values(id=run_id, state="running", reason="", started_at=now, initial_metrics={}, **facts)
    )
    return run(connection, run_id)


def add_base_model(connection: sa.Connection, sha256: str, *, name: str, source: str) -> None:
    """Make a base model known; one that is known keeps its first name."""
    if connection.scalar(sa.select(t.base_model.c.sha256).filter_by(sha256=sha256)) is None:
        facts = {"sha256": sha256, "name": name, "source": source, "added_at": datetime.now(UTC)}
        connection.execute(sa.insert(t.base_model).values(**facts))


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
    """Record how a run ended."""
    run(connection, run_id)
    ended = {"state": state, "reason": text(reason, limit=REASON_LENGTH), "finished_at": datetime.now(UTC)}
    connection.execute(sa.update(t.run).where(t.run.c.id == run_id).values(**ended))
    return run(connection, run_id)


def set_initial_metrics(connection: sa.Connection, run_id: str, values: Mapping[str, float]) -> None:
    """Record the scores before the first round."""
    run(connection, run_id)
    connection.execute(sa.update(t.run).where(t.run.c.id == run_id).values(initial_metrics=metrics(values)))


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
    if not connection.execute(sa.update(t.client).where(*known).values(**facts)).rowcount:
        connection.execute(sa.insert(t.client).values(run_id=run_id, name=name, **facts))
    return next(client for client in clients(connection, run_id) if client.name == name)


def clients(connection: sa.Connection, run_id: str) -> list[Client]:
    """Return the clients of a run, by name."""
    query = sa.select(t.client).filter_by(run_id=run_id).order_by("name")
    return [Client(**row) for row in connection.execute(query).mappings()]


def open_round(
    connection: sa.Connection, run_id: str, number: int, *, parent: str | None, cohort: Sequence[str]
) -> Round:
    """Open a round, open a failed one again, or return the one that is open already, with its own cohort.

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
    elif row.state == "committed" or (row.state == "open" and row.parent_id != parent_id):
        raise VersionConflict(f"round {number} of run {run_id} is {row.state} already, on its own parent")
    elif row.state == "failed":
        connection.execute(sa.update(t.round_).where(*_is_round(run_id, number)).values(**state))
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
        raise VersionConflict(f"round {number} of run {run_id} is {row.state} already; it was closed before")
    values_at = {**values, "closed_at": datetime.now(UTC)}
    connection.execute(sa.update(t.round_).where(*_is_round(run_id, number)).values(**values_at))
    return row


def fail_round(connection: sa.Connection, run_id: str, number: int, reason: str) -> Round:
    """Close an open round without a version."""
    close_round(connection, run_id, number, state="failed", reason=text(reason, limit=REASON_LENGTH))
    return rounds(connection, run_id, number)[0]


def lock_round(connection: sa.Connection, run_id: str, number: int) -> sa.Row[tuple[object, ...]]:
    """Return the row of a round and keep others from changing it until the transaction ends.

    Raises:
        AdapterNotFound: There is no such round.
    """
    row = connection.execute(_select_round(run_id, number).with_for_update()).one_or_none()
    if row is None:
        raise AdapterNotFound(f"run {run_id!r} has no round {number}; open it first")
    return row


def rounds(connection: sa.Connection, run_id: str, number: int | None = None) -> list[Round]:
    """Return the rounds of a run, or one of them, with what they published."""
    query = (
        sa.select(t.round_, _ref().label("parent"))
        .outerjoin(t.version, t.version.c.id == t.round_.c.parent_id)
        .where(t.round_.c.run_id == run_id)
        .order_by(t.round_.c.number)
    )
    if number is not None:
        query = query.where(t.round_.c.number == number)
    published = {item.round_number: item for item in versions.load(connection, t.version.c.run_id == run_id)}
    counts = _count_submissions(connection, run_id)
    return [
        Round(
            run_id=row.run_id,
            number=row.number,
            state=row.state,
            reason=row.reason,
            parent=row.parent,
            cohort=tuple(row.cohort),
            opened_at=row.opened_at,
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


def receipt(connection: sa.Connection, new: NewSubmission, sha256: str) -> Submission | None:
    """Return the row of this very update, recorded before."""
    same = (
        t.submission.c.client == text(new.client, limit=_NAME_LENGTH),
        t.submission.c.nonce == text(new.nonce, limit=_NONCE_LENGTH),
        t.submission.c.sha256 == sha256,
    )
    return next(iter(submissions(connection, new.run_id, new.round_number, *same)), None)


def insert_submission(connection: sa.Connection, new: NewSubmission, sha256: str) -> Submission:
    """Write the row of an update, or return the one it has.

    Raises:
        AdapterNotFound: There is no such round.
        VersionConflict: It is accepted, but the round is closed, the client has another accepted update in
            it, or the nonce was used before.
    """
    row = lock_round(connection, new.run_id, new.round_number)
    if known := receipt(connection, new, sha256):
        return known
    if new.status == "accepted":
        _require_room(connection, new, state=row.state)
    values = {
        "run_id": new.run_id,
        "round": new.round_number,
        "client": text(new.client, limit=_NAME_LENGTH),
        "rank": count(new.rank),
        "alpha": real(new.alpha),
        "num_examples": count(new.num_examples),
        "sha256": sha256,
        "bytes": len(new.payload),
        "nonce": text(new.nonce, limit=_NONCE_LENGTH),
        "status": new.status,
        "reason": text(new.reason, limit=REASON_LENGTH),
        "received_at": datetime.now(UTC),
        "train_loss": real(new.train_loss),
        "spectrum": json_value(new.spectrum) if new.spectrum else None,
    }
    statement = sa.insert(t.submission).values(**values).returning(t.submission.c.id)
    key = connection.execute(statement).scalar_one()
    return submissions(connection, new.run_id, None, t.submission.c.id == key)[0]


def submissions(
    connection: sa.Connection, run_id: str, number: int | None, *where: sa.ColumnElement[bool]
) -> list[Submission]:
    """Return the submissions of a run, or of one round, in the order they came."""
    chosen = (t.submission.c.run_id == run_id, *where)
    if number is not None:
        chosen = (t.submission.c.round == number, *chosen)
    query = (
        sa.select(t.submission, _ref().label("version")).outerjoin(t.version).where(*chosen).order_by(t.submission.c.id)
    )
    return [_submission(row) for row in connection.execute(query)]


def _submission(row: sa.Row[tuple[object, ...]]) -> Submission:
    return Submission(
        id=row.id,
        run_id=row.run_id,
        round_number=row.round,
        client=row.client,
        rank=row.rank,
        alpha=row.alpha,
        num_examples=row.num_examples,
        sha256=row.sha256,
        bytes=row.bytes,
        nonce=row.nonce,
        status=row.status,
        reason=row.reason,
        weight=row.weight,
        received_at=row.received_at,
        train_loss=row.train_loss,
        version=row.version,
        spectrum=row.spectrum or {},
    )


def _require_room(connection: sa.Connection, new: NewSubmission, *, state: str) -> None:
    where = f"round {new.round_number} of run {new.run_id}"
    if state != "open":
        raise VersionConflict(f"{where} is {state}; the update of {new.client!r} can only be recorded as late")
    accepted = sa.select(t.submission.c.client).filter_by(run_id=new.run_id, status="accepted")
    client = text(new.client, limit=_NAME_LENGTH)
    if connection.execute(accepted.filter_by(round=new.round_number, client=client)).first():
        raise VersionConflict(f"{where} has another accepted update of {new.client!r}; the first one counts")
    if connection.execute(accepted.filter_by(nonce=text(new.nonce, limit=_NONCE_LENGTH))).first():
        raise VersionConflict(f"the nonce of {new.client!r} in {where} was used before; send a new one")


def _count_submissions(connection: sa.Connection, run_id: str) -> dict[tuple[int, SubmissionStatus], int]:
    columns = (t.submission.c.round, t.submission.c.status)
    query = sa.select(*columns, sa.func.count()).where(t.submission.c.run_id == run_id).group_by(*columns)
    return {(number, status): amount for number, status, amount in connection.execute(query)}


def _select_round(run_id: str, number: int) -> sa.Select[tuple[object, ...]]:
    return sa.select(t.round_).where(*_is_round(run_id, number))


def _is_round(run_id: str, number: int) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return t.round_.c.run_id == run_id, t.round_.c.number == number


def _ref() -> sa.ColumnElement[str]:
    return t.version.c.adapter_name + "/" + sa.cast(t.version.c.version, sa.String(20))
