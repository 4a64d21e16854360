"""Two versions side by side, for people and for machines."""

import json
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

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
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
    ones: Callable[..., Array] = lambda *shape: np.ones(shape, np.float32)  # noqa: E731
    payloads = {
        "one": {"lora_A.x": ones(2, 3), "lora_B.x": ones(4, 2), "head.classifier.bias": ones(2)},
        "two": {"lora_A.x": -ones(1, 3), "lora_B.x": ones(4, 1), "head.classifier.bias": ones(3)},
        "bent": {"lora_A.x": ones(1, 9), "lora_B.x": ones(4, 1)},
        "elsewhere": {"lora_A.x": ones(1, 3), "lora_B.x": ones(4, 1)},
    }
    with open_registry(home) as registry:
        for name, tensors in payloads.items():
            base = ("c" if name == "elsewhere" else "b") * 64
            registry.add_base_model(base, f"base of {name}", "a test")
            registry.start_run(run_id=name, adapter=name, base_sha256=base, settings_json="{}")
            registry.open_round(name, 1, parent=None, cohort=[])
            registry.publish_round(
                NewVersion(
                    run_id=name,
                    round_number=1,
                    adapter=name,
                    payload=save(tensors),
                    base_sha256=base,
                    rank=2,
                    exactness="exact",
                )
            )
        yield registry


@pytest.fixture
def call(registry: Registry, home: Path) -> Call:
    return lambda *arguments: CliRunner().invoke(app, ["diff", *arguments, "--home", str(home)])


def test_people_get_a_table_with_a_row_for_all_layers(call: Call) -> None:
    result = call("one", "two/1")
    assert result.exit_code == 0, result.output
    assert [
        text for text in ("A = one/1, B = two/1", "all layers", "classifier.bias", "-1") if text not in result.stdout
    ] == []


def test_machines_get_every_angle(call: Call) -> None:
    facts = json.loads(call("one", "two", "--json").stdout)
    layer = facts["layers"]["x"]
    assert (facts["a"]["ref"], facts["b"]["ref"]) == ("one/1", "two/1")
    assert layer["norms"] == pytest.approx([2 * 12**0.5, 12**0.5])
    assert (layer["distance"], layer["cosine"]) == (pytest.approx(3 * 12**0.5), pytest.approx(-1.0))
    assert layer["ranks"] == [1, 1]
    assert [*layer["column_angles"], *layer["row_angles"]] == pytest.approx([0.0, 0.0], abs=1e-7)
    assert facts["heads"]["classifier.bias"]["distance"] is None
    assert facts["distance"] == pytest.approx(layer["distance"])


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("one", "elsewhere"), 5, "different base models"),
        (("one", "bent"), 40, "cannot be compared"),
        (("one", "nobody"), 11, "no adapter"),
    ],
)
def test_what_cannot_be_compared_is_refused(call: Call, arguments: tuple[str, str], code: int, reason: str) -> None:
    result = call(*arguments)
    assert (result.exit_code, reason in result.stderr) == (code, True)
    assert json.loads(call(*arguments, "--json").stdout)["error"]["code"] == code
