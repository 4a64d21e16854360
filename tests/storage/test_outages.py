"""The database goes away for a while, breaks a connection, undoes a transaction: nothing is lost or done twice."""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.pool import PoolProxiedConnection
from tests.postgresql import Server, fresh_database, own_server

from pomona.coordinator.recovery import only_coordinator
from pomona.errors import AdapterNotFound, AlreadyCoordinated, RegistryUnavailable, VersionConflict
from pomona.storage import engine as engines
from pomona.storage.engine import SessionLock
from pomona.storage.opening import open_registry
from pomona.storage.records import NewImport, NewSubmission, NewVersion
from pomona.storage.registry import Registry
from pomona.storage.verification import verify

BASE = "b" * 64
PATIENCE_S = 60.0
Submit = Callable[..., NewSubmission]
Make = Callable[..., NewVersion]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A PostgreSQL of this file's own, which can be stopped."""
    with own_server() as server:
        yield server


@pytest.fixture
def url(server: Server) -> Iterator[str]:
    with fresh_database(server.url) as url:
        yield url


def opened(home: Path, url: str | None = None, *, patience_s: float = PATIENCE_S) -> Registry:
    registry = open_registry(home, url=url, patience_s=patience_s)
    registry.add_base_model(BASE, "tiny-base", "a test")
    registry.start_run(run_id="run-1", adapter="demo", base_sha256=BASE, settings_json="{}")
    registry.open_round("run-1", 1, parent=None, cohort=["anna"])
    return registry


@pytest.fixture
def registry(home: Path, url: str) -> Iterator[Registry]:
    with opened(home, url) as registry:
        yield registry


def execute(url: str, statement: str) -> None:
    other = engines.create_engine(url, read_only=False).execution_options(isolation_level="AUTOCOMMIT")
    with other.connect() as connection:
        connection.execute(sa.text(statement))
    other.dispose()


