"""A server that starts a run by itself, and simulated clients that need nothing but a folder: what containers do."""

import json
from pathlib import Path

import pytest
from tests.integration.conftest import Terminal, stop, write_run_file
from tests.invariants import Outside, broken_promises

from pomona.coordinator.replay import Replay
from pomona.processes import free_ports
from pomona.settings import RunSettings
from pomona.storage.opening import open_registry

pytestmark = pytest.mark.timeout(600)


def test_a_run_starts_by_itself_once_and_goes_on_when_its_process_is_killed_alone(
    terminal: Terminal, tmp_path: Path, tiny_bert: Path, toy_data: Path
) -> None:
    """As where memory runs out: the server lives, and so does Flower. The simulated clients share the run's data."""
    (port,) = free_ports(1)
    home, claims = tmp_path / "home", tmp_path / "claims"
    lines = ["[cohort]\nmin_clients = 2", "[simulation]\nranks = [2, 4]"]
    run_file = write_run_file(tmp_path / "run.toml", model=tiny_bert, data=toy_data, lines=lines)
    run_file.write_text(run_file.read_text().replace("rounds = 2", "rounds = 4"))
    serve = ("server", "--home", str(home), "--port", str(port), "--insecure", "--run", str(run_file))
    server = terminal.start("server", *serve)
    arguments = ["--server", f"127.0.0.1:{port}", "--clients", "3", "--claims", str(claims), "--insecure"]
    clients = [terminal.start(f"any-{i}", "simulated-client", str(run_file), *arguments) for i in range(2)]
    terminal.wait_for_text("server", "version toy/1")
    (process,) = [each for each in terminal.processes() if "flwr-serverapp" in " ".join(each.cmdline())]
    process.kill()
    terminal.wait_for_text("server", "has lost its process; going on with it", timeout_s=60)
    said = terminal.wait_for_text("server", ": finished", timeout_s=400)
    assert "started run" in said
    assert said.count("version toy/4") == 1
    assert said.count("has lost its process") == 1

    shown = json.loads(terminal.run("registry", "show", "toy/1", "--home", str(home), "--json").stdout)
    took_part = {each["client"]: (each["rank"], each["num_examples"]) for each in shown["submissions"]}
    assert set(took_part) == {"client-1", "client-2"}
    assert [took_part[name][0] for name in sorted(took_part)] == [2, 4]
    assert {terminal.output(f"any-{i}").read_text().split(":")[0] for i in range(2)} == {
        "number 1 of 3",
        "number 2 of 3",
    }
    _expect_kept_promises(home)

    assert stop(server) == 0
    again = terminal.start("again", *serve)
    terminal.wait_for_text("again", "listening on")
    assert [stop(client) for client in clients] == [0, 0]
    assert stop(again) == 0
    runs = json.loads(terminal.run("registry", "runs", "--home", str(home), "--json").stdout)
    assert [each["state"] for each in runs] == ["finished"]
    terminal.expect_no_process()


def _expect_kept_promises(home: Path) -> None:
    with open_registry(home) as registry:
        (run,) = registry.runs()
        replay = Replay(RunSettings.model_validate_json(run.settings_json))
        assert len(registry.versions("toy")) == 4
        assert not broken_promises(registry, run.id, Outside(replay=replay, orphans=2))
