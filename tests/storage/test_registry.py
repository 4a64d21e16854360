"""Names, versions, aliases, tags and lineage, and what happens where the database cannot be used."""

import math
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from tests.storage.filling import SQLITE_ONLY

from pomona.errors import (
    AdapterNotFound,
    BlobCorrupt,
    ConfigError,
    RegistryDamaged,
    RegistryUnavailable,
    VersionConflict,
)
from pomona.storage import engine
from pomona.storage.engine import reading, writing
from pomona.storage.opening import default_home, open_registry
from pomona.storage.records import NewSubmission, NewVersion, Version
from pomona.storage.registry import Registry

Publish = Callable[..., Version]
Submit = Callable[..., NewSubmission]
Make = Callable[..., NewVersion]


def test_a_version_has_what_was_published(registry: Registry, publish: Publish) -> None:
    version = publish()
    assert (version.ref, version.rank, version.kind, version.exactness) == ("demo/1", 2, "round", "exact")
    assert version.base_model == "tiny-base"
    assert version.metrics == {"accuracy": 0.51}
    assert version.recipe == {"task": "classification"}
    assert version.created_at.tzinfo is UTC
    assert abs(datetime.now(UTC) - version.created_at) < timedelta(minutes=1)
    assert len(registry.payload("demo/1")) == version.bytes


def test_a_reference_names_a_number_an_alias_or_the_newest(registry: Registry, publish: Publish) -> None:
    publish(1)
    publish(2)
    registry.set_alias("demo", "champion", 1)
    assert [registry.resolve(ref).number for ref in ("demo/1", "demo@champion", "demo")] == [1, 1, 2]


@pytest.mark.parametrize(
    ("ref", "hint"),
    [
        ("demi/1", "did you mean demo?"),
        ("zzz", "there are demo"),
        ("demo/9", "has 1 to 1 and demo@champion"),
        ("demo/0", "has 1 to 1"),
        ("demo/99999999999999999999", "has 1 to 1"),
        ("demo/-1", "has 1 to 1"),
        ("demo/\N{SUPERSCRIPT TWO}", "has 1 to 1"),
        ("demo@challenger", "demo@champion"),
        ("demo/1/1", "has 1 to 1"),
        ("", "there are demo"),
        ("' OR 1=1 --", "there are demo"),
    ],
)
def test_an_unknown_reference_names_what_there_is(registry: Registry, publish: Publish, ref: str, hint: str) -> None:
    publish()
    registry.set_alias("demo", "champion", 1)
    with pytest.raises(AdapterNotFound) as caught:
        registry.resolve(ref)
    assert hint in str(caught.value)


def test_an_adapter_without_versions_says_so(registry: Registry) -> None:
    with pytest.raises(AdapterNotFound, match="demo has none yet"):
        registry.resolve("demo")
    (summary,) = registry.adapters()
    assert (summary.versions, summary.latest) == (0, None)


def test_nothing_changes_a_version(registry: Registry, publish: Publish) -> None:
    before = publish()
    payload = registry.payload("demo/1")
    registry.set_tag("demo/1", "stage", "test")
    registry.set_alias("demo", "champion", 1)
    publish(2)
    with pytest.raises(IntegrityError, match="a version is never changed"), writing(registry._engine) as connection:
        connection.execute(sa.text("UPDATE version SET rank = 99"))
    after = registry.resolve("demo/1")
    unchanged = ("sha256", "rank", "recipe", "metrics", "created_at", "run_id", "round_number")
    assert [getattr(after, name) for name in unchanged] == [getattr(before, name) for name in unchanged]
    assert registry.payload("demo/1") == payload


def test_a_changed_byte_of_a_version_is_noticed(registry: Registry, publish: Publish) -> None:
    path = registry.blobs.path(publish().sha256)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BlobCorrupt, match="bytes were changed"):
        registry.payload("demo")


def test_aliases_move_and_their_moves_are_kept(registry: Registry, publish: Publish) -> None:
    publish(1)
    publish(2)
    assert registry.set_alias("demo", "champion", 1).aliases == ("champion",)
    assert registry.set_alias("demo", "champion", 2).number == 2
    assert registry.resolve("demo/1").aliases == ()
    assert registry.adapters()[0].aliases == {"champion": 2}
    registry.remove_alias("demo", "champion")
    with pytest.raises(AdapterNotFound):
        registry.remove_alias("demo", "champion")
    with reading(registry._engine) as connection:
        moves = connection.execute(sa.text("SELECT version_id FROM alias_history ORDER BY id")).scalars().all()
    assert moves == [1, 2, None]


@pytest.mark.parametrize("alias", ["", "3", "Champion", "1st", "a b", "a/b", "a" * 65, "a\n"])
def test_a_malformed_alias_is_refused(registry: Registry, publish: Publish, alias: str) -> None:
    publish()
    with pytest.raises(ConfigError, match="expected an alias"):
        registry.set_alias("demo", alias, 1)


def test_an_alias_cannot_point_at_nothing(registry: Registry, publish: Publish) -> None:
    publish()
    with pytest.raises(AdapterNotFound):
        registry.set_alias("demo", "champion", 2)


