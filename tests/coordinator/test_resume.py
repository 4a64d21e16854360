"""A coordinator that is killed loses nothing: the run goes on, and ends with the bytes it would have had anyway."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import httpx
import pytest
from sqlalchemy.engine import make_url
from tests.coordinator.grid import Answer, InProcessGrid, Reply
from tests.coordinator.lives import Lives
from tests.coordinator.run_until_killed import JOURNAL, LOG, RUN, nodes
from tests.invariants import Outside, broken_after_collection, broken_promises, read_journal
from tests.postgresql import fresh_database

from pomona.coordinator.federation import run_federation
from pomona.coordinator.recovery import only_coordinator, resumable_run
from pomona.coordinator.replay import Replay
from pomona.errors import AdapterNotFound, AlreadyCoordinated, ConfigError, RegistryUnavailable, ServerGone
from pomona.failpoints import Place
from pomona.settings import RunSettings
from pomona.storage.opening import open_registry
from pomona.storage.records import RunState
from pomona.storage.registry import Registry

ROUNDS = 3
CLIENTS = 3
METHODS: dict[str, Mapping[str, object]] = {
    "flora-bounded": {"max_rank": 16},
    "adam": {"max_rank": 16, "server_optimizer": {"kind": "fedadam", "learning_rate": 0.01}},
    "self-pruning": {"strategy": "hetlora", "max_rank": 16, "self_pruning": {"penalty": 0.5, "decay": 0.5}},
}


def settings_of(method: str, model: Path, data: Path) -> RunSettings:
    return RunSettings.model_validate(
        {
            "name": "toy",
            "rounds": ROUNDS,
            "seed": 3,
            "model": {"base": str(model), "max_length": 16, "target_modules": ["query", "value"]},
            "data": {"source": str(data)},
            "cohort": {"join_timeout_s": 20.0, "round_deadline_s": 60.0, "min_clients": CLIENTS},
            "training": {"batch_size": 8, "max_steps": 2, "learning_rate": 1e-2},
            "aggregation": METHODS[method],
            "simulation": {"ranks": [4]},
        }
    )


@pytest.fixture(scope="module")
def lives(tiny_bert: Path, toy_data: Path) -> Iterator[Lives]:
    """What lets coordinators live, each in a process of its own, to its end or until it is killed."""
    with Lives(tiny_bert, toy_data) as made:
        yield made


@pytest.fixture(scope="module")
def settings(tiny_bert: Path, toy_data: Path) -> dict[str, RunSettings]:
    return {method: settings_of(method, tiny_bert, toy_data) for method in METHODS}


@pytest.fixture(scope="module")
def replays(settings: dict[str, RunSettings]) -> dict[str, Replay]:
    return {method: Replay(each) for method, each in settings.items()}


def published(registry: Registry) -> list[bytes]:
    return [registry.payload(version.ref) for version in sorted(registry.versions("toy"), key=lambda v: v.number)]


def held(registry: Registry) -> list[tuple[int, str]]:
    return [(each.round_number, each.client) for each in registry.submissions(RUN) if each.status == "accepted"]


def known(home: Path, replay: Replay, *, kills: int) -> Outside:
    """Return what the registry of a life is held against; the data of clients are what a log must not tell.

    Whoever is killed may have put the updates of all clients on disk that it was about to record together.
    """
    texts = ("hammer", "salmon", "thunder", "cheese")
    return Outside(
        journal=read_journal(home / JOURNAL), logs=[home / LOG], secrets=texts, replay=replay, orphans=kills * CLIENTS
    )


@pytest.fixture(scope="module")
def undisturbed(
    lives: Lives, settings: dict[str, RunSettings], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[bytes]]:
    """Return what each method publishes when nothing happens."""
    found = {}
    for method in METHODS:
        home = tmp_path_factory.mktemp(method)
        assert lives.live(home, settings[method]).code == 0, (home / LOG).read_text()
        with open_registry(home) as registry:
            found[method] = published(registry)
    return found


OF_OTHERS = (
    "release-",
    "task-trained",
    "task-learned",
    "classes-forgotten",
)  # failpoints that a run without privacy never reaches


@pytest.mark.parametrize("place", [f"{place}:2" for place in get_args(Place) if not place.startswith(OF_OTHERS)])
def test_a_run_killed_anywhere_ends_with_the_same_bytes(
    place: str,
    lives: Lives,
    settings: dict[str, RunSettings],
    replays: dict[str, Replay],
    undisturbed: dict[str, list[bytes]],
    tmp_path: Path,
) -> None:
    method = "flora-bounded"
    assert lives.live(tmp_path, settings[method], failpoint=place).killed
    with open_registry(tmp_path) as registry:
        assert registry.run(RUN).state == "running"
        assert not broken_promises(registry, RUN, known(tmp_path, replays[method], kills=1))
        before = held(registry)
    assert lives.live(tmp_path, settings[method]).code == 0, (tmp_path / LOG).read_text()
    with open_registry(tmp_path) as registry:
        assert registry.run(RUN).state == "finished"
        assert len(held(registry)) == ROUNDS * CLIENTS
        assert set(before) <= set(held(registry))
        assert not broken_promises(registry, RUN, known(tmp_path, replays[method], kills=1))
        assert not broken_after_collection(registry, RUN)
        assert published(registry) == undisturbed[method]


PASSWORD = "correct-horse"  # of the database, which trusts everybody; no log may tell it
COMMITS = (
    "round-opened", "submission-inserted", "submission-recorded", "round-frozen", "version-inserted",
    "version-published",
)  # fmt: skip


@pytest.mark.parametrize("place", [f"{place}:2" for place in COMMITS])
def test_a_run_killed_around_a_commit_on_postgresql_ends_with_the_same_bytes(
    place: str,
    lives: Lives,
    settings: dict[str, RunSettings],
    replays: dict[str, Replay],
    undisturbed: dict[str, list[bytes]],
    postgresql: str,
    tmp_path: Path,
) -> None:
    """There a killed process leaves its connection open, and its transaction to the server."""
    method = "flora-bounded"

    def outside() -> Outside:
        return replace(known(tmp_path, replays[method], kills=1), secrets=[PASSWORD])

    with fresh_database(postgresql) as made:
        url = make_url(made).set(password=PASSWORD).render_as_string(hide_password=False)
        assert lives.live(tmp_path, settings[method], failpoint=place, url=url).killed
        with open_registry(tmp_path, url=url) as registry:
            assert not broken_promises(registry, RUN, outside())
            before = held(registry)
        assert lives.live(tmp_path, settings[method], url=url).code == 0, (tmp_path / LOG).read_text()
        with open_registry(tmp_path, url=url) as registry:
            assert set(before) <= set(held(registry))
            assert not broken_promises(registry, RUN, outside())
            assert published(registry) == undisturbed[method]


@pytest.mark.parametrize("method", [method for method in METHODS if method != "flora-bounded"])
def test_what_the_aggregation_remembers_is_not_forgotten(
    method: str,
    lives: Lives,
    settings: dict[str, RunSettings],
    replays: dict[str, Replay],
    undisturbed: dict[str, list[bytes]],
    tmp_path: Path,
) -> None:
    assert lives.live(tmp_path, settings[method], failpoint="round-closing:2").killed
    assert lives.live(tmp_path, settings[method]).code == 0, (tmp_path / LOG).read_text()
    with open_registry(tmp_path) as registry:
        assert not broken_promises(registry, RUN, known(tmp_path, replays[method], kills=1))
        assert published(registry) == undisturbed[method]


@pytest.mark.parametrize("day", [-24 * 3600.0, 24 * 3600.0])
def test_a_clock_that_jumps_by_a_day_changes_nothing(
    day: float,
    lives: Lives,
    settings: dict[str, RunSettings],
    replays: dict[str, Replay],
    undisturbed: dict[str, list[bytes]],
    tmp_path: Path,
) -> None:
    method = "adam"
    assert lives.live(tmp_path, settings[method], failpoint="submission-recorded:5").killed
    assert lives.live(tmp_path, settings[method], failpoint="version-published:1", clock_s=day).killed
    assert lives.live(tmp_path, settings[method]).code == 0, (tmp_path / LOG).read_text()
    with open_registry(tmp_path) as registry:
        _, second, _ = registry.rounds(RUN)
        assert second.closed_at is not None
        assert (second.closed_at - second.opened_at).total_seconds() == pytest.approx(day, abs=3600.0)
        assert not broken_promises(registry, RUN, known(tmp_path, replays[method], kills=2))
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


@pytest.mark.usefixtures("flower_task")
@pytest.mark.parametrize(
    "stops", [SystemExit(0), KeyboardInterrupt(), RegistryUnavailable("the database is away", passing=True)], ids=repr
)
def test_a_coordinator_that_is_stopped_leaves_the_run_open(
    stops: BaseException, tiny_bert: Path, toy_data: Path, tmp_path: Path, undisturbed: dict[str, list[bytes]]
) -> None:
    """Flower makes SystemExit of SIGTERM, by which a server ends its processes when it is stopped itself."""
    settings = settings_of("flora-bounded", tiny_bert, toy_data)
    clients = nodes(tiny_bert, toy_data)

    def stop(request: str, answer: Answer) -> Reply:
        if json.loads(request)["round_number"] == 2:
            raise stops
        return answer

    clients[1] = replace(clients[1], trains=stop)
    with open_registry(tmp_path) as registry:
        with pytest.raises(type(stops)):
            run_federation(InProcessGrid(clients), settings, registry, run_id=RUN)
        assert registry.run(RUN).state == "running"
        assert [each.state for each in registry.rounds(RUN)] == ["committed", "open"]
        run_federation(InProcessGrid(nodes(tiny_bert, toy_data)), settings, registry, run_id=RUN)
        assert registry.run(RUN).state == "finished"
        assert published(registry) == undisturbed["flora-bounded"]


def test_bytes_are_those_of_all_lives(lives: Lives, settings: dict[str, RunSettings], tmp_path: Path) -> None:
    """The killed one had three answers of the second round on disk, of which a client is not asked again for any."""
    counted = []
    for name, failpoint in [("quiet", ""), ("killed", "submission-recorded:5")]:
        home = tmp_path / name
        assert lives.live(home, settings["flora-bounded"], failpoint=failpoint).killed == bool(failpoint)
        if failpoint:
            assert lives.live(home, settings["flora-bounded"]).code == 0, (home / LOG).read_text()
        with open_registry(home) as registry:
            counted.append([(each.bytes_down, each.bytes_up) for each in registry.rounds(RUN)])
    assert counted[0] == counted[1]
    assert all(down > 0 and up > 0 for down, up in counted[0])


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
            with pytest.raises(AlreadyCoordinated, match="by another process"), only_coordinator(registry, RUN):
                raise AssertionError
        with only_coordinator(registry, RUN):
            pass
