"""Which server runs, when one was killed, and how its end is noticed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pomona.coordinator import launch
from pomona.coordinator.following import follow
from pomona.coordinator.launch import submit
from pomona.coordinator.server import Server, _only_server, find_server
from pomona.errors import ConfigError, ProcessDied, ProcessError, RunFailed
from pomona.processes import free_ports
from pomona.settings import RunSettings
from pomona.storage.opening import open_registry
from pomona.storage.registry import Registry


def _facts(home: Path) -> None:
    home.mkdir(exist_ok=True)
    facts = {"pid": os.getpid(), "fleet": "127.0.0.1:1", "control": "127.0.0.1:2", "ca_certificate": ""}
    (home / "server.json").write_text(json.dumps(facts))


def test_a_server_is_found_while_it_holds_its_folder(tmp_path: Path) -> None:
    with _only_server(tmp_path):
        _facts(tmp_path)
        assert find_server(tmp_path).control == "127.0.0.1:2"
        with pytest.raises(ProcessError, match=r"runs on .+ already"), _only_server(tmp_path):
            pass


def test_what_a_killed_server_left_behind_is_no_server(tmp_path: Path) -> None:
    """Its process id may be another program's by now: here it is that of this test."""
    with _only_server(tmp_path):
        _facts(tmp_path)
    with pytest.raises(ProcessDied, match="no server runs on"):
        find_server(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"pid": 1, "fleet": "a", "control": "b", "more": 1}'])
def test_malformed_facts_are_no_server(tmp_path: Path, text: str) -> None:
    with _only_server(tmp_path):
        (tmp_path / "server.json").write_text(text)
        with pytest.raises(ProcessDied, match="start one with `pomona server`"):
            find_server(tmp_path)


def test_a_run_notices_within_seconds_that_its_server_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    server = Server(pid=os.getpid(), fleet="127.0.0.1:1", control=f"127.0.0.1:{port}")
    alive = launch.watch_flower(server, 1, folder=tmp_path)
    alive()
    monkeypatch.setattr(launch, "_LISTENS_POLL_S", -1.0)
    with pytest.raises(ProcessDied, match="is gone; what it published is in the registry"):
        alive()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A registry with a run."""
    monkeypatch.delenv("POMONA_REGISTRY_URL", raising=False)
    with open_registry(tmp_path / "home") as registry:
        registry.add_base_model("b" * 64, "tiny", "a test")
        registry.start_run(run_id="run-1", adapter="demo", base_sha256="b" * 64, settings_json="{}")
        yield registry


def test_a_run_that_ends_while_flower_is_asked_has_ended_well(registry: Registry) -> None:
    """Asking takes seconds; the row was read before."""

    def ends_meanwhile() -> None:
        registry.finish_run("run-1", "finished")
        raise RunFailed("Flower ended the run (finished:completed)")

    assert follow(registry, "run-1", alive=ends_meanwhile, show=lambda _run: None).state == "finished"


def test_a_run_that_flower_ended_and_nobody_wrote_down_has_failed(registry: Registry) -> None:
    def ended() -> None:
        raise RunFailed("Flower ended the run (finished:failed)")

    with pytest.raises(RunFailed, match="finished:failed"):
        follow(registry, "run-1", alive=ended, show=lambda _run: None)


def test_a_run_that_hides_its_clients_needs_a_server_that_writes_nothing_down(tmp_path: Path) -> None:
    privacy = {"unit": "client", "population": "p", "population_size": 9, "epsilon": 1e3, "delta": 1e-3}
    settings = RunSettings.model_validate({"name": "toy", "privacy": privacy})
    server = Server(pid=1, fleet="127.0.0.1:1", control="127.0.0.1:1", superlink_state="disk")
    with pytest.raises(ConfigError, match="--superlink-state memory"):
        submit(server, settings, run_id="run-1", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_server_starts_without_torch() -> None:
    """It takes two seconds to import, and no server computes anything."""
    modules = "pomona.coordinator.launch, pomona.coordinator.metrics, pomona.coordinator.server, pomona.storage.opening"
    code = f"import sys, pomona.cli.server, {modules}; sys.exit('torch' in sys.modules or 'flwr' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0
