"""A run that hides its clients, as real processes: what the server keeps of them, and what can be said afterwards."""

import json
import signal
from pathlib import Path

import pytest
from tests.integration.conftest import Terminal, last_json, stop, write_rows, write_run_file

from pomona.processes import free_ports

pytestmark = pytest.mark.timeout(400)

PRIVACY = """[privacy]
unit = "client"
population = "sites"
population_size = 4
epsilon = 50.0
delta = 1e-3
spare_rounds = 1
"""


def test_a_private_run_leaves_nothing_of_its_clients_at_the_server(
    terminal: Terminal, tmp_path: Path, tiny_bert: Path, toy_data: Path
) -> None:
    home, (port,) = tmp_path / "home", free_ports(1)
    run_file = write_run_file(
        tmp_path / "run.toml",
        model=tiny_bert,
        data=toy_data,
        lines=[
            "[cohort]\nmin_clients = 2\nround_deadline_s = 20",
            '[aggregation]\nstrategy = "ffa-nested"\nmax_rank = 4',
            PRIVACY,
        ],
    )
    run_file.write_text(run_file.read_text().replace("rounds = 2", "rounds = 1"))
    options = ("--home", str(home), "--port", str(port), "--insecure", "--superlink-state", "memory")
    server = terminal.start("server", "server", *options)
    terminal.wait_for_text("server", "listening on")
    data = [write_rows(tmp_path / f"{i}.csv", toy_data, part=i, of=2) for i in range(2)]
    for i, rows in enumerate(data):
        at = ("--server", f"127.0.0.1:{port}", "--data", str(rows), "--name", f"site-{i}", "--model", str(tiny_bert))
        terminal.start(f"site-{i}", "join", *at, "--rank", "4", "--insecure")
    done = terminal.run("run", str(run_file), "--home", str(home), "--json", timeout_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert last_json(done.stdout)["adapter"] == "toy/1"
    for name in ("site-0", "site-1"):
        assert "round 1" in terminal.output(name).read_text()

    told = json.loads(terminal.run("privacy", "certificate", "toy/1", "--home", str(home), "--json").stdout)
    assert (told["population"], told["releases"], told["unit"]) == ("sites", 1, "client")
    assert 0 < told["epsilon"] < 50.0
    ledger = json.loads(terminal.run("privacy", "ledger", "--home", str(home), "--json").stdout)
    assert [row["state"] for row in ledger] == ["reserved", "released"]

    words = {word for rows in data for word in rows.read_text().split() if word.isalpha() and len(word) > 5}
    kept = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    assert kept
    for path, content in kept.items():
        assert not [word for word in words if f" {word} ".encode() in content], path
        assert b"training loss" not in content, path
    assert stop(server) == 0
    for process in terminal.running:
        if process.poll() is None:
            stop(process, kind=signal.SIGTERM)
    terminal.expect_no_process()
