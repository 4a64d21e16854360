"""What was spent is written first, once, and cannot be taken back: on either database."""

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from tests.storage.filling import SQLITE_ONLY

from pomona.errors import RegistryError, VersionConflict
from pomona.storage import ledger
from pomona.storage import tables as t
from pomona.storage.ledger import START
from pomona.storage.opening import open_registry
from pomona.storage.records import LedgerEntry, NewVersion, Reservation
from pomona.storage.registry import Registry
from pomona.storage.verification import verify


def reservation(number: int = 1, *, population: str = "phones", attempt: int = 1, epsilon: float = 0.5) -> Reservation:
    return Reservation(
        population=population,
        run_id="run-1",
        round_number=number,
        attempt=attempt,
        unit="client",
        adjacency="add-or-remove-one",
        plan_sha256="a" * 64,
        epsilon=epsilon,
        delta=1e-6,
        budget=2.0,
        noise_multiplier=0.8,
        sample_rate=0.01,
        library="opacus 1.6.0",
    )


def reserve(registry: Registry, new: Reservation) -> LedgerEntry:
    rows = registry.ledger(new.population)
    return registry.reserve_release(new, expected_head=rows[-1].sha256 if rows else START)


def test_a_release_is_two_rows(registry: Registry) -> None:
    reserved = reserve(registry, reservation())
    settled = registry.settle_release(reserved, release_sha256="b" * 64)
    assert registry.ledger("phones") == [reserved, settled]
    assert (reserved.seq, reserved.state, reserved.previous, reserved.release_sha256) == (1, "reserved", START, None)
    assert (settled.seq, settled.state, settled.previous) == (2, "released", reserved.sha256)
    assert settled.release_sha256 == "b" * 64
    assert (settled.epsilon, settled.plan_sha256) == (reserved.epsilon, reserved.plan_sha256)


def test_populations_have_chains_of_their_own(registry: Registry) -> None:
    phones, laptops = reserve(registry, reservation()), reserve(registry, reservation(population="laptops"))
    assert (phones.seq, laptops.seq) == (1, 1)
    assert phones.previous == laptops.previous == START
    assert registry.ledger() == [laptops, phones]


def test_who_checked_an_older_ledger_is_refused(registry: Registry) -> None:
    """Two runs on one population would each find room for a release, and together overspend."""
    reserve(registry, reservation())
    with pytest.raises(VersionConflict, match="has grown"):
        registry.reserve_release(reservation(2), expected_head=START)
    assert len(registry.ledger("phones")) == 1


def test_of_many_who_reserve_at_once_one_is_first(registry: Registry) -> None:
    outcomes: list[object] = []
    barrier = threading.Barrier(6)

    def race(number: int) -> None:
        barrier.wait()
        try:
            outcomes.append(registry.reserve_release(reservation(number), expected_head=START))
        except VersionConflict as error:
            outcomes.append(error)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(each, LedgerEntry) for each in outcomes) == 1
    assert len(outcomes) == 6
    assert len(registry.ledger("phones")) == 1


def test_an_attempt_is_reserved_once_and_the_next_is_paid_again(registry: Registry) -> None:
    first = reserve(registry, reservation())
    with pytest.raises(RegistryError, match="never drawn again under one row"):
        registry.reserve_release(reservation(), expected_head=first.sha256)
    registry.settle_release(first, release_sha256=None)
    second = reserve(registry, reservation(attempt=2))
    assert [(each.attempt, each.state) for each in registry.ledger("phones")] == [
        (1, "reserved"), (1, "burned"), (2, "reserved"),
    ]  # fmt: skip
    assert second.seq == 3


@pytest.mark.parametrize("settled_as", ["b" * 64, None])
def test_a_release_ends_once(registry: Registry, settled_as: str | None) -> None:
    """The same bytes may be published again, others never: they would be a second draw of noise."""
    reserved = reserve(registry, reservation())
    first = registry.settle_release(reserved, release_sha256=settled_as)
    assert registry.settle_release(reserved, release_sha256=settled_as) == first
    for other in ("c" * 64, None if settled_as else "b" * 64):
        with pytest.raises(RegistryError, match="already"):
            registry.settle_release(reserved, release_sha256=other)
    assert len(registry.ledger("phones")) == 2


def test_what_was_not_reserved_is_not_released(registry: Registry) -> None:
    reserved = reserve(registry, reservation())
    with pytest.raises(RegistryError, match="not reserved"):
        registry.settle_release(dataclasses.replace(reserved, round=7), release_sha256="b" * 64)


def test_a_number_that_is_none_is_refused(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="finite numbers"):
        reserve(registry, reservation(epsilon=float("nan")))
    assert registry.ledger() == []


def test_rows_cannot_be_changed_or_deleted(registry: Registry) -> None:
    reserve(registry, reservation())
    for statement in (sa.update(t.ledger).values(epsilon=0.0), sa.delete(t.ledger)):
        with pytest.raises(DBAPIError, match="only added to"), registry._engine.begin() as connection:
            connection.execute(statement)
    assert registry.ledger("phones")[0].epsilon == 0.5


@SQLITE_ONLY
def test_rows_cannot_be_replaced(registry: Registry, make_version: Callable[..., NewVersion]) -> None:
    """SQLite tells no trigger of the row that a replacement deletes."""
    reserve(registry, reservation())
    registry.open_round("run-1", 1, parent=None, cohort=[])
    registry.publish_round(make_version())
    for table in ("privacy_ledger", "audit", "version"):
        with registry._engine.connect() as connection:
            before = connection.execute(sa.text(f"SELECT * FROM {table}")).all()
            with pytest.raises(DBAPIError, match="never replaced"):
                connection.execute(sa.text(f"INSERT OR REPLACE INTO {table} SELECT * FROM {table}"))
            connection.rollback()
            assert connection.execute(sa.text(f"SELECT * FROM {table}")).all() == before
    with pytest.raises(DBAPIError, match="never deleted"), registry._engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM version"))


@pytest.mark.parametrize(
    ("tamper", "found"),
    [
        (lambda rows: [dataclasses.replace(rows[0], epsilon=0.1), *rows[1:]], "its hash is another"),
        (lambda rows: [rows[0], rows[2]], "are gone"),
        (lambda rows: [rows[0], dataclasses.replace(rows[1], previous=START), rows[2]], "does not follow"),
        (lambda rows: rows[1:], "are gone"),
    ],
)
def test_what_was_changed_or_taken_out_is_found(
    registry: Registry, tamper: Callable[[list[LedgerEntry]], list[LedgerEntry]], found: str
) -> None:
    for number in (1, 2, 3):
        reserve(registry, reservation(number))
    rows = registry.ledger("phones")
    assert list(ledger.broken(rows)) == []
    assert any(found in why for _, why in ledger.broken(tamper(rows)))


@SQLITE_ONLY
def test_verify_finds_a_ledger_that_was_tampered_with(registry: Registry, home: Path) -> None:
    reserve(registry, reservation())
    with registry._engine.begin() as connection:
        connection.execute(sa.text("DROP TRIGGER privacy_ledger_is_immutable"))
        connection.execute(sa.update(t.ledger).values(epsilon=0.0))
    with open_registry(home) as again:
        assert any("privacy ledger phones/1" in problem.about for problem in verify(again).problems)
