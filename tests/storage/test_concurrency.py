"""Several writers at once, threads and processes, on either database: who is first, who is told, what is counted."""

import multiprocessing
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from tests.storage.conftest import BASE, new_version

from pomona.errors import AdapterNotFound, BlobWriteError, RegistryError, VersionConflict
from pomona.storage import tables as t
from pomona.storage.opening import open_registry
from pomona.storage.records import NewImport, NewSubmission, Submission, Version
from pomona.storage.registry import Registry

Submit = Callable[..., NewSubmission]
Publish = Callable[..., Version]


def together(works: Sequence[Callable[[], object]]) -> list[object]:
    """Run all at once and return what each returned or raised."""
    outcomes: list[object] = [None] * len(works)
    barrier = threading.Barrier(len(works))

    def run(place: int) -> None:
        barrier.wait()
        try:
            outcomes[place] = works[place]()
        except Exception as error:
            outcomes[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def in_processes(home: Path, work: Callable[[Registry, int], str], count: int) -> list[str]:
    """Run the same in processes that begin together and return what each says; the surroundings name the database."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(count), context.Queue()
    processes = [context.Process(target=_in_process, args=(home, work, i, barrier, queue)) for i in range(count)]
    for process in processes:
        process.start()
    said = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    return sorted(said)


def _in_process(home: Path, work: Callable[[Registry, int], str], number: int, barrier: object, queue: object) -> None:
    try:
        with open_registry(home) as registry:
            barrier.wait(60)  # type: ignore[attr-defined]
            said = work(registry, number)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    queue.put(said)  # type: ignore[attr-defined]


def rows(registry: Registry, table: sa.Table) -> int:
    with registry._engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0


def successors(registry: Registry, count: int) -> list[str]:
    """Open a round on demo/1 in runs of the same adapter."""
    runs = [f"successor-{i}" for i in range(count)]
    for run_id in runs:
        registry.start_run(run_id=run_id, adapter="demo", base_sha256=BASE, settings_json="{}")
        registry.open_round(run_id, 1, parent="demo/1", cohort=[])
    return runs


def test_of_publishers_that_expect_one_head_the_first_wins(registry: Registry, publish: Publish) -> None:
    publish()
    news = [replace(new_version(run_id=run_id), expected_head="demo/1") for run_id in successors(registry, 8)]
    outcomes = together([partial(registry.publish_round, new) for new in news])
    (winner,) = [each for each in outcomes if isinstance(each, Version)]
    assert winner.ref == "demo/2"
    conflicts = [each for each in outcomes if isinstance(each, VersionConflict)]
    assert len(conflicts) == 7
    assert all("expected demo/1 to be the newest of demo, found demo/2" in str(each) for each in conflicts)
    assert len(registry.versions("demo")) == 2
    (loser, *_) = [new.run_id for new in news if new.run_id != winner.run_id]
    assert registry.rounds(loser)[0].state == "open"
    again = registry.publish_round(replace(new_version(run_id=loser), expected_head="demo/2"))
    assert again.ref == "demo/3"


def test_who_looks_while_a_round_is_published_sees_it_before_or_after(registry: Registry, home: Path) -> None:
    """Several statements read a round: it is never committed, and without its version."""
    registry.open_round("run-1", 1, parent=None, cohort=[])
    published: list[Version] = []
    with open_registry(home) as other:

        def publish_between(_c: object, _cursor: object, statement: str, *_more: object) -> None:
            if statement.startswith("SELECT version.") and not published:
                published.append(other.publish_round(new_version()))

        event.listen(registry._engine, "after_cursor_execute", publish_between)
        (seen,) = registry.rounds("run-1")
        event.remove(registry._engine, "after_cursor_execute", publish_between)
    assert published
    assert (seen.state, seen.version) == ("open", None)
    (after,) = registry.rounds("run-1")
    assert (after.state, after.version) == ("committed", published[0])


def test_a_rule_that_is_broken_is_named_and_not_tried_again(registry: Registry) -> None:
    """It is no contest that somebody else won."""
    registry.open_round("run-1", 1, parent=None, cohort=[])
    tried: list[str] = []

    def note(_c: object, _cursor: object, statement: str, *_more: object) -> None:
        tried.extend([statement] if statement.startswith("INSERT INTO version") else [])

    event.listen(registry._engine, "before_cursor_execute", note)
    wrong = replace(new_version(), exactness="wrong")  # type: ignore[arg-type]
    with pytest.raises(RegistryError, match="ck_version_exactness") as caught:
        registry.publish_round(wrong)
    assert type(caught.value) is RegistryError
    assert len(tried) == 1
    assert registry.rounds("run-1")[0].state == "open"


def test_of_processes_that_expect_one_head_the_first_wins(registry: Registry, publish: Publish, home: Path) -> None:
    publish()
    successors(registry, 3)
    said = in_processes(home, _publish_successor, 3)
    assert said[0].startswith("VersionConflict: expected demo/1 to be the newest of demo, found demo/2")
    assert [each.split(":")[0] for each in said] == ["VersionConflict", "VersionConflict", "demo/2"]


def _publish_successor(registry: Registry, number: int) -> str:
    return registry.publish_round(replace(new_version(run_id=f"successor-{number}"), expected_head="demo/1")).ref


def test_without_an_expectation_all_publishers_win(registry: Registry, publish: Publish) -> None:
    publish()
    news = [new_version(run_id=run_id) for run_id in successors(registry, 6)]
    outcomes = together([partial(registry.publish_round, new) for new in news])
    assert sorted(each.number for each in outcomes if isinstance(each, Version)) == [2, 3, 4, 5, 6, 7]


def test_of_publishers_of_one_round_the_first_wins_and_is_named(registry: Registry) -> None:
    registry.open_round("run-1", 1, parent=None, cohort=[])
    outcomes = together([lambda: registry.publish_round(new_version())] * 6)
    assert [each.ref for each in outcomes if isinstance(each, Version)] == ["demo/1"]
    conflicts = [str(each) for each in outcomes if isinstance(each, VersionConflict)]
    assert conflicts == ["round 1 of run run-1 is committed already as demo/1; it was closed before"] * 5


@pytest.mark.parametrize(("expected", "found"), [("", "demo/1"), ("demo/2", "demo/1"), ("other/1", "demo/1")])
def test_an_expectation_that_fails_publishes_nothing(
    registry: Registry, publish: Publish, expected: str, found: str
) -> None:
    publish()
    new = NewImport(
        adapter="demo", payload=b"x", base_sha256=BASE, base_model="b", base_source="s", rank=1, expected_head=expected
    )
    with pytest.raises(VersionConflict, match=f"expected {expected or 'no version'} .* found {found}"):
        registry.publish_import(new)
    assert len(registry.versions("demo")) == 1
    assert registry.publish_import(replace(new, expected_head="demo/1")).number == 2
    assert registry.publish_import(replace(new, adapter="fresh", expected_head="")).number == 1


def test_fifty_copies_of_an_update_at_once_count_once(registry: Registry, submission: Submit) -> None:
    registry.open_round("run-1", 1, parent=None, cohort=["anna"])
    outcomes = together([lambda: registry.record_submission(submission())] * 50)
    assert {each.id if isinstance(each, Submission) else each for each in outcomes} == {1}
    assert rows(registry, t.submission) == 1
    assert registry.rounds("run-1")[0].accepted == 1


def test_copies_from_processes_count_once(registry: Registry, home: Path) -> None:
    registry.open_round("run-1", 1, parent=None, cohort=["anna"])
    assert in_processes(home, _send_copies, 3) == ["1", "1", "1"]
    assert rows(registry, t.submission) == 1


def _send_copies(registry: Registry, _number: int) -> str:
    outcomes = together([lambda: registry.record_submission(_update("anna"))] * 10)
    return " ".join(sorted({str(each.id) if isinstance(each, Submission) else repr(each) for each in outcomes}))


def _update(client: str, *, number: int = 1, payload: bytes = b"update", nonce: str = "") -> NewSubmission:
    return NewSubmission(
        run_id="run-1",
        round_number=number,
        client=client,
        rank=4,
        alpha=8.0,
        num_examples=100,
        nonce=nonce or f"{client}-{number}",
        status="accepted",
        payload=payload,
    )


def test_a_group_is_recorded_as_one_by_one(registry: Registry) -> None:
    for number in (1, 2):
        registry.open_round("run-1", number, parent=None, cohort=[])
    known = registry.record_submission(_update("anna"))
    registry.fail_round("run-1", 2, "nobody answered")
    group = [
        _update("bert"),
        _update("anna"),
        _update("carl", number=2),
        replace(_update("carl", number=2), status="late"),
        _update("bert", payload=b"other"),
        _update("dora", nonce="bert-1"),
        _update("emil", number=9),
        _update("bert"),
        _update("fred"),
    ]
    bert, anna, closed, late, rival, reused, nowhere, copy, fred = registry.record_submissions(group)
    assert anna == known
    assert isinstance(bert, Submission)
    assert copy == bert
    assert isinstance(late, Submission)
    assert isinstance(fred, Submission)
    assert (bert.status, late.status, fred.status) == ("accepted", "late", "accepted")
    assert [type(each) for each in (closed, rival, reused, nowhere)] == [*[VersionConflict] * 3, AdapterNotFound]
    assert "another accepted update of 'bert'" in str(rival)
    assert "nonce of 'dora'" in str(reused)
    assert [each.client for each in registry.submissions("run-1")] == ["anna", "bert", "fred", "carl"]
    assert registry.record_submissions([]) == []


def test_a_blob_that_cannot_be_written_takes_no_other_down(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.open_round("run-1", 1, parent=None, cohort=[])
    put = registry.blobs.put

    def full(content: bytes) -> str:
        if content == b"bert":
            raise BlobWriteError("no space left on device")
        return put(content)

    monkeypatch.setattr(registry.blobs, "put", full)
    anna, bert, carl = registry.record_submissions(
        [_update(name, payload=name.encode()) for name in ("anna", "bert", "carl")]
    )
    assert isinstance(bert, BlobWriteError)
    assert [each.client for each in (anna, carl) if isinstance(each, Submission)] == ["anna", "carl"]
    assert [each.client for each in registry.submissions("run-1")] == ["anna", "carl"]


def test_a_group_is_on_disk_before_anybody_is_told(registry: Registry) -> None:
    """Whoever reads with another connection sees all of it at the moment that the call returns, and none before."""
    registry.open_round("run-1", 1, parent=None, cohort=[])
    seen: list[int] = []

    def watch(_connection: sa.Connection) -> None:
        seen.append(rows(registry, t.submission))

    event.listen(registry._engine, "commit", watch)
    registry.record_submissions([_update(f"client-{i}") for i in range(20)])
    event.remove(registry._engine, "commit", watch)
    assert max(seen) == 0
    assert rows(registry, t.submission) == 20


def test_groups_from_many_threads_lose_nothing(registry: Registry) -> None:
    """The groups name the same two rounds in opposite orders: nobody waits for the other for ever."""
    for number in (1, 2):
        registry.open_round("run-1", number, parent=None, cohort=[])

    def group(thread: int) -> list[NewSubmission]:
        made = [_update(f"c{thread}-{i}", number=number) for number in (1, 2) for i in range(5)]
        return made[::-1] if thread % 2 else made

    outcomes = together([partial(registry.record_submissions, group(i)) for i in range(6)])
    receipts = [one for each in outcomes if isinstance(each, list) for one in each]
    assert all(isinstance(one, Submission) for one in receipts), outcomes
    assert len(receipts) == 60
    assert [each.accepted for each in registry.rounds("run-1")] == [30, 30]
