"""Bytes on disk, filed under their SHA-256.

A blob appears whole or not at all: temporary file, fsync, rename, fsync of the folder. Writers hold a shared
lock on the store, so an exclusive lock proves that any temporary file is left over from a process that died.

A blob is written before the row that names it, so for a moment a good blob is named by none. Putting makes its
file new, also where the bytes were there already; who deletes looks at that age under the exclusive lock.
"""

import fcntl
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pomona.errors import BlobCorrupt, BlobWriteError
from pomona.failpoints import reach

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBlob:
    """A file of the store, its bytes not looked at.

    Attributes:
        sha256: The hash it is filed under.
        bytes: Its size.
        put_at_s: When it was last put, in seconds since 1970 by the clock of the file system.
    """

    sha256: str
    bytes: int
    put_at_s: float


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
                if not (_holds(target, content) and _renewed(target)):
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

    def listing(self) -> Iterator[StoredBlob]:
        """Yield every blob, in no order; one that vanishes meanwhile is left out.

        Raises:
            BlobCorrupt: The folder cannot be read.
        """
        try:
            for folder in self.root.glob("[0-9a-f][0-9a-f]"):
                for path in folder.iterdir():
                    if _SHA256.fullmatch(path.name) and path.name[:2] == folder.name and path.is_file():
                        with suppress(FileNotFoundError):
                            yield _stored(path)
        except OSError as error:
            raise BlobCorrupt(f"cannot list the blobs below {self.root}: {error.strerror or error}") from error

    def leftovers(self) -> list[Path]:
        """Return the temporary files there are now: of writers that died, or that write right now."""
        return sorted(self._temporary().glob("*.part"))

    def remove_unnamed(
        self, candidates: Collection[str], *, named: Callable[[], Collection[str]], grace_s: float
    ) -> list[StoredBlob]:
        """Delete those candidates that nothing names and that were put longer ago than the grace period.

        Nobody puts a blob meanwhile: a writer waits for the lock, and then finds that its bytes are gone and writes
        them, or finds the file and makes it new. ``named`` is called under the lock, so a row that was committed
        before counts. What is left is a writer between its blob and its row: its file is younger than ``grace_s``.

        Args:
            candidates: Hashes of the blobs that may go.
            named: Returns the hashes of all blobs that must stay.
            grace_s: Seconds that a writer may take from its blob to its row.

        Returns:
            What was deleted.

        Raises:
            BlobWriteError: The store is read-only, or a file could not be deleted.
        """
        if self.read_only:
            raise BlobWriteError(f"cannot delete blobs: {self.root} was opened read-only")
        removed: list[StoredBlob] = []
        try:
            with self._lock(fcntl.LOCK_EX):
                keep, now = named(), time.time()
                for sha256 in sorted(set(candidates) - set(keep)):
                    with suppress(FileNotFoundError):
                        blob = _stored(self.path(sha256))
                        if now - blob.put_at_s >= grace_s:
                            self.path(sha256).unlink()
                            removed.append(blob)
        except OSError as error:
            raise BlobWriteError(
                f"cannot delete blobs below {self.root}: {error.strerror or error}; {len(removed)} were deleted before"
            ) from error
        return removed

    def remove_leftovers(self) -> int:
        """Delete what writers that died left behind, unless somebody writes right now; return how many."""
        removed = 0
        with suppress(OSError), self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB):
            for leftover in self.leftovers():
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
                reach("blob-written")
                os.fsync(descriptor)
            reach("blob-synced")
            temporary.replace(target)
            reach("blob-renamed")
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


def _renewed(path: Path) -> bool:
    try:
        os.utime(path)
    except OSError:
        return False  # another owner's file; writing it anew makes it ours
    return True


def _stored(path: Path) -> StoredBlob:
    facts = path.stat()
    return StoredBlob(sha256=path.name, bytes=facts.st_size, put_at_s=facts.st_mtime)


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
