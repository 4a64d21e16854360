"""Who follows a run ends it only where nobody else has it, and is not put off by one look that fails."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from pomona.coordinator import following, launch
from pomona.coordinator.following import follow, recorded, watch_coordinator
from pomona.coordinator.recovery import only_coordinator
from pomona.coordinator.server import Server
from pomona.errors import ConfigError, ProcessDied, RegistryUnavailable, RunFailed, ServerGone
from pomona.settings import RunSettings
from pomona.storage.opening import open_registry
from pomona.storage.records import Run
from pomona.storage.registry import Registry

RUN = "run-1"
SERVER = Server(pid=os.getpid(), fleet="127.0.0.1:1", control="127.0.0.1:2")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A registry with a run."""
    monkeypatch.delenv("POMONA_REGISTRY_URL", raising=False)
    monkeypatch.setattr(following, "PROBE_S", 0.0)
    monkeypatch.setattr(launch, "PROBE_S", 0.0)
    monkeypatch.setattr(following, "_POLL_S", 0.01)
    with open_registry(tmp_path / "home") as registry:
        registry.add_base_model("b" * 64, "tiny", "a test")
        settings = RunSettings(name="toy").model_dump_json()
        registry.start_run(run_id=RUN, adapter="toy", base_sha256="b" * 64, settings_json=settings)
        yield registry


def ends_badly(registry: Registry, error: BaseException) -> str:
    with pytest.raises(type(error)), recorded(registry, RUN):
        raise error
    return registry.run(RUN).state


def test_an_error_ends_a_run_unless_another_process_coordinates_it(registry: Registry) -> None:
    with only_coordinator(registry, RUN):
        assert ends_badly(registry, RunFailed("Flower ended the run")) == "running"
    assert ends_badly(registry, RunFailed("Flower ended the run")) == "failed"


def test_a_run_that_was_stopped_ends_when_its_process_has_let_go_of_it(registry: Registry) -> None:
    with ExitStack() as process:
        process.enter_context(only_coordinator(registry, RUN))
        process_ends = process.pop_all()

    def later() -> None:
        time.sleep(0.5)
        process_ends.close()

    thread = threading.Thread(target=later)
    thread.start()
    assert ends_badly(registry, KeyboardInterrupt()) == "failed"
    thread.join()


@pytest.mark.parametrize("error", [ServerGone("killed"), RegistryUnavailable("it restarts", passing=True)])
def test_what_passes_by_itself_ends_no_run(error: Exception, registry: Registry) -> None:
    assert ends_badly(registry, error) == "running"


def test_a_run_that_was_started_twice_is_followed_when_flower_has_ended_the_second(registry: Registry) -> None:
    """The second process finds the run coordinated, and Flower counts it as failed."""
    looks = 0

    def second_has_ended() -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            registry.finish_run(RUN, "finished")
        raise RunFailed("Flower ended the run (finished:failed)")

    with only_coordinator(registry, RUN):
        assert follow(registry, RUN, alive=second_has_ended, show=lambda _run: None).state == "finished"


def test_resuming_a_run_that_another_process_coordinates_follows_it(registry: Registry) -> None:
    seen = []

    def show(run: Run) -> None:
        seen.append(run.state)
        if len(seen) == 3:
            registry.finish_run(RUN, "finished")

    with only_coordinator(registry, RUN):
        done = launch.resume_at(SERVER, registry, registry.run(RUN), show=show)
    assert done.state == "finished"


def test_who_only_follows_a_run_does_not_stop_it(registry: Registry) -> None:
    def interrupted(_run: Run) -> None:
        raise KeyboardInterrupt

    with only_coordinator(registry, RUN):  # noqa: SIM117 - it is still held afterwards
        with pytest.raises(
            KeyboardInterrupt, match=f"run {RUN} goes on; follow it again by: pomona run --resume {RUN}"
        ):
            launch.resume_at(SERVER, registry, registry.run(RUN), show=interrupted)
    assert registry.run(RUN).state == "running"


def test_who_only_follows_a_run_is_told_when_nobody_has_it_any_more(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_LOCK_POLL_S", -1.0)
    alive = watch_coordinator(registry, RUN)
    alive()
    monkeypatch.setattr(following, "_ABANDONED_S", -1.0)
    with only_coordinator(registry, RUN):
        alive()
    with pytest.raises(ServerGone, match=f"pomona run --resume {RUN}"):
        alive()


def test_settings_that_another_version_wrote_are_named(registry: Registry) -> None:
    registry.start_run(run_id="old", adapter="toy", base_sha256="b" * 64, settings_json='{"name": "toy", "gone": 1}')
    with pytest.raises(ConfigError, match="cannot read the settings of run old \\(gone: "):
        launch.resume_at(SERVER, registry, registry.run("old"), show=lambda _run: None)


RUNNING = json.dumps({"runs": [{"status": "running"}]})
FINISHED = json.dumps({"runs": [{"status": "finished:failed"}]})


@dataclass
class Looking:
    """Looks at a run, with a program in Flower's place that prints a text, or fails where there is none."""

    says: Path
    alive: Callable[[], None]
    server: socket.socket

    def __call__(self, text: str) -> None:
        self.says.write_text(text)
        self.alive()


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Looking]:
    programs, says = tmp_path / "bin", tmp_path / "says"
    programs.mkdir()
    (programs / "flwr").write_text(f'#!/bin/sh\n[ -s "{says}" ] && cat "{says}"\n')
    (programs / "flwr").chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setattr(launch, "_ALIVE_POLL_S", -1.0)
    monkeypatch.setattr(launch, "_LISTENS_POLL_S", -1.0)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        control = f"127.0.0.1:{listening.getsockname()[1]}"
        server = Server(pid=os.getpid(), fleet="127.0.0.1:1", control=control)
        yield Looking(says, launch.watch_flower(server, 1, folder=tmp_path), listening)


@pytest.mark.parametrize("text", ["", "busy", "null", "[]", "{}", '{"runs": []}', '{"runs": null}'])
def test_a_look_that_fails_says_nothing_of_the_run(text: str, look: Looking) -> None:
    for _ in range(2):
        for _ in range(4):
            look(text)
        look(RUNNING)
    look(FINISHED)
    with pytest.raises(RunFailed, match="finished:failed"):
        look(FINISHED)


def test_a_server_that_says_the_run_has_ended_and_is_gone_was_stopped(look: Looking) -> None:
    look(FINISHED)
    look.server.close()
    with pytest.raises(ServerGone):
        look(FINISHED)


def test_a_server_that_never_says_how_a_run_is_is_not_asked_for_ever(look: Looking) -> None:
    for _ in range(4):
        look("")
    with pytest.raises(ProcessDied, match="asked 5 times"):
        look("")
