"""A hundred simulated clients on Flower's simulation runtime, and that nothing of it is left."""

import json
from pathlib import Path

import pytest
from tests.integration.conftest import Terminal, last_json, wait_until, write_run_file

from pomona.coordinator.recovery import coordinated
from pomona.storage.opening import open_registry

pytestmark = pytest.mark.timeout(600)

CLIENTS = 100


@pytest.fixture
def many_rows(tmp_path: Path, toy_data: Path) -> Path:
    """Three training rows for each client."""
    header, *rows = toy_data.read_text().splitlines()
    train = [row for row in rows if row.endswith(",train")]
    held_out = [row for row in rows if row.endswith(",validation")]
    path = tmp_path / "many.csv"
    path.write_text("\n".join([header, *(train[i % len(train)] for i in range(3 * CLIENTS)), *held_out]) + "\n")
    return path


def test_a_hundred_clients(terminal: Terminal, tmp_path: Path, tiny_bert: Path, many_rows: Path) -> None:
    lines = [
        "[cohort]\njoin_timeout_s = 300",
        "[simulation]\nranks = [2, 4, 8]",
        "[aggregation]\nmax_rank = 16",
    ]
    run_file = write_run_file(tmp_path / "run.toml", model=tiny_bert, data=many_rows, lines=lines)
    home = tmp_path / "home"
    process = terminal.start(
        "simulate", "simulate", str(run_file), "--clients", str(CLIENTS), "--home", str(home), "--json"
    )
    wait_until(lambda: _coordinated(home), what="the lock that keeps a server from the run", timeout_s=240)
    assert process.wait(timeout=500) == 0, terminal.output("simulate.err").read_text()[-2000:]
    found = last_json(terminal.output("simulate").read_text())
    clients = found["clients"]
    assert isinstance(clients, list)
    assert len(clients) == CLIENTS
    assert {client["rank"] for client in clients} == {2, 4, 8}
    assert sum(client["examples"] for client in clients) == 3 * CLIENTS
    assert found["accuracy_rounds"][-1] > found["accuracy_initial"]  # type: ignore[index]
    submissions = json.loads(terminal.run("registry", "show", "toy/1", "--home", str(home), "--json").stdout)
    assert json.dumps(submissions).count('"accepted"') == CLIENTS
    terminal.expect_no_process()


def _coordinated(home: Path) -> bool:
    if not home.exists():
        return False
    with open_registry(home) as registry:
        return [coordinated(registry, run.id) for run in registry.runs()] == ["here"]
