"""Real child processes: whatever happens to the parent or to one of them, none is left behind."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pomona import processes
from pomona.errors import PortInUse, ProcessDied
from pomona.processes import (
    Supervisor,
    check_port,
    child_environment,
    free_ports,
    listens,
    terminated_like_interrupted,
)

PATIENCE_S = 30.0
SLEEP = "import time; time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
)


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def until(ready: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start(supervisor: Supervisor, name: str, code: str, *arguments: str) -> int:
    return supervisor.start(name, python(code, *arguments), env=child_environment())


def written(log: Path) -> str:
    return log.read_text() if log.exists() else ""


def pids_in(log: Path, count: int) -> list[int]:
    """Wait until a log has that many lines of one process id each."""
    until(lambda: written(log).count("\n") >= count, f"{log.name} names {count} processes")
    return [int(line) for line in written(log).split()[:count]]


GRANDCHILDREN = """
import subprocess, sys, time
for detached in (False, True):
    child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=detached)
    print(child.pid, flush=True)
time.sleep(600)
"""


def test_stop_ends_children_and_all_that_they_started(tmp_path: Path) -> None:
    """A process in a session of its own would go on, with its port and its memory."""
    with Supervisor(tmp_path) as supervisor:
        parent = start(supervisor, "parent", GRANDCHILDREN, SLEEP)
        grandchildren = pids_in(tmp_path / "parent.log", 2)
        assert all(map(alive, [parent, *grandchildren]))
        began = time.monotonic()
    assert not any(map(alive, [parent, *grandchildren]))
    assert time.monotonic() - began < 5.0, "a polite signal should have done"


def test_stop_ends_by_force_what_does_not_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopping would hang, or leave the process that ignores it."""
    monkeypatch.setattr(processes, "_STOP_GRACE_S", 0.3)
    log = tmp_path / "parent.log"
    with Supervisor(tmp_path) as supervisor:
        pid = start(supervisor, "deaf", STUBBORN)
        parent = start(supervisor, "parent", GRANDCHILDREN, STUBBORN)
        until(lambda: "deaf" in written(tmp_path / "deaf.log"), "the child ignores the signal")
        until(lambda: written(log).count("deaf") == 2, "its grandchildren do")
        grandchildren = [int(line) for line in written(log).split() if line.isdigit()]
        assert len(grandchildren) == 2
        began = time.monotonic()
    assert not any(map(alive, [pid, parent, *grandchildren]))
    assert time.monotonic() - began < 10.0


def test_stop_gives_children_time_to_clean_up(tmp_path: Path) -> None:
    code = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), print("cleaned up", flush=True), sys.exit()))
