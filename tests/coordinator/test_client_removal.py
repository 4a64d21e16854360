"""A client is forgotten: what is left equals, to the byte, what a run without it would have published."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from tests.coordinator.grid import InProcessGrid, Node

from pomona.cli.forget_client import forget_client
from pomona.client.trainer import Profile
from pomona.coordinator.client_removal import remove_client
from pomona.coordinator.federation import run_federation
from pomona.coordinator.recovery import only_coordinator
from pomona.coordinator.replay import Replay
from pomona.errors import ConfigError, VersionQuarantined
from pomona.settings import RunSettings
from pomona.storage.export import export_peft
from pomona.storage.opening import open_registry
from pomona.storage.registry import Registry
from pomona.storage.verification import verify
from pomona.wire import decode_weights

pytestmark = pytest.mark.usefixtures("quick_polls")

RUN = "run-1"
MakeProfile = Callable[..., Profile]
MakeSettings = Callable[..., RunSettings]


@pytest.fixture
def make_settings(tiny_bert: Path, toy_data: Path) -> MakeSettings:
    def make(*, rounds: int = 2, **sections: Mapping[str, object]) -> RunSettings:
        given: dict[str, object] = {
            "name": "toy",
            "rounds": rounds,
            "seed": 3,
            "model": {"base": str(tiny_bert), "max_length": 16},
            "data": {"source": str(toy_data)},
            "cohort": {"join_timeout_s": 5.0, "round_deadline_s": 30.0},
            "training": {"batch_size": 8, "max_steps": 2, "learning_rate": 1e-2},
            "aggregation": {"max_rank": 8},
        }
        return RunSettings.model_validate({**given, **sections})

    return make


@pytest.fixture
def federate(make_profile: MakeProfile) -> Callable[..., list[str]]:
    def run(
        registry: Registry, settings: RunSettings, clients: Sequence[int], *, late: Sequence[int] = ()
    ) -> list[str]:
        """Run with some of three clients; the late ones come for the last round."""
        nodes = [
            Node(make_profile(i, count=3, rank=2 + i), joins_after=settings.rounds - 1 if i in late else 0)
            for i in clients
        ]
        return [
            each.ref for each in run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN, lasting=False)
        ]

    return run


def payload(registry: Registry, ref: str) -> bytes:
    return registry.blobs.get(registry.resolve(ref).sha256)


@pytest.mark.parametrize(
    "sections", [{}, {"aggregation": {"max_rank": 8, "server_optimizer": {"kind": "fedadam", "learning_rate": 0.1}}}],
    ids=["flora-bounded", "fedadam"],
)  # fmt: skip
def test_who_came_for_the_last_round_is_taken_out_of_it_to_the_byte(
    registry: Registry, tmp_path: Path, make_settings: MakeSettings, federate: Callable[..., list[str]],
    sections: Mapping[str, object],
) -> None:  # fmt: skip
    settings = make_settings(**sections)
    federate(registry, settings, (0, 1, 2), late=(2,))
    with open_registry(tmp_path / "without") as other:
        federate(other, settings, (0, 1))
        expected = payload(other, "toy/2")
    registry.set_alias("toy", "production", 2)

    (removal,), updates = remove_client(registry, "client-2")

    assert payload(registry, "toy/3") == expected
    assert payload(registry, "toy/2") != expected
    assert (removal.certificate.method, removal.certificate.exactness) == ("drop-block", "exact")
    assert (removal.certificate.version, removal.certificate.affected) == ("toy/3", ("toy/2",))
    assert (removal.rounds_lost, updates) == (0, 1)
    assert removal.certificate.evidence["accuracy_after"] == registry.resolve("toy/3").metrics["accuracy"]
    assert registry.resolve("toy@production").ref == "toy/3"
    assert verify(registry).problems == ()


def test_rounds_after_the_first_that_it_had_a_part_in_are_lost(
    registry: Registry, tmp_path: Path, make_settings: MakeSettings, federate: Callable[..., list[str]]
) -> None:
    """Dropping its block from the last round alone is no forgetting: the others trained on what it had a part in."""
    settings = make_settings()
    federate(registry, settings, (0, 1, 2))
    with open_registry(tmp_path / "without") as other:
        federate(other, settings, (0, 1))
        expected, never = payload(other, "toy/1"), payload(other, "toy/2")
    dropped = Replay(settings).payload(registry, registry.rounds(RUN)[-1], without={"client-2"})
    assert _distance(dropped, never) > 0.05

    (removal,), updates = remove_client(registry, "client-2")

    assert payload(registry, "toy/3") == expected
    assert (removal.rounds_lost, updates) == (1, 2)
    assert removal.certificate.affected == ("toy/1", "toy/2")


def test_a_round_that_would_have_failed_without_it_is_rolled_back(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, tmp_path: Path
) -> None:
    settings = make_settings(cohort={"join_timeout_s": 5.0, "round_deadline_s": 30.0, "min_replies": 2})
    nodes = [Node(make_profile(i, count=3), joins_after=i // 2, leaves_after=1 if i == 0 else 9) for i in range(3)]
    run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    registry.set_alias("toy", "production", 2)

    (removal,), _ = remove_client(registry, "client-2")

    assert removal.certificate.method == "rollback"
    assert payload(registry, "toy/3") == payload(registry, "toy/1")
    assert registry.resolve("toy@production").ref == "toy/3"
    assert "needs 2 updates, 1 are left" in str(removal.certificate.evidence["why_no_block_was_dropped"])
    with pytest.raises(VersionQuarantined):
        export_peft(registry, "toy/2", tmp_path / "export")

    (removal,), _ = remove_client(registry, "client-1")
    assert removal.certificate.version is None, "it was needed in the first round, so nothing is left"
    assert all(each.quarantined for each in registry.versions("toy"))
    assert "production" not in registry.adapters()[0].aliases
    assert verify(registry).problems == ()


def test_one_after_another_leaves_what_those_who_stay_made(
    registry: Registry, tmp_path: Path, make_settings: MakeSettings, federate: Callable[..., list[str]]
) -> None:
    settings = make_settings(rounds=1)
    federate(registry, settings, (0, 1, 2))
    with open_registry(tmp_path / "without") as other:
        federate(other, settings, (0,))
        expected = payload(other, "toy/1")
    remove_client(registry, "client-2")
    (removal,), _ = remove_client(registry, "client-1")
    assert payload(registry, "toy/3") == expected
    assert removal.certificate.method == "drop-block"
    assert removal.certificate.affected == ("toy/2",), "the first was in quarantine already"
    assert [bool(each.quarantined) for each in registry.versions("toy")] == [True, True, False]
    assert verify(registry).problems == ()


def test_its_updates_are_gone_and_those_of_others_are_there(
    registry: Registry, make_settings: MakeSettings, federate: Callable[..., list[str]]
) -> None:
    federate(registry, make_settings(rounds=1), (0, 1))
    sent = {each.client: each.sha256 for each in registry.submissions(RUN)}
    remove_client(registry, "client-1")
    assert registry.blobs.path(sent["client-0"]).exists()
    assert not registry.blobs.path(sent["client-1"]).exists()
    (told,) = [each for each in registry.audit() if each.event == "update-withdrawn"]
    assert told.details["sha256"] == sent["client-1"]
    assert registry.touched_by("client-1") == []
    (mine,) = [each for each in registry.clients(RUN) if each.name == "client-1"]
    assert "forgotten on request" in mine.excluded


def test_interrupted_it_is_asked_for_again_and_nothing_is_done_twice(
    registry: Registry,
    make_settings: MakeSettings,
    federate: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    federate(registry, make_settings(rounds=1), (0, 1))
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "withdraw", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remove_client(registry, "client-1")
    removals, updates = remove_client(registry, "client-1")
    assert (removals, updates) == ([], 1)
    assert len(registry.certificates("toy")) == 1
    assert len(registry.versions("toy")) == 2
    assert remove_client(registry, "client-1") == ([], 0)
    forget_client("client-1", home=tmp_path / "registry", as_json=False)
    assert "client-1 was forgotten already, and nothing was left to do: certificate 1" in capsys.readouterr().out


def test_killed_where_nothing_is_left_it_is_certified_when_asked_for_again(
    registry: Registry,
    make_settings: MakeSettings,
    federate: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Quarantine without a certificate would have said that nothing was left to do."""
    federate(registry, make_settings(rounds=1), (0,))
    with monkeypatch.context() as patch:
        patch.setattr("pomona.storage.certificates.record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remove_client(registry, "client-0")
    (removal,), _ = remove_client(registry, "client-0")
    assert removal.certificate.affected == ("toy/1",)
    assert "nothing is left" in registry.resolve("toy/1").quarantined


def test_a_run_that_was_cut_off_does_not_go_on_from_what_is_in_quarantine(
    registry: Registry, make_settings: MakeSettings, federate: Callable[..., list[str]]
) -> None:
    federate(registry, make_settings(rounds=1), (0, 1))
    registry.finish_run(RUN, "failed", "cut off")
    with only_coordinator(registry, RUN), pytest.raises(ConfigError, match="goes on at this moment"):
        remove_client(registry, "client-1")
    assert not any(each.quarantined for each in registry.versions("toy"))
    remove_client(registry, "client-1")
    assert registry.run(RUN).state == "finished"
    assert "forgotten" in registry.run(RUN).reason


def test_what_hides_its_clients_stays_and_is_certified(
    registry: Registry, make_settings: MakeSettings, federate: Callable[..., list[str]]
) -> None:
    privacy = {"unit": "client", "population": "toys", "population_size": 3, "epsilon": 1e6, "delta": 1e-3}
    settings = make_settings(
        rounds=1, privacy={**privacy, "noise_multiplier": 1.0},
        aggregation={"strategy": "fedit", "rank": 4, "max_rank": 8},
    )  # fmt: skip
    federate(registry, settings, (0, 1, 2))
    (removal,), updates = remove_client(registry, "client-2")
    assert (removal.certificate.exactness, removal.certificate.affected, updates) == ("certified-DP", (), 0)
    assert removal.certificate.evidence["delta"] == 1e-3
    assert not registry.resolve("toy/1").quarantined
    assert remove_client(registry, "client-2") == ([], 0)


def test_a_name_that_nobody_knows_is_refused(registry: Registry) -> None:
    with pytest.raises(ConfigError, match="no run of this registry has a client 'nobody'"):
        remove_client(registry, "nobody")


def _distance(one: bytes, other: bytes) -> float:
    a, b = (decode_weights(each)[0].layers for each in (one, other))
    moved = sum(float((a[name].delta() - b[name].delta()).pow(2).sum()) for name in b)
    return float((moved / sum(float(each.delta().pow(2).sum()) for each in b.values())) ** 0.5)