def test_a_tag_is_replaced(registry: Registry, publish: Publish) -> None:
    publish()
    registry.set_tag("demo", "stage", "test")
    assert registry.set_tag("demo/1", "stage", "live").tags == {"stage": "live"}
    with pytest.raises(ConfigError, match="tag key"):
        registry.set_tag("demo", "=x", "")


@pytest.mark.parametrize("value", ["a\x00b", "a\udc80"])
def test_a_tag_that_cannot_be_stored_as_typed_is_refused(registry: Registry, publish: Publish, value: str) -> None:
    publish()
    with pytest.raises(ConfigError, match="expected a tag value of characters that can be stored"):
        registry.set_tag("demo/1", "stage", value)
    assert registry.resolve("demo/1").tags == {}


@pytest.mark.parametrize("ref", ["a\udc80", "a\udc80/1", "demo@a\udc80", "demo/\udc80", "a\x00", "demo@a\x00"])
def test_a_reference_that_no_database_takes_is_not_found(registry: Registry, publish: Publish, ref: str) -> None:
    publish()
    with pytest.raises(AdapterNotFound, match="there is no"):
        registry.resolve(ref)


def test_half_a_surrogate_pair_is_no_crash_of_the_driver(registry: Registry) -> None:
    with pytest.raises(ConfigError, match=r"got U\+DC80"):
        registry.run("a\udc80")


def test_the_lineage_leads_to_the_first_version(registry: Registry, publish: Publish) -> None:
    for number in (1, 2, 3):
        publish(number)
    node = registry.lineage("demo")
    assert (node.version.ref, node.kind) == ("demo/3", "")
    (parent,) = node.parents
    assert (parent.version.ref, parent.kind, parent.coefficient) == ("demo/2", "parent", 1.0)
    assert parent.parents[0].version.ref == "demo/1"
    assert parent.parents[0].parents == []
    sent = [(item.client, item.weight, item.version) for item in parent.submissions]
    assert sent == [("anna", 0.25, "demo/2"), ("bert", 0.75, "demo/2")]


def test_a_long_lineage_needs_no_deep_recursion(registry: Registry, publish: Publish) -> None:
    publish()
    with writing(registry._engine) as connection:
        columns = "adapter_name, blob_sha256, bytes, base_sha256, rank, kind, exactness, retained_energy, recipe"
        connection.execute(
            sa.text(
                f"INSERT INTO version ({columns}, created_at, id, version) SELECT {columns}, created_at, "
                ":number, :number FROM version WHERE id = 1"
            ),
            [{"number": number} for number in range(2, 2001)],
        )
        connection.execute(
            sa.text("INSERT INTO lineage_edge VALUES (:number, :number - 1, 'parent', 1.0)"),
            [{"number": number} for number in range(2, 2001)],
        )
    node, depth = registry.lineage("demo"), 1
    while node.parents:
        node, depth = node.parents[0], depth + 1
    assert (depth, node.version.number) == (2000, 1)


def test_numbers_that_are_not_finite_survive_as_unknown(
    registry: Registry, make_version: Make, submission: Submit
) -> None:
    registry.set_initial_metrics("run-1", {"loss": math.inf, "accuracy": 0.1})
    initial = registry.run("run-1").initial_metrics
    assert math.isnan(initial["loss"])
    assert initial["accuracy"] == 0.1
    registry.open_round("run-1", 1, parent=None, cohort=[])
    recipe = {"task": "classification", "norms": [1.0, math.nan], "ranks": (4, 8)}
    version = registry.publish_round(make_version(metrics={"loss": math.nan}, recipe=recipe))
    assert math.isnan(version.metrics["loss"])
    assert version.recipe == {"task": "classification", "norms": [1.0, None], "ranks": [4, 8]}


