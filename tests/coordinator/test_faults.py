"""What goes wrong around a coordinator: late clients, a clock that jumps, a second coordinator, a crash when frozen."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from tests.coordinator.grid import Answer, InProcessGrid, Node, Reply
from tests.coordinator.lives import Lives
from tests.coordinator.run_until_killed import LOG, RUN
from tests.coordinator.test_resume import settings_of
from tests.invariants import Outside, broken_promises
from tests.postgresql import own_server

from pomona.client.trainer import Profile
from pomona.coordinator import round_loop
from pomona.coordinator.federation import run_federation
from pomona.coordinator.recovery import only_coordinator
from pomona.coordinator.replay import Replay
from pomona.errors import AlreadyCoordinated, BlobWriteError, NotEnoughClients, ServerGone
from pomona.failpoints import Place
from pomona.protocol import TRAIN
from pomona.settings import RunSettings
from pomona.storage.opening import open_registry
from pomona.storage.registry import Registry

pytestmark = pytest.mark.usefixtures("quick_polls")

MakeProfile = Callable[..., Profile]
DAY_S = 24 * 3600.0


@pytest.fixture
def settings(tiny_bert: Path, toy_data: Path) -> RunSettings:
    """Return settings of two rounds that wait half a second for their two clients."""
    made = settings_of("flora-bounded", tiny_bert, toy_data)
    cohort = made.cohort.model_copy(update={"min_clients": 2, "join_timeout_s": 5.0, "round_deadline_s": 0.5})
    return made.model_copy(update={"rounds": 2, "cohort": cohort})


def silent_in_round(number: int) -> Callable[[str, Answer], Reply]:
    return lambda request, answer: None if json.loads(request)["round_number"] == number else answer


def two(make_profile: MakeProfile, second: Callable[[str, Answer], Reply]) -> list[Node]:
    return [Node(make_profile(0, count=2)), Node(make_profile(1, count=2), trains=second)]


def statuses(registry: Registry) -> list[tuple[int, str, str]]:
    return sorted((each.round_number, each.client, each.status) for each in registry.submissions(RUN))


def test_who_is_late_is_told_so_and_counts_in_the_next_round(
    registry: Registry, settings: RunSettings, make_profile: MakeProfile
) -> None:
    nodes = two(make_profile, silent_in_round(1))
    run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    assert statuses(registry)[1:] == [
        (1, "client-1", "late"), (2, "client-0", "accepted"), (2, "client-1", "accepted"),
    ]  # fmt: skip
    assert [node.told for node in nodes] == [[], ["it did not come within 0.5 s"]]
    assert not broken_promises(registry, RUN, Outside(replay=Replay(settings)))


def cut_short(payload: bytes) -> bytes:
    return payload[:-4]


def with_a_name_that_is_no_text(_payload: bytes) -> bytes:
    header = rb'{"\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return len(header).to_bytes(8, "little") + header + bytes(4)


@pytest.mark.parametrize("tamper", [cut_short, with_a_name_that_is_no_text])
def test_who_is_rejected_is_told_why(
    tamper: Callable[[bytes], bytes], registry: Registry, settings: RunSettings, make_profile: MakeProfile
) -> None:
    """Whatever stands in the reason, telling it does not end the round."""
    nodes = two(make_profile, lambda _request, answer: (*answer[:2], tamper(answer[2])))
    run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    rejected = [each for each in registry.submissions(RUN) if each.status == "rejected"]
    assert [told[:20] for told in nodes[1].told] == [each.reason[:20] for each in rejected]
    assert len(nodes[1].told) == 2
    assert not broken_promises(registry, RUN, Outside(replay=Replay(settings)))


@pytest.mark.parametrize("place", ["round-frozen", "round-aggregated", "version-blob-written"])
def test_a_round_that_was_frozen_goes_on_with_what_it_had(
    place: str,
    registry: Registry,
    settings: RunSettings,
    make_profile: MakeProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its clients need not even be there, and who was told that it came too late is not counted after all."""

    def die(reached: Place) -> None:
        if reached == place:
            raise ServerGone("as if it had died")

    with monkeypatch.context() as dying:
        dying.setattr(round_loop, "reach", die)
        dying.setattr("pomona.storage.registry.reach", die)
        with pytest.raises(ServerGone):
            run_federation(InProcessGrid(two(make_profile, silent_in_round(1))), settings, registry, run_id=RUN)
    (begun,) = registry.rounds(RUN)
    assert begun.state == "open"
    assert begun.frozen_at is not None
    nodes = two(make_profile, lambda _request, answer: answer)
    run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    assert [[request.round_number for request, _ in node.asked] for node in nodes] == [[2], [2]]
    assert statuses(registry)[:2] == [(1, "client-0", "accepted"), (1, "client-1", "late")]
    assert not broken_promises(registry, RUN, Outside(replay=Replay(settings), orphans=1))


