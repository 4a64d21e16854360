"""Adapters go out and come in by command, and what cannot is refused with a code."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pomona.cli.registry import app
from pomona.storage.opening import open_registry

MODULE = "encoder.layer.0.attention.self.query"
Call = Callable[..., Result]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POMONA_REGISTRY_URL", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({f"{MODULE}.weight": torch.zeros(4, 3)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    root = "base_model.model.bert"
    tensors = {
        f"{root}.{MODULE}.lora_A.weight": torch.eye(2, 3),
        f"{root}.{MODULE}.lora_B.weight": torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]),
        "base_model.model.classifier.weight": torch.ones(2, 4),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def call(tmp_path: Path) -> Call:
    return lambda *arguments: CliRunner().invoke(app, [*map(str, arguments), "--home", str(tmp_path / "home")])


@pytest.mark.parametrize("wrong", ["folder", "name"])
def test_what_cannot_be_taken_in_creates_no_registry(
    call: Call, tmp_path: Path, adapter: Path, base: Path, wrong: str
) -> None:
    folder, name = (tmp_path / "typo", "demo") if wrong == "folder" else (adapter, "no name")
    result = call("import", folder, "--name", name, "--base", base)
    assert result.exit_code != 0
    assert not (tmp_path / "home").exists()


@pytest.fixture
def taken_in(call: Call, adapter: Path, base: Path) -> dict[str, object]:
    result = call("import", adapter, "--name", "demo", "--base", base, "--json")
    assert result.exit_code == 0, result.output
    facts: dict[str, object] = json.loads(result.stdout)
    return facts


def test_an_import_is_a_version_with_a_base_model(taken_in: dict[str, object], call: Call, tmp_path: Path) -> None:
    assert (taken_in["ref"], taken_in["kind"], taken_in["rank"], taken_in["base_model"]) == (
        "demo/1",
        "import",
        2,
        "base",
    )
    for command in (["ls"], ["show", "demo"], ["versions", "demo"], ["lineage", "demo"], ["verify"]):
        assert call(*command).exit_code == 0
    assert "import" in call("versions", "demo").stdout
    with open_registry(tmp_path / "home") as registry:
        from pomona.wire import decode_weights

        weights, _ = decode_weights(registry.payload("demo"))
    assert weights.layers[f"bert.{MODULE}"].b.tolist()[:2] == [[6.0, 0.0], [0.0, 3.0]]


@pytest.mark.usefixtures("taken_in")
def test_an_export_says_what_it_kept_and_left_out(call: Call, tmp_path: Path) -> None:
    cut = json.loads(call("export", "demo", "--to", tmp_path / "cut", "--rank", 1, "--json").stdout)
    assert (cut["rank"], cut["kept_energy_min"], cut["left_out"]) == (1, pytest.approx(0.8), [])
    people = call("export", "demo", "--to", tmp_path / "vllm", "--layout", "vllm")
    assert (people.exit_code, "left out: classifier.weight" in people.stdout) == (0, True)
    tensors = load_file(tmp_path / "vllm" / "adapter_model.safetensors")
    assert tensors[f"base_model.model.bert.{MODULE}.lora_A.weight"].shape == (8, 3)
    plain = json.loads(call("export", "demo", "--to", tmp_path / "peft", "--json").stdout)
    assert (plain["ref"], plain["layout"], plain["directory"]) == ("demo/1", "peft", str(tmp_path / "peft"))
    card = (tmp_path / "peft" / "README.md").read_text()
    assert "| Origin | import, not made by a run |" in card
    again = json.loads(
        call("import", tmp_path / "peft", "--name", "copy", "--base", tmp_path / "base", "--json").stdout
    )
    with open_registry(tmp_path / "home") as registry:
        assert again["sha256"] == registry.resolve("demo").sha256


@pytest.mark.usefixtures("taken_in")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["export", "demo", "--rank", "0", "--to"], 2),
        (["export", "demo", "--layout", "onnx", "--to"], 2),
        (["export", "demo", "--base", "x", "--to"], 3),
        (["export", "demo", "--layout", "merged", "--base", "nowhere", "--to"], 5),
        (["export", "nobody", "--layout", "vllm", "--to"], 11),
    ],
    ids=str,
)
def test_a_refused_export_leaves_nothing(call: Call, tmp_path: Path, arguments: list[str], code: int) -> None:
    def files() -> list[Path]:
        return sorted(path for path in tmp_path.rglob("*") if not path.name.startswith("registry."))

    before = files()
    assert call(*arguments, tmp_path / "out").exit_code == code
    assert files() == before


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda adapter, _: (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin"), 3),
        (lambda adapter, _: (adapter / "adapter_config.json").write_text('{"peft_type": "IA3"}'), 3),
        (lambda adapter, _: (adapter / "adapter_config.json").write_text("{"), 40),
        (lambda adapter, _: (adapter / "adapter_model.safetensors").write_bytes(b"x" * 100), 40),
        (lambda _, base: (base / "model.safetensors").unlink(), 5),
        (lambda _, base: (base / "model.safetensors").write_bytes(b"x" * 100), 5),
    ],
)
def test_a_refused_import_publishes_nothing(
    call: Call, adapter: Path, base: Path, tmp_path: Path, change: Callable[[Path, Path], object], code: int
) -> None:
    change(adapter, base)
    result = call("import", adapter, "--name", "demo", "--base", base, "--json")
    assert (result.exit_code, json.loads(result.stdout)["error"]["code"]) == (code, code)
    with open_registry(tmp_path / "home") as registry:
        assert registry.adapters() == []
        assert list(registry.blobs.listing()) == []


def test_a_name_that_is_none_is_refused(call: Call, adapter: Path, base: Path) -> None:
    assert call("import", adapter, "--name", "../x", "--base", base).exit_code == 3
