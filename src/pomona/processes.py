"""Child processes that cannot outlive their parent, nor each other.

Every child leads a session of its own, so that one signal reaches all that it started; on Linux the kernel
also ends it when its parent is killed. A supervisor watches its children: when one ends, the others are ended.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import psutil

from pomona.errors import PortInUse, ProcessDied

_PR_SET_PDEATHSIG = 1
_STOP_GRACE_S = 6.0
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOG_TAIL_LINES = 12


def free_ports(count: int, *, host: str = "127.0.0.1") -> list[int]:
    """Return ``count`` different ports on which nobody listens at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((host, 0))
        return [each.getsockname()[1] for each in sockets]


def check_port(host: str, port: int) -> None:
    """Check that a server could listen on a port.

    Raises:
        PortInUse: Another program does, or the address is not this machine's.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise PortInUse(
                f"cannot listen on {host}:{port} ({error}); stop the other program or choose another port"
            ) from error


def listens(address: str) -> bool:
    """Return whether somebody accepts connections at ``HOST:PORT``."""
    host, port = address.rsplit(":", 1)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1.0):
            return True
    except OSError:
        return False


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent ends; elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for a child: this installation's programs first, one thread, no telemetry."""
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **(extra or {}),
    }


@dataclass(slots=True)
class _Child:
    name: str
    process: subprocess.Popen[bytes]
    log: Path


@dataclass(slots=True)
class Supervisor:
    """Owns child processes; leaving the ``with`` block ends them and all that they started.

    Attributes:
        log_dir: Each child writes ``<name>.log`` there.
    """

    log_dir: Path
    _children: list[_Child] = field(default_factory=list)
    _folders: list[Path] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.log_dir.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, command: Sequence[str], *, env: Mapping[str, str]) -> int:
        """Start a program and return its process id.

        Raises:
            ProcessDied: The program does not exist or may not be run.
        """
        log = self.log_dir / f"{name}.log"
        with _signals_held_back():
            try:
                with log.open("ab") as output:
                    process = subprocess.Popen(
                        list(command),
                        env=dict(env),
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl call, no locks
                    )
            except OSError as error:
                raise ProcessDied(f"cannot start {name} ({command[0]}): {error}") from error
            self._children.append(_Child(name, process, log))
        return process.pid

    def short_folder(self) -> Path:
        """Return a new folder that only the user can enter, of a path short enough for sockets; it goes at the end."""
        folder = Path(tempfile.mkdtemp(prefix="pomona-", dir="/tmp"))
        self._folders.append(folder)
        return folder

    def check(self) -> None:
        """Check that every child lives.

        Raises:
            ProcessDied: One has ended; names it and quotes the end of its log.
        """
        for child in self._children:
            if (code := child.process.poll()) is not None:
                raise ProcessDied(
                    f"{child.name} ended with exit code {code}; the end of {child.log}:\n{_tail(child.log)}"
                )

    def ended(self, name: str) -> int | None:
        """Return the exit code of a child, or None while it lives."""
        return next(child.process.poll() for child in self._children if child.name == name)

    def forget(self, name: str) -> None:
        """Stop watching a child that has ended, so that it can be started again."""
        self._children = [child for child in self._children if child.name != name or child.process.poll() is None]

    def wait_for(self, ready: Callable[[], bool], *, what: str, timeout_s: float) -> None:
        """Wait until ``ready`` is true, watching the children meanwhile.

        Raises:
            ProcessDied: A child ended first, or the time ran out.
        """
        deadline = time.monotonic() + timeout_s
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise ProcessDied(f"{what} was not ready within {timeout_s:.0f} s; see the logs in {self.log_dir}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End every child and every process that it started: politely, then by force."""
        leaders = [child.process.pid for child in self._children]
        everyone = _descendants(leaders)
        strangers = [process for process in everyone if _group(process) not in leaders]
        for pid in reversed(leaders):
            _signal_group(pid, signal.SIGTERM)
        for process in strangers:  # in sessions of their own, where no signal to a group reaches them
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, stubborn = psutil.wait_procs(everyone, timeout=_STOP_GRACE_S)
        for process in stubborn:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(stubborn, timeout=_STOP_GRACE_S)
        for child in self._children:
            _signal_group(child.process.pid, signal.SIGKILL)
            child.process.wait()
        self._children.clear()
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise :class:`KeyboardInterrupt`, so that both clean up like Ctrl-C."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    kinds = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(kind, interrupt) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Let signals that end a program wait until the block is left.

    Python drops what a signal's handler raises while the hooks that follow a fork run, and an interrupt right after
    the fork would leave a child that nobody knows of.
    """
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main thread alone
        yield
        return
    held: list[int] = []
    before = {kind: handler for kind in _ENDING if (handler := signal.getsignal(kind)) is not None}
    for kind in before:
        signal.signal(kind, lambda number, _frame: held.append(number))
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
        for number in held:
            signal.raise_signal(number)


def _descendants(pids: Sequence[int]) -> list[psutil.Process]:
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(pid)
            found += [parent, *parent.children(recursive=True)]
    return found


def _group(process: psutil.Process) -> int | None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        return os.getpgid(process.pid)
    return None


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-_LOG_TAIL_LINES:])
