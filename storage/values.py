"""What others state, made fit to be stored: finite numbers, text any database takes, JSON without NaN."""

import math
import re
from collections.abc import Mapping, Sequence

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_LARGEST = 2**63 - 1


def count(value: object) -> int | None:
    """Return a number of things that fits 64 bits, ``None`` for anything else.

    Example:
        >>> count(3), count(-1), count(2**63), count("3"), count(True)
        (3, None, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value <= _LARGEST else None


def real(value: object) -> float | None:
    """Return a finite number, ``None`` for anything else.

    Example:
        >>> real(1), real(float("nan")), real(10**400), real("1")
        (1.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def text(value: object, *, limit: int) -> str:
    """Return at most ``limit`` characters, without those that a database refuses."""
    return _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", str(value)[:limit])


def is_storable(value: str) -> bool:
    """Return whether every database takes this text as it is: no NUL, no half of a surrogate pair."""
    return _UNSTORABLE.search(value) is None


def json_value(value: object) -> object:
    """Return ``value`` as JSON can hold it: NaN and infinities become ``None``, tuples lists."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return real(value)
        case str():
            return text(value, limit=len(value))
        case Mapping():
            return {text(key, limit=200): json_value(item) for key, item in value.items()}
        case Sequence():
            return [json_value(item) for item in value]
        case _:
            return text(value, limit=1000)


def metrics(values: Mapping[str, float]) -> dict[str, float | None]:
    """Return metrics as they are stored, ``None`` for one that is not finite."""
    return {text(key, limit=100): real(value) for key, value in values.items()}


def read_metrics(stored: Mapping[str, float | None]) -> dict[str, float]:
    """Return metrics as they are read, NaN for one that was not finite."""
    return {key: math.nan if value is None else value for key, value in stored.items()}
