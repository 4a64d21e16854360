"""Places where a test can kill the process, to see that nothing is lost there. Nothing happens unless one is named.

``POMONA_FAILPOINT=NAME`` kills at the first time that place is reached, ``NAME:3`` at the third.
"""

import os
import signal
from typing import Literal

VARIABLE = "POMONA_FAILPOINT"

Place = Literal[
    "round-opened",
    "submission-received",
    "blob-written",
    "blob-synced",
    "blob-renamed",
    "submission-blob-written",
    "submission-inserted",
    "submission-recorded",
    "round-closing",
    "round-frozen",
    "round-aggregated",
    "version-blob-written",
    "version-inserted",
    "version-published",
]

_reached: dict[str, int] = {}


def reach(place: Place) -> None:
    """Kill this process, with no chance to clean up, if the place and the number of times are the ones named."""
    if wanted := os.environ.get(VARIABLE):
        name, _, times = wanted.partition(":")
        _reached[place] = _reached.get(place, 0) + 1
        if name == place and _reached[place] == int(times or 1):
            os.kill(os.getpid(), signal.SIGKILL)
