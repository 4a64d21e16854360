"""What only PostgreSQL does, or does in another way; the other tests of this folder run on it too."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.exc import IntegrityError
from tests.postgresql import ONLY_ADDED_TO

from pomona.errors import ConfigError, RegistryUnavailable, VersionConflict
from pomona.storage.backup import write_backup
from pomona.storage.collection import collect_garbage
from pomona.storage.engine import create_engine
from pomona.storage.opening import open_registry
from pomona.storage.records import NewSubmission, NewVersion, Version
from pomona.storage.registry import Registry
from pomona.storage.schema import alembic_config
from pomona.storage.tables import metadata
from pomona.storage.verification import verify

BASE = "b" * 64
Submit = Callable[..., NewSubmission]
Make = Callable[..., NewVersion]


@pytest.fixture
def registry(home: Path, url: str) -> Iterator[Registry]:
    with open_registry(home, url=url) as registry:
        registry.add_base_model(BASE, "tiny-base", "a test")
        registry.start_run(run_id="run-1", adapter="demo", base_sha256=BASE, settings_json="{}")
        registry.open_round("run-1", 1, parent=None, cohort=["anna"])
        yield registry


def together(*works: Callable[[], object]) -> list[Exception]:
    """Run all at once and return what they raised."""
    errors: list[Exception] = []
    barrier = threading.Barrier(len(works))

    def guarded(work: Callable[[], object]) -> None:
        try:
            barrier.wait()
            work()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_the_migrations_end_at_the_tables_and_can_be_undone(url: str) -> None:
    engine = create_engine(url, read_only=False)
    with engine.begin() as connection:
        config = alembic_config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        command.downgrade(config, "base")
        assert sa.inspect(connection).get_table_names() == ["alembic_version"]
        command.upgrade(config, "head")
    engine.dispose()


def test_a_fresh_database_can_be_opened_many_times_at_once(home: Path, url: str) -> None:
    assert together(*[lambda: open_registry(home, url=url).close()] * 4) == []


def test_a_version_is_never_changed(registry: Registry, make_version: Make, url: str) -> None:
    registry.publish_round(make_version())
    engine = create_engine(url, read_only=False)
    with pytest.raises(IntegrityError, match="a version is never changed"), engine.begin() as connection:
        connection.execute(sa.text("UPDATE version SET rank = 99"))
    engine.dispose()


@pytest.mark.parametrize("table", ONLY_ADDED_TO)
def test_what_is_only_added_to_cannot_be_emptied(registry: Registry, url: str, table: str) -> None:
    before = registry.audit()
    engine = create_engine(url, read_only=False)
    with pytest.raises(IntegrityError, match="is only added to"), engine.begin() as connection:
        connection.execute(sa.text(f"TRUNCATE {table}"))
    engine.dispose()
    assert registry.audit() == before != []


def test_an_update_has_one_receipt_and_no_rival(registry: Registry, submission: Submit) -> None:
    receipts: list[int] = []
    assert together(*[lambda: receipts.append(registry.record_submission(submission()).id)] * 6) == []
    assert receipts == [1] * 6
    with pytest.raises(VersionConflict, match="another accepted"):
        registry.record_submission(submission(payload=b"other"))
    garbage = submission("bad\x00", num_examples=2**70, alpha=float("nan"), status="rejected", reason="\ud800")
    assert registry.record_submission(garbage).num_examples is None


def test_publishers_on_one_parent_lose_nothing(registry: Registry, make_version: Make) -> None:
    registry.publish_round(make_version(metrics={"loss": float("nan")}))
    runs = [f"run-{letter}" for letter in "abcdef"]
    for run_id in runs:
        registry.start_run(run_id=run_id, adapter="demo", base_sha256=BASE, settings_json="{}")
        registry.open_round(run_id, 1, parent="demo/1", cohort=[])
    published: list[Version] = []

    def publish(run_id: str) -> Callable[[], object]:
        return lambda: published.append(registry.publish_round(make_version(run_id=run_id)))

    assert together(*map(publish, runs)) == []
    assert sorted(version.number for version in published) == [2, 3, 4, 5, 6, 7]
    assert registry.lineage("demo").parents[0].version.ref == "demo/1"
    assert registry.adapters()[0].versions == 7


def test_notes_are_kept_and_a_reader_writes_nothing(
    registry: Registry, make_version: Make, home: Path, url: str
) -> None:
    registry.publish_round(make_version())
    registry.set_alias("demo", "champion", 1)
    registry.set_tag("demo@champion", "stage", "live")
    registry.enrol_client("run-1", name="anna", rank=4, num_examples=1)
    registry.enrol_client("run-1", name="anna", rank=4, num_examples=2)
    with open_registry(home, url=url, read_only=True) as reader:
        version = reader.resolve("demo@champion")
        assert (version.tags, version.aliases) == ({"stage": "live"}, ("champion",))
        assert version.created_at.utcoffset() is not None
        assert [client.num_examples for client in reader.clients("run-1")] == [2]
        assert reader.rounds("run-1")[0].state == "committed"
        with pytest.raises(RegistryUnavailable, match="read-only"):
            reader.set_tag("demo", "stage", "test")


def test_it_is_verified_and_its_garbage_collected(registry: Registry, submission: Submit, make_version: Make) -> None:
    registry.record_submission(submission())
    registry.publish_round(make_version(weights={"anna": 1.0}))
    registry.set_alias("demo", "champion", 1)
    orphan = registry.blobs.put(b"nobody names this")
    report = verify(registry)
    assert (report.problems, report.blobs, len(report.notes)) == ((), 2, 1)
    assert [blob.sha256 for blob in collect_garbage(registry, grace_s=0.0).blobs] == [orphan]
    registry.blobs.path(registry.resolve("demo").sha256).unlink()
    assert [item.about for item in verify(registry).problems] == ["version demo/1"]


def test_contradictions_are_found_here_too(registry: Registry, make_version: Make, url: str) -> None:
    registry.publish_round(make_version())
    engine = create_engine(url, read_only=False)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE round SET state = 'open'"))
    engine.dispose()
    found = [(item.about, item.found) for item in verify(registry).problems]
    assert found == [("round 1 of run run-1", "is open, but has a version")]


def test_a_backup_is_left_to_its_own_tools(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pg_dump"):
        write_backup(registry, tmp_path / "backup.tar")
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == []
