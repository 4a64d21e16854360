"""Bytes on disk, filed under their SHA-256.

A blob appears whole or not at all: temporary file, fsync, rename, fsync of the folder. Writers hold a shared
lock on the store, so an exclusive lock proves that any temporary file is left over from a process that died.
"""

import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pomona.errors import BlobCorrupt, BlobWriteError

_SHA256 = re.compile(r"[0-9a-f]{64}")


class BlobStore:
    """A folder of immutable blobs.

    Attributes:
        root: The folder.
        read_only: Refuse to write.
    """

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        self.root = root
        self.read_only = read_only

    def path(self, sha256: str) -> Path:
        """Return where a blob lies, or would lie.

        Raises:
            BlobCorrupt: ``sha256`` is no hash.
        """
        if not _SHA256.fullmatch(sha256):
            raise BlobCorrupt(f"expected 64 hexadecimal digits to name a blob, got {sha256!r}")
        return self.root / sha256[:2] / sha256

    def put(self, content: bytes) -> str:
        """Write a blob and return its SHA-256; afterwards it survives a crash of the machine.

        Raises:
            BlobWriteError: It could not be written (no space, no permission); nothing is left behind.
        """
        if self.read_only:
            raise BlobWriteError(f"cannot write a blob: {self.root} was opened read-only")
        sha256 = hashlib.sha256(content).hexdigest()
        target = self.path(sha256)
        try:
            self._make_folder(target.parent)
            with self._lock(fcntl.LOCK_SH):
                if not _holds(target, content):
                    self._write(content, target)
            _sync_folder(target.parent)
        except OSError as error:
            raise BlobWriteError(
                f"cannot write a blob of {len(content)} bytes below {self.root}: {error.strerror or error}; "
                "nothing was published; free some space or check the folder's owner and try again"
            ) from error
        return sha256

    def get(self, sha256: str) -> bytes:
        """Read a blob and check its hash.

        Raises:
            BlobCorrupt: It is missing, unreadable, or its bytes have another hash.
        """
        path = self.path(sha256)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BlobCorrupt(
                f"cannot read blob {path}: {error.strerror or error}; restore it from a backup"
            ) from error
        if (found := hashlib.sha256(content).hexdigest()) != sha256:
            raise BlobCorrupt(f"blob {path} has the hash {found}; its bytes were changed: restore it from a backup")
        return content

    def remove_leftovers(self) -> int:
        """Delete what writers that died left behind, unless somebody writes right now; return how many."""
        removed = 0
        with suppress(OSError), self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB):
            for leftover in self._temporary().glob("*.part"):
                leftover.unlink(missing_ok=True)
                removed += 1
        return removed

    def _write(self, content: bytes, target: Path) -> None:
        temporary = self._temporary() / f"{target.name}.{secrets.token_hex(8)}.part"
        try:
            with _descriptor(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
                view = memoryview(content)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _temporary(self) -> Path:
        return self.root / "tmp"

    def _make_folder(self, folder: Path) -> None:
        if folder.is_dir() and self._temporary().is_dir():
            return
        self._temporary().mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        _sync_folder(self.root)
        _sync_folder(self.root.parent)

    @contextmanager
    def _lock(self, operation: int) -> Iterator[None]:
        with _descriptor(self.root / "lock", os.O_RDWR | os.O_CREAT) as descriptor:
            fcntl.flock(descriptor, operation)
            yield


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    with _descriptor(folder, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        os.fsync(descriptor)


@contextmanager
def _descriptor(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
