"""A blob is there whole and under its own hash, or not at all."""

import errno
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pomona.errors import BlobCorrupt, BlobWriteError
from pomona.storage.blobs import BlobStore


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def files_of(blobs: BlobStore) -> list[str]:
    return sorted(path.name for path in blobs.root.rglob("*") if path.is_file() and path.name != "lock")


@pytest.mark.parametrize("content", [b"", b"x", os.urandom(1 << 20)], ids=["empty", "byte", "mebibyte"])
def test_what_was_put_is_got(blobs: BlobStore, content: bytes) -> None:
    sha256 = blobs.put(content)
    assert sha256 == hashlib.sha256(content).hexdigest()
    assert blobs.get(sha256) == content
    assert blobs.put(content) == sha256
    assert files_of(blobs) == [sha256]


def test_a_changed_byte_is_noticed_and_putting_again_repairs_it(blobs: BlobStore) -> None:
    sha256 = blobs.put(b"precious")
    blobs.path(sha256).write_bytes(b"preciouz")
    with pytest.raises(BlobCorrupt, match="bytes were changed"):
        blobs.get(sha256)
    blobs.put(b"precious")
    assert blobs.get(sha256) == b"precious"


def test_a_missing_blob_is_corrupt(blobs: BlobStore) -> None:
    with pytest.raises(BlobCorrupt, match="restore it from a backup"):
        blobs.get("a" * 64)


def test_a_name_that_is_no_hash_reaches_no_file(blobs: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"")
    with pytest.raises(BlobCorrupt, match="64 hexadecimal digits"):
        blobs.get("../secret")


@pytest.mark.parametrize("function", ["write", "fsync"])
def test_a_full_disk_leaves_nothing(blobs: BlobStore, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs.put(b"first")
    before = files_of(blobs)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(BlobWriteError, match=r"No space left on device.*free some space"):
            blobs.put(b"second")
    assert files_of(blobs) == before
    assert blobs.get(blobs.put(b"second")) == b"second"


def test_a_limit_of_the_system_leaves_nothing(blobs: BlobStore) -> None:
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from pomona.errors import BlobWriteError; from pomona.storage.blobs import BlobStore\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try: BlobStore(Path(sys.argv[1])).put(bytes(100_000))\n"
        "except BlobWriteError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, blobs.root], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert files_of(blobs) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BlobWriteError, match="file/blobs"):
        BlobStore(tmp_path / "file" / "blobs").put(b"x")


def test_a_read_only_store_refuses(tmp_path: Path) -> None:
    with pytest.raises(BlobWriteError, match="read-only"):
        BlobStore(tmp_path, read_only=True).put(b"x")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_removed_but_never_under_a_writer(blobs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = blobs.put(b"kept")
    (blobs.root / "tmp" / "dead.part").write_bytes(b"half")
    removed_during_the_write: list[int] = []
    write = os.write

    def sweeping_write(descriptor: int, content: memoryview) -> int:
        sweeper = threading.Thread(target=lambda: removed_during_the_write.append(blobs.remove_leftovers()))
        sweeper.start()
        sweeper.join()
        return write(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", sweeping_write)
        blobs.put(b"being written")
    assert removed_during_the_write == [0]
    assert blobs.remove_leftovers() == 1
    assert not list((blobs.root / "tmp").iterdir())
    assert blobs.get(sha256) == b"kept"
