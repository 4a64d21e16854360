"""Real processes on loopback: helpers to start the command line, wait for it, and see that nothing is left of it."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch

POMONA = str(Path(sys.executable).parent / "pomona")
MARK = "POMONA_TEST_MARK"


_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests of real processes: they take longest."""
    items.sort(key=lambda item: _HERE not in item.path.parents)


@dataclass(slots=True)
class Terminal:
    """Starts commands whose whole process tree carries a mark in its environment."""

    mark: str
    folder: Path
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start ``pomona`` in the background; what it prints goes to ``<name>.txt`` and ``<name>.err.txt``."""
        with self.output(name).open("wb") as out, self.output(f"{name}.err").open("wb") as err:
            process = subprocess.Popen(
                [POMONA, *arguments],
                stdout=out,
                stderr=err,
                env=self._environment(),
                cwd=self.folder,
                preexec_fn=_obey_interrupts,  # noqa: PLW1509 - no threads here
            )
        self.running.append(process)
        return process

    def run(self, *arguments: str, timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
        """Run ``pomona`` to its end."""
        return subprocess.run(
            [POMONA, *arguments],
            env=self._environment(),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def output(self, name: str) -> Path:
        """Return the file that a background command prints to."""
        return self.folder / f"{name}.txt"

    def wait_for_text(self, name: str, text: str, *, times: int = 1, timeout_s: float = 240.0) -> str:
        """Wait until a background command has printed a text so many times, and return all that it printed."""
        output = self.output(name)
        wait_until(
            lambda: output.read_text().count(text) >= times,
            what=lambda: f"{text!r} from {name} ({times} times), which printed:\n{output.read_text()}",
            timeout_s=timeout_s,
        )
        return output.read_text()

    def processes(self) -> list[psutil.Process]:
        """Return every living process that carries the mark, whoever its parent is."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def expect_no_process(self, *, timeout_s: float = 30.0) -> None:
        """Fail unless all marked processes are gone in time."""
        wait_until(lambda: not self.processes(), what=f"the end of all of {self.describe()}", timeout_s=timeout_s)

    def describe(self) -> list[str]:
        """Return the command lines of what still lives."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                found.append(" ".join(process.cmdline())[:120])
        return found

    def _environment(self) -> dict[str, str]:
        return {**os.environ, MARK: self.mark, "NO_COLOR": "1", "COLUMNS": "200"}


def _obey_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background of a script inherits that it is ignored


def wait_until(condition: Callable[[], bool], *, what: str | Callable[[], str], timeout_s: float) -> None:
    """Wait for a condition, or fail and name it."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s} s in vain for {what() if callable(what) else what}")
        time.sleep(0.2)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """A terminal; whatever it started is killed at the end."""
    made = Terminal(mark=tmp_path.as_posix(), folder=tmp_path)
    yield made
    for process in made.processes():
        process.kill()
    for each in made.running:
        each.wait()


@dataclass(frozen=True, slots=True)
class FinishedDemo:
    """What one run of ``pomona demo --json`` left and took.

    Attributes:
        result: The object that it printed.
        home: Folder of its registry.
        peak_bytes: Largest memory of all processes together, shared pages counted once.
        cpu_s: CPU time of all processes together.
        piece_s: CPU time of a fixed piece of work, the median of many that were done meanwhile: neighbours make the
            same work take more of it, and other machines take other times.
    """

    result: dict[str, object]
    home: Path
    peak_bytes: int
    cpu_s: float
    piece_s: float


@pytest.fixture(scope="session")
def finished_demo(tmp_path_factory: pytest.TempPathFactory) -> FinishedDemo:
    """Run the demo once for all tests that look at what it leaves."""
    folder = tmp_path_factory.mktemp("demo")
    terminal = Terminal(mark=folder.as_posix(), folder=folder)
    process = terminal.start("demo", "demo", "--json", "--home", str(folder / "home"))
    peak, cpu_s, pieces = 0, dict[int, float](), list[float]()
    while process.poll() is None:
        peak = max(peak, _usage(terminal, cpu_s))
        pieces.append(_piece_s())
        time.sleep(2)
    text = terminal.output("demo").read_text()
    assert process.returncode == 0, text + terminal.output("demo.err").read_text()
    terminal.expect_no_process()
    return FinishedDemo(last_json(text), folder / "home", peak, sum(cpu_s.values()), statistics.median(pieces))


def _piece_s() -> float:
    """Do a piece of work like the demo's, some of it in Python and some in matrix products; return its CPU time."""
    matrix = torch.ones(256, 256)
    began = time.thread_time()
    for _ in range(10):
        json.loads(json.dumps(list(range(2000))))
        torch.mm(matrix, matrix)
    return time.thread_time() - began


def _usage(terminal: Terminal, cpu_s: dict[int, float]) -> int:
    """Return the memory of all processes, and note the CPU time of each."""
    total = 0
    for process in terminal.processes():
        try:
            times = process.cpu_times()
            cpu_s[process.pid] = times.user + times.system
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def last_json(text: str) -> dict[str, object]:
    """Return the JSON object on the last line of an output."""
    document = json.loads(text.strip().splitlines()[-1])
    assert isinstance(document, dict)
    return document


def stop(process: subprocess.Popen[bytes], *, kind: signal.Signals = signal.SIGINT, timeout_s: float = 30.0) -> int:
    """Send a signal and return the exit code."""
    process.send_signal(kind)
    return process.wait(timeout=timeout_s)


def write_rows(path: Path, source: Path, *, part: int, of: int) -> Path:
    """Write every ``of``-th training row of a CSV file."""
    header, *rows = source.read_text().splitlines()
    chosen = [row for row in rows if row.endswith(",train")][part::of]
    path.write_text("\n".join([header, *chosen]) + "\n")
    return path


def write_run_file(path: Path, *, model: Path, data: Path, lines: Sequence[str] = ()) -> Path:
    """Write a run file for the tiny model."""
    path.write_text(
        "\n".join(
            [
                'name = "toy"',
                "rounds = 2",
                *[line for line in lines if not line.startswith("[")],
                f'[model]\nbase = "{model}"\nmax_length = 32',
                f'[data]\nsource = "{data}"',
                "[training]\nbatch_size = 8\nlearning_rate = 5e-3\nhead_learning_rate = 5e-2",
                *[line for line in lines if line.startswith("[")],
            ]
        )
        + "\n"
    )
    return path
