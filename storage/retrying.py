"""Doing a transaction again that came to nothing through no fault of its own."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import IntegrityError

from pomona.errors import RegistryUnavailable, VersionConflict
from pomona.storage.engine import lost_contest

_log = logging.getLogger(__name__)

_ATTEMPTS = 20
_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 2.0
RUN_PATIENCE_S = 120.0  # of those that make a run or follow it

Result = TypeVar("Result")


def until_done(attempt: Callable[[bool], Result], *, patience_s: float) -> Result:
    """Return what a transaction returns, however often it takes.

    Where another writer was first (a broken constraint, a serialisation failure, a deadlock) it is done again at once.
    Where the database is away for a while (it restarts, the connection broke, somebody holds a lock) it is done again
    until the patience is at its end, after waits of 0.05 s that double up to 2 s.

    Args:
        attempt: The transaction. Its argument says whether the one before it may have been committed all the same: the
            connection can break between the commit and the word of it.
        patience_s: How long the database may be away.

    Raises:
        VersionConflict: Another writer was first, 20 times.
        RegistryUnavailable: The database stays away, or cannot be used for a reason that does not pass by itself.
    """
    attempts, wait_s, unsure, deadline = 1, _FIRST_WAIT_S, False, time.monotonic() + patience_s
    while True:
        try:
            return attempt(unsure)
        except IntegrityError as error:
            if attempts == _ATTEMPTS:
                raise VersionConflict(f"another writer was first, {_ATTEMPTS} times: {error.orig}") from error
        except RegistryUnavailable as error:
            if lost_contest(error.__cause__):
                if attempts == _ATTEMPTS:
                    raise
            elif not error.passing or time.monotonic() + wait_s > deadline:
                raise
            else:
                if not unsure:
                    _log.warning("%s; trying again for %.0f s", error, patience_s)
                time.sleep(wait_s)
                wait_s, unsure = min(2 * wait_s, _LONGEST_WAIT_S), True
                continue
        attempts += 1
