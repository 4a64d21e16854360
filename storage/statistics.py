"""Counts over the whole registry, for monitoring: totals only, nothing of a single client."""

from collections.abc import Mapping

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict

from pomona.storage import tables as t
from pomona.storage.records import RoundState, RunState, SubmissionStatus


class OpenRound(BaseModel):
    """A round that is being trained.

    Attributes:
        run_id: Of its run.
        adapter: The name that the run publishes under.
        number: Of the round, from 1.
        cohort_size: How many were asked.
        accepted: How many accepted updates there are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    adapter: str
    number: int
    cohort_size: int
    accepted: int


class Statistics(BaseModel):
    """Totals of a registry at one moment.

    Attributes:
        adapters: How many names there are.
        versions: How many versions there are.
        runs: How many runs are in each state.
        rounds: How many rounds are in each state.
        submissions: How many updates have each status.
        bytes_down: Payload bytes that committed rounds sent to clients.
        bytes_up: Payload bytes that committed rounds got from clients.
        round_seconds: Of all committed rounds together.
        open_rounds: Those of running runs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapters: int
    versions: int
    runs: Mapping[RunState, int]
    rounds: Mapping[RoundState, int]
    submissions: Mapping[SubmissionStatus, int]
    bytes_down: int
    bytes_up: int
    round_seconds: float
    open_rounds: tuple[OpenRound, ...]


def statistics(connection: sa.Connection) -> Statistics:
    """Count everything once."""
    r = t.round_.c
    sums = [sa.func.coalesce(sa.func.sum(column), 0) for column in (r.bytes_down, r.bytes_up, r.seconds)]
    bytes_down, bytes_up, seconds = list(connection.execute(sa.select(*sums).where(r.state == "committed")).one())
    return Statistics.model_validate(
        {
            "adapters": _count(connection, t.adapter),
            "versions": _count(connection, t.version),
            "runs": _by(connection, t.run.c.state),
            "rounds": _by(connection, r.state),
            "submissions": _by(connection, t.submission.c.status),
            "bytes_down": int(bytes_down),
            "bytes_up": int(bytes_up),
            "round_seconds": float(seconds),
            "open_rounds": _open_rounds(connection),
        }
    )


def _count(connection: sa.Connection, table: sa.Table) -> int:
    return connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0


def _by(connection: sa.Connection, column: sa.Column[str]) -> dict[str, int]:
    rows = connection.execute(sa.select(column, sa.func.count()).group_by(column))
    return {str(state): int(count) for state, count in rows}


def _open_rounds(connection: sa.Connection) -> tuple[OpenRound, ...]:
    r, s = t.round_.c, t.submission.c
    accepted = (
        sa.select(sa.func.count())
        .where(s.run_id == r.run_id, s.round == r.number, s.status == "accepted")
        .scalar_subquery()
    )
    query = (
        sa.select(r.run_id, t.run.c.adapter_name.label("adapter"), r.number, r.cohort_size, accepted.label("accepted"))
        .join(t.run, t.run.c.id == r.run_id)
        .where(r.state == "open", t.run.c.state == "running")
        .order_by(r.run_id, r.number)
    )
    return tuple(OpenRound(**row._mapping) for row in connection.execute(query))
