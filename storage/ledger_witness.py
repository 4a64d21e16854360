"""What a machine has seen of privacy ledgers, kept outside the database.

A database that is put back from a backup has a whole ledger that is too short: what was released after the backup is
out in the world, and not in it. So the last reservation of each population is also a file beside the blobs. A machine
without such a file releases nothing on a ledger that has rows, and nothing at all on a registry that was restored,
before somebody says that the ledger is the newest.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pomona.errors import BlobWriteError
from pomona.storage.records import LedgerEntry

FOLDER = "privacy"
_RESTORED = ".restored"


class Witness(BaseModel):
    """What was seen last.

    Attributes:
        seq: Of the row; 0: somebody has said that there is none.
        sha256: Of the row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    seq: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def keep(folder: Path, row: LedgerEntry) -> None:
    """Remember a row that was written, on disk when this returns; an older one is not gone back to.

    Raises:
        BlobWriteError: It cannot be written.
    """
    path = _path(folder, row.population)
    with _locked(folder):
        seen = _read(path)
        if not isinstance(seen, Witness) or seen.seq < row.seq:
            _write(path, Witness(seq=row.seq, sha256=row.sha256).model_dump_json())


def seen(folder: Path, population: str) -> Witness | str | None:
    """Return what this machine has seen last, why that cannot be read, or None where it has seen nothing."""
    return _read(_path(folder, population))


def objection(folder: Path, population: str, rows: Sequence[LedgerEntry], before: Witness | str | None) -> str:
    """Return why a ledger cannot be believed, ``""`` where it can.

    Args:
        folder: Where the files are.
        population: Whose ledger it is.
        rows: It, whole by itself.
        before: What had been seen of it before it was read; another run may write meanwhile.
    """
    path = _path(folder, population)
    match before:
        case None if not rows and not (folder / _RESTORED).exists():
            return ""
        case None:
            return (
                f"the privacy ledger of {population} has {len(rows)} rows, and this registry was restored from a "
                "backup or this machine has not seen it yet; if nothing was released beyond them, say so by "
                f"`pomona privacy confirm {population}`"
            )
        case Witness(seq=seq, sha256=sha256):
            if seq == 0 or (len(rows) >= seq and rows[seq - 1].sha256 == sha256):
                return ""
            return (
                f"the privacy ledger of {population} has {len(rows)} rows, and this machine has seen row {seq} "
                f"({sha256[:12]}): an older database was put back, and what was spent since is not in it; restore the "
                "newest one"
            )
        case problem:
            return f"{path} cannot be read ({problem}), so it is not known whether the ledger is the newest"


def mark_restored(folder: Path) -> None:
    """Mark a registry as restored.

    Raises:
        BlobWriteError: It cannot be written.
    """
    _write(folder / _RESTORED, json.dumps({"restored": True}))


def confirm(folder: Path, population: str, rows: Sequence[LedgerEntry]) -> bool:
    """Take somebody's word that a ledger is the newest; return whether there was any doubt.

    Raises:
        BlobWriteError: It cannot be written.
    """
    path = _path(folder, population)
    if _read(path) is not None or not objection(folder, population, rows, None):
        return False
    last = Witness(seq=rows[-1].seq, sha256=rows[-1].sha256) if rows else Witness(seq=0, sha256="0" * 64)
    _write(path, last.model_dump_json())
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise BlobWriteError(f"cannot write in {folder}: {error.strerror or error}; free space and go on") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> Witness | str | None:
    try:
        return Witness.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        return str(error.strerror or error)
    except ValidationError as error:
        return str(error.errors(include_url=False)[0]["msg"])


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BlobWriteError(f"cannot write {path}: {error.strerror or error}; free space and go on") from error
    finally:
        partial.unlink(missing_ok=True)


def _path(folder: Path, population: str) -> Path:
    return folder / f"{population}.json"
