"""The processes of a real client: a Flower SuperNode that joins over gRPC, and the trainer behind it."""

import json
import re
import sys
import tempfile
from collections.abc import Mapping
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


def start_trainer(supervisor: Supervisor, settings: JoinSettings) -> Path:
    """Start the trainer of a client and return its socket, in a new folder that only the user can enter."""
    socket = Path(tempfile.mkdtemp(prefix="pomona-", dir="/tmp")) / "trainer"  # noqa: S108 - socket paths must be short
    threads = str(settings.threads)
    env = child_environment({"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads})
    supervisor.start(f"{settings.name}-trainer", _trainer_command(settings, socket), env=env)
    return socket


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


def _trainer_command(settings: JoinSettings, socket: Path) -> list[str]:
    options: Mapping[str, object] = {
        "socket": socket,
        "name": settings.name,
        "rank": settings.rank,
        "data": settings.data,
        "model": settings.model,
        "threads": settings.threads,
    }
    return [sys.executable, "-m", "pomona.client.daemon", *(f"--{key}={value}" for key, value in options.items())]


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
