"""What a machine has seen of privacy ledgers, kept outside the database.

A database that is put back from a backup has a whole ledger that is too short: what was released after the backup is
out in the world, and not in it. So the last reservation of each population is also a file beside the blobs. A registry
that is restored into a new folder has no such file; there the restoring leaves a mark, and nothing is released until
somebody says that nothing was released since the backup was made.
"""

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pomona.errors import BlobWriteError
from pomona.storage.records import LedgerEntry

FOLDER = "privacy"


class Witness(BaseModel):
    """What was seen last.

    Attributes:
        seq: Of the row.
        sha256: Of the row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    seq: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def keep(folder: Path, row: LedgerEntry) -> None:
    """Remember a row that was written, on disk when this returns; an older one is not gone back to.

    Raises:
        BlobWriteError: It cannot be written.
    """
    path = _path(folder, row.population)
    seen = _read(path)
    if isinstance(seen, Witness) and seen.seq >= row.seq:
        return
    _write(path, Witness(seq=row.seq, sha256=row.sha256).model_dump_json())


def objection(folder: Path, population: str, rows: Sequence[LedgerEntry]) -> str:
    """Return why a ledger cannot be believed, ``""`` where it can.

    Args:
        folder: Where the files are.
        population: Whose ledger it is.
        rows: It, whole by itself.
    """
    if _mark(folder, population).exists():
        return (
            f"this registry was restored from a backup, and what population {population} has spent since is not in its "
            f"ledger; if nothing was released after the backup, say so by `pomona privacy confirm {population}`"
        )
    path = _path(folder, population)
    match _read(path):
        case None:
            return ""
        case Witness(seq=seq, sha256=sha256):
            if len(rows) >= seq and rows[seq - 1].sha256 == sha256:
                return ""
            return (
                f"the privacy ledger of {population} has {len(rows)} rows, and this machine has seen row {seq} "
                f"({sha256[:12]}): an older database was put back, and what was spent since is not in it; restore the "
                "newest one"
            )
        case problem:
            return f"{path} cannot be read ({problem}), so it is not known whether the ledger is the newest"


def mark_restored(folder: Path, populations: Collection[str]) -> None:
    """Mark the ledgers of a registry that was restored.

    Raises:
        BlobWriteError: It cannot be written.
    """
    for population in populations:
        _write(_mark(folder, population), json.dumps({"restored": True}))


def confirm(folder: Path, population: str) -> bool:
    """Take away the mark of a restored ledger; return whether there was one."""
    mark = _mark(folder, population)
    found = mark.exists()
    mark.unlink(missing_ok=True)
    return found


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
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
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


def _mark(folder: Path, population: str) -> Path:
    return folder / f"{population}.restored"
