"""The local socket between a client's relay and its trainer. Imports no torch and no flwr.

One request a connection: three frames (kind, JSON, payload) go to the trainer, three come back. The socket lies in a
folder that only the user can enter.
"""

from multiprocessing.connection import Client, Connection

from pomona.errors import ProcessDied

_MAX_FRAME_BYTES = 1 << 31


def ask(socket: str, kind: str, json: str, payload: bytes) -> tuple[str, str, bytes]:
    """Send a request to the trainer and wait for its answer.

    Raises:
        ProcessDied: There is no trainer at the socket, or it ended before it answered.
    """
    try:
        with Client(socket, family="AF_UNIX") as connection:
            send(connection, kind, json, payload)
            return receive(connection)
    except (OSError, EOFError) as error:
        raise ProcessDied(f"the trainer of this client does not answer ({error!r}); restart `pomona join`") from error


def send(connection: Connection, kind: str, json: str, payload: bytes) -> None:
    """Write one message."""
    for frame in (kind.encode(), json.encode(), payload):
        connection.send_bytes(frame)


def receive(connection: Connection) -> tuple[str, str, bytes]:
    """Read one message.

    Raises:
        EOFError: The other side closed.
        OSError: The connection broke, or a frame is larger than 2 GiB.
    """
    kind, json, payload = (connection.recv_bytes(_MAX_FRAME_BYTES) for _ in range(3))
    return kind.decode(), json.decode(), payload
