"""Taking replies from Flower one by one.

Flower's ``pull_messages`` hands over all replies at once, and nothing at all when one of them cannot be read: a client
that sends bytes which are no Flower message would take the updates of the others with it. Pulled alone, it harms only
itself, and the updates of a large cohort never lie in memory together.
"""

import time
from collections.abc import Callable, Iterator, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from pomona.errors import PayloadError

_POLL_S = 0.3
_IDLE_S = 3.0

Reply = Message | PayloadError


def pull(grid: Grid, message_id: str) -> Reply | None:
    """Return the reply to one message, why it cannot be read, or None while there is none."""
    try:
        return next(iter(grid.pull_messages([message_id])), None)
    except Exception as error:  # what Flower raises depends on the bytes that a client made up
        return PayloadError(f"its reply cannot be read: {type(error).__name__}: {error}"[:500])


def collect(
    grid: Grid,
    messages: Sequence[Message],
    *,
    deadline_s: float,
    idle: Callable[[], None],
) -> Iterator[tuple[int, Reply]]:
    """Send messages and yield each reply when it lands, with the position of the message it answers.

    Ends when all have been answered or the deadline has passed; ``idle`` is called now and then meanwhile. A reply that
    Flower makes itself for a lost node does not name that node, so replies are matched by message.
    """
    waiting = {
        message_id: position
        for position, message_id in enumerate(grid.push_messages(messages) if messages else [])
        if message_id
    }
    deadline = time.monotonic() + deadline_s
    next_idle = time.monotonic() + _IDLE_S
    while waiting:
        for message_id, position in list(waiting.items()):
            if (reply := pull(grid, message_id)) is not None:
                del waiting[message_id]
                yield position, reply
        if time.monotonic() > deadline:
            return
        if time.monotonic() > next_idle:
            idle()
            next_idle = time.monotonic() + _IDLE_S
        if waiting:
            time.sleep(_POLL_S)
