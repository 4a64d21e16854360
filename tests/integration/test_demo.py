"""The main job as a newcomer runs it, measured."""

import signal
from pathlib import Path

import pytest
from tests.integration.conftest import FinishedDemo, Terminal, last_json, wait_until

pytestmark = pytest.mark.timeout(420)

CPU_LIMIT_PIECES = 36_000  # two minutes on two cores that do a piece in 6.7 ms; wall time would measure neighbours
MEMORY_LIMIT_BYTES = 5e9


def test_the_demo_trains_and_its_export_scores_the_same(finished_demo: FinishedDemo) -> None:
    found = finished_demo.result
    rounds = found["accuracy_rounds"]
    assert isinstance(rounds, list)
    assert len(rounds) == found["rounds"] == 3
    assert rounds[-1] > found["accuracy_initial"] + 0.2  # type: ignore[operator]
    assert found["accuracy_exported"] == rounds[-1]
    assert found["adapter"] == "demo/3"
    assert [client["rank"] for client in found["clients"]] == [4, 8, 16, 32]  # type: ignore[attr-defined]
    assert (Path(str(found["export_dir"])) / "adapter_model.safetensors").is_file()


def test_the_demo_stays_within_its_budget(finished_demo: FinishedDemo) -> None:
    assert 5e8 < finished_demo.peak_bytes < MEMORY_LIMIT_BYTES
    assert 20 < finished_demo.cpu_s < CPU_LIMIT_PIECES * finished_demo.piece_s


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_process(terminal: Terminal, tmp_path: Path, kind: signal.Signals) -> None:
    process = terminal.start("demo", "demo", "--home", str(tmp_path / "home"))
    wait_until(lambda: len(terminal.processes()) >= 10, what="all processes of the demo", timeout_s=120)
    process.send_signal(kind)
    assert process.wait(timeout=30) == 130
    assert "interrupted" in terminal.output("demo.err").read_text()
    terminal.expect_no_process()


def test_a_killed_demo_leaves_no_process(terminal: Terminal, tmp_path: Path) -> None:
    process = terminal.start("demo", "demo", "--home", str(tmp_path / "home"))
    wait_until(lambda: len(terminal.processes()) >= 10, what="all processes of the demo", timeout_s=120)
    process.kill()
    process.wait()
    terminal.expect_no_process()


@pytest.mark.parametrize("victim", ["flower-superlink", "client-2", "pomona.client.daemon"])
def test_when_one_process_dies_the_others_are_ended(terminal: Terminal, tmp_path: Path, victim: str) -> None:
    process = terminal.start("demo", "demo", "--json", "--home", str(tmp_path / "home"))
    wait_until(lambda: len(terminal.processes()) >= 10, what="all processes of the demo", timeout_s=120)
    matching = [
        p for p in terminal.processes() if victim in " ".join(p.cmdline()) and "flower-superexec" not in p.name()
    ]
    # the trainer of all clients has children with its own command line: the oldest is their parent
    min(matching, key=lambda each: each.create_time()).kill()
    assert process.wait(timeout=60) == 22
    assert last_json(terminal.output("demo").read_text())["error"]["type"] == "ProcessDied"  # type: ignore[index]
    terminal.expect_no_process()
