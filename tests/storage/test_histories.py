"""How aliases moved and how metrics went; a registry from before the views keeps every row."""

import math
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command

from pomona.errors import AdapterNotFound, ConfigError
from pomona.storage.engine import create_engine
from pomona.storage.opening import open_registry
from pomona.storage.records import NewVersion, Version
from pomona.storage.registry import Registry
from pomona.storage.schema import alembic_config

Publish = Callable[..., Version]
Make = Callable[..., NewVersion]


def test_every_move_of_an_alias_is_kept(registry: Registry, publish: Publish) -> None:
    publish(1)
    publish(2)
    registry.set_alias("demo", "champion", 1)
    registry.set_alias("demo", "other", 2)
    registry.set_alias("demo", "champion", 2)
    registry.remove_alias("demo", "champion")
    registry.set_alias("demo", "champion", 1)
    moves = registry.alias_history("demo", "champion")
    assert [(item.previous, item.version) for item in moves] == [(None, 1), (1, 2), (2, None), (None, 1)]
    assert [item.moved_at for item in moves] == sorted(item.moved_at for item in moves)
    assert {(item.adapter, item.alias) for item in moves} == {("demo", "champion")}


def test_a_move_that_fails_leaves_no_trace(registry: Registry, publish: Publish) -> None:
    publish(1)
    registry.set_alias("demo", "champion", 1)
    with pytest.raises(AdapterNotFound):
        registry.set_alias("demo", "champion", 9)
    assert len(registry.alias_history("demo", "champion")) == 1


@pytest.mark.parametrize("alias", ["nobody", "", "a\x00", "\ud800", "' OR 1=1"])
def test_an_alias_that_never_was_has_no_history(registry: Registry, publish: Publish, alias: str) -> None:
    publish(1)
    with pytest.raises(AdapterNotFound, match="there never was an alias"):
        registry.alias_history("demo", alias)
    with pytest.raises(AdapterNotFound, match="did you mean demo"):
        registry.alias_history("demi", "champion")


def test_a_metric_is_followed_over_versions(registry: Registry, make_version: Make) -> None:
    for number, metrics in enumerate([{"accuracy": 0.5}, {"loss": 1.0}, {"accuracy": math.nan, "loss": 2.0}], start=1):
        registry.open_round("run-1", number, parent=None, cohort=[])
        registry.publish_round(make_version(number, metrics=metrics))
    accuracy, loss = registry.metric_history("demo")
    assert (accuracy.metric, loss.metric) == ("accuracy", "loss")
    assert [point.version for point in accuracy.points] == [1, 3]
    assert math.isnan(accuracy.points[1].value)
    assert [(point.version, point.value) for point in loss.points] == [(2, 1.0), (3, 2.0)]
    assert registry.metric_history("demo", "loss") == [loss]
    assert loss.points[0].created_at == registry.resolve("demo/2").created_at


def test_an_unknown_metric_names_what_there_is(registry: Registry, publish: Publish) -> None:
    assert registry.metric_history("demo") == []
    with pytest.raises(ConfigError, match="its versions have none"):
        registry.metric_history("demo", "accuracy")
    publish(1)
    with pytest.raises(ConfigError, match="did you mean accuracy"):
        registry.metric_history("demo", "acuracy")
    with pytest.raises(ConfigError, match="there are accuracy"):
        registry.metric_history("demo", "zzz")
    with pytest.raises(AdapterNotFound):
        registry.metric_history("demi")


def test_an_older_registry_keeps_its_moves_and_its_lineage(home: Path) -> None:
    home.mkdir()
    engine = create_engine(f"sqlite:///{home / 'registry.db'}", read_only=False)
    config = alembic_config()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0003")
        for statement in OLD_ROWS:
            connection.exec_driver_sql(statement)
    engine.dispose()
    with open_registry(home) as registry:
        moves = registry.alias_history("demo", "champion")
        assert [(item.previous, item.version) for item in moves] == [(None, 1), (1, 2)]
        assert registry.lineage("demo/2").parents[0].version.ref == "demo/1"
        assert [version.ref for version in registry.search("alias = 'champion'").versions] == ["demo/2"]
    with closing(sqlite3.connect(home / "registry.db")) as connection:
        assert connection.execute("SELECT child, parent, coefficient FROM lineage").fetchall() == [
            ("demo/2", "demo/1", 0.5)
        ]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


OLD_ROWS = [
    "INSERT INTO adapter VALUES ('demo', '2026-01-01')",
    "INSERT INTO base_model VALUES ('b', 'b', 'b', '2026-01-01')",
    *(
        "INSERT INTO version (id, adapter_name, version, blob_sha256, bytes, base_sha256, rank, kind, exactness, "
        f"retained_energy, recipe, created_at) VALUES ({n}, 'demo', {n}, 'c', 1, 'b', 4, 'round', 'exact', 1.0, "
        "'{}', '2026-01-01 00:00:00.000000')"
        for n in (1, 2)
    ),
    "INSERT INTO lineage VALUES (2, 1, 'parent', 0.5)",
    "INSERT INTO alias VALUES ('demo', 'champion', 2, '2026-01-02 00:00:00.000000')",
    *(
        "INSERT INTO alias_history (adapter_name, alias, version_id, moved_at) "
        f"VALUES ('demo', 'champion', {n}, '2026-01-0{n} 00:00:00.000000')"
        for n in (1, 2)
    ),
]
