"""How long it takes from a command of ``benchmarks/registry.py`` to its answer, as whole processes."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from pomona.storage.opening import open_registry

Facts = dict[str, Any]


def starts(home: Path, empty: Path, mlflow_at: Path, database: Path, *, rounds: int) -> Facts:
    """Time whole processes, from the command to the answer, in turns."""
    pomona = Path(sys.executable).parent / "pomona"
    open_registry(empty).close()
    commands: dict[str, Callable[[], float]] = {
        "pomona registry ls": lambda: _command([pomona, "registry", "ls", "--home", home]),
        "pomona registry search": lambda: _command(
            [pomona, "registry", "search", "tags.stage = 'live'", "--limit", "20", "--home", home]
        ),
        "pomona server, to listening": lambda: _server(pomona, home),
        "pomona server on an empty registry": lambda: _server(pomona, empty),
        "mlflow server, to its health": lambda: _mlflow_server(mlflow_at.parent / "mlflow", database),
    }
    held: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, run in commands.items():
            held[name].append(run())
    return {name: {"seconds": median(values), "all": values} for name, values in held.items()}


def _command(command: Sequence[str | Path]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _server(pomona: Path, home: Path) -> float:
    began = time.perf_counter()
    process = subprocess.Popen(
        [pomona, "server", "--insecure", "--port", "0", "--home", home], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("listening on"):
                return time.perf_counter() - began
        raise SystemExit("pomona server ended before it listened")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def _mlflow_server(mlflow: Path, database: Path) -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.perf_counter()
    process = subprocess.Popen(
        [mlflow, "server", "--backend-store-uri", f"sqlite:///{database}", "--port", str(port), "--workers", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=database.parent,
    )
    try:
        while process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return time.perf_counter() - began
            time.sleep(0.02)
        raise SystemExit("mlflow server ended before it answered")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
