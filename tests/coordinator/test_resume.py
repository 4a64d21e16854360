"""A coordinator that is killed loses nothing: the run goes on, and ends with the bytes it would have had anyway."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import httpx
import pytest
from tests.coordinator.grid import InProcessGrid
from tests.coordinator.run_until_killed import nodes

from pomona.coordinator.federation import run_federation
from pomona.coordinator.recovery import only_coordinator, resumable_run
from pomona.errors import AdapterNotFound, ConfigError, ProcessError, ServerGone
from pomona.failpoints import VARIABLE, Place
from pomona.settings import RunSettings
from pomona.storage.records import RunState
from pomona.storage.registry import Registry, open_registry

ROOT = Path(__file__).parents[2]
RUN = "run-1"
ROUNDS = 3
CLIENTS = 3
METHODS: dict[str, Mapping[str, object]] = {
    "flora-bounded": {"max_rank": 16},
    "adam": {"max_rank": 16, "server_optimizer": {"kind": "fedadam", "learning_rate": 0.01}},
    "self-pruning": {"strategy": "hetlora", "max_rank": 16, "self_pruning": {"penalty": 0.5, "decay": 0.5}},
}

Start = Callable[..., tuple[int, str]]


def settings_of(method: str, model: Path, data: Path) -> RunSettings:
    return RunSettings.model_validate(
        {
            "name": "toy",
            "rounds": ROUNDS,
            "seed": 3,
            "model": {"base": str(model), "max_length": 16},
            "data": {"source": str(data)},
            "cohort": {"join_timeout_s": 20.0, "round_deadline_s": 60.0, "min_clients": CLIENTS},
            "training": {"batch_size": 8, "max_steps": 2, "learning_rate": 1e-2},
            "aggregation": METHODS[method],
            "simulation": {"ranks": [4]},
        }
    )


@pytest.fixture(scope="module")
def start(tiny_bert: Path, toy_data: Path) -> Start:
    """Return what runs a federation in a process of its own, to its end or until a failpoint kills it."""

    def run(home: Path, method: str, failpoint: str = "") -> tuple[int, str]:
        settings = settings_of(method, tiny_bert, toy_data)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
        env.pop("POMONA_REGISTRY_URL", None)
        command = [sys.executable, "-m", "tests.coordinator.run_until_killed", str(home)]
        done = subprocess.run(
            [*command, str(tiny_bert), str(toy_data), settings.model_dump_json()],
            env={**env, VARIABLE: failpoint} if failpoint else env,
            cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode in {0, -signal.SIGKILL}, done.stderr[-3000:]
        return done.returncode, done.stdout

    return run


def published(registry: Registry) -> list[bytes]:
    return [registry.payload(version.ref) for version in sorted(registry.versions("toy"), key=lambda v: v.number)]


def assert_nothing_is_lost_or_counted_twice(registry: Registry) -> None:
    for each in registry.submissions(RUN):
        if each.status == "accepted":
            assert registry.blobs.get(each.sha256)
    for round_ in registry.rounds(RUN):
        accepted = [s.client for s in registry.submissions(RUN, round_.number) if s.status == "accepted"]
        assert len(accepted) == len(set(accepted))
        assert (round_.version is not None) == (round_.state == "committed")


@pytest.fixture(scope="module")
def undisturbed(start: Start, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bytes]]:
    """Return what each method publishes when nothing happens."""
    found = {}
    for method in METHODS:
        home = tmp_path_factory.mktemp(method)
        assert start(home, method)[0] == 0
        with open_registry(home) as registry:
            found[method] = published(registry)
    return found


@pytest.mark.parametrize("place", [f"{place}:2" for place in get_args(Place)])
def test_a_run_killed_anywhere_ends_with_the_same_bytes(
    place: str, start: Start, undisturbed: dict[str, list[bytes]], tmp_path: Path
) -> None:
    code, _ = start(tmp_path, "flora-bounded", place)
    assert code == -signal.SIGKILL
    with open_registry(tmp_path) as registry:
        assert registry.run(RUN).state == "running"
        assert_nothing_is_lost_or_counted_twice(registry)
        held = [(each.round_number, each.client) for each in registry.submissions(RUN) if each.status == "accepted"]
    code, told = start(tmp_path, "flora-bounded")
    assert code == 0
    assert f"asked {ROUNDS * CLIENTS - len(held)}\n" in told, "a client was asked again for what it had delivered"
    with open_registry(tmp_path) as registry:
        assert registry.run(RUN).state == "finished"
        assert_nothing_is_lost_or_counted_twice(registry)
        assert published(registry) == undisturbed["flora-bounded"]


@pytest.mark.parametrize("method", [method for method in METHODS if method != "flora-bounded"])
def test_what_the_aggregation_remembers_is_not_forgotten(
    method: str, start: Start, undisturbed: dict[str, list[bytes]], tmp_path: Path
) -> None:
    assert start(tmp_path, method, "round-closing:2")[0] == -signal.SIGKILL
    assert start(tmp_path, method)[0] == 0
    with open_registry(tmp_path) as registry:
        assert published(registry) == undisturbed[method]


@pytest.mark.usefixtures("flower_task")
def test_a_server_that_is_gone_leaves_the_run_open_and_blames_no_client(
    tiny_bert: Path, toy_data: Path, tmp_path: Path, undisturbed: dict[str, list[bytes]]
) -> None:
    """Its clients would count as refused, the round close without them, and the run be over."""
    settings = settings_of("flora-bounded", tiny_bert, toy_data)
    lost = nodes(tiny_bert, toy_data)
    lost[1] = replace(lost[1], trains=lambda *_: httpx.ConnectError("gone"))
    with open_registry(tmp_path) as registry:
        with pytest.raises(ServerGone, match="gone"):
            run_federation(InProcessGrid(lost), settings, registry, run_id=RUN)
        assert registry.run(RUN).state == "running"
        assert [each.state for each in registry.rounds(RUN)] == ["open"]
        assert {each.status for each in registry.submissions(RUN)} <= {"accepted"}
        run_federation(InProcessGrid(nodes(tiny_bert, toy_data)), settings, registry, run_id=RUN)
        assert published(registry) == undisturbed["flora-bounded"]


def test_a_run_that_failed_can_be_resumed_and_one_that_finished_cannot(tmp_path: Path) -> None:
    with open_registry(tmp_path) as registry:
        registry.add_base_model("b" * 64, "tiny", "tiny")
        states: dict[str, RunState] = {"one": "finished", "two": "failed", "three": "finished"}
        for run_id, state in states.items():
            registry.start_run(run_id=run_id, adapter="toy", base_sha256="b" * 64, settings_json="{}")
            registry.finish_run(run_id, state)
        assert resumable_run(registry, "two").id == resumable_run(registry, "latest").id == "two"
        with pytest.raises(ConfigError, match="run one has finished"):
            resumable_run(registry, "one")
        with pytest.raises(AdapterNotFound, match="four"):
            resumable_run(registry, "four")
        registry.finish_run("two", "finished")
        with pytest.raises(ConfigError, match="every run has finished"):
            resumable_run(registry, "latest")


def test_a_run_has_one_coordinator(tmp_path: Path) -> None:
    with open_registry(tmp_path) as registry:
        with only_coordinator(registry, RUN):  # noqa: SIM117 - the second is the one that must not be had
            with pytest.raises(ProcessError, match="by another process"), only_coordinator(registry, RUN):
                raise AssertionError
        with only_coordinator(registry, RUN):
            pass
