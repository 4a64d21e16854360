"""How an alias moved, and how metrics went, from version to version."""

import difflib
import math

import sqlalchemy as sa

from pomona.errors import AdapterNotFound, ConfigError
from pomona.storage import tables as t
from pomona.storage import versions
from pomona.storage.records import AliasMove, MetricHistory, MetricPoint
from pomona.storage.values import is_storable


def of_alias(connection: sa.Connection, name: str, alias: str) -> list[AliasMove]:
    """Return every move of an alias, oldest first; the one that removed it too.

    Raises:
        AdapterNotFound: There is no such adapter, or never was such an alias.
    """
    versions.require_adapter(connection, name)
    query = (
        sa.select(t.alias_history.c.moved_at, t.version.c.version)
        .outerjoin(t.version)
        .where(t.alias_history.c.adapter_name == name, t.alias_history.c.alias == alias)
        .order_by(t.alias_history.c.id)
    )
    rows = connection.execute(query).all() if is_storable(alias) else []
    if not rows:
        raise AdapterNotFound(
            f"there never was an alias {name}@{alias}; `pomona registry versions {name}` shows aliases"
        )
    before = [None, *(row.version for row in rows)]
    return [
        AliasMove(adapter=name, alias=alias, version=row.version, previous=previous, moved_at=row.moved_at)
        for row, previous in zip(rows, before, strict=False)
    ]


def of_metrics(connection: sa.Connection, name: str, metric: str | None) -> list[MetricHistory]:
    """Return how the metrics of an adapter went over its versions, or how one of them did, by name.

    Raises:
        AdapterNotFound: There is no such adapter.
        ConfigError: No version of it has that metric.
    """
    versions.require_adapter(connection, name)
    query = (
        sa.select(t.metric.c.key, t.metric.c.value, t.version.c.version, t.version.c.created_at)
        .join(t.version)
        .where(t.version.c.adapter_name == name)
        .order_by(t.version.c.version)
    )
    points: dict[str, list[MetricPoint]] = {}
    for row in connection.execute(query):
        value = math.nan if row.value is None else row.value
        point = MetricPoint(version=row.version, created_at=row.created_at, value=value)
        points.setdefault(row.key, []).append(point)
    if metric is not None and metric not in points:
        raise ConfigError(f"expected a metric of {name}, got {metric!r}; {_hint(metric, sorted(points))}")
    return [MetricHistory(metric=key, points=points[key]) for key in sorted(points) if metric in {None, key}]


def _hint(metric: str, known: list[str]) -> str:
    if close := difflib.get_close_matches(metric, known, n=3):
        return f"did you mean {' or '.join(close)}?"
    return f"there are {versions.some(known)}" if known else "its versions have none"
