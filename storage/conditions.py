"""A filter as a condition on ``version``: every value that was typed is a bound parameter, never text of the statement.

SQLite and PostgreSQL are made to agree: text is ordered by code point, ``LIKE`` minds the case, ``ILIKE`` ignores that
of A to Z and of no other letter. A comparison with a value that a version does not have is false, so ``NOT`` always
turns it true.
"""

import math
import operator
import string
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from pomona.storage import tables as t
from pomona.storage.fields import Column, Few, Kind, Source, find
from pomona.storage.filters import Comparison, Expression, Junction, Negation, Value, refuse

_LARGEST = 2**63 - 1
_LETTERS = (string.ascii_uppercase, string.ascii_lowercase)
_TO_LOWER = str.maketrans(*_LETTERS)
_COMPARE: dict[str, Callable[[Column, Column], sa.ColumnElement[bool]]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_TYPES: dict[Kind, sa.types.TypeEngine[Any]] = {
    "text": sa.Text(),
    "whole": sa.BigInteger(),
    "number": sa.Double(),
    "moment": t.UtcDateTime(),
}
_EXPECTED: dict[Kind, str] = {
    "text": "a string in single quotes",
    "whole": "a whole number",
    "number": "a number",
    "moment": "a moment such as '2026-03-01' or '2026-03-01T12:00:00+01:00', in single quotes",
}


def condition(text: str, expression: Expression, *, dialect: str, few: Few) -> sa.ColumnElement[bool]:
    """Return what a filter says as a condition on ``version``.

    Args:
        text: The filter as it was typed, for errors.
        expression: What it says.
        dialect: ``sqlite`` or ``postgresql``.
        few: Whether the rows of another table that a comparison finds are gathered first; the answer changes no result.

    Raises:
        ConfigError: A field is unknown, or is compared with what it cannot be compared with.
    """
    match expression:
        case Comparison():
            return _comparison(text, expression, dialect=dialect, few=few)
        case Negation(of=inner):
            return sa.not_(condition(text, inner, dialect=dialect, few=few))
        case Junction(kind=kind, of=parts):
            join = sa.and_ if kind == "all" else sa.or_
            return join(*(condition(text, part, dialect=dialect, few=few) for part in parts))


def bound(kind: Kind, value: object) -> Column:
    """Return a value of a kind as a bound parameter."""
    return sa.literal(value, _TYPES[kind])


def sortable(source: Source, *, dialect: str) -> Column:
    """Return the values of a field such that both databases order them alike."""
    if source.kind == "text" and dialect == "postgresql":
        return sa.collate(source.value, "C")
    return source.value


def _comparison(text: str, item: Comparison, *, dialect: str, few: Few) -> sa.ColumnElement[bool]:
    source = find(text, item.field)
    if item.operator in {"LIKE", "ILIKE"}:
        return source.has(_like(text, item, source, dialect=dialect), few=few)
    values = [bound(source.kind, _read(text, value, source.kind)) for value in item.values]
    if item.operator == "IN":
        return source.has(source.value.in_(values), few=few)
    column = source.value if item.operator in {"=", "!="} else sortable(source, dialect=dialect)
    return source.has(_COMPARE[item.operator](column, values[0]), few=few)


def _read(text: str, value: Value, kind: Kind) -> object:
    read: object = None
    match kind, value.is_string:
        case "text", True:
            read = value.text
        case "moment", True:
            read = _moment(value.text)
        case "whole", False:
            read = _whole(value.text)
        case "number", False:
            number = float(value.text)
            read = number if math.isfinite(number) else None
    if read is None:
        came = f"the string {value.text[:30]!r}" if value.is_string else value.text[:30]
        refuse(text, value.position, f"expected {_EXPECTED[kind]}, got {came}")
    return read


def _whole(digits: str) -> int | None:
    if not digits.lstrip("+-").isdigit():
        return None
    number = int(digits)
    return number if -_LARGEST <= number <= _LARGEST else None


def _moment(written: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(written)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _like(text: str, item: Comparison, source: Source, *, dialect: str) -> sa.ColumnElement[bool]:
    (pattern,) = item.values
    if source.kind != "text":
        refuse(text, item.position, f"expected =, !=, <, <=, >, >= or IN for {item.field.name}, got {item.operator}")
    if not pattern.is_string:
        refuse(text, pattern.position, f"expected {_EXPECTED['text']}, got {pattern.text[:30]}")
    pieces = _pieces(text, pattern)
    column: Column = source.value
    if item.operator == "ILIKE":
        pieces = [piece.translate(_TO_LOWER) for piece in pieces]
        upper, lower = (sa.literal(letters, sa.Text) for letters in _LETTERS)
        column = sa.func.lower(column) if dialect == "sqlite" else sa.func.translate(column, upper, lower)
    if dialect == "sqlite":  # its LIKE ignores the case
        return column.op("GLOB", is_comparison=True)(bound("text", "".join(map(_as_glob, pieces))))
    return column.like(bound("text", "".join(pieces)))


def _pieces(text: str, pattern: Value) -> list[str]:
    """Split a pattern: ``%`` and ``_`` are wild, a backslash takes what is special from the character after it."""
    pieces: list[str] = []
    letters = iter(pattern.text)
    for letter in letters:
        following = next(letters, "") if letter == "\\" else None
        if following == "":
            refuse(text, pattern.position, r"expected a character after the last backslash; write \\ for a backslash")
        pieces.append(letter if following is None else f"\\{following}")
    return pieces


def _as_glob(piece: str) -> str:
    letter = piece[-1]
    if piece in {"%", "_"}:
        return "*" if piece == "%" else "?"
    return f"[{letter}]" if letter in "*?[" else letter
