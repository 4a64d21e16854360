"""A client behind a bad link, over the real wire: it contributes, or it is dropped and told so; the round closes."""

import signal
from collections import deque
from functools import partial
from pathlib import Path

import pytest
from tests.fault_proxy import FaultProxy, Link
from tests.integration.conftest import Terminal, stop, wait_until, write_rows, write_run_file
from tests.invariants import Outside, broken_promises

from pomona.coordinator.replay import Replay
from pomona.processes import free_ports
from pomona.settings import RunSettings
from pomona.storage.opening import open_registry
from pomona.storage.records import Submission

pytestmark = pytest.mark.timeout(400)

CUT_AT = 60_000  # bytes


def test_a_link_that_is_cut_in_mid_upload_costs_at_most_an_update(
    terminal: Terminal, tmp_path: Path, tiny_bert: Path, toy_data: Path
) -> None:
    home, fleet = tmp_path / "home", f"127.0.0.1:{free_ports(1)[0]}"
    server = terminal.start("server", "server", "--home", str(home), "--port", fleet.split(":")[1], "--insecure")
    terminal.wait_for_text("server", "listening on")
    with FaultProxy(fleet) as proxy:
        clients = []
        for part, (name, rank, address) in enumerate([("good", 4, fleet), ("bad", 64, proxy.address)]):
            data = write_rows(tmp_path / f"{name}.csv", toy_data, part=part, of=2)
            who = ["--name", name, "--rank", str(rank), "--data", str(data), "--model", str(tiny_bert)]
            clients.append(terminal.start(name, "join", "--server", address, *who, "--insecure"))
        lines = [
            "[cohort]\nmin_clients = 2\nround_deadline_s = 20\njoin_timeout_s = 120",
            "[aggregation]\nmax_rank = 64",
        ]
        run_file = write_run_file(tmp_path / "run.toml", model=tiny_bert, data=toy_data, lines=lines)
        run = terminal.start("run", "run", str(run_file), "--home", str(home), "--json")
        terminal.wait_for_text("bad", "enrolled in run")
        proxy.set(Link(latency_s=0.05, cut_at=CUT_AT))
        calm = _sent_up_before_the_cut(proxy)
        assert calm < CUT_AT / 3, "nothing but an upload sends so much more within seconds"
        assert run.wait(timeout=200) == 0, terminal.output("run").read_text()
        assert proxy.cuts == 1
        sent = _sent(home)
        assert [each.status for each in sent if each.client == "good"] == ["accepted", "accepted"]
        lost = [each for each in sent if each.status != "accepted"]
        assert len(lost) <= 1
        assert len([each for each in sent if each.client == "bad"]) == 2, "it was asked in both rounds"
        for each in lost:
            said = f"update of round {each.round_number} of run"
            wait_until(partial(_says, terminal.output("bad"), said), what=said, timeout_s=60)
        for client in clients:
            stop(client, kind=signal.SIGTERM)
    assert stop(server) == 0
    terminal.expect_no_process()


def _sent_up_before_the_cut(proxy: FaultProxy) -> int:
    """Wait for the cut; return how many bytes had gone up three seconds before it, since the link was set."""
    begun, looks = proxy.seen["up"], deque([0], maxlen=15)

    def cut() -> bool:
        looks.append(proxy.seen["up"] - begun)
        return proxy.cuts > 0

    wait_until(cut, what="the cut", timeout_s=120)
    return looks[0]


def _says(output: Path, words: str) -> bool:
    return words in output.read_text()


def _sent(home: Path) -> list[Submission]:
    """Return what clients sent in the one run there is, once it was held to its promises."""
    with open_registry(home) as registry:
        (run,) = registry.runs()
        replay = Replay(RunSettings.model_validate_json(run.settings_json))
        assert not broken_promises(registry, run.id, Outside(replay=replay, orphans=1))
        return registry.submissions(run.id)
