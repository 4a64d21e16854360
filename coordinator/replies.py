"""Taking replies from Flower one by one.

Flower's ``pull_messages`` hands over all replies at once, and nothing at all when one of them cannot be read: a client
that sends bytes which are no Flower message would take the updates of the others with it. Pulled alone, it harms only
itself, and the updates of a large cohort never lie in memory together.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from pomona.errors import PayloadError, ServerGone

_POLL_S = 0.3
_IDLE_S = 3.0
_PULL_S = 2.0

Reply = Message | PayloadError


def server_gone(error: httpx.TransportError) -> ServerGone:
    """Return the error of a run whose server cannot be reached."""
    return ServerGone(
        f"the server cannot be reached ({type(error).__name__}: {error}); the run goes on when it is started again"[
            :500
        ]
    )


@dataclass(slots=True)
class Puller:
    """Pulls replies, each in a thread of its own, so that one that never comes whole holds up nobody.

    Where a client dies in the middle of its reply, Flower waits up to two hours for the rest of it.
    """

    grid: Grid
    _stuck: dict[str, tuple[threading.Thread, list[Reply | ServerGone]]] = field(default_factory=dict)

    def pull(self, message_id: str) -> Reply | None:
        """Return the reply to one message, why it cannot be read, or None while there is none.

        Raises:
            ServerGone: Flower's server cannot be reached; whether there is a reply is not known.
        """
        if message_id not in self._stuck:
            found: list[Reply | ServerGone] = []
            thread = threading.Thread(target=self._pull, args=(message_id, found), daemon=True)
            thread.start()
            thread.join(_PULL_S)
            self._stuck[message_id] = thread, found
        thread, found = self._stuck[message_id]
        if thread.is_alive():
            return None
        del self._stuck[message_id]
        reply = found[0] if found else None
        if isinstance(reply, ServerGone):
            raise reply
        return reply

    def _pull(self, message_id: str, found: list[Reply | ServerGone]) -> None:
        try:
            found.extend(self.grid.pull_messages([message_id]))
        except httpx.TransportError as error:
            found.append(server_gone(error))
        except Exception as error:  # what Flower raises depends on the bytes that a client made up
            found.append(PayloadError(f"its reply cannot be read: {type(error).__name__}: {error}"[:500]))


def collect(
    puller: Puller,
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
        for position, message_id in enumerate(puller.grid.push_messages(messages) if messages else [])
        if message_id
    }
    deadline = time.monotonic() + deadline_s
    next_idle = time.monotonic() + _IDLE_S
    while waiting:
        for message_id, position in list(waiting.items()):
            if (reply := puller.pull(message_id)) is not None:
                del waiting[message_id]
                yield position, reply
            if time.monotonic() > deadline:
                return
        if time.monotonic() > deadline:
            return
        if time.monotonic() > next_idle:
            idle()
            next_idle = time.monotonic() + _IDLE_S
        if waiting:
            time.sleep(_POLL_S)
