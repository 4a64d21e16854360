"""A migration is right when it ends at the tables and can be undone, and when it runs once."""

import fcntl
import multiprocessing
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from io import StringIO
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine.interfaces import ReflectedIndex

from pomona.errors import RegistryDamaged, RegistryUnavailable, SchemaTooNew
from pomona.storage.engine import create_engine
from pomona.storage.opening import open_registry
from pomona.storage.registry import Registry
from pomona.storage.schema import alembic_config
from pomona.storage.tables import metadata


@pytest.fixture
def config() -> Iterator[Config]:
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    with engine.begin() as connection:
        config = alembic_config()
        config.attributes["connection"] = connection
        yield config
    engine.dispose()


def test_the_last_migration_ends_at_the_tables(config: Config) -> None:
    command.upgrade(config, "head")
    context = MigrationContext.configure(config.attributes["connection"], opts={"compare_type": True})
    assert compare_metadata(context, metadata) == []


def test_the_migration_has_the_constraints_that_comparing_does_not_see(config: Config) -> None:
    command.upgrade(config, "head")
    built = _constraints(config.attributes["connection"])
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    with engine.begin() as connection:
        metadata.create_all(connection)
        assert built == _constraints(connection)
    engine.dispose()


def test_every_step_can_be_undone_and_redone(config: Config) -> None:
    connection = config.attributes["connection"]
    for step in reversed(list(ScriptDirectory.from_config(config).walk_revisions())):
        command.upgrade(config, step.revision)
        command.downgrade(config, "-1")
        command.upgrade(config, step.revision)
    command.downgrade(config, "base")
    assert sa.inspect(connection).get_table_names() == ["alembic_version"]


def test_the_migrations_can_be_written_for_postgresql() -> None:
    text = StringIO()
    config = alembic_config()
    config.output_buffer = text
    config.attributes["dialect"] = "postgresql"
    command.upgrade(config, "head", sql=True)
    assert "WHERE status = 'accepted'" in text.getvalue()
    assert "EXECUTE FUNCTION version_is_immutable()" in text.getvalue()


