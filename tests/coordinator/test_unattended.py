"""A server keeps the runs going that nobody follows; their processes are stood in for by whoever holds the lock."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.postgresql import own_server

from pomona.coordinator import unattended
from pomona.coordinator.app import patient_registry
from pomona.coordinator.recovery import only_coordinator
from pomona.coordinator.unattended import Keeper
from pomona.errors import ProcessDied
from pomona.settings import RunSettings
from pomona.storage.opening import open_registry
from pomona.storage.records import NewSubmission
from pomona.storage.registry import Registry

SETTINGS = RunSettings(name="toy")
LONG_S = 1000.0


@dataclass
class Flower:
    """Starts what holds the lock of a run, or refuses to."""

    registry: Registry
    refuses: bool = False
    holds_lock: bool = True
    started: list[str] = field(default_factory=list)
    running: dict[str, ExitStack] = field(default_factory=dict)

    def submit(self, settings: RunSettings, run_id: str) -> None:
        assert settings == SETTINGS
        self.started.append(run_id)
        if self.refuses:
            raise ProcessDied("`flwr run` failed")
        if self.holds_lock:
            self.running[run_id] = ExitStack()
            self.running[run_id].enter_context(only_coordinator(self.registry, run_id))

    def kill(self, run_id: str) -> None:
        self.running.pop(run_id).close()


@dataclass
class Case:
    registry: Registry
    flower: Flower
    keeper: Keeper
    watched: list[str]
    said: list[str]

    def looks(self, times: int = 2) -> None:
        """Look: a lock that was let go is seen by the first look, and found long free by the second."""
        for _ in range(times):
            self.keeper.look()


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    monkeypatch.delenv("POMONA_REGISTRY_URL", raising=False)
    for name, value in {"_LOOK_S": -1.0, "_DEAD_S": 0.0, "_STARTING_S": LONG_S}.items():
        monkeypatch.setattr(unattended, name, value)
    with open_registry(tmp_path / "home") as registry:
        registry.add_base_model("b" * 64, "tiny", "a test")
        watched, said = list[str](), list[str]()
        flower = Flower(registry)
        keeper = Keeper(
            registry, submit=flower.submit, watch=lambda run_id, _said: watched.append(run_id), say=said.append
        )
        yield Case(registry, flower, keeper, watched, said)
        for each in flower.running.values():
            each.close()


def begin(registry: Registry, run_id: str, settings_json: str = SETTINGS.model_dump_json()) -> None:
    registry.start_run(run_id=run_id, adapter="toy", base_sha256="b" * 64, settings_json=settings_json)


def send_update(registry: Registry, run_id: str, number: int) -> None:
    registry.record_submission(
        NewSubmission(
            run_id=run_id, round_number=1, client=f"client-{number}", rank=2, alpha=2.0, num_examples=3,
            nonce=f"nonce-{number}", status="accepted", reason="", payload=b"update", train_loss=0.5,
        )
    )  # fmt: skip


def test_a_run_whose_process_dies_is_started_again_until_it_has_ended(case: Case) -> None:
    begin(case.registry, "run-1")
    case.keeper.resume()
    case.looks()
    assert case.flower.started == case.watched == ["run-1"], "one that is coordinated is left alone"
    case.flower.kill("run-1")
    case.looks()
    assert case.flower.started == ["run-1", "run-1"]
    case.registry.finish_run("run-1", "finished")
    case.flower.kill("run-1")
    case.looks()
    assert case.flower.started == ["run-1", "run-1"]
    assert case.registry.run("run-1").state == "finished"


def test_one_that_is_still_being_started_is_not_started_twice(case: Case) -> None:
    begin(case.registry, "run-1")
    case.flower.holds_lock = False
    case.keeper.resume()
    case.looks(5)
    assert case.flower.started == ["run-1"]


def test_one_that_gets_nowhere_is_given_up(case: Case) -> None:
    begin(case.registry, "run-1")
    case.keeper.resume()
    for _ in range(5):
        case.looks()
        if "run-1" in case.flower.running:
            case.flower.kill("run-1")
    assert len(case.flower.started) == 3
    ended = case.registry.run("run-1")
    assert (ended.state, ended.reason.split(":")[0]) == ("failed", "ProcessDied")


def test_one_that_gets_on_may_die_any_number_of_times(case: Case) -> None:
    begin(case.registry, "run-1")
    case.registry.open_round("run-1", 1, parent=None, cohort=["client-0"])
    case.keeper.resume()
    for number in range(5):
        case.looks()
        send_update(case.registry, "run-1", number)
        case.flower.kill("run-1")
    case.looks()
    assert len(case.flower.started) == 6
    assert case.registry.run("run-1").state == "running"


def test_one_that_another_process_coordinates_is_gone_on_with_when_that_has_died(case: Case) -> None:
    begin(case.registry, "run-1")
    with only_coordinator(case.registry, "run-1"):
        case.keeper.resume()
        case.looks()
        assert (case.flower.started, case.watched) == ([], ["run-1"])
    case.looks()
    assert case.flower.started == ["run-1"]


@pytest.mark.parametrize("settings_json", ["{}", '{"name": "toy", "of_another_version": 1}', ""])
def test_a_run_that_cannot_go_on_keeps_back_no_other(settings_json: str, case: Case) -> None:
    begin(case.registry, "run-1", settings_json)
    begin(case.registry, "run-2")
    case.keeper.resume()
    assert case.flower.started == ["run-2"]
    assert case.said[0].startswith("run run-1 is left as it is: ")
    assert "the version that began it" in case.said[0]


def test_one_that_the_server_does_not_take_is_tried_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(case.registry, "run-1")
    begin(case.registry, "run-2")
    case.flower.refuses = True
    case.keeper.resume()
    assert case.flower.started == ["run-1", "run-2"]
    assert "`flwr run` failed" in case.said[0]
    monkeypatch.setattr(unattended, "_STARTING_S", 0.0)
    case.flower.refuses = False
    case.looks(1)
    assert case.flower.started == ["run-1", "run-2"] * 2
    assert set(case.flower.running) == {"run-1", "run-2"}


def test_a_coordinator_waits_for_a_database_that_is_away_when_it_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with own_server() as server:
        monkeypatch.setenv("POMONA_HOME", str(tmp_path))
        monkeypatch.setenv("POMONA_REGISTRY_URL", server.url)
        with open_registry() as registry:
            registry.add_base_model("b" * 64, "tiny", "a test")
            begin(registry, "run-1")
        server.stop()
        back = threading.Timer(1.0, server.start)
        back.start()
        with patient_registry() as registry:
            assert registry.run("run-1").state == "running"
        back.join()
