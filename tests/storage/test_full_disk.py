"""A disk that is really full, or becomes read-only: a small file system in a namespace of the test's own.

``POMONA_TEST_FULL_DISK=required`` makes it an error where no namespace can be made.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]

BEGINNING = """
import hashlib, os, subprocess, sys
from pathlib import Path

import pytest
from tests.storage.conftest import BASE, new_version

from pomona.errors import BlobWriteError, RegistryUnavailable
from pomona.storage.records import NewSubmission
from pomona.storage.opening import open_registry
from pomona.storage.verification import verify

disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
filler = disk / "filler"
blobs_elsewhere = Path(sys.argv[2])


def fill(*, but: int = 0) -> None:
    with filler.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                break
        file.truncate(max(0, file.tell() - but))


def submission(payload: bytes = b"update") -> NewSubmission:
    return NewSubmission(
        run_id="run-1", round_number=1, client="anna", rank=4, alpha=8.0, num_examples=100, nonce="n",
        status="accepted", reason="", payload=payload, train_loss=0.5,
    )


def begin(registry) -> None:
    registry.add_base_model(BASE, "tiny-base", "a test")
    registry.start_run(run_id="run-1", adapter="demo", base_sha256=BASE, settings_json="{}")
    registry.open_round("run-1", 1, parent=None, cohort=["anna"])
"""

NO_ROOM_FOR_A_BLOB = """
with open_registry(disk / "home", patience_s=60.0) as registry:
    begin(registry)
    fill(but=100 * 1024)
    with pytest.raises(BlobWriteError):
        registry.record_submission(submission(os.urandom(200 * 1024)))
    assert registry.submissions("run-1") == []
    assert verify(registry).problems == ()
    filler.unlink()
    update = os.urandom(200 * 1024)
    receipt = registry.record_submission(submission(update))
    assert receipt.sha256 == hashlib.sha256(update).hexdigest()
    fill(but=40 * 1024)
    with pytest.raises(BlobWriteError):
        registry.publish_round(new_version(payload=os.urandom(300 * 1024), weights={"anna": 1.0}))
    assert registry.rounds("run-1")[0].state == "open"
    filler.unlink()
    assert registry.publish_round(new_version(weights={"anna": 1.0})).ref == "demo/1"
    assert verify(registry).problems == ()
"""

NO_ROOM_FOR_A_COMMIT = """
home = disk / "home"
home.mkdir()
(home / "blobs").symlink_to(blobs_elsewhere)
with open_registry(home, patience_s=60.0) as registry:
    begin(registry)
    registry.record_submission(submission())
    fill()
    before = registry.rounds("run-1"), registry.submissions("run-1")
    with pytest.raises(RegistryUnavailable, match="full") as caught:
        for number in range(2, 200):  # what the log has taken of the disk is used up first
            registry.open_round("run-1", number, parent=None, cohort=["anna"] * 50)
    assert not caught.value.passing
    with pytest.raises(RegistryUnavailable, match="full"):
        registry.publish_round(new_version(weights={"anna": 1.0}))
    assert (registry.rounds("run-1")[:1], registry.submissions("run-1")) == before
with open_registry(home, read_only=True) as registry:
    assert registry.submissions("run-1") == before[1]
filler.unlink()
with open_registry(home) as registry:
    assert registry.submissions("run-1") == before[1]
    assert registry.publish_round(new_version(weights={"anna": 1.0})).ref == "demo/1"
    assert [each.about for each in verify(registry).problems] == []
    assert registry.broken_audit() == []
"""

READ_ONLY = """
with open_registry(disk / "home", patience_s=60.0) as registry:
    begin(registry)
    remount = ["mount", "-o", "remount,ro", disk]
    subprocess.run(remount, check=False, capture_output=True)  # busy while the log is open for writing
registry.close()
subprocess.run(remount, check=True)
with open_registry(disk / "home", read_only=True) as registry:
    assert [each.id for each in registry.runs()] == ["run-1"]
try:
    registry = open_registry(disk / "home", patience_s=60.0)
    with registry, pytest.raises(RegistryUnavailable):
        registry.finish_run("run-1", "finished")
except (RegistryUnavailable, BlobWriteError):
    pass
subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
with open_registry(disk / "home") as registry:
    assert registry.run("run-1").state == "running"
    assert registry.record_submission(submission()).status == "accepted"
"""


@pytest.mark.parametrize(
    "story",
    [
        pytest.param(NO_ROOM_FOR_A_BLOB, id="blob"),
        pytest.param(NO_ROOM_FOR_A_COMMIT, id="commit"),
        pytest.param(READ_ONLY, id="read-only"),
    ],
)
def test_what_does_not_fit_leaves_nothing_and_what_was_there_stays(story: str, tmp_path: Path) -> None:
    if subprocess.run([*NAMESPACE, "true"], check=False, capture_output=True).returncode:
        why = "NOT TESTED ON A FULL DISK: no user namespace can be made here (needs Linux and unshare)"
        (pytest.fail if os.environ.get("POMONA_TEST_FULL_DISK") == "required" else pytest.skip)(why)
    for name in ("disk", "blobs"):
        (tmp_path / name).mkdir()
    code = textwrap.dedent(BEGINNING + story)
    done = subprocess.run(
        [*NAMESPACE, sys.executable, "-c", code, str(tmp_path / "disk"), str(tmp_path / "blobs")],
        cwd=ROOT,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
