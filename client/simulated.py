"""One of several simulated clients that know nothing of each other but a folder, as containers with a volume do.

Everything about such a client follows from its number: its name, its rank and its share of the run's training data.
A number belongs to whoever holds the lock of its file, so no two clients have the same one, and the number of a client
that ended, however it ended, is free again. A client that comes back takes the number it had where that is still free.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pomona.base_model import is_packaged
from pomona.client.join import JoinSettings
from pomona.datasets import load_dataset, write_jsonl
from pomona.errors import ConfigError, ProcessError
from pomona.partition import partition
from pomona.settings import RunSettings


@contextmanager
def claimed_number(folder: Path, clients: int, *, holder: str) -> Iterator[int]:
    """Hold one of the numbers from 1 to ``clients``: the holder's own of last time, or else the lowest free one.

    Args:
        folder: Shared by all clients, on a file system whose locks all of them see.
        clients: How many numbers there are.
        holder: Who asks; a container's host name is its own for as long as the container exists.

    Raises:
        ConfigError: All numbers are taken.
        ProcessError: The folder cannot be written.
    """
    try:
        number, claim = _claim(folder, clients, holder)
    except OSError as error:
        raise ProcessError(f"cannot claim a number in {folder}: {error}; choose another --claims") from error
    with claim:
        yield number


def simulated_client(
    settings: RunSettings,
    number: int,
    clients: int,
    *,
    server: str,
    folder: Path,
    root_certificates: Path | None,
    threads: int,
) -> JoinSettings:
    """Return how a simulated client joins, and write its share of the data.

    Args:
        settings: Those of the run: ``data`` says what is shared and how, ``simulation.ranks`` who has which rank.
        number: Of the client, from 1.
        clients: How many share the data.
        server: ``HOST:PORT`` of the coordinator.
        folder: Where the share is written; private.
        root_certificates: Certificate authority of the coordinator; None: no TLS.
        threads: CPU threads for training.

    Raises:
        DataError: The data cannot be read, or are too few for so many clients.
    """
    train = load_dataset(settings.data.source, split="train", task=settings.task)
    share = partition(train, settings.data, clients, settings.seed)[number - 1]
    data = folder / f"client-{number}.jsonl"
    write_jsonl(train.subset(share.tolist()), data)
    ranks, base = settings.simulation.ranks, settings.model.base
    return JoinSettings(
        server=server,
        name=f"client-{number}",
        rank=ranks[(number - 1) % len(ranks)] if settings.continual is None else settings.continual.mos.rank,
        data=str(data),
        model="" if is_packaged(base) else base,
        root_certificates=root_certificates,
        threads=threads,
    )


def _claim(folder: Path, clients: int, holder: str) -> tuple[int, TextIO]:
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(1, clients + 1)
    for number in sorted(numbers, key=lambda number: (_holder(folder, number) != holder, number)):
        claim = _path(folder, number).open("a", encoding="utf-8")
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            claim.close()
        else:
            claim.truncate(0)
            claim.write(holder)
            claim.flush()
            return number, claim
    raise ConfigError(
        f"all {clients} shares of the data are taken; start fewer simulated clients, or all of them again with more "
        "--clients"
    )


def _holder(folder: Path, number: int) -> str:
    path = _path(folder, number)
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _path(folder: Path, number: int) -> Path:
    return folder / f"client-{number}"
