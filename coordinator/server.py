"""The coordinator's server: a Flower SuperLink whose Fleet API clients join over gRPC.

Only the Fleet port faces clients. Flower's control port has no authentication, so it stays on loopback.
"""

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pomona.errors import ConfigError, ProcessDied, ProcessError
from pomona.processes import Supervisor, check_port, child_environment, free_ports, listens

SuperlinkState = Literal["disk", "memory"]

_FACTS = "server.json"
_IN_MEMORY = ":flwr-in-memory:"
_LOCK = "server.lock"
_START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Certificate files (PEM) of the server."""

    ca_certificate: Path
    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where a running server listens.

    Attributes:
        pid: Process that keeps it.
        fleet: ``HOST:PORT`` that clients join.
        control: ``HOST:PORT`` on loopback that runs are started at.
        ca_certificate: Path of the certificate authority; ``""`` without TLS.
        superlink_state: Where its SuperLink keeps messages.
    """

    pid: int
    fleet: str
    control: str
    ca_certificate: str = ""
    superlink_state: SuperlinkState = "disk"


def tls_or_insecure(
    ca_certificate: Path | None, certificate: Path | None, key: Path | None, *, insecure: bool
) -> Tls | None:
    """Return the certificates, or None where going without was asked for in so many words.

    Raises:
        ConfigError: Neither, both, or only some of the files were given.
    """
    if insecure and not (ca_certificate or certificate or key):
        return None
    if insecure or not (ca_certificate and certificate and key):
        raise ConfigError(
            "give --ssl-ca-certfile, --ssl-certfile and --ssl-keyfile, or --insecure to go without TLS, and not both"
        )
    return Tls(ca_certificate=ca_certificate, certificate=certificate, key=key)


@contextmanager
def run_server(
    supervisor: Supervisor,
    state: Path,
    *,
    registry_home: Path,
    host: str,
    port: int,
    tls: Tls | None,
    threads: int = 1,
    superlink_state: SuperlinkState = "disk",
) -> Iterator[Server]:
    """Start a server and take it down at the end.

    Args:
        supervisor: Owns its processes.
        state: Folder of the server's own state; one server at a time.
        registry_home: Folder of the registry that runs publish to.
        host: Address that clients join.
        port: Port that clients join; 0: a free one.
        tls: Certificates; None: without TLS.
        threads: CPU threads for aggregating and scoring. Beside busy clients on the same cores more than one is
            slower, because threads wait for each other.
        superlink_state: Where Flower's SuperLink keeps its messages and nodes. In memory it handles several times as
            many; what a client has not been told is recorded is lost with the process then, and is sent again.

    Raises:
        ConfigError: A certificate file is missing.
        PortInUse: Another program listens on the port.
        ProcessError: A server runs on this folder already.
        ProcessDied: Flower's SuperLink does not come up.
    """
    for path in (tls.ca_certificate, tls.certificate, tls.key) if tls else ():
        if not path.is_file():
            raise ConfigError(f"there is no certificate file {path}")
    with _only_server(state):
        if port:
            check_port(host, port)
        control_port, *rest = free_ports(1 if port else 2)
        server = Server(
            pid=os.getpid(),
            fleet=f"{host}:{port or rest[0]}",
            control=f"127.0.0.1:{control_port}",
            ca_certificate=str(tls.ca_certificate) if tls else "",
            superlink_state=superlink_state,
        )
        env = child_environment(
            {
                "FLWR_HOME": str(state / "flwr"),
                "POMONA_HOME": str(registry_home.resolve()),
                "OMP_NUM_THREADS": str(threads),
                "MKL_NUM_THREADS": str(threads),
            }
        )
        supervisor.start("superlink", _command(server, state, tls, superlink_state), env=env)
        supervisor.wait_for(
            lambda: listens(server.fleet) and listens(server.control),
            what="the SuperLink",
            timeout_s=_START_TIMEOUT_S,
        )
        facts = state / _FACTS
        facts.write_text(json.dumps(asdict(server)), encoding="utf-8")
        try:
            yield server
        finally:
            facts.unlink(missing_ok=True)


def find_server(home: Path) -> Server:
    """Return the server that runs on a folder.

    Raises:
        ProcessDied: None does.
    """
    with suppress(OSError, ValueError, TypeError), (home / _LOCK).open() as lock:
        server = Server(**json.loads((home / _FACTS).read_text(encoding="utf-8")))
        try:  # a killed server leaves its facts behind, and another program may have its process id by now
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return server
    raise ProcessDied(f"no server runs on {home}; start one with `pomona server`")


def _command(server: Server, state: Path, tls: Tls | None, superlink_state: SuperlinkState) -> list[str]:
    host, port = server.control.rsplit(":", 1)
    security = (
        ["--insecure"]
        if tls is None
        else [
            "--ssl-ca-certfile", str(tls.ca_certificate),
            "--ssl-certfile", str(tls.certificate),
            "--ssl-keyfile", str(tls.key),
        ]
    )  # fmt: skip
    return [
        str(Path(sys.executable).parent / "flower-superlink"),
        *security,
        "--host", host, "--port", port,
        "--fleet-api-type", "grpc-rere", "--fleet-api-address", server.fleet,
        "--database", _IN_MEMORY if superlink_state == "memory" else str(state / "superlink.db"),
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip


@contextmanager
def _only_server(home: Path) -> Iterator[None]:
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / _LOCK).open("a")
    except OSError as error:
        raise ProcessError(f"cannot write in {home}: {error}; choose another --home") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ProcessError(f"a server runs on {home} already; stop it or choose another --home") from error
        yield