def test_an_older_registry_keeps_its_rows(home: Path) -> None:
    """A rebuilt table whose old one is dropped would take lineage, aliases and submissions with it."""
    home.mkdir()
    engine = create_engine(f"sqlite:///{home / 'registry.db'}", read_only=False)
    config = alembic_config()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(sa.text("INSERT INTO adapter (name, created_at) VALUES ('demo', '2026-01-01')"))
        connection.execute(
            sa.text("INSERT INTO base_model (sha256, name, source, added_at) VALUES ('b', 'b', 'b', '2026-01-01')")
        )
        connection.execute(
            sa.text(
                "INSERT INTO version (adapter_name, version, blob_sha256, bytes, base_sha256, rank, kind, exactness, "
                "retained_energy, recipe, created_at) "
                "VALUES ('demo', 1, 'c', 1, 'b', 4, 'round', 'exact', 1.0, '{}', '2026-01-01')"
            )
        )
        connection.execute(
            sa.text(
                "INSERT INTO alias (adapter_name, alias, version_id, moved_at) VALUES ('demo', 'x', 1, '2026-01-01')"
            )
        )
    engine.dispose()
    open_registry(home).close()
    with closing(sqlite3.connect(home / "registry.db")) as connection:
        assert connection.execute("SELECT adapter_name, rank, exactness FROM version").fetchall() == [
            ("demo", 4, "exact")
        ]
        assert connection.execute("SELECT alias, version_id FROM alias").fetchall() == [("x", 1)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        with pytest.raises(sqlite3.IntegrityError, match="a version is never changed"):
            connection.execute("UPDATE version SET rank = 5")


def _one_round(connection: sa.Connection) -> None:
    for statement in (
        "INSERT INTO adapter VALUES ('demo', '2026-01-01')",
        "INSERT INTO base_model VALUES ('b', 'b', 'b', '2026-01-01')",
        "INSERT INTO run VALUES ('run-1', 'demo', '{}', 'b', 'running', '', '2026-01-01', NULL, '{}')",
        "INSERT INTO round VALUES ('run-1', 1, 'open', '', NULL, '[]', 2, '2026-01-01', NULL, 0, 0, 0.0, NULL)",
    ):
        connection.execute(sa.text(statement))


@pytest.fixture(params=["sqlite", "postgresql"])
def older(request: pytest.FixtureRequest, home: Path) -> sa.Engine:
    """An empty database, at which ``open_registry`` finds what was made of it."""
    home.mkdir()
    url = request.getfixturevalue("url") if request.param == "postgresql" else f"sqlite:///{home / 'registry.db'}"
    return create_engine(url, read_only=False)


def upgraded(connection: sa.Connection, revision: str) -> None:
    config = alembic_config()
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def opened_again(engine: sa.Engine, home: Path) -> Registry:
    return open_registry(home, url=engine.url.render_as_string(hide_password=False))


def test_a_registry_with_rows_that_are_no_longer_allowed_is_left_alone_with_a_reason(
    older: sa.Engine, home: Path
) -> None:
    """A coordinator from before 0008 refused such a pair, other writers need not have."""
    with older.begin() as connection:
        upgraded(connection, "0007")
        _one_round(connection)
        insert = sa.text(
            "INSERT INTO submission (run_id, round, client, sha256, bytes, nonce, status, reason, received_at) "
            "VALUES ('run-1', 1, :client, 'a', 1, 'n', :status, '', '2026-01-01 00:00:00')"
        )
        pair = [{"client": "anna", "status": "accepted"}, {"client": "bert", "status": "quarantined"}]
        connection.execute(insert, pair)
    with pytest.raises(RegistryDamaged, match=r"nonce.*nothing was changed: mend those rows"):
        opened_again(older, home)
    with older.begin() as connection:
        assert connection.scalar(sa.text("SELECT version_num FROM alembic_version")) == "0007"
        assert connection.scalar(sa.text("SELECT count(*) FROM submission")) == 2
        connection.execute(sa.text("UPDATE submission SET nonce = 'm' WHERE client = 'bert'"))
    older.dispose()
    with opened_again(older, home) as registry:
        assert [each.nonce for each in registry.submissions("run-1")] == ["n", "m"]


def test_parents_from_before_their_kinds_were_checked_are_kept(older: sa.Engine, home: Path) -> None:
    with older.begin() as connection:
        upgraded(connection, "0009")
        _one_round(connection)
        insert = sa.text(
            "INSERT INTO version (adapter_name, version, blob_sha256, bytes, base_sha256, rank, kind, exactness, "
            "retained_energy, recipe, created_at) "
            "VALUES ('demo', :number, 'c', 1, 'b', 4, 'import', 'exact', 1.0, '{}', '2026-01-01 00:00:00')"
        )
        connection.execute(insert, [{"number": 1}, {"number": 2}])
        connection.execute(sa.text("INSERT INTO lineage_edge VALUES (2, 1, 'parent', 1.0)"))
    older.dispose()
    with opened_again(older, home) as registry:
        (parent,) = registry.lineage("demo/2").parents
        assert (parent.version.ref, parent.kind, parent.coefficient) == ("demo/1", "parent", 1.0)
        assert registry.contradictions() == []
    with older.begin() as connection:
        assert connection.execute(sa.text("SELECT child, parent FROM lineage")).all() == [("demo/2", "demo/1")]
    older.dispose()


def test_a_newer_registry_is_refused_and_left_alone(home: Path) -> None:
    open_registry(home).close()
    with closing(sqlite3.connect(home / "registry.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    before = (home / "registry.db").read_bytes()
    for read_only in (False, True):
        with pytest.raises(SchemaTooNew, match=r"9999.*upgrade this one"):
            open_registry(home, read_only=read_only)
    assert (home / "registry.db").read_bytes() == before


FOREIGN = {
    "another program's tables": "CREATE TABLE bookmark (id INTEGER)",
    "its migrations": "CREATE TABLE alembic_version (version_num TEXT); CREATE TABLE bookmark (id INTEGER);"
    "INSERT INTO alembic_version VALUES ('1ee7beef')",
    "numbered like ours": "CREATE TABLE alembic_version (version_num TEXT); CREATE TABLE bookmark (id INTEGER);"
    "INSERT INTO alembic_version VALUES ('0001')",
}


@pytest.mark.parametrize("script", FOREIGN.values(), ids=FOREIGN)
def test_another_programs_database_is_refused_and_left_alone(home: Path, script: str) -> None:
    home.mkdir()
    with closing(sqlite3.connect(home / "registry.db")) as connection, connection:
        connection.executescript(script)
    before = (home / "registry.db").read_bytes()
    for read_only in (False, True):
        with pytest.raises(RegistryUnavailable, match="is not a Pomona registry"):
            open_registry(home, read_only=read_only)
    assert (home / "registry.db").read_bytes() == before


def test_a_damaged_database_is_called_so(home: Path) -> None:
    open_registry(home).close()
    whole = (home / "registry.db").read_bytes()
    (home / "registry.db").write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with pytest.raises(RegistryDamaged, match="is damaged: database disk image is malformed; restore a backup"):
        open_registry(home)


@pytest.mark.parametrize("empty", [False, True], ids=["no folder", "an empty file"])
def test_a_registry_is_created_only_where_that_is_meant(home: Path, *, empty: bool) -> None:
    if empty:
        home.mkdir()
        (home / "registry.db").touch()
    with pytest.raises(RegistryUnavailable, match="there is no registry in"):
        open_registry(home, create=False)
    assert (home / "registry.db").exists() == empty
    assert not empty or (home / "registry.db").read_bytes() == b""


def test_an_unfinished_registry_is_not_migrated_by_a_reader(home: Path) -> None:
    home.mkdir()
    sqlite3.connect(home / "registry.db").close()
    (home / "registry.db").touch()
    with pytest.raises(RegistryUnavailable, match="read-only"):
        open_registry(home, read_only=True)


def test_threads_that_open_a_fresh_registry_together_all_succeed(home: Path) -> None:
    errors: list[BaseException] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        try:
            barrier.wait()
            open_registry(home).close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_processes_that_open_a_fresh_registry_together_all_succeed(home: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_open_and_add, args=(home, digit)) for digit in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    with closing(sqlite3.connect(home / "registry.db")) as connection:
        assert connection.execute("SELECT count(*) FROM base_model").fetchone() == (2,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_opening_waits_for_whoever_migrates(home: Path) -> None:
    home.mkdir()
    opening = threading.Thread(target=lambda: open_registry(home).close())
    with (home / "registry.lock").open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        opening.start()
        opening.join(timeout=0.5)
        assert opening.is_alive()
    opening.join()
    open_registry(home, read_only=True).close()


def _open_and_add(home: Path, digit: str) -> None:
    with open_registry(home) as registry:
        registry.add_base_model(digit * 64, digit, "a process")


def _constraints(connection: sa.Connection) -> dict[str, list[str]]:
    inspector = sa.inspect(connection)
    return {
        table.name: sorted(
            [f"{item['name']} {item['sqltext']}" for item in inspector.get_check_constraints(table.name)]
            + [f"{item['name']} {item['column_names']}" for item in inspector.get_unique_constraints(table.name)]
            + [_index(item) for item in inspector.get_indexes(table.name)]
            + [f"{item['name']} {item['referred_table']}" for item in inspector.get_foreign_keys(table.name)]
        )
        for table in metadata.sorted_tables
    }


def _index(item: ReflectedIndex) -> str:
    only = item.get("dialect_options", {}).get("sqlite_where", "")
    return f"{item['name']} {item['unique']} {item['column_names']} {only}"
