"""Taking a registry away whole, and putting it back."""

import os
import secrets
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import file_digest
from pathlib import Path

from pomona import __version__
from pomona.errors import BackupDamaged, BlobWriteError, ConfigError
from pomona.storage import ledger_witness
from pomona.storage.archive import (
    BLOBS,
    DATABASE,
    BackupManifest,
    add_bytes,
    add_file,
    add_manifest,
    read_manifest,
    read_members,
)
from pomona.storage.blobs import BlobStore
from pomona.storage.engine import sqlite_url
from pomona.storage.opening import open_registry
from pomona.storage.registry import Registry

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """A backup that was written, or restored.

    Attributes:
        path: The file, or the folder that it was restored to.
        blobs: Number of blobs in it.
        bytes: Their size, and that of the database.
        created_at: When the database was copied, ISO 8601.
    """

    path: Path
    blobs: int
    bytes: int
    created_at: str


def write_backup(registry: Registry, target: Path, *, progress: Progress = lambda _done, _all: None) -> Backup:
    """Write the database and every blob that it names into one file, whole or not at all.

    Others may write meanwhile. The database is copied as it is at one moment, and the copy says which blobs belong to
    it: they were on disk before it named them, and what is named is never deleted. Every blob is read and hashed.

    Args:
        registry: On SQLite; may be open read-only.
        target: The file to create.
        progress: Called with the number of blobs written, and that of all.

    Raises:
        ConfigError: ``target`` exists, or the database is PostgreSQL.
        BlobCorrupt: A blob is missing or was changed; there is no file.
        BlobWriteError: The file could not be written; there is none.
        RegistryUnavailable: The database cannot be read.
    """
    target = target.expanduser().resolve()
    if target.exists():
        raise ConfigError(f"{target} exists; a backup replaces nothing, name another file")
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    with _new_file(target) as partial, tempfile.TemporaryDirectory(dir=target.parent, prefix=".pomona-") as folder:
        copy = Path(folder) / DATABASE
        registry.copy_database(copy)
        with open_registry(Path(folder), url=sqlite_url(copy, read_only=True), read_only=True) as snapshot:
            named, needed = snapshot.named_blobs(), {item.sha256 for item in snapshot.references()}
        here = {blob.sha256: blob.bytes for blob in registry.blobs.listing()}
        blobs = {sha256: here.get(sha256, 0) for sha256 in sorted(needed | (named & here.keys()))}
        with copy.open("rb") as stream:
            digest = file_digest(stream, "sha256").hexdigest()
        manifest = BackupManifest(
            format="pomona-backup/1",
            created_at=created_at,
            written_by=__version__,
            database_sha256=digest,
            database_bytes=copy.stat().st_size,
            blobs=blobs,
        )
        with tarfile.open(partial, "x:", format=tarfile.PAX_FORMAT) as tar:
            add_manifest(tar, manifest)
            add_file(tar, DATABASE, copy)
            for done, sha256 in enumerate(manifest.blobs, 1):
                add_bytes(tar, BLOBS + sha256, registry.blobs.get(sha256))
                progress(done, len(blobs))
    return _summary(target, manifest)


def restore_backup(source: Path, home: Path, *, progress: Progress = lambda _done, _all: None) -> Backup:
    """Make a registry of a backup, whole or not at all; older ones are migrated.

    Nothing is unpacked by its own name: what the list says is a blob is put into a store under the hash of its bytes.

    Args:
        source: A file that :func:`write_backup` made.
        home: The registry's folder, which is not there or is empty.
        progress: Called with the number of members read, and that of all.

    Raises:
        ConfigError: ``home`` is not empty, or there is no file ``source``.
        BackupDamaged: The file is no backup, or is not whole; nothing was restored.
        SchemaTooNew: A newer package wrote it; nothing was restored.
        BlobWriteError: It could not be written; nothing was restored.
    """
    home = home.expanduser().resolve()
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise ConfigError(f"{home} is not empty; a backup is restored into a new folder only, name one by --home")
    if not source.is_file():
        raise ConfigError(f"there is no file {source}")
    staging = home.with_name(f".{home.name}.{secrets.token_hex(6)}")
    try:
        staging.mkdir(parents=True)
        manifest = _unpack(source, staging, progress)
        open_restored(staging).close()
        ledger_witness.mark_restored(staging / ledger_witness.FOLDER)
        staging.rename(home)
        _sync(home.parent)
    except (tarfile.TarError, EOFError) as error:
        raise BackupDamaged(f"{source} is no backup or is cut off: {error}") from error
    except OSError as error:
        raise BlobWriteError(
            f"cannot restore {source} to {home}: {error.strerror or error}; nothing was restored"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return _summary(home, manifest)


def _unpack(source: Path, folder: Path, progress: Progress) -> BackupManifest:
    blobs = BlobStore(folder / "blobs")
    with tarfile.open(source, "r:") as tar:
        manifest = read_manifest(tar, folder=folder)
        for done, member in enumerate(read_members(tar, manifest, folder=folder), 1):
            if member.name == DATABASE:
                with (folder / DATABASE).open("xb") as database:
                    member.copy_to(database)
                    database.flush()
                    os.fsync(database.fileno())
            else:
                blobs.put(member.content())
            progress(done, len(manifest.blobs) + 1)
    return manifest


def open_restored(home: Path) -> Registry:
    """Open a registry that was restored, whatever other database the surroundings name."""
    return open_registry(home, url=sqlite_url(home / DATABASE, read_only=False))


@contextmanager
def _new_file(target: Path) -> Iterator[Path]:
    """Lend a temporary name beside ``target``; give the file its own name at the end, once it is on disk."""
    partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise BlobWriteError(
            f"cannot write the backup {target}: {error.strerror or error}; there is no such file"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _summary(path: Path, manifest: BackupManifest) -> Backup:
    return Backup(
        path=path,
        blobs=len(manifest.blobs),
        bytes=sum(manifest.blobs.values()) + manifest.database_bytes,
        created_at=manifest.created_at,
    )