print("ready", flush=True)
time.sleep(600)
"""
    with Supervisor(tmp_path) as supervisor:
        start(supervisor, "tidy", code)
        until(lambda: "ready" in written(tmp_path / "tidy.log"), "it is ready")
    assert written(tmp_path / "tidy.log") == "ready\ncleaned up\n"


def test_an_error_in_the_block_ends_the_children_too(tmp_path: Path) -> None:
    pids = []

    def fail() -> None:
        with Supervisor(tmp_path) as supervisor:
            pids.append(start(supervisor, "child", SLEEP))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not alive(pids[0])


def test_the_death_of_one_child_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    """Nobody would see why a run hangs."""
    code = "import sys; [print('line', i) for i in range(30)]; print('the reason', file=sys.stderr); sys.exit(7)"
    with Supervisor(tmp_path / "logs") as supervisor:
        start(supervisor, "healthy", SLEEP)
        supervisor.check()
        start(supervisor, "broken", code)
        until(lambda: supervisor.ended("broken") is not None, "it has ended")
        with pytest.raises(ProcessDied, match=r"broken ended with exit code 7; the end of .*broken\.log") as died:
            supervisor.check()
        assert "  the reason" in str(died.value)
        assert "  line 29" in str(died.value)
        assert "  line 3\n" not in str(died.value), "only the end of the log"
        assert supervisor.ended("healthy") is None


def test_a_child_that_ended_can_be_started_again(tmp_path: Path) -> None:
    """What ended once would be reported for ever, or a live child would be lost."""
    with Supervisor(tmp_path) as supervisor:
        start(supervisor, "node", "print('first')")
        until(lambda: supervisor.ended("node") is not None, "it has ended")
        supervisor.forget("node")
        supervisor.check()
        pid = start(supervisor, "node", SLEEP)
        supervisor.forget("node")
        assert supervisor.ended("node") is None
        assert written(tmp_path / "node.log") == "first\n", "the log goes on"
    assert not alive(pid)


def test_a_program_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor, pytest.raises(ProcessDied, match=r"cannot start x \(/no/such\)"):
        supervisor.start("x", ["/no/such"], env={})


def test_waiting_ends_when_it_is_ready_or_a_child_died_or_time_is_up(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        answers = iter([False, False, True])
        supervisor.wait_for(lambda: next(answers), what="the answer", timeout_s=5.0)
        with pytest.raises(ProcessDied, match="the port was not ready within 0 s; see the logs in"):
            supervisor.wait_for(lambda: False, what="the port", timeout_s=0.1)
        start(supervisor, "broken", "raise SystemExit(3)")
        with pytest.raises(ProcessDied, match="broken ended with exit code 3"):
            supervisor.wait_for(lambda: False, what="the port", timeout_s=60.0)


SUPERVISOR = """
import sys, time
from pathlib import Path
from pomona.processes import Supervisor, child_environment
with Supervisor(Path(sys.argv[1])) as supervisor:
    for name in ("one", "two"):
        print(supervisor.start(name, [sys.executable, "-c", sys.argv[2]], env=child_environment()), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_children_die_when_their_supervisor_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    """The out-of-memory killer or a closed terminal would leave servers behind."""
    log = tmp_path / "supervisor.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            python(SUPERVISOR, str(tmp_path / "logs"), SLEEP), stdout=output, env=child_environment()
        )
    try:
        children = pids_in(log, 2)
        assert all(map(alive, children))
        process.send_signal(number)
        process.wait(timeout=PATIENCE_S)
        until(lambda: not any(map(alive, children)), "its children have ended")
    finally:
        process.kill()
        process.wait()


def test_free_ports_are_different_and_free() -> None:
    """Two servers of one run would be given the same port."""
    ports = free_ports(40)
    assert len(set(ports)) == 40
    assert free_ports(0) == []
    for port in ports[:5]:
        check_port("127.0.0.1", port)
        assert not listens(f"127.0.0.1:{port}")


def test_a_port_in_use_is_refused() -> None:
    """Flower would start and log its error somewhere else."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert listens(f"127.0.0.1:{port}")
        with pytest.raises(PortInUse, match=rf"cannot listen on 127\.0\.0\.1:{port} .*; stop the other program"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("127.0.0.1", -1), ("192.0.2.1", 0), ("::zz", 0)])
def test_an_address_that_is_not_ours_is_refused(host: str, port: int) -> None:
    with pytest.raises(PortInUse, match="cannot listen on"):
        check_port(host, port)


def test_children_are_told_to_stay_offline_and_single_threaded() -> None:
    env = child_environment({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"})
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert env["OMP_NUM_THREADS"] == "1"
    assert env["HF_HUB_OFFLINE"] == "0", "what the caller says wins"
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert env["HOME"] == os.environ["HOME"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_cleans_up_like_an_interrupt(number: signal.Signals) -> None:
    """``docker stop`` would leave temporary folders and children behind."""

    def wait_to_be_told() -> None:
        with terminated_like_interrupted():
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            time.sleep(PATIENCE_S)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        wait_to_be_told()
    assert signal.getsignal(number) is before


INTERRUPTED_BY_ITS_OWN_FORK = """
import os, signal, sys
from pathlib import Path
from pomona.processes import Supervisor, child_environment, terminated_like_interrupted

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), int(sys.argv[2])))
with terminated_like_interrupted():
    try:
        with Supervisor(Path(sys.argv[1])) as supervisor:
            supervisor.start("child", [sys.executable, "-c", sys.argv[3]], env=child_environment())
            print("went on", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_the_middle_of_a_fork_is_not_lost(tmp_path: Path, number: signal.Signals) -> None:
    """Python drops what is raised there: the demo went on as if nobody had pressed Ctrl-C."""
    command = python(INTERRUPTED_BY_ITS_OWN_FORK, str(tmp_path), str(number.value), SLEEP)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stdout == "interrupted\n", done.stderr
    assert "ignored" not in done.stderr
