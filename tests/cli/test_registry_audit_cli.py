"""The audit log by command: what people and programs are shown, and the code where it is not whole."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from click.testing import Result
from typer.testing import CliRunner

from pomona.cli import app
from pomona.storage.engine import writing
from pomona.storage.opening import open_registry
from pomona.storage.registry import Registry

Call = Callable[..., Result]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.delenv("POMONA_REGISTRY_URL", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("POMONA_HOME", str(tmp_path / "home"))
    with open_registry() as registry:
        registry.add_base_model("b" * 64, "tiny-base", "a test")
        registry.start_run(run_id="run-1", adapter="demo", base_sha256="b" * 64, settings_json="{}")
        registry.finish_run("run-1", "finished")
        yield registry


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["registry", "audit", *arguments])


@pytest.mark.usefixtures("registry")
def test_people_see_what_was_done() -> None:
    shown = call()
    assert shown.exit_code == 0, shown.output
    assert all(event in shown.stdout for event in ("base-model-added", "run-started", "run-finished"))
    assert "3 records; each follows on the one before it; head " in shown.stdout
    shown = call("--last", "1")
    assert "run-started" not in shown.stdout
    assert "3 records, of which the newest 1 are shown" in shown.stdout


def test_a_hash_that_was_noted_down_is_looked_for(registry: Registry) -> None:
    noted = json.loads(call("--json").stdout)["head"]
    registry.finish_run("run-1", "failed", "a test")
    assert call("--expect", noted).exit_code == 0
    missing = call("--expect", "f" * 64)
    assert missing.exit_code == 17
    assert "cut off or written anew" in missing.stderr


def test_a_changed_record_is_an_error(registry: Registry) -> None:
    with writing(registry._engine) as connection:
        connection.execute(sa.text("DROP TRIGGER audit_is_immutable"))
        connection.execute(sa.text("UPDATE audit SET actor = 'nobody' WHERE id = 2"))
    assert call().exit_code == 17
    found = call("--json")
    assert found.exit_code == 17
    answer = json.loads(found.stdout)
    assert answer["problems"] == ["record 2 was changed: its hash is another"]
    assert answer["error"]["code"] == 17
    assert [record["id"] for record in answer["records"]] == [1, 2, 3]