def test_a_round_with_too_few_updates_is_not_frozen(
    registry: Registry, settings: RunSettings, make_profile: MakeProfile
) -> None:
    """Resumed, it asks the others again."""
    strict = settings.model_copy(update={"cohort": settings.cohort.model_copy(update={"min_replies": 2})})
    with pytest.raises(NotEnoughClients):
        run_federation(InProcessGrid(two(make_profile, silent_in_round(1))), strict, registry, run_id=RUN)
    (failed,) = registry.rounds(RUN)
    assert (failed.state, failed.frozen_at) == ("failed", None)
    nodes = two(make_profile, lambda _request, answer: answer)
    run_federation(InProcessGrid(nodes), strict, registry, run_id=RUN)
    assert [[request.round_number for request, _ in node.asked] for node in nodes] == [[2], [1, 2]]


class Forgetful(InProcessGrid):
    """A server that stood still while a round's work was sent to it, and forgot the rest, some times."""

    def __init__(self, nodes: Sequence[Node], *, times: int) -> None:
        super().__init__(nodes)
        self._times = times

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        kept = list(messages)
        if self._times and any(message.metadata.message_type == TRAIN for message in kept):
            self._times -= 1
            super().push_messages(kept[:1])  # its client trains, and nobody waits for what it says
            raise ObjectPushError("object", run_id=1, session_id="expired")
        return super().push_messages(kept)


def test_work_that_did_not_get_to_the_server_is_sent_again(
    registry: Registry, settings: RunSettings, make_profile: MakeProfile, tmp_path: Path
) -> None:
    """Flower forgets what was being sent to it after half a minute; the run would end."""
    settings = settings.model_copy(update={"cohort": settings.cohort.model_copy(update={"round_deadline_s": 60.0})})
    nodes = [Node(make_profile(0, count=2)), Node(make_profile(1, count=2))]
    run_federation(Forgetful(nodes, times=2), settings, registry, run_id=RUN)
    assert registry.run(RUN).state == "finished"
    assert all(status == "accepted" for _, _, status in statuses(registry))
    assert not broken_promises(registry, RUN, Outside(replay=Replay(settings)))
    with open_registry(tmp_path / "quiet") as other:
        quiet = [Node(make_profile(0, count=2)), Node(make_profile(1, count=2))]
        run_federation(InProcessGrid(quiet), settings, other, run_id=RUN)
        expected = [other.payload(each.ref) for each in other.versions(settings.name)]
    assert [registry.payload(each.ref) for each in registry.versions(settings.name)] == expected


def test_a_server_that_never_takes_the_work_ends_the_run(
    registry: Registry, settings: RunSettings, make_profile: MakeProfile
) -> None:
    nodes = [Node(make_profile(0, count=2)), Node(make_profile(1, count=2))]
    with pytest.raises(ObjectPushError):
        run_federation(Forgetful(nodes, times=3), settings, registry, run_id=RUN)
    assert registry.run(RUN).state == "failed"


