"""The audit log has one record of each change, and a change of the log shows."""

import os
import pwd
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from tests.storage.filling import SQLITE_ONLY

from pomona.errors import BlobWriteError, ConfigError, VersionConflict
from pomona.storage import audit
from pomona.storage.engine import writing
from pomona.storage.opening import open_registry
from pomona.storage.records import NewSubmission, NewVersion, Version
from pomona.storage.registry import Registry
from pomona.storage.verification import verify

Publish = Callable[..., Version]
Submit = Callable[..., NewSubmission]


def told(registry: Registry) -> list[tuple[str, str]]:
    return [(record.event, record.subject) for record in registry.audit()]


def test_every_change_has_one_record(registry: Registry, publish: Publish) -> None:
    registry.enrol_client("run-1", name="anna", rank=4, num_examples=10)
    registry.set_initial_metrics("run-1", {"accuracy": 0.1})
    publish(weights={"anna": 1.0})
    registry.set_alias("demo", "champion", 1)
    registry.set_tag("demo/1", "site", "b")
    registry.remove_alias("demo", "champion")
    registry.finish_run("run-1", "finished")
    assert told(registry) == [
        ("base-model-added", "b" * 64),
        ("run-started", "run-1"),
        ("client-enrolled", "run-1: anna"),
        ("run-scored", "run-1"),
        ("round-opened", "run-1/1"),
        ("submission-recorded", "run-1/1: anna"),
        ("version-published", "demo/1"),
        ("alias-set", "demo@champion"),
        ("tag-set", "demo/1"),
        ("alias-removed", "demo@champion"),
        ("run-finished", "run-1"),
    ]


def test_what_was_done_before_or_refused_has_none(
    registry: Registry, submission: Submit, make_version: Callable[..., NewVersion]
) -> None:
    registry.open_round("run-1", 1, parent=None, cohort=["anna"])
    registry.record_submission(submission())
    registry.set_initial_metrics("run-1", {"accuracy": 0.1, "loss": float("nan")})
    before = told(registry)
    registry.set_initial_metrics("run-1", {"accuracy": 0.1, "loss": float("nan")})
    registry.add_base_model("b" * 64, "tiny-base", "a test")
    registry.start_run(run_id="run-1", adapter="demo", base_sha256="b" * 64, settings_json="{}")
    registry.open_round("run-1", 1, parent=None, cohort=["anna"])
    registry.record_submission(submission())
    with pytest.raises(VersionConflict):
        registry.record_submission(submission(payload=b"another"))
    with pytest.raises(ConfigError):
        registry.set_alias("demo", "Not An Alias", 1)
    assert told(registry) == before


def test_a_record_says_what_changed_and_who_did_it(registry: Registry, publish: Publish) -> None:
    version = publish(weights={"anna": 1.0})
    registry.set_alias("demo", "champion", 1)
    found = {record.event: record for record in registry.audit()}
    assert found["version-published"].details == {"sha256": version.sha256, "run": "run-1", "round": 1}
    assert found["alias-set"].details == {"version": 1}
    assert found["alias-set"].actor
    assert found["alias-set"].at.utcoffset() is not None


def test_the_actor_is_the_account_whatever_the_surroundings_say(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "somebody-else")
    audit._actor.cache_clear()
    registry.log_event("looked-after", "nothing")
    assert registry.audit()[-1].actor == pwd.getpwuid(os.geteuid()).pw_name


def test_each_record_follows_on_the_one_before(registry: Registry, publish: Publish) -> None:
    publish()
    chain = registry.audit()
    assert [record.id for record in chain] == list(range(1, len(chain) + 1))
    assert [record.previous for record in chain] == [audit.START, *(record.sha256 for record in chain[:-1])]
    assert registry.audit(after=chain[-2].id) == chain[-1:]


def test_the_hash_is_that_of_the_documented_text() -> None:
    import hashlib
    from datetime import UTC, datetime

    record = {
        "id": 7,
        "at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "actor": "änna",
        "event": "tag-set",
        "subject": "demo/1",
        "details": {"b": 1, "a": None},
        "previous": "0" * 64,
    }
    text = '[7,"2026-01-02T03:04:05.000000+00:00","\\u00e4nna","tag-set","demo/1",{"a":null,"b":1},"' + "0" * 64 + '"]'
    assert audit.digest(record) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "statement",
    ["UPDATE audit SET actor = 'nobody' WHERE id = 2", "DELETE FROM audit WHERE id = 2", "DELETE FROM audit"],
)
def test_the_database_refuses_to_change_it(registry: Registry, statement: str) -> None:
    with pytest.raises(IntegrityError, match="the audit log"), writing(registry._engine) as connection:
        connection.execute(sa.text(statement))
    assert verify(registry).problems == ()


@SQLITE_ONLY
@pytest.mark.parametrize(
    ("statement", "about", "found"),
    [
        ("UPDATE audit SET actor = 'nobody' WHERE id = 2", "audit record 2", "its hash is another"),
        ("UPDATE audit SET details = '{\"x\": 1}' WHERE id = 3", "audit record 3", "its hash is another"),
        ("DELETE FROM audit WHERE id = 3", "audit record 4", "comes after 2; 1 before it are gone"),
    ],
)
def test_a_change_round_the_database_shows(
    registry: Registry, publish: Publish, statement: str, about: str, found: str
) -> None:
    publish()
    with writing(registry._engine) as connection:
        for name in ("audit_is_immutable", "audit_is_kept"):
            connection.execute(sa.text(f"DROP TRIGGER {name}"))
        connection.execute(sa.text(statement))
    problems = [(item.about, item.found) for item in verify(registry).problems]
    assert any(item[0] == about and found in item[1] for item in problems), problems


@SQLITE_ONLY
def test_an_end_that_was_cut_off_is_found_by_a_hash_that_somebody_kept(registry: Registry, publish: Publish) -> None:
    publish()
    kept = registry.audit()[-1].sha256
    with writing(registry._engine) as connection:
        connection.execute(sa.text("DROP TRIGGER audit_is_kept"))
        connection.execute(sa.text("DELETE FROM audit WHERE id = (SELECT max(id) FROM audit)"))
    assert verify(registry).problems == ()
    assert kept not in {record.sha256 for record in registry.audit()}


def test_writers_at_once_make_one_chain(registry: Registry, publish: Publish, home: Path) -> None:
    publish()

    def tag(number: int) -> None:
        with open_registry(home) as mine:
            for value in range(5):
                mine.set_tag("demo/1", f"writer-{number}", str(value))

    writers = [threading.Thread(target=tag, args=(number,)) for number in range(4)]
    before = len(registry.audit())
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(registry.audit()) == before + 20
    assert verify(registry).problems == ()


def test_a_change_that_fails_leaves_no_record(
    registry: Registry, submission: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.open_round("run-1", 1, parent=None, cohort=["anna"])
    before = told(registry)

    def full(_payload: bytes) -> str:
        raise BlobWriteError("no space")

    monkeypatch.setattr(registry.blobs, "put", full)
    with pytest.raises(BlobWriteError):
        registry.record_submission(submission())
    assert told(registry) == before
