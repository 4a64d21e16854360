"""Page tokens: where a page ended, so that the next one begins after it, whatever was published in between.

A token is JSON in base64, opaque to whoever sends it back. It holds the values by which the last version of the page
was ordered, and a digest of the search, because it means nothing to another one. All that it holds is checked, and
reaches the database as bound parameters only: a forged one can name another place in the same order, and no more.
"""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime

from pomona.errors import ConfigError
from pomona.storage.fields import Kind
from pomona.storage.values import is_storable

_MAX_LENGTH = 100_000
_LARGEST = 2**63 - 1


def write_token(search: Sequence[str], values: Sequence[object]) -> str:
    """Return the token of the page that begins after these values.

    Args:
        search: The texts that say what is searched and in which order.
        values: One per kind of :func:`read_token`, ``None`` for what the version does not have; the last is its id.
    """
    held = [value.isoformat() if isinstance(value, datetime) else value for value in values]
    text = json.dumps({"search": _digest(search), "after": held}, separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def read_token(token: str, search: Sequence[str], kinds: Sequence[Kind]) -> list[object]:
    """Return the values after which the page begins.

    Raises:
        ConfigError: It is no token, or one of another search.
    """
    held = _decoded(token)
    if not isinstance(held, dict) or held.keys() != {"search", "after"}:
        raise _malformed()
    if held["search"] != _digest(search):
        raise ConfigError(
            "the page token belongs to another search; repeat the filter and the order that it came with, "
            "or begin without a token"
        )
    values = held["after"]
    if not isinstance(values, list) or len(values) != len(kinds) or values[-1] is None:
        raise _malformed()
    return [None if value is None else _value(value, kind) for value, kind in zip(values, kinds, strict=True)]


def _decoded(token: str) -> object:
    if len(token) > _MAX_LENGTH:
        raise _malformed()
    try:
        padded = token + "=" * (-len(token) % 4)
        decoded: object = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (ValueError, RecursionError) as error:
        raise _malformed() from error
    return decoded


def _value(value: object, kind: Kind) -> object:
    match kind, value:
        case "whole", int() if not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST:
            return value
        case "number", int() | float() if not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST:
            return float(value)
        case "number", float() if math.isfinite(value):
            return value
        case "text", str() if is_storable(value):
            return value
        case "moment", str():
            return _moment(value)
    raise _malformed()


def _moment(written: str) -> datetime:
    try:
        return datetime.fromisoformat(written).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise _malformed() from error


def _digest(search: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(search).encode()).hexdigest()[:16]


def _malformed() -> ConfigError:
    return ConfigError("expected a page token as the page before it ended with, got something else")
