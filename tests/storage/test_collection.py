"""What nothing names goes, what anything names stays, also while others write."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pomona.errors import BlobWriteError, ConfigError
from pomona.storage.blobs import BlobStore
from pomona.storage.collection import GRACE_S, collect_garbage
from pomona.storage.opening import open_registry
from pomona.storage.records import NewSubmission, Version
from pomona.storage.registry import Registry
from pomona.storage.verification import verify

Publish = Callable[..., Version]
Submit = Callable[..., NewSubmission]


def age(blobs: BlobStore, sha256: str, *, seconds: float = 2 * GRACE_S) -> str:
    then = time.time() - seconds
    os.utime(blobs.path(sha256), (then, then))
    return sha256


def hashes(blobs: BlobStore) -> set[str]:
    return {blob.sha256 for blob in blobs.listing()}


def test_only_what_is_old_and_unnamed_goes(registry: Registry, publish: Publish) -> None:
    publish()
    for sha256 in hashes(registry.blobs):
        age(registry.blobs, sha256)
    old = age(registry.blobs, registry.blobs.put(b"old"))
    young = registry.blobs.put(b"young")
    before = hashes(registry.blobs)

    tried = collect_garbage(registry, dry_run=True)
    assert hashes(registry.blobs) == before
    done = collect_garbage(registry)
    assert tried == done
    assert [blob.sha256 for blob in done.blobs] == [old]
    assert (done.blobs[0].bytes, done.young, done.leftovers) == (3, 1, 0)
    assert hashes(registry.blobs) == before - {old}
    assert young in hashes(registry.blobs)
    assert verify(registry).problems == ()


def test_leftovers_go_too(registry: Registry, home: Path) -> None:
    registry.blobs.put(b"x")
    (registry.blobs.root / "tmp" / "dead.part").write_bytes(b"half")
    with open_registry(home, read_only=True) as reader:
        assert collect_garbage(reader, dry_run=True).leftovers == 1
        assert collect_garbage(reader).leftovers == 1
        assert collect_garbage(reader).leftovers == 0


def test_a_hash_that_a_recipe_mentions_is_kept(registry: Registry, make_version: Callable[..., object]) -> None:
    mentioned = age(registry.blobs, registry.blobs.put(b"a plan"))
    registry.open_round("run-1", 1, parent=None, cohort=[])
    registry.publish_round(make_version(recipe={"task": "x", "plans": [{"file": mentioned}]}))  # type: ignore[arg-type]
    assert collect_garbage(registry).blobs == []
    assert mentioned in hashes(registry.blobs)


def test_putting_again_makes_a_blob_young(registry: Registry) -> None:
    sha256 = age(registry.blobs, registry.blobs.put(b"sent before, never recorded"))
    assert registry.blobs.put(b"sent before, never recorded") == sha256
    assert collect_garbage(registry).blobs == []
    assert sha256 in hashes(registry.blobs)


def test_a_blob_that_gets_its_row_after_the_listing_stays(
    registry: Registry, submission: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are read again under the lock, and so is the age."""
    registry.open_round("run-1", 1, parent=None, cohort=["anna"])
    sha256 = age(registry.blobs, registry.blobs.put(b"update"))
    listing = BlobStore.listing

    def slow_listing(blobs: BlobStore) -> object:
        found = list(listing(blobs))
        registry.record_submission(submission("anna"))
        age(registry.blobs, sha256)  # its age alone would not save it
        return iter(found)

    monkeypatch.setattr(BlobStore, "listing", slow_listing)
    assert collect_garbage(registry).blobs == []
    assert registry.blobs.get(sha256) == b"update"


def test_nothing_is_lost_while_somebody_writes(registry: Registry, home: Path, submission: Submit) -> None:
    """Updates whose bytes lie there as old orphans are sent again while garbage is collected without pause."""
    count = 60
    registry.open_round("run-1", 1, parent=None, cohort=[])
    payloads = [f"update {number}".encode() for number in range(count)]
    for payload in payloads:
        age(registry.blobs, registry.blobs.put(payload))
    done = threading.Event()
    passes: list[int] = []

    def collect() -> None:
        with open_registry(home, read_only=True) as reader:
            while not done.is_set():
                passes.append(len(collect_garbage(reader, grace_s=3600.0).blobs))

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        for number, payload in enumerate(payloads):
            registry.record_submission(submission(f"client {number}", payload=payload))
    finally:
        done.set()
        collector.join()
    report = verify(registry)
    assert report.problems == ()
    assert report.blobs == count
    assert sum(passes) > 0  # it did delete, and writers wrote again


def test_a_negative_grace_and_a_folder_that_cannot_be_written(registry: Registry) -> None:
    with pytest.raises(ConfigError, match="at least 0"):
        collect_garbage(registry, grace_s=-1.0)
    with pytest.raises(ConfigError):
        collect_garbage(registry, grace_s=float("nan"))
    store = BlobStore(registry.blobs.root, read_only=True)
    with pytest.raises(BlobWriteError, match="read-only"):
        store.remove_unnamed([], named=set, grace_s=0.0)
