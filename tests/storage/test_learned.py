"""What was learned, what was to be forgotten, and what leaves the registry no more because of that."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from tests.storage.conftest import BASE, PAYLOAD
from tests.storage.filling import SQLITE_ONLY

from pomona.errors import AdapterNotFound, RegistryError, VersionConflict, VersionQuarantined
from pomona.storage.backup import restore_backup, write_backup
from pomona.storage.certificates import NewCertificate
from pomona.storage.collection import collect_garbage
from pomona.storage.engine import writing
from pomona.storage.export import export_peft
from pomona.storage.learned import NewLearned
from pomona.storage.opening import open_registry
from pomona.storage.records import Parent, Version
from pomona.storage.registry import Registry
from pomona.storage.verification import verify

TASK = NewLearned(
    adapter="intents",
    payload=b"task",
    base_sha256=BASE,
    base_model="tiny-base",
    base_source="a test",
    rank=2,
    kind="task",
)
CERTIFICATE = NewCertificate(
    adapter="intents",
    scope="class",
    subjects=("plant",),
    method="gs-lora",
    exactness="behavioural",
    reason="the adapter was trained not to show it",
    evidence={"acc_forget": {"before": 0.9, "after": 0.0}},
    affected=("intents/1",),
)


def learn(registry: Registry, number: int) -> Version:
    parents = [Parent(ref=f"intents/{number - 1}", kind="task")] if number > 1 else []
    new = replace(TASK, payload=f"task {number}".encode(), parents=parents, metrics={"accuracy": 0.9})
    return registry.publish_learned(replace(new, expected_head=f"intents/{number - 1}" if number > 1 else ""))


def forget(registry: Registry, number: int) -> Version:
    new = replace(TASK, kind="forget", payload=b"less", parents=[Parent(ref=f"intents/{number - 1}", kind="forget")])
    before = [f"intents/{i}" for i in range(1, number)]
    certificate = replace(CERTIFICATE, affected=before)
    return registry.publish_learned(replace(new, exactness="behavioural"), certificate=certificate, quarantined=before)


def test_what_was_learned_is_a_version_with_its_kind_scores_and_parents(registry: Registry) -> None:
    learn(registry, 1)
    second = learn(registry, 2)
    assert (second.ref, second.kind, second.metrics, second.run_id) == ("intents/2", "task", {"accuracy": 0.9}, None)
    (parent,) = registry.lineage("intents/2").parents
    assert (parent.version.ref, parent.kind) == ("intents/1", "task")
    assert [item.ref for item in registry.search("kind = 'task' AND metrics.accuracy > 0.5").versions] == [
        "intents/2",
        "intents/1",
    ]
    with pytest.raises(VersionConflict, match="somebody else published first"):
        registry.publish_learned(replace(TASK, expected_head="intents/1"))
    assert len(collect_garbage(registry, grace_s=0.0).blobs) == 1  # of the one that came too late
    assert verify(registry).problems == ()


def test_a_request_is_one_transaction_version_certificate_and_quarantine(registry: Registry) -> None:
    learn(registry, 1)
    learn(registry, 2)
    registry.set_alias("intents", "champion", 2)
    third = forget(registry, 3)
    (certificate,) = registry.certificates("intents")
    assert (certificate.id, certificate.version, certificate.affected) == (1, "intents/3", ("intents/1", "intents/2"))
    assert certificate.evidence == CERTIFICATE.evidence
    assert (certificate.scope, certificate.subjects, certificate.exactness) == ("class", ("plant",), "behavioural")
    assert registry.resolve("intents@champion").ref == third.ref
    assert third.quarantined == ""
    assert [bool(item.quarantined) for item in registry.versions("intents")] == [True, True, False]
    assert [record.event for record in registry.audit()][-5:] == [
        "version-published",
        "certificate-recorded",
        "version-quarantined",
        "version-quarantined",
        "alias-set",
    ]
    assert verify(registry).problems == ()


@SQLITE_ONLY
def test_a_request_that_cannot_be_certified_publishes_nothing(registry: Registry) -> None:
    learn(registry, 1)
    for wrong in (replace(CERTIFICATE, subjects=()), replace(CERTIFICATE, affected=("intents/9",))):
        with pytest.raises((RegistryError, AdapterNotFound)):
            registry.publish_learned(replace(TASK, kind="forget"), certificate=wrong, quarantined=["intents/1"])
    assert [item.ref for item in registry.versions("intents")] == ["intents/1"]
    assert registry.certificates() == []
    assert registry.resolve("intents/1").quarantined == ""


def test_what_is_in_quarantine_leaves_the_registry_no_more(registry: Registry, tmp_path: Path) -> None:
    registry.publish_learned(replace(TASK, payload=PAYLOAD))
    registry.set_alias("intents", "champion", 1)
    (version,) = registry.quarantine(["intents@champion"], "client anna is to be forgotten")
    assert version.quarantined == "client anna is to be forgotten"
    assert version.aliases == ()
    for use in (
        lambda: export_peft(registry, "intents/1", tmp_path / "out"),
        lambda: registry.set_alias("intents", "champion", 1),
        lambda: registry.quarantine(["intents/1"], "again", instead="intents/1"),
    ):
        with pytest.raises(VersionQuarantined, match="intents/1 is in quarantine: client anna is to be forgotten"):
            use()
    assert not (tmp_path / "out").exists()
    before = registry.audit()
    assert registry.quarantine(["intents/1"], "again")[0].quarantined == "client anna is to be forgotten"
    assert registry.audit() == before
    assert registry.payload("intents/1") == PAYLOAD


@SQLITE_ONLY
def test_a_quarantine_says_why_and_moves_aliases_to_another_version(registry: Registry) -> None:
    learn(registry, 1)
    with pytest.raises(RegistryError, match="expected a reason"):
        registry.quarantine(["intents/1"], " ")
    with pytest.raises(RegistryError, match="is to be put into quarantine itself"):
        registry.quarantine(["intents/1"], "why", instead="intents/1")
    with pytest.raises(AdapterNotFound):
        registry.quarantine(["intents/1", "intents/2"], "why")
    assert registry.resolve("intents/1").quarantined == ""


def test_a_certificate_of_a_client_needs_no_version_of_its_own(
    registry: Registry, publish: Callable[..., Version]
) -> None:
    publish(1)
    made = replace(CERTIFICATE, adapter="demo", scope="client", subjects=("anna",), affected=("demo/1",))
    recorded = registry.record_certificate(made)
    assert (recorded.id, recorded.version, recorded.adapter) == (1, None, "demo")
    assert registry.record_certificate(replace(made, version="demo/1")).version == "demo/1"
    assert [item.id for item in registry.certificates()] == [1, 2]
    assert registry.certificates("other") == []
    with pytest.raises(AdapterNotFound):
        registry.record_certificate(replace(made, adapter="nobody"))
    with pytest.raises(RegistryError, match="expected a scope of class, client"):
        registry.record_certificate(replace(made, exactness="sure"))  # type: ignore[arg-type]
    assert verify(registry).problems == ()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE certificate SET exactness = 'exact'",
        "DELETE FROM certificate",
        "UPDATE quarantine SET reason = ''",
        "DELETE FROM quarantine",
    ],
)
def test_neither_certificate_nor_quarantine_can_be_changed(registry: Registry, change: str) -> None:
    learn(registry, 1)
    forget(registry, 2)
    with pytest.raises(IntegrityError, match="is only added to"), writing(registry._engine) as connection:
        connection.execute(sa.text(change))


@SQLITE_ONLY
def test_a_certificate_that_was_changed_all_the_same_shows(registry: Registry) -> None:
    learn(registry, 1)
    forget(registry, 2)
    registry.record_certificate(CERTIFICATE)
    changes = ["DROP TRIGGER certificate_is_immutable", "UPDATE certificate SET exactness = 'exact' WHERE id = 1"]
    with writing(registry._engine) as connection:
        for change in (*changes, "DROP TRIGGER certificate_is_kept", "DELETE FROM certificate WHERE id = 2"):
            connection.execute(sa.text(change))
    found = {item.about: item.found for item in verify(registry).problems}
    assert found == {
        "certificate 1": "was changed: its hash is another",
        "certificate 2": "is gone; the audit log tells of it",
    }


@SQLITE_ONLY
def test_an_alias_that_points_into_quarantine_shows(registry: Registry) -> None:
    learn(registry, 1)
    forget(registry, 2)
    registry.set_alias("intents", "champion", 2)
    with writing(registry._engine) as connection:
        connection.execute(sa.text("UPDATE alias SET version_id = 1"))
    assert [item.about for item in verify(registry).problems] == ["alias intents@champion"]


@SQLITE_ONLY
def test_a_backup_holds_certificates_and_quarantine(registry: Registry, tmp_path: Path) -> None:
    learn(registry, 1)
    forget(registry, 2)
    write_backup(registry, tmp_path / "backup.tar")
    restore_backup(tmp_path / "backup.tar", tmp_path / "restored")
    with open_registry(tmp_path / "restored") as restored:
        assert restored.certificates() == registry.certificates()
        assert restored.versions("intents") == registry.versions("intents")
        assert verify(restored).problems == ()


@SQLITE_ONLY
def test_no_run_goes_on_from_what_was_learned(registry: Registry) -> None:
    learn(registry, 1)
    with pytest.raises(VersionConflict, match="intents/1 was learned task after task"):
        registry.start_run(run_id="run-2", adapter="intents", base_sha256=BASE, settings_json="{}")
    learns = registry.start_run(run_id="run-3", adapter="intents", base_sha256=BASE, settings_json="{}", learns=True)
    assert learns.state == "running"