@pytest.mark.parametrize("jump_s", [-DAY_S, DAY_S])
def test_a_clock_that_jumps_neither_ends_a_round_nor_keeps_it_open(
    jump_s: float,
    registry: Registry,
    settings: RunSettings,
    make_profile: MakeProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = time.time

    def first(_request: str, answer: Answer) -> Reply:
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        return answer

    nodes = [Node(make_profile(0, count=2), trains=first), Node(make_profile(1, count=2), trains=silent_in_round(1))]
    began = time.monotonic()
    run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    assert abs(time.time() - real()) > DAY_S / 2
    assert time.monotonic() - began < 60.0
    assert statuses(registry) == [
        (1, "client-0", "accepted"), (1, "client-1", "late"), (2, "client-0", "accepted"), (2, "client-1", "accepted"),
    ]  # fmt: skip


def test_a_second_coordinator_of_a_run_is_refused_and_changes_nothing(
    tiny_bert: Path, toy_data: Path, tmp_path: Path
) -> None:
    settings = settings_of("flora-bounded", tiny_bert, toy_data)
    with Lives(tiny_bert, toy_data) as lives:
        assert lives.live(tmp_path, settings, failpoint="round-closing:2").killed
        with open_registry(tmp_path) as registry, only_coordinator(registry, RUN):
            before = (registry.run(RUN), registry.rounds(RUN), registry.submissions(RUN))
            assert lives.live(tmp_path, settings).code == 24
            assert "coordinated by another process" in (tmp_path / LOG).read_text()
            assert (registry.run(RUN), registry.rounds(RUN), registry.submissions(RUN)) == before
        assert lives.live(tmp_path, settings).code == 0, "the lock of one that was killed is free"


def test_one_that_was_taken_over_does_not_end_the_run_of_the_other(
    registry: Registry, settings: RunSettings, make_profile: MakeProfile
) -> None:
    """Whatever goes wrong with it then: it meets what the other has written."""
    taken_over = False

    def fails(_request: str, _answer: Answer) -> Reply:
        nonlocal taken_over
        taken_over = True
        raise BlobWriteError("no space left")

    def make_sure() -> None:
        if taken_over:
            raise AlreadyCoordinated("by another process")

    with pytest.raises(AlreadyCoordinated):
        run_federation(InProcessGrid(two(make_profile, fails)), settings, registry, run_id=RUN, make_sure=make_sure)
    assert registry.run(RUN).state == "running"
    assert [each.state for each in registry.rounds(RUN)] == ["open"]


@pytest.mark.parametrize("fraction", [None, 1.0])
def test_one_that_goes_on_waits_for_who_was_there_last(
    fraction: float | None,
    registry: Registry,
    settings: RunSettings,
    make_profile: MakeProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who left before is not waited for, unless cohorts are drawn: then it would be from fewer than before."""
    cohort = settings.cohort.model_copy(update={"fraction": fraction})
    settings = settings.model_copy(update={"rounds": 3, "cohort": cohort})

    def die(reached: Place) -> None:
        if reached == "version-published" and len(registry.versions(settings.name)) == 2:
            raise ServerGone("as if it had died")

    nodes = two(make_profile, lambda _request, answer: answer)
    nodes[1].leaves_after = 1
    with monkeypatch.context() as dying:
        dying.setattr(round_loop, "reach", die)
        with pytest.raises(ServerGone):
            run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    assert [list(each.cohort) for each in registry.rounds(RUN)] == [["client-0", "client-1"], ["client-0"]]
    began = time.monotonic()
    run_federation(InProcessGrid([Node(make_profile(0, count=2))]), settings, registry, run_id=RUN)
    waited = time.monotonic() - began
    assert registry.run(RUN).state == "finished"
    assert (waited >= settings.cohort.join_timeout_s) == (fraction is not None)


def test_a_database_that_restarts_in_mid_round_changes_nothing(
    settings: RunSettings, make_profile: MakeProfile, tmp_path: Path
) -> None:
    """The versions are those of a quiet run."""
    patient = settings.model_copy(update={"cohort": settings.cohort.model_copy(update={"round_deadline_s": 60.0})})
    payloads = []
    with own_server() as server:

        def stop_for_a_while(request: str, answer: Answer) -> Reply:
            if json.loads(request)["round_number"] == 2:
                server.stop()
                threading.Timer(1.0, server.start).start()
            return answer

        quiet, disturbed = f"sqlite:///{tmp_path / 'quiet.db'}", server.url
        for number, (url, trains) in enumerate(
            [(quiet, lambda _request, answer: answer), (disturbed, stop_for_a_while)]
        ):
            with open_registry(tmp_path / str(number), url=url, patience_s=60.0) as registry:
                nodes = [Node(make_profile(0, count=2)), Node(make_profile(1, count=2), trains=trains)]
                versions = run_federation(InProcessGrid(nodes), patient, registry, run_id=RUN)
                payloads.append([registry.payload(version.ref) for version in versions])
                assert not broken_promises(registry, RUN, Outside(replay=Replay(patient)))
    assert len(payloads[0]) == 2
    assert payloads[0] == payloads[1]
