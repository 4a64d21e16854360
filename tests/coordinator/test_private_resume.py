"""A private run that is killed: what was reserved stays spent, what was released is not released again."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.coordinator.lives import Lives
from tests.coordinator.run_until_killed import LOG, RUN
from tests.invariants import Outside, broken_promises
from tests.postgresql import fresh_database

from pomona.settings import RunSettings
from pomona.storage.opening import open_registry
from pomona.storage.records import LedgerEntry
from pomona.storage.registry import Registry

ROUNDS = 3
TEXTS = ("hammer", "salmon", "thunder", "cheese")


@pytest.fixture(scope="module")
def lives(tiny_bert: Path, toy_data: Path) -> Iterator[Lives]:
    with Lives(tiny_bert, toy_data) as made:
        yield made


@pytest.fixture(scope="module")
def settings(tiny_bert: Path, toy_data: Path) -> RunSettings:
    return RunSettings.model_validate(
        {
            "name": "toy",
            "rounds": ROUNDS,
            "seed": 3,
            "model": {"base": str(tiny_bert), "max_length": 16, "target_modules": ["query", "value"]},
            "data": {"source": str(toy_data)},
            "cohort": {"join_timeout_s": 20.0, "round_deadline_s": 60.0, "min_clients": 3},
            "training": {"batch_size": 8, "max_steps": 2, "learning_rate": 1e-2},
            "aggregation": {"strategy": "ffa-nested", "max_rank": 8},
            "privacy": {
                "unit": "client",
                "population": "toys",
                "population_size": 3,
                "epsilon": 20.0,
                "delta": 1e-3,
                "spare_rounds": 1,
                "accountant": "rdp",
                "adaptive_clip": {"count_noise": 10.0},
            },
        }
    )


def steps(rows: list[LedgerEntry]) -> list[tuple[str, int, int]]:
    return [(row.state, row.round, row.attempt) for row in rows]


def expect_whole(registry: Registry, home: Path) -> None:
    known = Outside(logs=[home / LOG], secrets=TEXTS, orphans=1)
    assert not broken_promises(registry, RUN, known)
    versions = registry.versions("toy")
    told = [version.recipe["privacy"] for version in versions]
    clips = [(each["clip"], each["next_clip"]) for each in told if isinstance(each, dict)]
    assert all(before[1] == after[0] != before[0] for before, after in itertools.pairwise(clips)), "the bound goes on"
    released = {row.round: row.release_sha256 for row in registry.ledger("toys") if row.state == "released"}
    assert {version.round_number: version.sha256 for version in versions}.items() <= released.items()
    assert len(released) == sum(row.state == "released" for row in registry.ledger("toys")), "released once a round"


UNSPENT = ("round-opened",)
BURNED = ("release-reserved", "release-summed", "release-written")
RELEASED = ("release-settled",)
PUBLISHED = ("version-published",)


@pytest.mark.parametrize("place", [*UNSPENT, *BURNED, *RELEASED, *PUBLISHED])
def test_a_private_run_that_is_killed_spends_what_it_reserved_and_releases_nothing_twice(
    place: str, lives: Lives, settings: RunSettings, tmp_path: Path
) -> None:
    assert lives.live(tmp_path, settings, failpoint=f"{place}:2").killed
    with open_registry(tmp_path) as registry:
        assert registry.run(RUN).state == "running"
        expect_whole(registry, tmp_path)
        before = registry.ledger("toys")
    assert lives.live(tmp_path, settings).code == 0, (tmp_path / LOG).read_text()
    with open_registry(tmp_path) as registry:
        assert registry.run(RUN).state == "finished"
        assert len(registry.versions("toy")) == ROUNDS
        expect_whole(registry, tmp_path)
        after = registry.ledger("toys")
    assert after[: len(before)] == before, "nothing is taken back"
    once = [(state, number, 1) for number in (1, 2, 3) for state in ("reserved", "released")]
    if place in BURNED:
        assert steps(after) == [*once[:3], ("burned", 2, 1), ("reserved", 2, 2), ("released", 2, 2), *once[4:]]
        return
    assert steps(after) == once
    if place in RELEASED:
        assert steps(before)[-1] == ("released", 2, 1), "it was written down, and so is published and not made again"


def test_without_room_for_another_try_the_run_ends_and_keeps_what_it_has(
    lives: Lives, settings: RunSettings, tmp_path: Path
) -> None:
    assert settings.privacy is not None
    tight = settings.model_copy(update={"privacy": settings.privacy.model_copy(update={"spare_rounds": 0})})
    assert lives.live(tmp_path, tight, failpoint="release-summed:2").killed
    assert lives.live(tmp_path, tight).code != 0
    with open_registry(tmp_path) as registry:
        run = registry.run(RUN)
        assert (run.state, run.reason.partition(":")[0]) == ("failed", "PrivacyBudgetExhausted")
        assert [version.ref for version in registry.versions("toy")] == ["toy/1", "toy/2"]
        assert steps(registry.ledger("toys"))[-1] == ("released", 2, 2)


@pytest.mark.parametrize("place", ["release-reserved", "release-settled"])
def test_the_same_on_postgresql(
    place: str, lives: Lives, settings: RunSettings, postgresql: str, tmp_path: Path
) -> None:
    with fresh_database(postgresql) as url:
        assert lives.live(tmp_path, settings, failpoint=f"{place}:2", url=url).killed
        assert lives.live(tmp_path, settings, url=url).code == 0, (tmp_path / LOG).read_text()
        with open_registry(tmp_path, url=url) as registry:
            assert len(registry.versions("toy")) == ROUNDS
            expect_whole(registry, tmp_path)
            assert sum(row.state == "burned" for row in registry.ledger("toys")) == (place == "release-reserved")
