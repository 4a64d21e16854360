"""What is wrong with a registry is found, named, and told from what only takes space."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from tests.storage.filling import SQLITE_ONLY

from pomona.storage import tables
from pomona.storage.opening import open_registry
from pomona.storage.records import NewVersion, Version
from pomona.storage.registry import Registry
from pomona.storage.verification import Verification, verify

Publish = Callable[..., Version]
Make = Callable[..., NewVersion]
EDGES = tables.lineage.name
ANNA_1 = "the update of 'anna' in round 1 of run run-1"


@pytest.fixture
def two_rounds(registry: Registry, publish: Publish) -> Registry:
    publish(1)
    publish(2)
    registry.set_alias("demo", "champion", 1)
    registry.set_tag("demo/1", "site", "b")
    return registry


def damage(home: Path, *statements: str) -> None:
    """Write round the constraints, as another program could; PostgreSQL lets none do so."""
    with closing(sqlite3.connect(home / "registry.db", isolation_level=None)) as database:
        triggers = database.execute(
            "SELECT 'DROP TRIGGER ' || name FROM sqlite_master WHERE type = 'trigger'"
        ).fetchall()
        off = ["PRAGMA foreign_keys = OFF", "PRAGMA ignore_check_constraints = ON", *(drop for (drop,) in triggers)]
        for statement in (*off, *statements):
            database.execute(statement)


def found(report: Verification) -> list[tuple[str, str]]:
    return [(item.about, item.found) for item in report.problems]


def test_a_whole_registry_has_no_problem(two_rounds: Registry) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(two_rounds, progress=lambda done, total: seen.append((done, total)))
    assert (report.problems, report.notes) == ((), ())
    assert report.blobs == 5  # four updates, and two versions of the same bytes
    assert seen == [(number, 5) for number in range(1, 6)]


def test_an_empty_registry_is_whole(home: Path) -> None:
    with open_registry(home) as registry:
        assert verify(registry).problems == ()


def test_missing_changed_and_cut_blobs_are_named_by_what_needs_them(two_rounds: Registry) -> None:
    version, (anna, bert) = two_rounds.resolve("demo/2"), two_rounds.submissions("run-1", 1)
    two_rounds.blobs.path(version.sha256).unlink()
    two_rounds.blobs.path(anna.sha256).write_bytes(b"changed")
    two_rounds.blobs.path(bert.sha256).write_bytes(b"")
    report = verify(two_rounds)
    problems = dict(found(report))
    assert problems.keys() == {"version demo/1", "version demo/2", ANNA_1, ANNA_1.replace("anna", "bert")}
    assert "No such file" in problems["version demo/2"]
    assert "bytes were changed" in problems[ANNA_1]
    assert all("backup" in item.remedy for item in report.problems)


def test_a_rejected_update_needs_no_blob_and_one_in_quarantine_does(
    registry: Registry, submission: Callable[..., object], make_version: Make
) -> None:
    registry.open_round("run-1", 1, parent=None, cohort=["anna", "bert"])
    registry.record_submission(submission("bert", status="rejected", payload=b"thrown away"))  # type: ignore[arg-type]
    kept = registry.record_submission(submission("anna"))  # type: ignore[arg-type]
    registry.publish_round(make_version(quarantined={"anna": "too far away"}))
    assert verify(registry).problems == ()
    registry.blobs.path(kept.sha256).unlink()
    assert [about for about, _ in found(verify(registry))] == [ANNA_1]


def test_what_a_method_kept_is_needed(registry: Registry, make_version: Make) -> None:
    state = registry.blobs.put(b"momentum")
    registry.open_round("run-1", 1, parent=None, cohort=[])
    registry.publish_round(make_version(recipe={"task": "classification", "method_state": state}))
    report = verify(registry)
    assert (report.problems, report.notes) == ((), ())
    registry.blobs.path(state).unlink()
    assert [about for about, _ in found(verify(registry))] == ["the method's state after demo/1"]


@SQLITE_ONLY
def test_a_size_that_was_recorded_wrong(two_rounds: Registry, home: Path) -> None:
    damage(home, "UPDATE submission SET bytes = 7 WHERE id = 1")
    assert "has 5 bytes, the database says 7" in dict(found(verify(two_rounds)))[ANNA_1]


@SQLITE_ONLY
@pytest.mark.parametrize(
    ("statements", "about", "what"),
    [
        (["UPDATE alias SET version_id = 99"], "alias demo champion", "points at the version with id 99"),
        ([f"UPDATE {EDGES} SET parent_id = 77"], f"{EDGES} 2 77 parent", "points at the version with id 77"),
        ([f"UPDATE {EDGES} SET child_id = 1, parent_id = 2"], "the version with id 1", "came later"),
        ([f"DELETE FROM {EDGES}"], "version demo/2", "its lineage does not say so"),
        (["UPDATE round SET state = 'open' WHERE number = 2"], "round 2 of run run-1", "is open, but has a version"),
        (
            ["INSERT INTO round SELECT run_id, 3, 'committed', '', 2, '[]', 0, opened_at, closed_at, 0, 0, 0, NULL "
             "FROM round WHERE number = 2"],
            "round 3 of run run-1",
            "is committed, but has no version",
        ),
        (["DELETE FROM round WHERE number = 2"], "version demo/2", "says that round 2 of run run-1 made it"),
        (
            ["DROP INDEX uq_submission_accepted", "UPDATE submission SET client = 'anna'"],
            "run_id 'run-1', round 1, client 'anna'",
            "has 2 accepted updates of one client in one round",
        ),
        (
            [
                "DROP INDEX uq_submission_nonce",
                "UPDATE submission SET nonce = 'n'",
                "UPDATE submission SET status = 'quarantined' WHERE client = 'bert'",
            ],
            "run_id 'run-1', nonce 'n'",
            "has 4 updates taken in with one nonce",
        ),
        (
            ["INSERT INTO adapter SELECT 'other', created_at FROM adapter", "UPDATE alias SET adapter_name = 'other'"],
            "alias other@champion",
            "points at demo/1, a version of another adapter",
        ),
        (
            ["UPDATE submission SET version_id = 2 WHERE round = 1 AND client = 'anna'"],
            "the accepted update of 'anna' in round 1 of run run-1",
            "is counted in demo/2",
        ),
        (["UPDATE run SET base_sha256 = 'x'"], "version demo/1", "on another base model than its run"),
        (["UPDATE run SET base_sha256 = 'x'"], "run run-1", "points at the base_model with sha256 'x'"),
    ],
)  # fmt: skip
def test_a_contradiction_is_found(
    two_rounds: Registry, home: Path, statements: list[str], about: str, what: str
) -> None:
    damage(home, *statements)
    report = verify(two_rounds)
    matching = [item for item in report.problems if item.about == about and what in item.found]
    assert len(matching) == 1, found(report)
    assert all(item.remedy for item in report.problems)


@SQLITE_ONLY
def test_versions_that_vanished_leave_a_gap(two_rounds: Registry, home: Path) -> None:
    damage(
        home,
        *(f"DELETE FROM {table} WHERE version_id = 1" for table in ("metric", "tag", "alias")),
        "DELETE FROM version WHERE id = 1",
    )
    problems = found(verify(two_rounds))
    assert ("adapter demo", "has 1 versions, numbered up to 2; versions are never deleted") in problems
    assert ("round 1 of run run-1", "is committed, but has no version") in problems


def test_what_takes_space_for_nothing_is_a_note(two_rounds: Registry, home: Path) -> None:
    orphan = two_rounds.blobs.put(b"nobody names this")
    (two_rounds.blobs.root / "tmp" / "dead.part").write_bytes(b"half")
    with open_registry(home, read_only=True) as registry:
        report = verify(registry)
    assert report.problems == ()
    assert [item.about.split("/")[-1] for item in report.notes] == [f"blob {orphan}", "dead.part"]
    assert all("registry gc" in item.remedy for item in report.notes)
