"""A backup is whole and comes back whole, or there is none; a hostile one writes nothing anywhere."""

import io
import json
import os
import random
import sqlite3
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from pomona.errors import BackupDamaged, BlobCorrupt, BlobWriteError, ConfigError, PomonaError
from pomona.storage.archive import MANIFEST
from pomona.storage.backup import restore_backup, write_backup
from pomona.storage.blobs import BlobStore
from pomona.storage.opening import open_registry
from pomona.storage.records import NewSubmission, Version
from pomona.storage.registry import Registry
from pomona.storage.verification import verify

Publish = Callable[..., Version]
Submit = Callable[..., NewSubmission]


@pytest.fixture
def backend() -> str:
    """PostgreSQL has its own tools."""
    return "sqlite"


@pytest.fixture
def backup(registry: Registry, publish: Publish, tmp_path: Path) -> Path:
    publish(1)
    publish(2)
    registry.set_alias("demo", "champion", 1)
    return write_backup(registry, tmp_path / "out" / "backup.tar").path


def members(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path) as tar:
        return [(info, file.read() if (file := tar.extractfile(info)) else b"") for info in tar]


def rewritten(path: Path, content: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:") as tar:
        for info, data in content:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def refused(path: Path, tmp_path: Path, *, match: str | None = None) -> None:
    """The backup is refused in words, and nothing is left anywhere."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BackupDamaged, match=match):
        restore_backup(path, tmp_path / "new")
    assert sorted(tmp_path.rglob("*")) == before


def test_everything_comes_back(registry: Registry, backup: Path, tmp_path: Path) -> None:
    done = restore_backup(backup, tmp_path / "deep" / "new")
    assert (done.path, done.blobs) == (tmp_path / "deep" / "new", 5)
    with open_registry(done.path) as restored:
        assert verify(restored).problems == ()
        assert restored.versions("demo") == registry.versions("demo")
        assert restored.submissions("run-1") == registry.submissions("run-1")
        assert restored.payload("demo@champion") == registry.payload("demo/1")
        restored.set_alias("demo", "champion", 2)
    with closing(sqlite3.connect(done.path / "registry.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert [path.name for path in backup.parent.iterdir()] == ["backup.tar"]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["new"]


def test_the_first_member_lists_the_others(backup: Path) -> None:
    (first, text), *others = members(backup)
    listed = json.loads(text)
    assert first.name == MANIFEST
    assert [info.name for info, _ in others] == ["registry.db", *(f"blobs/{sha}" for sha in sorted(listed["blobs"]))]
    assert [info.size for info, _ in others] == [listed["database_bytes"], *listed["blobs"].values()]


def test_orphans_stay_behind_and_an_empty_registry_is_one_too(registry: Registry, tmp_path: Path) -> None:
    registry.blobs.put(b"nobody names this")
    path = write_backup(registry, tmp_path / "backup.tar").path
    restore_backup(path, tmp_path / "new")
    with open_registry(tmp_path / "new") as restored:
        assert (list(restored.blobs.listing()), restored.versions("demo")) == ([], [])


def test_what_is_written_meanwhile_is_in_the_next(
    registry: Registry, submission: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.open_round("run-1", 1, parent=None, cohort=["anna", "bert"])
    registry.record_submission(submission("anna", payload=b"before"))
    listing = BlobStore.listing

    def during(blobs: BlobStore) -> object:
        if blobs.root == registry.blobs.root:
            registry.record_submission(submission("bert", payload=b"after"))
        return listing(blobs)

    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "listing", during)
        path = write_backup(registry, tmp_path / "backup.tar").path
    restore_backup(path, tmp_path / "new")
    with open_registry(tmp_path / "new") as restored:
        assert [item.client for item in restored.submissions("run-1")] == ["anna"]
        assert verify(restored).problems == verify(restored).notes == ()


def test_a_damaged_registry_makes_no_backup(registry: Registry, publish: Publish, tmp_path: Path) -> None:
    path = registry.blobs.path(publish().sha256)
    for damage in (lambda: path.write_bytes(b"changed"), path.unlink):
        damage()
        with pytest.raises(BlobCorrupt):
            write_backup(registry, tmp_path / "backup.tar")
        assert [item.name for item in tmp_path.iterdir()] == ["home"]


def test_an_interruption_leaves_no_file(
    registry: Registry, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()

    def interrupted(_done: int, _all: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_backup(registry, tmp_path / "backup.tar", progress=interrupted)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(BlobWriteError, match="No space left"):
            write_backup(registry, tmp_path / "backup.tar")
    assert [item.name for item in tmp_path.iterdir()] == ["home"]


def test_nothing_is_replaced(registry: Registry, backup: Path, home: Path) -> None:
    with pytest.raises(ConfigError, match="replaces nothing"):
        write_backup(registry, backup)
    with pytest.raises(ConfigError, match="not empty"):
        restore_backup(backup, home)
    with pytest.raises(ConfigError, match="not empty"):
        restore_backup(backup, backup)
    with pytest.raises(ConfigError, match="no file"):
        restore_backup(home / "nothing.tar", home.with_name("new"))


def test_an_empty_folder_is_filled(backup: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    restore_backup(backup, tmp_path / "new")
    assert (tmp_path / "new" / "registry.db").is_file()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_backup_cut_off_anywhere_is_refused(backup: Path, tmp_path: Path, share: float) -> None:
    content = backup.read_bytes()
    end = sum(512 + (info.size + 511) // 512 * 512 for info, _ in members(backup))
    backup.write_bytes(content[: int(end * share)])
    refused(backup, tmp_path)


def test_no_flipped_byte_goes_unseen(backup: Path, tmp_path: Path) -> None:
    """It is refused, or what comes back is the same: padding, and fields that are not looked at."""
    content, rng = backup.read_bytes(), random.Random(0)
    for attempt in range(30):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        backup.write_bytes(flipped)
        target = tmp_path / f"new{attempt}"
        try:
            restore_backup(backup, target)
        except PomonaError:
            assert not target.exists()
            continue
        with open_registry(target) as restored:
            assert verify(restored).problems == ()


def test_a_hostile_member_reaches_no_file(backup: Path, tmp_path: Path) -> None:
    whole = members(backup)
    for name in ("../escaped", "/tmp/escaped", "blobs/../../escaped", "registry.db"):
        extra = tarfile.TarInfo(name)
        refused(rewritten(backup, [*whole, (extra, b"x")]), tmp_path)
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
        link = tarfile.TarInfo(whole[-1][0].name)
        link.type, link.linkname = kind, "/etc/passwd"
        refused(rewritten(backup, [*whole[:-1], (link, b"")]), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda listed: listed | {"format": "pomona-backup/2"},
        lambda listed: listed | {"more": 1},
        lambda listed: listed | {"blobs": {"../../escaped": 1}},
        lambda listed: listed | {"blobs": listed["blobs"] | {"a" * 64: 5}},
        lambda listed: listed | {"blobs": {sha: size + 1 for sha, size in listed["blobs"].items()}},
        lambda listed: listed | {"blobs": {}},
        lambda listed: listed | {"database_sha256": "a" * 64},
        lambda _: [],
    ],
)
def test_a_list_that_lies_is_refused(
    backup: Path, tmp_path: Path, change: Callable[[dict[str, object]], object]
) -> None:
    (first, text), *others = members(backup)
    refused(rewritten(backup, [(first, json.dumps(change(json.loads(text))).encode()), *others]), tmp_path)


def test_what_is_no_backup_is_refused(backup: Path, tmp_path: Path) -> None:
    for content in (b"", b"nothing of the kind" * 100):
        backup.write_bytes(content)
        refused(backup, tmp_path)
    refused(rewritten(backup, [(tarfile.TarInfo("holiday.jpg"), b"x")]), tmp_path, match="first member")
    refused(rewritten(backup, [(tarfile.TarInfo(MANIFEST), b"{")]), tmp_path, match="list cannot be read")


def test_postgresql_is_told_what_to_use(tmp_path: Path) -> None:
    from pomona.storage.engine import copy_database, create_engine

    engine = create_engine("postgresql://nobody@127.0.0.1:1/nothing", read_only=True)
    with pytest.raises(ConfigError, match=r"pg_dump.*folder"):
        copy_database(engine, tmp_path / "copy.db", blobs=tmp_path / "blobs")
