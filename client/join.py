"""The processes of a real client: a Flower SuperNode that joins over gRPC, and the trainer behind it."""

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pomona.datasets import load_dataset
from pomona.errors import ConfigError
from pomona.processes import Supervisor, child_environment, free_ports

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
_SERVER = re.compile(r"^(\[[0-9A-Fa-f:.]+\]|[^:\s/]+):\d{1,5}$")


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinSettings:
    """How a client joins.

    Attributes:
        server: ``HOST:PORT`` of the coordinator's Fleet API.
        name: Unique among the clients of the coordinator.
        rank: LoRA rank that the client trains.
        data: A CSV or JSONL file, or a data set that ships with the package.
        model: Folder of the base model; empty: the run's, where it ships in a package.
        root_certificates: Certificate authority of the coordinator (PEM); None: no TLS at all.
        threads: CPU threads for training.
    """

    server: str
    name: str
    rank: int
    data: str
    model: str = ""
    root_certificates: Path | None = None
    threads: int = 1

    def check(self) -> None:
        """Check everything that can be checked before anything is started.

        Raises:
            ConfigError: A setting is malformed.
            DataError: The data are missing, empty or malformed.
        """
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"expected a name of letters, digits, '.', '_' and '-', got {self.name!r}")
        if self.rank < 1:
            raise ConfigError(f"expected a rank of at least 1, got {self.rank}")
        if self.threads < 1:
            raise ConfigError(f"expected at least 1 thread, got {self.threads}")
        if not _SERVER.fullmatch(self.server):
            raise ConfigError(f"expected --server HOST:PORT, got {self.server!r}")
        if self.root_certificates is not None and not self.root_certificates.is_file():
            raise ConfigError(f"there is no certificate file {self.root_certificates}")
        load_dataset(self.data, split=None, task="causal-lm")


def start_trainers(supervisor: Supervisor, clients: Sequence[JoinSettings]) -> list[Path]:
    """Start the trainers of this machine's clients and return their sockets, in a new folder that only the user can enter."""
    folder = Path(tempfile.mkdtemp(prefix="pomona-", dir="/tmp"))  # noqa: S108 - socket paths must be short
    sockets = [folder / str(number) for number, _ in enumerate(clients)]
    specs = [
        {"socket": str(socket), "name": c.name, "rank": c.rank, "data": c.data, "model": c.model}
        for c, socket in zip(clients, sockets, strict=True)
    ]
    threads = str(clients[0].threads)
    env = child_environment({"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "MALLOC_ARENA_MAX": "2"})
    command = [sys.executable, "-m", "pomona.client.daemon", "--clients", json.dumps(specs), "--threads", threads]
    supervisor.start("trainer", command, env=env)
    return sockets


def start_supernode(supervisor: Supervisor, settings: JoinSettings, socket: Path, *, folder: Path) -> None:
    """Start the SuperNode of a client.

    Args:
        supervisor: Owns it.
        settings: Checked settings.
        socket: Of the client's trainer.
        folder: A private folder for Flower's state.
    """
    env = child_environment({"FLWR_HOME": str(folder / f"{settings.name}-flwr")})
    supervisor.start(f"{settings.name}-supernode", _supernode_command(settings, socket), env=env)


def _supernode_command(settings: JoinSettings, socket: Path) -> list[str]:
    node_config = {"name": settings.name, "trainer": str(socket)}
    security = (
        ["--insecure"]
        if settings.root_certificates is None
        else ["--root-certificates", str(settings.root_certificates)]
    )
    return [
        "flower-supernode",
        "--grpc-rere",
        *security,
        "--superlink",
        settings.server,
        "--host",
        "127.0.0.1",
        "--port",
        str(free_ports(1)[0]),
        "--node-config",
        " ".join(f"{key}={json.dumps(value)}" for key, value in node_config.items()),
    ]
