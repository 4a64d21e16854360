"""Deleting blobs that nothing needs: updates whose row was never written, and what writers left that died."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from pomona.errors import ConfigError
from pomona.storage.blobs import BlobStore, StoredBlob
from pomona.storage.registry import Registry

GRACE_S = 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What was deleted, or would be.

    Attributes:
        blobs: Those that nothing in the database named and that were older than the grace period.
        young: Number of blobs that nothing names yet either, but that are younger, and were kept.
        leftovers: Number of temporary files of writers that died.
    """

    blobs: Sequence[StoredBlob]
    young: int
    leftovers: int


def collect_garbage(registry: Registry, *, grace_s: float = GRACE_S, dry_run: bool = False) -> Collected:
    """Delete the blobs that nothing in the database names.

    This is safe while others write. A blob is on disk before its row is, so a blob without a row may be one whose row
    is about to come: the grace period must be longer than a writer takes from the one to the other, which is seconds
    unless the database hangs. Age counts from when the blob was last put, even if its bytes lay there before, and
    age and rows are both read under the store's exclusive lock, which no writer can put under
    (:meth:`pomona.storage.blobs.BlobStore.remove_unnamed`). So no row can come to name a blob that has just gone.

    Args:
        registry: May be open read-only: no row is changed.
        grace_s: Seconds since it was last put for which a blob is kept in any case; 0 is for a registry that nobody
            writes to.
        dry_run: Delete nothing, say what would be deleted.

    Raises:
        ConfigError: ``grace_s`` is negative or no number.
        BlobWriteError: A file could not be deleted.
        RegistryUnavailable: The database cannot be read; nothing was deleted.
    """
    if not grace_s >= 0.0:
        raise ConfigError(f"expected a grace period of at least 0, got {grace_s:g} s")
    blobs = BlobStore(registry.blobs.root)
    listed, named, now = list(blobs.listing()), registry.named_blobs(), time.time()
    unnamed = [blob for blob in listed if blob.sha256 not in named]
    old = [blob for blob in unnamed if now - blob.put_at_s >= grace_s]
    if dry_run:
        return Collected(
            blobs=sorted(old, key=lambda blob: blob.sha256),
            young=len(unnamed) - len(old),
            leftovers=len(blobs.leftovers()),
        )
    candidates = [blob.sha256 for blob in old]
    removed = blobs.remove_unnamed(candidates, named=registry.named_blobs, grace_s=grace_s) if candidates else []
    return Collected(blobs=removed, young=len(unnamed) - len(removed), leftovers=blobs.remove_leftovers())
