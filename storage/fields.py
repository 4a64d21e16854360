"""What a version can be searched and ordered by: each field's kind, and where its value is kept.

A version may have no value of a field (a metric that was not measured), or several (its aliases).
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from pomona.storage import tables as t
from pomona.storage.filters import Field, refuse

Column = sa.ColumnElement[Any]  # of what type, its kind says
Kind = Literal["text", "whole", "number", "moment"]
Few = Callable[[sa.SelectBase], bool]
"""Whether a query finds so few rows that they are best gathered first."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of another table that belong to a version.

    Attributes:
        table: The table, for one field alone.
        theirs: The column by which they belong to a version.
        ours: The column of ``version`` that it equals.
        only: Which of them are meant.
        parts: Conditions of which each row satisfies one; each has an index of its own.
    """

    table: sa.FromClause
    theirs: Column
    ours: Column
    only: sa.ColumnElement[bool]
    parts: Sequence[sa.ColumnElement[bool]] = ()

    @property
    def belong(self) -> sa.ColumnElement[bool]:
        """Whether a row belongs to a version and is meant."""
        return sa.and_(self.theirs == self.ours, self.only)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the values of a field are.

    Attributes:
        kind: What its values are.
        value: The column that holds them.
        rows: The rows that the column is in; ``None`` where it is a column of ``version``.
        single: Whether a version has at most one value.
    """

    kind: Kind
    value: Column
    rows: Rows | None = None
    single: bool = True

    def has(self, condition: sa.ColumnElement[bool], *, few: Few) -> sa.ColumnElement[bool]:
        """Return whether a version has a value that satisfies a condition: true or false, never unknown.

        Few rows are gathered first, by the index; of many it is asked version by version, until a page is full.
        """
        if self.rows is None:
            return sa.and_(self.value.is_not(None), condition)
        chosen = sa.select(self.rows.theirs).where(self.rows.only, condition)
        found = sa.union_all(*map(chosen.where, self.rows.parts)) if self.rows.parts else chosen
        if few(found):
            return self.rows.ours.in_(found)
        return sa.exists().where(self.rows.belong, condition).correlate(t.version)


_KINDS: dict[str, Kind] = {
    "name": "text",
    "version": "whole",
    "rank": "whole",
    "kind": "text",
    "exactness": "text",
    "retained_energy": "number",
    "run_id": "text",
    "round": "whole",
    "bytes": "whole",
    "sha256": "text",
    "base_model": "text",
    "base_sha256": "text",
    "created_at": "moment",
    "alias": "text",
}
_KEYED: dict[str, Kind] = {"metrics": "number", "tags": "text"}
_COLUMNS = {"name": "adapter_name", "sha256": "blob_sha256"}

FIELDS: Mapping[str, Kind] = {**_KINDS, **{f"{name}.KEY": kind for name, kind in _KEYED.items()}}


def find(text: str, field: Field, *, what: str = "filter") -> Source:
    """Return where the values of a field are; every call has tables of its own.

    Raises:
        ConfigError: There is no such field, or it lacks its key, or has one too many.
    """
    if field.name in _KEYED:
        if field.key is None:
            refuse(text, field.position, f"expected {field.name}.KEY, got {field.name!r} alone", what=what)
        return _keyed(field.name, field.key)
    if field.name not in _KINDS:
        refuse(text, field.position, f"expected a field, got {field.name!r}; {_hint(field.name)}", what=what)
    if field.key is not None:
        refuse(text, field.position, f"expected {field.name!r} alone, got it with a key after a dot", what=what)
    return _plain(field.name)


def _keyed(name: str, key: str) -> Source:
    table = (t.metric if name == "metrics" else t.tag).alias()
    only = table.c.key == sa.literal(key, sa.Text)
    parts: list[sa.ColumnElement[bool]] = []
    if name == "tags":  # in the words of the two partial indexes, or neither would be used
        length: Column = sa.func.length(table.c.value)
        limit: Column = sa.literal_column(str(t.SHORT_TAG_LENGTH))
        parts = [length <= limit, length > limit]
    return Source(_KEYED[name], table.c.value, Rows(table, table.c.version_id, t.version.c.id, only, parts))


def _plain(name: str) -> Source:
    if name == "alias":
        aliases = t.alias.alias()
        return Source(
            "text", aliases.c.alias, Rows(aliases, aliases.c.version_id, t.version.c.id, sa.true()), single=False
        )
    if name == "base_model":
        models = t.base_model.alias()
        return Source("text", models.c.name, Rows(models, models.c.sha256, t.version.c.base_sha256, sa.true()))
    return Source(_KINDS[name], t.version.c[_COLUMNS.get(name, name)])


def _hint(name: str) -> str:
    if close := difflib.get_close_matches(name, [*_KINDS, *_KEYED], n=2):
        return f"did you mean {' or '.join(close)}?"
    return f"there are {', '.join(FIELDS)}"
