"""The form of a backup: one tar file that says first what is in it.

The first member, ``pomona-backup.json``, lists the size and SHA-256 of the database and of every blob; then come
``registry.db`` and the blobs, each under ``blobs/<sha256>``. A reader takes nothing that is not listed, and misses
nothing that is.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pomona.errors import BackupDamaged, PayloadError
from pomona.payload import parse_object

MANIFEST = "pomona-backup.json"
DATABASE = "registry.db"
BLOBS = "blobs/"

_MAX_MANIFEST_BYTES = 1 << 28
_CHUNK_BYTES = 1 << 20
_HASH = r"^[0-9a-f]{64}$"


class BackupManifest(BaseModel):
    """What a backup holds.

    Attributes:
        format: The form, as described above.
        created_at: When the database was copied, ISO 8601 in UTC.
        written_by: The package's version.
        database_sha256: Hash of ``registry.db``.
        database_bytes: Its size.
        blobs: Size of each blob by its hash.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: str = Field(pattern=r"^pomona-backup/1$")
    created_at: str
    written_by: str
    database_sha256: str = Field(pattern=_HASH)
    database_bytes: int = Field(ge=0)
    blobs: Mapping[str, int]

    def members(self) -> dict[str, tuple[str, int]]:
        """Return the hash and size of each member after the manifest, by its name, in order."""
        blobs = {BLOBS + sha256: (sha256, size) for sha256, size in sorted(self.blobs.items())}
        return {DATABASE: (self.database_sha256, self.database_bytes)} | blobs


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a backup that is on its list, its content not yet read."""

    name: str
    sha256: str
    size: int
    stream: BinaryIO

    def copy_to(self, target: BinaryIO) -> None:
        """Copy the content.

        Raises:
            BackupDamaged: It is cut off or has another hash.
        """
        digest, left = hashlib.sha256(), self.size
        while left and (chunk := self.stream.read(min(left, _CHUNK_BYTES))):
            digest.update(chunk)
            target.write(chunk)
            left -= len(chunk)
        if left or digest.hexdigest() != self.sha256:
            raise BackupDamaged(
                f"{self.name} in the backup is cut off or was changed: its SHA-256 is not {self.sha256}"
            )

    def content(self) -> bytes:
        """Return the content; BackupDamaged as in :meth:`copy_to`."""
        buffer = BytesIO()
        self.copy_to(buffer)
        return buffer.getvalue()


def add_manifest(tar: tarfile.TarFile, manifest: BackupManifest) -> None:
    """Write the first member."""
    add_bytes(tar, MANIFEST, json.dumps(manifest.model_dump(), indent=1).encode())


def add_bytes(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Write a member; its owner and time say nothing about where it was written."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, BytesIO(content))


def add_file(tar: tarfile.TarFile, name: str, path: Path) -> None:
    """Write a file as a member."""
    info = tarfile.TarInfo(name)
    info.size = path.stat().st_size
    with path.open("rb") as stream:
        tar.addfile(info, stream)


def read_manifest(tar: tarfile.TarFile, *, folder: Path) -> BackupManifest:
    """Read the first member of a backup.

    Args:
        tar: The backup, nothing of it read.
        folder: Where members would go, for the check of their names.

    Raises:
        BackupDamaged: It is no backup, or of a form that is not known.
    """
    info = tar.next()
    if info is None or info.name != MANIFEST:
        raise BackupDamaged(
            f"expected a backup, whose first member is {MANIFEST}, got {info.name if info else 'nothing'!r}"
        )
    if info.size > _MAX_MANIFEST_BYTES:
        raise BackupDamaged(f"expected a list of at most {_MAX_MANIFEST_BYTES} bytes in the backup, got {info.size}")
    try:
        manifest = BackupManifest.model_validate(
            parse_object(_stream(tar, info, folder).read().decode(), source="the backup's list")
        )
    except (ValidationError, PayloadError, UnicodeDecodeError) as error:
        raise BackupDamaged(f"the backup's list cannot be read: {error}") from error
    for sha256, size in manifest.blobs.items():
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef") or size < 0:
            raise BackupDamaged(f"the backup's list names a blob that is none: {sha256[:80]!r} of {size} bytes")
    return manifest


def read_members(tar: tarfile.TarFile, manifest: BackupManifest, *, folder: Path) -> Iterator[Member]:
    """Yield every member that is listed, once; each must be read before the next is asked for.

    Raises:
        BackupDamaged: A member is not on the list, is no plain file, comes twice, has another size, or is missing.
    """
    missing = manifest.members()
    while (info := tar.next()) is not None:
        if info.name not in missing:
            raise BackupDamaged(f"the backup has a member {info.name[:200]!r} that its list has not, or has it twice")
        sha256, size = missing.pop(info.name)
        if info.size != size:
            raise BackupDamaged(f"{info.name} in the backup should have {size} bytes, it has {info.size}")
        yield Member(info.name, sha256, size, _stream(tar, info, folder))
    if missing:
        raise BackupDamaged(f"the backup is cut off: {len(missing)} members are missing, the first is {min(missing)}")


def _stream(tar: tarfile.TarFile, info: tarfile.TarInfo, folder: Path) -> BinaryIO:
    try:
        tarfile.data_filter(info, str(folder))
    except tarfile.FilterError as error:
        raise BackupDamaged(f"the backup has a member that no backup has: {error}") from error
    if info.type not in {tarfile.REGTYPE, tarfile.AREGTYPE}:
        raise BackupDamaged(f"the backup's member {info.name[:200]!r} is no plain file")
    stream = tar.extractfile(info)
    assert stream is not None  # a plain file has content
    return stream  # type: ignore[return-value]
