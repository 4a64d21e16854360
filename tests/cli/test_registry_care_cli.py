"""Keeping a registry whole by command: what is said, what is printed for machines, and the codes."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import save
from typer.testing import CliRunner

from pomona.cli.registry import app
from pomona.storage.opening import open_registry
from pomona.storage.records import NewVersion
from pomona.storage.registry import Registry

BASE = "b" * 64
PAYLOAD = save({"lora_A.x": np.ones((2, 3), np.float32), "lora_B.x": np.ones((4, 2), np.float32)})

Call = Callable[..., Result]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POMONA_REGISTRY_URL", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def registry(home: Path) -> Iterator[Registry]:
    with open_registry(home) as registry:
        registry.add_base_model(BASE, "tiny-base", "a test")
        registry.start_run(run_id="run-1", adapter="demo", base_sha256=BASE, settings_json="{}")
        registry.open_round("run-1", 1, parent=None, cohort=[])
        registry.publish_round(
            NewVersion(
                run_id="run-1",
                round_number=1,
                adapter="demo",
                payload=PAYLOAD,
                base_sha256=BASE,
                rank=2,
                exactness="exact",
                recipe={"task": "classification"},
            )
        )
        yield registry


@pytest.fixture
def call(registry: Registry, home: Path) -> Call:
    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--home", str(home)])

    return invoke


def test_a_whole_registry_is_verified(call: Call, registry: Registry) -> None:
    registry.blobs.put(b"nobody names this")
    people = call("verify")
    assert people.exit_code == 0, people.output
    assert "everything is there and fits together" in people.stdout
    assert "registry gc" in people.stdout
    machines = json.loads(call("verify", "--json").stdout)
    assert (machines["blobs"], machines["bytes"], machines["problems"]) == (1, len(PAYLOAD), [])
    assert len(machines["notes"]) == 1


def test_a_damaged_registry_has_a_list_and_a_code(call: Call, registry: Registry) -> None:
    registry.blobs.path(registry.resolve("demo").sha256).unlink()
    people = call("verify")
    assert people.exit_code == 17
    assert "version demo/1" in people.stdout
    assert "1 problem" in people.stdout
    assert people.stderr.count("\n") == 1
    machines = call("verify", "--json")
    document = json.loads(machines.stdout)
    assert (machines.exit_code, document["error"]["code"], document["error"]["type"]) == (17, 17, "RegistryDamaged")
    assert [item["about"] for item in document["problems"]] == ["version demo/1"]


def test_garbage_is_named_then_deleted(call: Call, registry: Registry) -> None:
    sha256 = registry.blobs.put(b"nobody names this")
    assert json.loads(call("gc", "--json").stdout)["young"] == 1
    then = time.time() - 7200
    os.utime(registry.blobs.path(sha256), (then, then))
    tried = json.loads(call("gc", "--grace", "1", "--dry-run", "--json").stdout)
    assert [item["sha256"] for item in tried["blobs"]] == [sha256]
    assert "deleted 1 blob of 17 bytes in all and 0 leftovers" in call("gc", "--grace", "1").stdout
    assert not registry.blobs.path(sha256).exists()
    assert call("gc", "--grace", "-1").exit_code == 2


def test_a_backup_is_restored_and_verified(
    call: Call, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, new = tmp_path / "backup.tar", tmp_path / "new"
    written = json.loads(call("backup", str(file), "--json").stdout)
    assert (written["path"], written["blobs"]) == (str(file), 1)
    monkeypatch.setenv("POMONA_REGISTRY_URL", "sqlite:////nowhere/else.db")
    restored = CliRunner().invoke(app, ["restore", str(file), "--home", str(new), "--json"])
    document = json.loads(restored.stdout)
    assert (restored.exit_code, document["path"], document["problems"]) == (0, str(new), [])
    monkeypatch.delenv("POMONA_REGISTRY_URL")
    with open_registry(new) as other:
        assert other.payload("demo/1") == PAYLOAD
    again = CliRunner().invoke(app, ["restore", str(file), "--home", str(new)])
    assert (again.exit_code, "not empty" in again.stderr) == (3, True)
    assert call("backup", str(file)).exit_code == 3
    file.write_bytes(file.read_bytes()[:2000])
    cut = CliRunner().invoke(app, ["restore", str(file), "--home", str(tmp_path / "other")])
    assert (cut.exit_code, cut.stderr.count("\n")) == (18, 1)
