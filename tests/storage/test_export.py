"""An export scores in plain peft like the base model plus the update, and is there whole or not at all."""

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from pomona.errors import AdapterNotFound, BlobCorrupt, BlobWriteError, ConfigError, PayloadError
from pomona.storage.export import export_peft
from pomona.storage.records import NewVersion, Version
from pomona.storage.registry import Registry

Make = Callable[..., NewVersion]
Publish = Callable[..., Version]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
INPUTS = torch.tensor([[2, 5, 7, 1], [3, 3, 9, 1]])


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def publish_payload(registry: Registry, make_version: Make) -> Callable[..., Version]:
    def publish(payload: bytes, **recipe: object) -> Version:
        registry.open_round("run-1", 1, parent=None, cohort=[])
        recipe = {"task": "classification"} | recipe
        return registry.publish_round(make_version(payload=payload, recipe=recipe))

    return publish


def tiny(kind: str) -> nn.Module:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 30,
        "max_position_embeddings": 16,
        "num_labels": 3,
    }
    model: nn.Module
    if kind == "bert":
        model = BertForSequenceClassification(BertConfig(**shape))
    else:
        model = RobertaForSequenceClassification(RobertaConfig(**shape))
    model.train(False)
    return model


def ragged(model: nn.Module, *, head: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a payload of unequal ranks, and the parameters of the model that has it folded in."""
    generator = torch.Generator().manual_seed(1)
    payload: dict[str, Tensor] = {}
    folded = {name: value.detach().clone() for name, value in model.named_parameters()}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for place, name in enumerate(name for name in linear if ".layer." in name):
        out, in_ = folded[f"{name}.weight"].shape
        rank = (1, 3, 5)[place % 3]
        a = torch.randn(rank, in_, generator=generator) * 0.3
        b = torch.randn(out, rank, generator=generator) * 0.3
        payload |= {f"lora_A.{name}": a, f"lora_B.{name}": b}
        folded[f"{name}.weight"] += b @ a
    for name in [name for name in folded if name.startswith(head)]:
        folded[name] = torch.randn(folded[name].shape, generator=generator)
        payload[f"head.{name}"] = folded[name]
    return payload, folded


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result = model(input_ids=INPUTS).logits
    assert isinstance(result, Tensor)
    return result


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_peft_scores_like_the_base_model_plus_the_update(
    registry: Registry, publish_payload: Callable[..., Version], tmp_path: Path, kind: str
) -> None:
    base = tiny(kind)
    payload, folded = ragged(base, head="classifier")
    publish_payload(save(payload), labels=["ham", "eggs", "spam"])
    folder = export_peft(registry, "demo", tmp_path / "export")

    expected = tiny(kind)
    before = logits(expected)
    expected.load_state_dict(folded, strict=False)
    loaded = PeftModel.from_pretrained(base, folder).eval()
    assert_close(logits(loaded), logits(expected), atol=1e-5, rtol=0)
    assert (logits(loaded) - before).abs().max() > 0.1

    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (5, 5, "SEQ_CLS")
    assert config["modules_to_save"] == ["classifier"]
    assert config["base_model_name_or_path"] == "tiny-base"
    assert config["target_modules"] == sorted(key[7:] for key in payload if key.startswith("lora_A."))
    assert json.loads((folder / "labels.json").read_text()) == ["ham", "eggs", "spam"]


def test_the_keys_are_those_that_peft_writes(
    registry: Registry, publish_payload: Callable[..., Version], tmp_path: Path
) -> None:
    base = tiny("bert")
    publish_payload(save(ragged(base, head="classifier")[0]))
    folder = export_peft(registry, "demo/1", tmp_path / "export")
    PeftModel.from_pretrained(base, folder).save_pretrained(str(tmp_path / "by-peft"), save_embedding_layers=False)
    ours = load_file(folder / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "by-peft" / "adapter_model.safetensors")
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_a_causal_model_has_no_head(
    registry: Registry, publish_payload: Callable[..., Version], tmp_path: Path
) -> None:
    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False)
    ).train(False)
    before = logits(base)
    payload = {"lora_A.lm_head": torch.full((2, 16), 0.1), "lora_B.lm_head": torch.full((30, 2), 0.1)}
    publish_payload(save(payload), task="causal-lm")
    folder = export_peft(registry, "demo", tmp_path / "export")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", None)
    assert not (folder / "labels.json").exists()
    with torch.no_grad():
        hidden = base.transformer(input_ids=INPUTS).last_hidden_state
    delta = hidden @ (payload["lora_B.lm_head"] @ payload["lora_A.lm_head"]).T
    assert_close(logits(PeftModel.from_pretrained(base, folder).eval()), before + delta, atol=1e-5, rtol=0)


def test_the_card_tells_where_it_comes_from_and_names_no_client(
    registry: Registry, publish: Publish, tmp_path: Path
) -> None:
    publish(1)
    publish(2)
    card = (export_peft(registry, "demo/2", tmp_path / "export") / "README.md").read_text()
    assert card.startswith('---\nbase_model: "tiny-base"\nlibrary_name: "peft"\ntags: ["lora"')
    assert "* demo/1 (parent, coefficient 1)" in card
    assert "* accuracy: 0.52" in card
    assert "2 clients" in card
    assert "anna" not in card


def test_only_an_earlier_export_is_overwritten(registry: Registry, publish: Publish, tmp_path: Path) -> None:
    publish(1)
    publish(2)
    target = tmp_path / "export"
    target.mkdir()
    export_peft(registry, "demo/1", target)
    with pytest.raises(ConfigError, match="earlier export"):
        export_peft(registry, "demo/2", target)
    assert json.loads((target / "pomona.json").read_text())["ref"] == "demo/1"
    export_peft(registry, "demo/2", target, overwrite=True)
    assert json.loads((target / "pomona.json").read_text())["ref"] == "demo/2"
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["export"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_export_is_never_touched(
    registry: Registry, publish: Publish, tmp_path: Path, overwrite: bool
) -> None:
    publish()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    for target in (tmp_path / "thesis", tmp_path / "thesis" / "chapter"):
        with pytest.raises(ConfigError):
            export_peft(registry, "demo", target, overwrite=overwrite)
    assert (tmp_path / "thesis" / "chapter").read_text() == "years of work"


@pytest.mark.parametrize("listed", [True, False])
def test_what_somebody_put_beside_an_export_is_never_touched(
    registry: Registry, publish: Publish, tmp_path: Path, *, listed: bool
) -> None:
    """The whole folder is replaced; notes in it would be gone. Earlier exports say nothing of their files."""
    publish()
    target = export_peft(registry, "demo", tmp_path / "export")
    marker = target / "pomona.json"
    if not listed:
        marker.write_text(
            json.dumps({key: each for key, each in json.loads(marker.read_text()).items() if key != "files"})
        )
    export_peft(registry, "demo", target, overwrite=True)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"what no export wrote \(notes\.txt\)"):
        export_peft(registry, "demo", target, overwrite=True)
    assert (target / "notes.txt").read_text() == "mine"


def test_a_full_disk_leaves_the_earlier_export(
    registry: Registry, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(1)
    publish(2)
    target = export_peft(registry, "demo/1", tmp_path / "export")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(BlobWriteError, match="No space left on device"):
            export_peft(registry, "demo/2", target, overwrite=True)
        with pytest.raises(BlobWriteError):
            export_peft(registry, "demo/2", tmp_path / "new")
    assert json.loads((target / "pomona.json").read_text())["ref"] == "demo/1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "home"]


ONE = {"lora_A.x": torch.ones(2, 3), "lora_B.x": torch.ones(4, 2)}


@pytest.mark.parametrize(
    ("payload", "recipe", "refusal"),
    [
        (b"nothing of the kind", {}, PayloadError),
        (save({"weight": torch.ones(1)}), {}, PayloadError),
        (save({"head.classifier.weight": torch.ones(1, 1)}), {}, PayloadError),
        (save({"lora_A.x": torch.ones(2, 3)}), {}, PayloadError),
        (save(ONE | {"lora_B.x": torch.ones(4, 3)}), {}, PayloadError),
        (save(ONE | {"head.bias": torch.ones(1)}), {}, ConfigError),
        (save(ONE), {"task": "poetry"}, ConfigError),
        (save(ONE), {"task": ["classification"]}, ConfigError),
    ],
)
def test_what_peft_could_not_load_is_not_written(
    registry: Registry,
    publish_payload: Callable[..., Version],
    tmp_path: Path,
    payload: bytes,
    recipe: Mapping[str, object],
    refusal: type[Exception],
) -> None:
    publish_payload(payload, **recipe)
    with pytest.raises(refusal):
        export_peft(registry, "demo", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_changed_or_unknown_version_is_not_written(registry: Registry, publish: Publish, tmp_path: Path) -> None:
    registry.blobs.path(publish().sha256).write_bytes(b"changed")
    with pytest.raises(BlobCorrupt):
        export_peft(registry, "demo", tmp_path / "export")
    with pytest.raises(AdapterNotFound):
        export_peft(registry, "demo/2", tmp_path / "export")
    assert not (tmp_path / "export").exists()
