"""Whether a registry is whole: every blob read and hashed, every fact followed, and what lies about for nothing."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pomona.errors import BlobCorrupt
from pomona.storage.blobs import BlobStore
from pomona.storage.consistency import Finding
from pomona.storage.references import Reference
from pomona.storage.registry import Registry

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found.

    Attributes:
        blobs: Number of blobs that facts need and that were read.
        bytes: Their size in all.
        problems: What is wrong; a registry without any is whole.
        notes: What is not wrong but takes space: orphaned blobs, leftovers of writers that died.
    """

    blobs: int
    bytes: int
    problems: Sequence[Finding]
    notes: Sequence[Finding]


def verify(registry: Registry, *, progress: Progress = lambda _done, _all: None) -> Verification:
    """Check everything a registry holds; nothing is changed.

    Others may write meanwhile: a fact's blob is on disk before the fact is, and every check is one statement, which
    sees one state. What is being written may be noted as an orphan, and is none the next time.

    Args:
        registry: May be open read-only.
        progress: Called after each blob with how many were read, and how many there are to read.

    Raises:
        RegistryUnavailable: The database cannot be read.
        BlobCorrupt: The folder of blobs cannot be listed.
    """
    files = {blob.sha256: blob.bytes for blob in registry.blobs.listing()}
    problems = registry.contradictions()
    needed: dict[str, list[Reference]] = {}
    for reference in registry.references():
        needed.setdefault(reference.sha256, []).append(reference)
    size = 0
    for done, (sha256, holders) in enumerate(sorted(needed.items()), 1):
        found = _read(registry.blobs, sha256)
        size += found if isinstance(found, int) else 0
        problems += _judged(found, holders)
        progress(done, len(needed))
    notes = [*_orphans(files, registry.named_blobs()), *_leftovers(registry.blobs)]
    return Verification(blobs=len(needed), bytes=size, problems=tuple(problems), notes=tuple(notes))


def _read(blobs: BlobStore, sha256: str) -> int | str:
    """Return the size of a blob, or what is wrong with it."""
    try:
        return len(blobs.get(sha256))
    except BlobCorrupt as error:
        return str(error)


def _judged(found: int | str, holders: Sequence[Reference]) -> Iterator[Finding]:
    for holder in holders:
        match found:
            case str():
                yield Finding(about=holder.holder, found=found, remedy=holder.remedy)
            case size if holder.bytes not in {None, size}:
                wrong = f"blob {holder.sha256} has {size} bytes, the database says {holder.bytes}"
                yield Finding(about=holder.holder, found=wrong, remedy="the hash is right, so the recorded size is not")


def _orphans(files: Mapping[str, int], named: Collection[str]) -> Iterator[Finding]:
    collect = "`pomona registry gc` deletes it once it is older than the grace period"
    for sha256 in sorted(files.keys() - set(named)):
        found = f"{files[sha256]} bytes that nothing in the database names"
        yield Finding(about=f"blob {sha256}", found=found, remedy=collect)


def _leftovers(blobs: BlobStore) -> Iterator[Finding]:
    for path in blobs.leftovers():
        found = "a blob half written, by somebody who writes right now or who died"
        yield Finding(about=str(path), found=found, remedy="`pomona registry gc` deletes it when nobody writes")
