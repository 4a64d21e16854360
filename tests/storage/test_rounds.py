"""What was acknowledged is there once, and a round has one end."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pomona.errors import (
    AdapterNotFound,
    BaseModelError,
    BlobWriteError,
    PomonaError,
    RegistryError,
    VersionConflict,
)
from pomona.storage.opening import open_registry
from pomona.storage.records import NewSubmission, NewVersion, Version
from pomona.storage.registry import Registry

Submit = Callable[..., NewSubmission]
Make = Callable[..., NewVersion]
Publish = Callable[..., Version]
BASE = "b" * 64


@pytest.fixture(autouse=True)
def _round_one(registry: Registry) -> None:
    registry.open_round("run-1", 1, parent=None, cohort=["anna", "bert"])


def test_an_accepted_update_is_on_disk(registry: Registry, submission: Submit) -> None:
    row = registry.record_submission(submission(payload=b"bytes"))
    assert registry.blobs.get(row.sha256) == b"bytes"
    assert (row.bytes, row.status, row.version, row.weight) == (5, "accepted", None, None)
    assert registry.submissions("run-1") == registry.submissions("run-1", 1) == [row]
    assert registry.submissions("run-1", 2) == []


def test_the_same_update_has_one_receipt(registry: Registry, submission: Submit) -> None:
    first = registry.record_submission(submission())
    assert registry.record_submission(submission()) == first
    late = submission("bert", status="late", reason="after the deadline")
    assert registry.record_submission(late) == registry.record_submission(late)
    assert len(registry.submissions("run-1")) == 2


def test_the_receipt_outlives_the_round(registry: Registry, submission: Submit, make_version: Make) -> None:
    first = registry.record_submission(submission())
    registry.publish_round(make_version(weights={"anna": 1.0}))
    again = registry.record_submission(submission())
    assert (again.id, again.version) == (first.id, "demo/1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"payload": b"other"}, "another accepted update"),
        ({"nonce": "new"}, "another accepted update"),
        ({"client": "bert", "nonce": "anna-1"}, "nonce .* used before"),
    ],
)
def test_a_second_accepted_update_is_a_conflict(
    registry: Registry, submission: Submit, change: dict[str, object], message: str
) -> None:
    first = registry.record_submission(submission())
    with pytest.raises(VersionConflict, match=message):
        registry.record_submission(submission(**change))
    assert registry.submissions("run-1") == [first]


def test_a_nonce_may_not_come_back_in_a_later_round(registry: Registry, submission: Submit, make_version: Make) -> None:
    registry.record_submission(submission())
    registry.publish_round(make_version(weights={"anna": 1.0}))
    registry.open_round("run-1", 2, parent="demo/1", cohort=["anna"])
    with pytest.raises(VersionConflict, match="nonce"):
        registry.record_submission(submission(number=2, nonce="anna-1"))


def test_a_rejected_nonce_stays_free_for_its_owner(registry: Registry, submission: Submit) -> None:
    stolen = submission("mallory", nonce="anna-1", status="rejected", reason="unknown client")
    registry.record_submission(stolen)
    assert registry.record_submission(submission("anna", nonce="anna-1")).status == "accepted"


def test_a_rejected_update_keeps_its_hash_and_not_its_bytes(registry: Registry, submission: Submit) -> None:
    row = registry.record_submission(submission(payload=b"poison", status="rejected", reason="norm 1e9"))
    assert (row.bytes, row.reason, len(row.sha256)) == (6, "norm 1e9", 64)
    assert not registry.blobs.path(row.sha256).exists()
    assert registry.record_submission(submission(payload=b"good", nonce="next")).status == "accepted"


@pytest.mark.parametrize(
    "garbage",
    [
        {"rank": -1, "alpha": float("nan"), "num_examples": 2**63, "train_loss": float("-inf")},
        {"rank": 10**400, "alpha": 10**400, "num_examples": "10", "train_loss": None},
        {"rank": [4], "alpha": "8", "num_examples": float("nan"), "train_loss": True},
    ],
)
def test_garbage_in_a_rejected_update_is_stored_as_unknown(
    registry: Registry, submission: Submit, garbage: dict[str, object]
) -> None:
    row = registry.record_submission(submission(status="rejected", reason="bad\x00\ud800", **garbage))
    assert (row.rank, row.alpha, row.num_examples, row.train_loss) == (None, None, None, None)
    assert row.reason == "bad\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"


def test_text_of_any_length_is_cut(registry: Registry, submission: Submit) -> None:
    row = registry.record_submission(
        submission("x" * 10_000, nonce="n" * 10_000, status="rejected", reason="r" * 100_000)
    )
    assert (len(row.client), len(row.nonce), len(row.reason)) == (200, 64, 2000)


def test_a_closed_round_takes_only_late_updates(registry: Registry, submission: Submit) -> None:
    registry.fail_round("run-1", 1, "nobody answered")
    with pytest.raises(VersionConflict, match="recorded as late"):
        registry.record_submission(submission())
    assert registry.record_submission(submission(status="late")).status == "late"


def test_a_round_that_was_not_opened_takes_nothing(registry: Registry, submission: Submit) -> None:
    with pytest.raises(AdapterNotFound, match="no round 7"):
        registry.record_submission(submission(number=7))


def test_without_space_there_is_no_row_and_no_file(
    registry: Registry, submission: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(BlobWriteError, match="nothing was published"):
            registry.record_submission(submission())
    assert registry.submissions("run-1") == []
    assert not list((registry.blobs.root / "tmp").iterdir())
    assert registry.record_submission(submission()).status == "accepted"


def test_a_limit_on_file_sizes_publishes_nothing(registry: Registry, home: Path) -> None:
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from pomona.errors import BlobWriteError\n"
        "from pomona.storage.records import NewVersion\n"
        "from pomona.storage.opening import open_registry\n"
        "new = NewVersion(run_id='run-1', round_number=1, adapter='demo', payload=bytes(4_000_000),\n"
        "                 base_sha256='b' * 64, rank=2, exactness='exact')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
        "with open_registry(Path(sys.argv[1])) as registry:\n"
        "    try: registry.publish_round(new)\n"
        "    except BlobWriteError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, home], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert [item.state for item in registry.rounds("run-1")] == ["open"]
    assert registry.versions("demo") == []
    assert [path.name for path in registry.blobs.root.rglob("*") if path.is_file()] == ["lock"]


def test_a_published_round_says_what_it_is_made_of(registry: Registry, submission: Submit, make_version: Make) -> None:
    for client in ("anna", "bert", "carl"):
        registry.record_submission(submission(client))
    registry.record_submission(submission("dora", status="rejected", reason="NaN"))
    registry.record_submission(submission("emil", status="late"))
    registry.publish_round(make_version(weights={"anna": 0.25, "bert": 0.75}))
    (closed,) = registry.rounds("run-1")
    assert (closed.state, closed.accepted, closed.rejected, closed.late) == ("committed", 3, 1, 1)
    assert (closed.bytes_down, closed.bytes_up, closed.seconds) == (10, 20, 1.5)
    assert closed.cohort == ("anna", "bert")
    assert closed.metrics == {"accuracy": 0.51}
    assert closed.closed_at is not None
    assert closed.closed_at >= closed.opened_at
    made_of = {item.client: (item.version, item.weight) for item in registry.submissions("run-1")}
    assert made_of["anna"] == ("demo/1", 0.25)
    assert [made_of[client] for client in ("carl", "dora", "emil")] == [(None, None)] * 3


def test_a_round_is_published_once(registry: Registry, make_version: Make) -> None:
    registry.publish_round(make_version())
    with pytest.raises(VersionConflict, match="committed already"):
        registry.publish_round(make_version(payload=b"other"))
    with pytest.raises(VersionConflict, match="committed already"):
        registry.fail_round("run-1", 1, "too late")
    with pytest.raises(VersionConflict, match="committed already"):
        registry.open_round("run-1", 1, parent=None, cohort=[])
    assert [version.number for version in registry.versions("demo")] == [1]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"weights": {"stranger": 1.0}}, RegistryError),
        ({"base": "c" * 64}, BaseModelError),
        ({"adapter": "other"}, RegistryError),
        ({"number": 2}, AdapterNotFound),
        ({"run_id": "run-2"}, AdapterNotFound),
    ],
)
def test_what_does_not_belong_to_the_round_publishes_nothing(
    registry: Registry, make_version: Make, change: dict[str, object], error: type[PomonaError]
) -> None:
    with pytest.raises(error):
        registry.publish_round(make_version(**change))
    assert registry.versions("demo") == []
    assert registry.rounds("run-1")[0].state == "open"
    assert registry.publish_round(make_version()).ref == "demo/1"


def test_an_open_round_is_found_again_with_its_cohort(registry: Registry, submission: Submit) -> None:
    registry.record_submission(submission())
    again = registry.open_round("run-1", 1, parent=None, cohort=["somebody", "else"])
    assert (again.cohort, again.accepted) == (("anna", "bert"), 1)


def test_a_failed_round_can_be_opened_again(registry: Registry) -> None:
    assert registry.fail_round("run-1", 1, "nobody answered").reason == "nobody answered"
    again = registry.open_round("run-1", 1, parent=None, cohort=["carl"])
    assert (again.state, again.reason, again.closed_at, again.cohort) == ("open", "", None, ("carl",))


def test_a_frozen_round_takes_no_more_updates(registry: Registry, submission: Submit, make_version: Make) -> None:
    first = registry.record_submission(submission())
    assert registry.rounds("run-1")[0].frozen_at is None
    frozen = registry.freeze_round("run-1", 1)
    assert frozen.frozen_at is not None
    assert registry.freeze_round("run-1", 1) == frozen == registry.open_round("run-1", 1, parent=None, cohort=[])
    with pytest.raises(VersionConflict, match=r"closing; the update of 'bert' can only be recorded as late"):
        registry.record_submission(submission("bert"))
    assert registry.record_submission(submission()) == first, "a receipt is given all the same"
    assert registry.record_submission(submission("bert", status="late", reason="too late")).status == "late"
    registry.publish_round(make_version(weights={"anna": 1.0}))
    with pytest.raises(VersionConflict, match="committed already"):
        registry.freeze_round("run-1", 1)


def test_a_round_that_failed_after_it_was_frozen_stays_frozen(registry: Registry) -> None:
    frozen = registry.freeze_round("run-1", 1)
    registry.fail_round("run-1", 1, "no space left")
    again = registry.open_round("run-1", 1, parent=None, cohort=["anna", "bert"])
    assert (again.state, again.frozen_at) == ("open", frozen.frozen_at)


def test_an_open_round_keeps_its_parent(registry: Registry, make_version: Make) -> None:
    registry.publish_round(make_version())
    registry.open_round("run-1", 2, parent="demo/1", cohort=[])
    with pytest.raises(VersionConflict, match="own parent"):
        registry.open_round("run-1", 2, parent=None, cohort=[])
    assert registry.rounds("run-1")[1].parent == "demo/1"


def test_publishers_on_one_parent_lose_nothing(registry: Registry, make_version: Make, home: Path) -> None:
    registry.publish_round(make_version())
    runs = [f"run-{letter}" for letter in "abcd"]
    for run_id in runs:
        registry.start_run(run_id=run_id, adapter="demo", base_sha256=BASE, settings_json="{}")
        registry.open_round(run_id, 1, parent="demo/1", cohort=[])
    published: list[Version] = []
    errors: list[Exception] = []
    barrier = threading.Barrier(len(runs))

    def work(run_id: str) -> None:
        try:
            with open_registry(home) as mine:
                barrier.wait()
                published.append(mine.publish_round(make_version(run_id=run_id, payload=run_id.encode())))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(run_id,)) for run_id in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(version.number for version in published) == [2, 3, 4, 5]
    for version in registry.versions("demo")[1:]:
        assert registry.payload(version.ref) == (version.run_id or "").encode()
        assert [parent.version.ref for parent in registry.lineage(version.ref).parents] == ["demo/1"]


def test_one_update_sent_many_times_at_once_is_counted_once(registry: Registry, submission: Submit) -> None:
    receipts: list[int] = []
    threads = [
        threading.Thread(target=lambda: receipts.append(registry.record_submission(submission()).id)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert receipts == [1] * 8
    assert registry.rounds("run-1")[0].accepted == 1


def test_what_a_defence_took_out_is_quarantined_with_its_reason_and_its_bytes(
    registry: Registry, submission: Submit, make_version: Make
) -> None:
    """An update left out in silence would look like one that counted."""
    for name in ("anna", "bert", "cleo"):
        registry.record_submission(submission(name, payload=name.encode(), nonce=name))
    registry.publish_round(
        make_version(
            weights={"anna": 0.5, "bert": 0.1},
            reduced={"bert": "norm 9 is above the bound 1"},
            quarantined={"cleo": "far from all others"},
        )
    )
    found = {each.client: each for each in registry.submissions("run-1", 1)}
    assert (found["anna"].status, found["anna"].weight, found["anna"].reason) == ("accepted", 0.5, "")
    assert (found["bert"].status, found["bert"].weight) == ("accepted", 0.1)
    assert found["bert"].reason == "norm 9 is above the bound 1"
    assert (found["cleo"].status, found["cleo"].weight, found["cleo"].version) == ("quarantined", 0.0, None)
    assert found["cleo"].reason == "far from all others"
    assert registry.blobs.get(found["cleo"].sha256) == b"cleo"
    (closed,) = registry.rounds("run-1")
    assert (closed.accepted, closed.quarantined) == (2, 1)


def test_only_what_was_accepted_can_be_quarantined(registry: Registry, make_version: Make) -> None:
    with pytest.raises(RegistryError, match="no accepted submission of 'zoe'"):
        registry.publish_round(make_version(quarantined={"zoe": "why"}))
    assert registry.versions("demo") == []
