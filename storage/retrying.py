"""Doing a transaction again that came to nothing through no fault of its own."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import IntegrityError

from pomona.errors import RegistryError, RegistryUnavailable, VersionConflict
from pomona.storage.engine import is_taken, lost_contest

_log = logging.getLogger(__name__)

_ATTEMPTS = 20
_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 2.0
RUN_PATIENCE_S = 120.0  # of those that make a run or follow it

Result = TypeVar("Result")


def until_done(attempt: Callable[[], Result], *, patience_s: float) -> Result:
    """Return what a transaction returns, however often it takes.

    Where another writer was first (its row is there, a serialisation failure, a deadlock) it is done again at once.
    Where the database is away for a while (it restarts, the connection broke, somebody holds a lock) it is done again
    until the patience is at its end, after waits of 0.05 s that double up to 2 s.

    Args:
        attempt: The transaction. The connection can break between its commit and the word of it: it has to find out by
            itself whether it was done.
        patience_s: How long the database may be away.

    Raises:
        VersionConflict: Another writer was first, 20 times.
        RegistryError: A constraint of the tables is broken, which no other attempt would mend.
        RegistryUnavailable: The database stays away, or cannot be used for a reason that does not pass by itself.
    """
    attempts, wait_s, deadline = 1, _FIRST_WAIT_S, time.monotonic() + patience_s
    while True:
        try:
            return attempt()
        except IntegrityError as error:
            if not is_taken(error):
                why = " ".join(str(error.orig).split())
                raise RegistryError(f"the registry's database refuses this: {why}; nothing was written") from error
            if attempts == _ATTEMPTS:
                raise VersionConflict(f"another writer was first, {_ATTEMPTS} times: {error.orig}") from error
        except RegistryUnavailable as error:
            if lost_contest(error.__cause__):
                if attempts == _ATTEMPTS:
                    raise
            elif not error.passing or time.monotonic() + wait_s > deadline:
                raise
            else:
                if wait_s == _FIRST_WAIT_S:
                    _log.warning("%s; trying again for %.0f s", error, patience_s)
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
                continue
        attempts += 1