def test_a_run_is_taken_up_only_as_it_was(registry: Registry) -> None:
    start = partial(registry.start_run, run_id="run-1", adapter="demo", base_sha256="b" * 64)
    registry.finish_run("run-1", "failed", "power cut")
    assert registry.run("run-1").reason == "power cut"
    resumed = start(settings_json="{}")
    assert (resumed.state, resumed.reason, resumed.finished_at) == ("running", "", None)
    with pytest.raises(VersionConflict, match="other settings"):
        start(settings_json='{"rounds": 4}')
    assert [run.id for run in registry.runs()] == ["run-1"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a@b", "-x", "a" * 101])
def test_a_malformed_adapter_name_is_refused(registry: Registry, name: str) -> None:
    with pytest.raises(ConfigError, match="adapter name"):
        registry.start_run(run_id="run-2", adapter=name, base_sha256="b" * 64, settings_json="{}")
    assert len(registry.runs()) == 1


def test_a_client_that_enrols_again_is_the_same_client(registry: Registry) -> None:
    registry.enrol_client("run-1", name="anna", rank=4, num_examples=10)
    registry.enrol_client("run-1", name="bert", rank=8, num_examples=0, excluded="no examples")
    registry.enrol_client("run-1", name="anna", rank=4, num_examples=11)
    found = [(client.name, client.num_examples, client.excluded) for client in registry.clients("run-1")]
    assert found == [("anna", 11, ""), ("bert", 0, "no examples")]
    with pytest.raises(ConfigError, match="client name"):
        registry.enrol_client("run-1", name="a" * 201, rank=4, num_examples=1)


def test_it_opens_again_with_everything_in_it(registry: Registry, publish: Publish, home: Path) -> None:
    payload = registry.payload(publish().ref)
    registry.close()
    with open_registry(home, read_only=True) as again:
        assert again.payload("demo") == payload
        assert [run.id for run in again.runs()] == ["run-1"]


def test_a_reader_writes_nothing(registry: Registry, publish: Publish, submission: Submit, home: Path) -> None:
    publish()
    with open_registry(home, read_only=True) as reader, pytest.raises(RegistryUnavailable, match=r"read-?only"):
        reader.set_tag("demo", "stage", "test")
    assert registry.resolve("demo").tags == {}


def test_a_reader_creates_nothing(home: Path) -> None:
    with pytest.raises(RegistryUnavailable, match="there is no registry"):
        open_registry(home, read_only=True)
    assert not home.exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RegistryUnavailable, match="file/home"):
        open_registry(tmp_path / "file" / "home")


def test_a_file_that_is_no_database_is_left_alone(home: Path) -> None:
    home.mkdir()
    (home / "registry.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(RegistryDamaged, match="is damaged: file is not a database; restore a backup"):
        open_registry(home)
    assert (home / "registry.db").read_bytes() == b"this is no database" * 100


@SQLITE_ONLY
def test_a_database_that_stays_locked_is_unavailable(
    registry: Registry, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_S", 0.05)
    with (
        open_registry(home) as other,
        closing(sqlite3.connect(home / "registry.db", isolation_level=None)) as connection,
    ):
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(RegistryUnavailable, match="database is locked"):
            other.set_initial_metrics("run-1", {})
        assert other.runs()[0].id == "run-1"
        connection.execute("ROLLBACK")
        other.set_initial_metrics("run-1", {"accuracy": 1.0})
    assert registry.run("run-1").initial_metrics == {"accuracy": 1.0}


def test_a_folder_without_write_permission_can_be_read_and_not_written() -> None:
    with tempfile.TemporaryDirectory() as name:
        home = Path(name) / "home"
        with open_registry(home) as registry:
            registry.add_base_model("a" * 64, "tiny-base", "a test")
            registry.start_run(run_id="r", adapter="demo", base_sha256="a" * 64, settings_json="{}")
        for path in (Path(name), *Path(name).rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        script = (
            "import ctypes, sys\nfrom pathlib import Path\n"
            "from pomona.errors import RegistryUnavailable\n"
            "from pomona.storage.opening import open_registry\n"
            "if sys.platform == 'linux':  # root may do everything, unless it gives that up\n"
            "    none = (ctypes.c_uint32 * 6)()\n"
            "    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), none)\n"
            "home = Path(sys.argv[1])\n"
            "with open_registry(home, read_only=True) as registry: print(registry.runs()[0].id)\n"
            "try: open_registry(home)\n"
            "except RegistryUnavailable as error: print(error)\n"
        )
        done = subprocess.run([sys.executable, "-c", script, home], check=False, capture_output=True, text=True)
        Path(name).chmod(0o755)
        home.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("r\n")
    assert "cannot be used" in done.stdout


def test_the_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POMONA_HOME", str(tmp_path / "there"))
    assert default_home() == tmp_path / "there"
    monkeypatch.setenv("POMONA_REGISTRY_URL", f"sqlite:///{tmp_path}/elsewhere.db")
    open_registry().close()
    assert (tmp_path / "elsewhere.db").is_file()
    assert not (tmp_path / "there" / "registry.db").exists()


@pytest.mark.parametrize("url", ["nonsense", "mysql://host/db"])
def test_a_url_of_another_database_is_refused_without_its_password(home: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="registry URL"):
        open_registry(home, url=url)


def test_postgresql_that_does_not_answer_is_unavailable_and_its_password_is_kept(home: Path) -> None:
    with pytest.raises(RegistryUnavailable) as caught:
        open_registry(home, url="postgresql://me:hunter2@127.0.0.1:1/pomona")
    assert "127.0.0.1" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@SQLITE_ONLY
def test_every_connection_checks_keys_and_syncs(registry: Registry) -> None:
    with registry._engine.connect() as connection:
        read = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("foreign_keys", "synchronous", "journal_mode")
        ]
        assert read == [1, 2, "wal"]
        with pytest.raises(IntegrityError):
            connection.execute(sa.text("INSERT INTO alias VALUES ('nobody', 'x', 1, '2026-01-01')"))


def test_it_needs_no_torch() -> None:
    script = (
        "import sys, pomona.storage.registry, pomona.storage.export, pomona.cli.registry\n"
        "print(sorted({'torch', 'flwr', 'ray', 'peft', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, env=os.environ.copy()
    )
    assert done.stdout == "[]\n", done.stderr
