"""Places where a test can kill the process, to see that nothing is lost there. Nothing happens unless one is named.

``POMONA_FAILPOINT=NAME`` kills at the first time that place is reached, ``NAME:3`` at the third.
"""

import os
import signal
import threading
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
    "task-trained",
    "task-learned",
    "classes-forgotten",
    "release-reserved",
    "release-summed",
    "release-written",
    "release-settled",
]

_reached: dict[str, int] = {}
_counting = threading.Lock()  # blobs are written by several threads


def reach(place: Place) -> None:
    """Kill this process, with no chance to clean up, if the place and the number of times are the ones named."""
    if wanted := os.environ.get(VARIABLE):
        name, _, times = wanted.partition(":")
        with _counting:
            _reached[place] = _reached.get(place, 0) + 1
            times_now = _reached[place]
        if name == place and times_now == int(times or 1):
            os.kill(os.getpid(), signal.SIGKILL)
