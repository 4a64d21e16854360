"""The relay and the real trainer process behind its socket."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Client, Listener
from pathlib import Path

import psutil
import pytest
from flwr.app import Context, Message, RecordDict

from pomona import __version__
from pomona.adapters import AdapterWeights
from pomona.base_model import base_model_sha256
from pomona.client.app import relay
from pomona.client.relay import ask
from pomona.errors import ProcessDied
from pomona.lora_model import AdaptedModel
from pomona.messages import pack, unpack
from pomona.processes import child_environment
from pomona.protocol import ENROL, TRAIN, Enrolled, Invitation, Refusal, TrainRequest
from pomona.settings import TrainingSettings
from pomona.wire import decode_update, encode_weights

LABELS = ("animal", "food", "tool", "weather")
PATIENCE_S = 60.0


@dataclass
class Daemon:
    """A trainer process and the sockets of its clients, by name."""

    process: subprocess.Popen[bytes]
    sockets: dict[str, str]


def command(sockets: dict[str, str], model: Path, data: Path) -> list[str]:
    specs = [
        {"socket": socket, "name": name, "rank": rank, "data": str(data), "model": str(model)}
        for rank, (name, socket) in enumerate(sockets.items(), start=2)
    ]
    return [sys.executable, "-m", "pomona.client.daemon", "--clients", json.dumps(specs)]


def environment() -> dict[str, str]:
    return child_environment({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})


def until(ready: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder of a short name: a socket's path may have about 100 characters."""
    path = Path(tempfile.mkdtemp(prefix="pomona-test-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def daemon(folder: Path, tiny_bert: Path, toy_data: Path) -> Iterator[Daemon]:
    """One process with two clients, as in the demo."""
    sockets = {name: str(folder / name) for name in ("anna", "bert")}
    process = subprocess.Popen(command(sockets, tiny_bert, toy_data), env=environment(), start_new_session=True)
    try:
        until(lambda: all(Path(socket).exists() for socket in sockets.values()), "the sockets are open")
        yield Daemon(process, sockets)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def invitation(tiny_bert: Path) -> Invitation:
    return Invitation(
        run_id="run-1",
        pomona_version=__version__,
        task="classification",
        base="",
        base_sha256=base_model_sha256(tiny_bert),
        max_length=16,
        labels=LABELS,
        max_rank=16,
    )


def test_two_clients_of_one_process_enrol_each_for_itself(daemon: Daemon, invitation: Invitation) -> None:
    """One would answer for the other, or wait for it."""
    for rank, (name, socket) in enumerate(daemon.sockets.items(), start=2):
        kind, answer, payload = ask(socket, ENROL, invitation.model_dump_json(), b"")
        enrolled = Enrolled.model_validate_json(answer)
        assert (kind, payload) == ("enrolled", b"")
        assert (enrolled.name, enrolled.rank, enrolled.num_examples) == (name, rank, 144)
    parent = psutil.Process(daemon.process.pid)
    assert all(_cpu_s(child) < _cpu_s(parent) / 2 for child in parent.children()), "each has imported all by itself"


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def test_trains_over_the_socket(daemon: Daemon, invitation: Invitation, tiny_bert: Path) -> None:
    heads = AdaptedModel(tiny_bert, task="classification", labels=LABELS).initial_heads(seed=1)
    request = TrainRequest(
        invitation=invitation,
        round_number=1,
        parent="",
        seed=3,
        training=TrainingSettings(max_steps=2),
        rank=3,
        adapter_seed=5,
    )
    start = encode_weights(AdapterWeights(heads=heads))
    kind, _, payload = ask(daemon.sockets["bert"], TRAIN, request.model_dump_json(), start)
    update = decode_update(payload)
    assert (kind, update.client, update.rank, update.round_number) == ("update", "bert", 3, 1)
    assert any(bool(factors.b.any()) for factors in update.weights.layers.values())


def test_a_request_that_breaks_off_ends_nobody(daemon: Daemon, invitation: Invitation) -> None:
    """Flower kills the relay of a message that took too long; the trainer must be there for the next."""
    socket = daemon.sockets["anna"]
    with Client(socket, family="AF_UNIX") as connection:
        connection.send_bytes(b"query")
    with Client(socket, family="AF_UNIX") as connection:  # asks and does not wait for the answer
        for frame in (b"query", invitation.model_dump_json().encode(), b""):
            connection.send_bytes(frame)
    with Client(socket, family="AF_UNIX") as connection:
        for frame in (b"query", b"\xff\xfe", b""):
            connection.send_bytes(frame)
    assert ask(socket, ENROL, invitation.model_dump_json(), b"")[0] == "enrolled"
    assert daemon.process.poll() is None


@pytest.mark.usefixtures("flower_task")
def test_the_apps_relay_hands_messages_on(daemon: Daemon, invitation: Invitation) -> None:
    message = Message(pack("invitation", invitation.model_dump_json()), dst_node_id=1, message_type=ENROL)
    reply = relay(message, context(daemon.sockets["anna"]))
    assert reply.metadata.message_type == ENROL
    kind, answer, _ = unpack(reply)
    assert (kind, Enrolled.model_validate_json(answer).name) == ("enrolled", "anna")


def test_when_one_client_ends_the_process_ends(daemon: Daemon) -> None:
    """The others would go on unwatched, and nobody would start the lost one again. The last test of this process."""
    children = psutil.Process(daemon.process.pid).children()
    assert len(children) == 2
    children[0].send_signal(signal.SIGKILL)
    assert daemon.process.wait(timeout=PATIENCE_S) != 0
    until(lambda: not any(psutil.pid_exists(child.pid) for child in children), "all its clients have ended")
    with pytest.raises(ProcessDied, match="restart `pomona join`"):
        ask(daemon.sockets["bert"], ENROL, "{}", b"")


def test_the_trainer_dies_with_its_parent(
    folder: Path, tiny_bert: Path, toy_data: Path, invitation: Invitation
) -> None:
    """A supervisor that was killed would leave trainers behind that hold memory for ever."""
    socket = str(folder / "orphan")
    start = (
        "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], start_new_session=True).pid, flush=True); input()"
    )
    arguments = [sys.executable, "-c", start, *command({"anna": socket}, tiny_bert, toy_data)]
    with subprocess.Popen(
        arguments, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        trainer = int(parent.stdout.readline())
        until(Path(socket).exists, "the socket is open")
        assert ask(socket, ENROL, invitation.model_dump_json(), b"")[0] == "enrolled"
        os.kill(parent.pid, signal.SIGKILL)
        until(lambda: not _runs(trainer), "the trainer has ended")


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("kind", ["absent", "file", "empty"])
def test_without_a_trainer_the_error_says_so(folder: Path, kind: str) -> None:
    path = folder / kind
    if kind == "file":
        path.write_text("not a socket")
    with pytest.raises(ProcessDied, match="the trainer of this client does not answer"):
        ask("" if kind == "empty" else str(path), ENROL, "{}", b"")


def test_a_trainer_that_ends_before_it_answers_is_noticed(folder: Path) -> None:
    """The relay would wait for ever, and with it the round."""
    with Listener(str(folder / "brief"), family="AF_UNIX") as listener:
        thread = threading.Thread(target=lambda: listener.accept().close())
        thread.start()
        with pytest.raises(ProcessDied):
            ask(str(folder / "brief"), ENROL, "{}", b"")
        thread.join()


def context(socket: str) -> Context:
    return Context(
        run_id=1, node_id=1, node_config={"name": "anna", "trainer": socket}, state=RecordDict(), run_config={}
    )


@pytest.mark.usefixtures("flower_task")
def test_the_apps_relay_refuses_when_there_is_no_trainer(folder: Path) -> None:
    """An exception would reach the coordinator as a Flower error without a reason."""
    message = Message(pack("invitation", "{}"), dst_node_id=1, message_type=ENROL)
    kind, answer, _ = unpack(relay(message, context(str(folder / "absent"))))
    refusal = Refusal.model_validate_json(answer)
    assert (kind, refusal.name) == ("refusal", "anna")
    assert "restart `pomona join`" in refusal.error
    foreign = Message(RecordDict(), dst_node_id=1, message_type=ENROL)
    kind, answer, _ = unpack(relay(foreign, context(str(folder / "absent"))))
    assert (kind, Refusal.model_validate_json(answer).error[:23]) == ("refusal", "expected a message with")