def cut_off(url: str) -> None:
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    execute(url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")


def lose_the_word_of_a_commit(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the next commit of a change be done and the connection break before anybody hears of it, once."""
    dialect, changed, lost = registry._engine.dialect, list[str](), list[str]()
    commit = dialect.do_commit

    def note(_connection: object, _cursor: object, statement: str, *_more: object) -> None:
        changed.extend([statement] if statement.startswith("INSERT INTO audit") else [])

    def commit_and_break(connection: PoolProxiedConnection) -> None:
        commit(connection)
        if changed and not lost and connection.dbapi_connection is not None:
            lost.append("lost")
            connection.dbapi_connection.close()
            raise psycopg.OperationalError("server closed the connection unexpectedly")

    event.listen(registry._engine, "after_cursor_execute", note)
    monkeypatch.setattr(dialect, "do_commit", commit_and_break)
    return lost


@pytest.mark.parametrize("mode", ["immediate", "fast"])
def test_a_stopped_database_is_waited_for(
    mode: str, server: Server, registry: Registry, submission: Submit, make_version: Make
) -> None:
    registry.record_submission(submission())
    server.stop(mode)
    back = threading.Timer(1.0, server.start)
    back.start()
    began = time.monotonic()
    assert registry.publish_round(make_version(weights={"anna": 1.0})).ref == "demo/1"
    assert time.monotonic() - began > 0.9
    back.join()
    assert [each.status for each in registry.submissions("run-1")] == ["accepted"]
    assert verify(registry).problems == ()


def test_nobody_who_only_looks_waits_for_it(home: Path, server: Server, url: str) -> None:
    """A command says what is wrong; a run would be over."""
    with opened(home, url, patience_s=0.0) as registry:
        server.stop()
        try:
            began = time.monotonic()
            with pytest.raises(RegistryUnavailable, match="check that it runs") as caught:
                registry.runs()
            assert time.monotonic() - began < 5.0
            assert caught.value.passing
        finally:
            server.start()


def test_a_connection_that_is_cut_within_a_transaction_leaves_nothing_of_it(
    registry: Registry, url: str, submission: Submit, make_version: Make
) -> None:
    registry.record_submission(submission())
    cut: list[str] = []

    def cut_once(_c: object, _cursor: object, statement: str, *_more: object) -> None:
        if statement.startswith("INSERT INTO version") and not cut:
            cut.append(statement)
            cut_off(url)

    event.listen(registry._engine, "after_cursor_execute", cut_once)
    assert registry.publish_round(make_version(weights={"anna": 1.0})).ref == "demo/1"
    assert cut
    assert [each.number for each in registry.versions("demo")] == [1]
    assert registry.broken_audit() == []
    assert verify(registry).problems == ()


def test_an_update_whose_commit_nobody_heard_of_counts_once(
    registry: Registry, submission: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(registry.audit())
    lost = lose_the_word_of_a_commit(registry, monkeypatch)
    receipt = registry.record_submission(submission())
    assert lost
    assert registry.submissions("run-1") == [receipt]
    assert [each.event for each in registry.audit()[before:]] == ["submission-recorded"]


def test_a_version_whose_commit_nobody_heard_of_is_published_once(
    registry: Registry, submission: Submit, make_version: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.record_submission(submission())
    lost = lose_the_word_of_a_commit(registry, monkeypatch)
    version = registry.publish_round(make_version(weights={"anna": 1.0}))
    assert lost
    assert registry.versions("demo") == [version]
    assert verify(registry).problems == ()


def test_who_does_not_look_whether_it_was_committed_gets_a_conflict_with_itself(
    home: Path, url: str, submission: Submit, make_version: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(home, url, patience_s=0.0) as registry:
        registry.record_submission(submission())
        lost = lose_the_word_of_a_commit(registry, monkeypatch)
        with pytest.raises(RegistryUnavailable):
            registry.publish_round(make_version(weights={"anna": 1.0}))
        assert lost
        with pytest.raises(VersionConflict, match="committed already as demo/1"):
            registry.publish_round(make_version(weights={"anna": 1.0}))


def test_an_alias_whose_move_nobody_heard_of_moved_once(
    registry: Registry, make_version: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.publish_round(make_version())
    lost = lose_the_word_of_a_commit(registry, monkeypatch)
    assert registry.set_alias("demo", "champion", 1).aliases == ("champion",)
    assert lost
    assert len(registry.alias_history("demo", "champion")) == 1


@pytest.mark.parametrize(
    ("change", "event"),
    [
        (lambda r: r.remove_alias("demo", "live"), "alias-removed"),
        (lambda r: r.set_tag("demo/1", "site", "b"), "tag-set"),
        (lambda r: r.finish_run("run-1", "failed", "no reason"), "run-failed"),
        (lambda r: r.enrol_client("run-1", name="carl", rank=4, num_examples=9), "client-enrolled"),
        (lambda r: r.set_initial_metrics("run-1", {"accuracy": 0.1}), "run-scored"),
        (lambda r: r.log_event("garbage-collected", "3 blobs", bytes=7), "garbage-collected"),
    ],
)
def test_a_change_whose_commit_nobody_heard_of_stands_in_the_log_once(
    registry: Registry,
    make_version: Make,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Registry], object],
    event: str,
) -> None:
    registry.publish_round(make_version())
    registry.set_alias("demo", "live", 1)
    before = len(registry.audit())
    lost = lose_the_word_of_a_commit(registry, monkeypatch)
    change(registry)
    assert lost
    assert [each.event for each in registry.audit()[before:]] == [event]


def test_an_import_and_a_failed_round_whose_commit_nobody_heard_of(
    registry: Registry, make_version: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = NewImport(
        adapter="other", payload=make_version().payload, base_sha256=BASE, base_model="tiny-base",
        base_source="a test", rank=2, recipe={},
    )  # fmt: skip
    with monkeypatch.context() as once:
        lost = lose_the_word_of_a_commit(registry, once)
        assert registry.publish_import(new).ref == "other/1"
        assert lost
    with monkeypatch.context() as once:
        lost = lose_the_word_of_a_commit(registry, once)
        assert registry.fail_round("run-1", 1, "why").reason == "why"
        assert lost
    assert [each.number for each in registry.versions("other")] == [1]


def test_waiting_for_a_database_makes_nothing_done(server: Server, registry: Registry, make_version: Make) -> None:
    """Where it could not even be reached, nothing was committed: what looks done was done by somebody else."""
    new = NewImport(
        adapter="other", payload=make_version().payload, base_sha256=BASE, base_model="tiny-base",
        base_source="a test", rank=2, expected_head="",
    )  # fmt: skip
    registry.publish_import(new)
    for change, refusal in (
        (lambda: registry.remove_alias("demo", "never"), AdapterNotFound),
        (lambda: registry.publish_import(new), VersionConflict),
    ):
        server.stop()
        back = threading.Timer(0.5, server.start)
        back.start()
        with pytest.raises(refusal):
            change()
        back.join()
    assert [each.number for each in registry.versions("other")] == [1]


def test_serialisation_failures_are_tried_again(
    home: Path, url: str, make_version: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the database isolates strictly, every writer who waited for another one is undone."""
    execute(url, f"ALTER DATABASE {sa.make_url(url).database} SET default_transaction_isolation = 'serializable'")
    undone: list[BaseException] = []
    lost_contest = engines.lost_contest

    def note(error: BaseException | None) -> bool:
        undone.extend([error] if error is not None and lost_contest(error) else [])
        return lost_contest(error)

    monkeypatch.setattr("pomona.storage.retrying.lost_contest", note)
    with opened(home, url, patience_s=0.0) as registry:
        errors: list[Exception] = []
        barrier = threading.Barrier(4)

        def publish(run_id: str) -> None:
            try:
                registry.start_run(run_id=run_id, adapter="demo", base_sha256=BASE, settings_json="{}")
                registry.open_round(run_id, 1, parent=None, cohort=[])
                barrier.wait(30)
                registry.publish_round(make_version(run_id=run_id))
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=publish, args=(f"run-{letter}",)) for letter in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert undone
        assert sorted(each.number for each in registry.versions("demo")) == [1, 2, 3, 4]
        assert registry.broken_audit() == []


def test_a_database_that_may_only_be_read_is_not_waited_for(registry: Registry, url: str, submission: Submit) -> None:
    execute(url, f"ALTER DATABASE {sa.make_url(url).database} SET default_transaction_read_only = on")
    cut_off(url)
    began = time.monotonic()
    with pytest.raises(RegistryUnavailable, match="read-only") as caught:
        registry.record_submission(submission())
    assert time.monotonic() - began < PATIENCE_S / 2
    assert not caught.value.passing
    assert registry.submissions("run-1") == []


def test_two_machines_with_one_postgresql_do_not_coordinate_one_run(home: Path, url: str, tmp_path: Path) -> None:
    """A lock on a file would hold on one of them only."""
    with opened(home, url) as here, open_registry(tmp_path / "elsewhere", url=url) as there:
        with only_coordinator(here, "run-1"):
            with pytest.raises(AlreadyCoordinated, match="another process"), only_coordinator(there, "run-1"):
                pass
            with only_coordinator(there, "run-2"):
                pass
        with only_coordinator(there, "run-1") as make_sure:
            cut_off(url)
            with only_coordinator(here, "run-1", wait_s=5.0), pytest.raises(AlreadyCoordinated):
                make_sure()


def test_a_coordinator_takes_its_lock_again_when_the_connection_broke(home: Path, url: str, tmp_path: Path) -> None:
    with (
        opened(home, url) as here,
        open_registry(tmp_path / "elsewhere", url=url) as there,
        only_coordinator(here, "run-1") as make_sure,
    ):
        for _ in range(2):
            make_sure()
            cut_off(url)
        make_sure()
        with pytest.raises(AlreadyCoordinated), only_coordinator(there, "run-1"):
            pass


@pytest.fixture
def engine(url: str) -> Iterator[sa.Engine]:
    engine = engines.create_engine(url, read_only=False)
    yield engine
    engine.dispose()


def instead_of_the_lock(engine: sa.Engine, act: Callable[[str], str]) -> None:
    """Let ``act`` say what is executed when a lock is asked for, once."""
    acted: list[str] = []

    def act_once(_c: object, _cursor: object, statement: str, parameters: object, *_more: object) -> tuple[str, object]:
        if "pg_try_advisory_lock" in statement and not acted:
            acted.append(statement)
            return act(statement), parameters
        return statement, parameters

    event.listen(engine, "before_cursor_execute", act_once, retval=True)


def test_a_lock_whose_query_failed_was_not_taken(engine: sa.Engine) -> None:
    """The connection lives, and is no sign of a lock."""
    mine, theirs = SessionLock(engine, "run 1"), SessionLock(engine, "run 1")
    instead_of_the_lock(engine, lambda _statement: "SELECT 1 / 0")
    with pytest.raises(RegistryUnavailable, match="division by zero"):
        mine.take()
    assert theirs.take()
    assert not mine.take()
    theirs.release()
    assert mine.take()
    mine.release()


def test_a_lock_is_taken_after_a_connection_that_broke_when_it_was_asked_for(engine: sa.Engine, url: str) -> None:
    mine = SessionLock(engine, "run 1")

    def break_off(statement: str) -> str:
        cut_off(url)
        return statement

    instead_of_the_lock(engine, break_off)
    with pytest.raises(RegistryUnavailable) as caught:
        mine.take()
    assert caught.value.passing
    assert mine.take()
    assert mine.take()
    mine.release()


def test_a_locked_file_is_waited_for(home: Path, submission: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "BUSY_TIMEOUT_S", 0.05)
    with opened(home) as patient, open_registry(home) as hasty:
        with closing(sqlite3.connect(home / "registry.db", isolation_level=None, check_same_thread=False)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(RegistryUnavailable, match="locked") as caught:
                hasty.record_submission(submission())
            assert caught.value.passing
            threading.Timer(0.5, other.execute, ["ROLLBACK"]).start()
            patient.record_submission(submission())
        assert len(patient.submissions("run-1")) == 1
