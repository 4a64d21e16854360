"""What is certified of an adapter is computed from the ledger; a ledger that is too short is found out."""

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.coordinator.test_spending import plan
from typer.testing import CliRunner

from pomona.cli import app
from pomona.coordinator.certificate import certify
from pomona.coordinator.spending import reserve, whole_ledger, witness_folder
from pomona.errors import ConfigError, RegistryDamaged
from pomona.privacy.plan import PrivacyPlan
from pomona.storage import ledger_witness
from pomona.storage.backup import restore_backup, write_backup
from pomona.storage.card import model_card
from pomona.storage.opening import open_registry
from pomona.storage.records import NewVersion, Version
from pomona.storage.registry import Registry
from pomona.storage.verification import verify
from pomona.wire import digest

BASE = "b" * 64
PLAN = plan(rounds=8, noise=1.0)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def registry(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.delenv("POMONA_REGISTRY_URL", raising=False)
    with open_registry(home) as registry:
        registry.add_base_model(BASE, "tiny", "tiny")
        for run in ("run-1", "run-2"):
            registry.start_run(run_id=run, adapter=run, base_sha256=BASE, settings_json="{}")
        yield registry


def release(
    registry: Registry, number: int, *, run: str = "run-1", plan: PrivacyPlan = PLAN, paid: PrivacyPlan | None = None
) -> Version:
    """Pay for a round, and publish it; ``paid`` pays in place of its own plan."""
    payload = f"{run} {number}".encode()
    row = reserve(registry, paid or plan, run_id=run, round_number=number)
    registry.settle_release(row, release_sha256=registry.blobs.put(payload))
    registry.open_round(run, number, parent=f"{run}/{number - 1}" if number > 1 else None, cohort=[])
    told = {
        "population": plan.population, "plan": plan.model_dump(mode="json"), "plan_sha256": plan.sha256,
        "ledger_seq": row.seq, "ledger_sha256": row.sha256, "clip": 0.5,
    }  # fmt: skip
    new = NewVersion(
        run_id=run, round_number=number, adapter=run, payload=payload, base_sha256=BASE, rank=1,
        exactness="approximate", recipe={"privacy": told, "task": "classification"},
    )  # fmt: skip
    return registry.publish_round(new)


def test_a_certificate_counts_all_that_the_population_has_released(registry: Registry) -> None:
    release(registry, 1, run="run-2")
    first = release(registry, 1)
    reserve(registry, PLAN, run_id="run-1", round_number=2)  # a process that was killed
    second = release(registry, 2)
    release(registry, 3)
    rows = whole_ledger(registry, PLAN.population)
    told = certify(second, rows)
    assert (told.releases, told.rounds) == (4, 2)
    assert told.epsilon == pytest.approx(PLAN.epsilon_after(4))
    assert told.epsilon_of_run == pytest.approx(PLAN.epsilon_after(3)), "a round that came to nothing is paid too"
    assert certify(first, rows).epsilon == pytest.approx(PLAN.epsilon_after(2))
    assert told.epsilon_without_sampling > 5 * told.epsilon
    assert (told.sha256, told.ledger_seq) == (digest(b"run-1 2"), rows[told.ledger_seq - 1].seq)
    assert (told.delta, told.noise_multiplier, told.sample_rate, told.population_size) == (1e-5, 1.0, 0.05, 1000)


def test_what_the_ledger_does_not_bear_out_is_not_certified(registry: Registry) -> None:
    version = release(registry, 1)
    rows = whole_ledger(registry, PLAN.population)
    with pytest.raises(RegistryDamaged, match="no such row"):
        certify(version, [])
    with pytest.raises(RegistryDamaged, match="was released"):
        certify(version, rows[:1])
    with pytest.raises(RegistryDamaged, match="was released"):
        certify(replace(version, sha256=digest(b"other bytes")), rows)
    plain = registry.publish_round
    registry.open_round("run-2", 1, parent=None, cohort=[])
    new = NewVersion(
        run_id="run-2", round_number=1, adapter="run-2", payload=b"x", base_sha256=BASE, rank=1, exactness="exact"
    )
    with pytest.raises(ConfigError, match="not released under privacy"):
        certify(plain(new), rows)


def test_an_adapter_of_a_simulation_is_not_certified(registry: Registry) -> None:
    """Its noise was scaled down to that of a larger cohort; a ledger row that claims more does not make it good."""
    scaled = PLAN.model_copy(update={"update_noise_multiplier": PLAN.noise_multiplier * 30 / 5000})
    version = release(registry, 1, plan=scaled, paid=PLAN)
    with pytest.raises(ConfigError, match="as in a simulation of a larger population"):
        certify(version, whole_ledger(registry, PLAN.population))


def test_a_row_that_paid_for_other_noise_certifies_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    louder = PLAN.model_copy(update={"noise_multiplier": 2.0, "update_noise_multiplier": 2.0})
    monkeypatch.setattr(PrivacyPlan, "sha256", PLAN.sha256)  # or the row would be another plan's to begin with
    version = release(registry, 1, paid=louder)
    with pytest.raises(RegistryDamaged, match=r"was paid for 2 at 0\.05; one of them was changed"):
        certify(version, whole_ledger(registry, PLAN.population))


def test_verify_finds_a_version_that_its_ledger_does_not_know(registry: Registry, home: Path, tmp_path: Path) -> None:
    release(registry, 1)
    assert not verify(registry).problems
    told = {"population": "phones", "ledger_seq": 7, "ledger_sha256": "c" * 64}
    registry.open_round("run-2", 1, parent=None, cohort=[])
    registry.publish_round(
        NewVersion(
            run_id="run-2",
            round_number=1,
            adapter="run-2",
            payload=b"x",
            base_sha256=BASE,
            rank=1,
            exactness="approximate",
            recipe={"privacy": told},
        )
    )
    assert [item.about for item in verify(registry).problems] == ["version run-2/1"]


def test_an_older_database_that_is_put_back_releases_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ledger is whole, and does not know what was spent since."""
    monkeypatch.delenv("POMONA_REGISTRY_URL", raising=False)
    with open_registry(home) as registry:
        reserve(registry, PLAN, run_id="run-1", round_number=1)
    shutil.copy(home / "registry.db", tmp_path / "older.db")
    with open_registry(home) as registry:
        reserve(registry, PLAN, run_id="run-1", round_number=2)
    for each in home.glob("registry.db*"):
        each.unlink()
    shutil.copy(tmp_path / "older.db", home / "registry.db")
    with open_registry(home) as registry:
        with pytest.raises(RegistryDamaged, match="an older database was put back"):
            reserve(registry, PLAN, run_id="run-1", round_number=2)
        assert len(registry.ledger()) == 1
        reserve(registry, plan(population="laptops"), run_id="run-1", round_number=1)


def test_a_restored_registry_releases_nothing_before_somebody_answers_for_it(
    registry: Registry, tmp_path: Path
) -> None:
    release(registry, 1)
    write_backup(registry, tmp_path / "backup.tar")
    release(registry, 2)
    restored = tmp_path / "restored"
    restore_backup(tmp_path / "backup.tar", restored)
    with open_registry(restored) as again:
        with pytest.raises(RegistryDamaged, match="restored from a backup"):
            reserve(again, PLAN, run_id="run-1", round_number=2)
        with pytest.raises(RegistryDamaged, match="restored from a backup"):
            reserve(again, plan(population="laptops"), run_id="run-1", round_number=1)
        done = CliRunner().invoke(app, ["privacy", "confirm", "phones", "--home", str(restored)])
        assert done.exit_code == 0, done.output
        reserve(again, PLAN, run_id="run-1", round_number=2)
        assert "privacy-ledger-confirmed" in {record.event for record in again.audit()}
    assert CliRunner().invoke(app, ["privacy", "confirm", "phones", "--home", str(restored)]).exit_code == 3


@pytest.mark.parametrize("text", ["", "{}", '{"seq": 0, "sha256": "x"}', "\x00"])
def test_a_witness_that_cannot_be_read_is_not_taken_for_none(registry: Registry, text: str) -> None:
    reserve(registry, PLAN, run_id="run-1", round_number=1)
    (witness_folder(registry) / "phones.json").write_text(text)
    with pytest.raises(RegistryDamaged, match="cannot be read"):
        reserve(registry, PLAN, run_id="run-1", round_number=2)


def test_a_witness_does_not_go_back(registry: Registry) -> None:
    first = reserve(registry, PLAN, run_id="run-1", round_number=1)
    reserve(registry, PLAN, run_id="run-1", round_number=2)
    folder = witness_folder(registry)
    ledger_witness.keep(folder, first)
    before = ledger_witness.seen(folder, "phones")
    assert ledger_witness.objection(folder, "phones", [first], before)
    assert not ledger_witness.objection(folder, "phones", registry.ledger("phones"), before)


def test_of_two_processes_that_remember_at_once_the_newer_row_stays(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older row's writer is held up after it has looked, for as long as the newer one's could overtake it."""
    older, newer = (reserve(registry, PLAN, run_id="run-1", round_number=number) for number in (1, 2))
    folder = witness_folder(registry)
    (folder / "phones.json").unlink()
    looked, overtaken = threading.Event(), threading.Event()
    read = ledger_witness._read

    def slow(path: Path) -> ledger_witness.Witness | str | None:
        found = read(path)
        if threading.current_thread() is first:
            looked.set()
            overtaken.wait(0.3)
        return found

    def second() -> None:
        looked.wait(5)
        ledger_witness.keep(folder, newer)
        overtaken.set()

    monkeypatch.setattr(ledger_witness, "_read", slow)
    first, other = threading.Thread(target=ledger_witness.keep, args=(folder, older)), threading.Thread(target=second)
    for each in (first, other):
        each.start()
    for each in (first, other):
        each.join()
    assert ledger_witness.seen(folder, "phones") == ledger_witness.Witness(seq=newer.seq, sha256=newer.sha256)


def test_ledger_and_certificate_are_told_to_people_and_machines(registry: Registry, home: Path) -> None:
    release(registry, 1)

    def told(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["privacy", *arguments, "--home", str(home)])
        assert done.exit_code == 0, done.output
        return done.stdout

    rows = json.loads(told("ledger", "phones", "--json"))
    assert [(row["state"], row["round"]) for row in rows] == [("reserved", 1), ("released", 1)]
    assert "reserved" in told("ledger")
    facts = json.loads(told("certificate", "run-1/1", "--json"))
    assert facts["epsilon"] == pytest.approx(PLAN.epsilon_after(1))
    assert {"delta", "unit", "adjacency", "accountant", "library", "noise_multiplier", "sample_rate"} <= facts.keys()
    assert "trusted" in " ".join(facts["assumptions"])
    assert "epsilon" in told("certificate", "run-1/1")
    assert CliRunner().invoke(app, ["privacy", "ledger", "nobody", "--home", str(home)]).exit_code == 3


def test_the_card_of_an_export_says_what_was_promised_and_how_many_took_part_is_not_in_it(registry: Registry) -> None:
    card = model_card(registry.lineage(release(registry, 1).ref))
    assert f"epsilon of at most {PLAN.budget} at delta 1e-05 for each client of phones" in card
    assert "| Privacy ledger | row 1, `" in card
    assert "clients |" not in card
