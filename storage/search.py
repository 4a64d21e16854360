"""Search over all versions: a filter, an order, and pages that stay in step while others publish."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from pomona.errors import ConfigError
from pomona.storage import tables as t
from pomona.storage import versions
from pomona.storage.conditions import bound, condition, sortable
from pomona.storage.fields import Column, Few, Kind, Source, find
from pomona.storage.filters import Ranking, parse_filter, parse_order, refuse
from pomona.storage.pages import read_token, write_token
from pomona.storage.records import SearchPage

MAX_LIMIT = 1000

_FEW = 20_000


@dataclass(frozen=True, slots=True)
class Key:
    """One of the things that versions are ordered by; those that do not have it come last, either way."""

    kind: Kind
    column: Column
    descending: bool
    optional: bool


def search(connection: sa.Connection, text: str, *, order_by: str, limit: int, page_token: str | None) -> SearchPage:
    """Return the versions that satisfy a filter, in an order, beginning where a page ended.

    Raises:
        ConfigError: The filter, the order, the limit or the token cannot be used.
    """
    if not 0 < limit <= MAX_LIMIT:
        raise ConfigError(f"expected a limit of 1 to {MAX_LIMIT} versions, got {limit}")
    asked, few = (text, order_by), _counted_on(connection)
    _, keys = statement(text, order_by=order_by, dialect=connection.dialect.name)
    after = read_token(page_token, asked, [key.kind for key in keys]) if page_token is not None else None
    found: Sequence[sa.Row[Any]] = []
    # those that have what they are ordered by come first, and an index finds them; mostly they fill the page
    for measured in (True, False) if keys[0].optional and (after is None or after[0] is not None) else (False,):
        query, keys = statement(text, order_by=order_by, dialect=connection.dialect.name, measured=measured, few=few)
        if after is not None:
            query = query.where(_after(keys, after))
        found = connection.execute(query.limit(limit + 1)).all()
        if len(found) > limit:
            break
    ids = [row[-1] for row in found[:limit]]
    by_id = {item.id: item for item in versions.load(connection, t.version.c.id.in_(ids))} if ids else {}
    more = write_token(asked, list(found[limit - 1])) if len(found) > limit else None
    return SearchPage(versions=[by_id[key] for key in ids], next_page_token=more)


def statement(
    text: str, *, order_by: str, dialect: str, measured: bool = False, few: Few = lambda _: True
) -> tuple[sa.Select[Any], list[Key]]:
    """Return what finds all versions that satisfy a filter, and what it orders them by.

    Its rows are the values of the keys. The last key is the version's id, newest first, so that no two rows are alike.
    With ``measured`` those are left out that do not have the first thing that they are ordered by.

    Raises:
        ConfigError: The filter or the order cannot be used.
    """
    expression = parse_filter(text)
    origin: sa.FromClause = t.version
    keys: list[Key] = []
    for ranking in parse_order(order_by):
        source = _source(order_by, ranking)
        certain = measured and not keys
        if source.rows is not None:
            origin = origin.join(source.rows.table, source.rows.belong, isouter=not certain)
        keys.append(_key(source, ranking, dialect=dialect, certain=certain))
    keys.append(Key("whole", t.version.c.id, descending=True, optional=False))
    columns = [key.column.label(f"key_{place}") for place, key in enumerate(keys)]
    query = sa.select(*columns).select_from(origin).order_by(*map(_direction, keys))
    if measured:
        query = query.where(keys[0].column.is_not(None))
    if expression is not None:
        query = query.where(condition(text, expression, dialect=dialect, few=few))
    return query, keys


def _counted_on(connection: sa.Connection) -> Few:
    """Return what counts rows, as far as it matters; PostgreSQL knows its tables well enough to choose by itself."""

    def is_few(query: sa.SelectBase) -> bool:
        some = query.subquery().select().limit(_FEW + 1).subquery()
        return (connection.scalar(sa.select(sa.func.count()).select_from(some)) or 0) <= _FEW

    return is_few if connection.dialect.name == "sqlite" else lambda _: True


def _source(text: str, ranking: Ranking) -> Source:
    source = find(text, ranking.field, what="order")
    if not source.single:
        problem = f"expected a field that a version has once, got {ranking.field.name!r}"
        refuse(text, ranking.field.position, problem, what="order")
    return source


def _key(source: Source, ranking: Ranking, *, dialect: str, certain: bool) -> Key:
    optional = not certain and (source.rows is not None or bool(source.value.nullable))
    return Key(source.kind, sortable(source, dialect=dialect), ranking.descending, optional)


def _direction(key: Key) -> Column:
    column = key.column.desc() if key.descending else key.column.asc()
    return column.nulls_last() if key.optional else column


def _after(keys: Sequence[Key], values: Sequence[object]) -> sa.ColumnElement[bool]:
    """Return whether a version comes after these values: beyond one of them, and equal in those before it."""
    same: list[sa.ColumnElement[bool]] = []
    ways: list[sa.ColumnElement[bool]] = []
    for key, value in zip(keys, values, strict=True):
        if value is None:
            same.append(key.column.is_(None))
            continue
        here = bound(key.kind, value)
        beyond = key.column < here if key.descending else key.column > here
        if key.optional:
            beyond = sa.or_(beyond, key.column.is_(None))
        ways.append(sa.and_(*same, beyond))
        same.append(key.column == here)
    first, value = keys[0], values[0]
    if value is None or first.optional:
        return sa.or_(*ways)
    here = bound(first.kind, value)  # says nothing new, but where in an index the page begins
    return sa.and_(first.column <= here if first.descending else first.column >= here, sa.or_(*ways))
