"""Every layout computes what the version computes, or says by how much it does not."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from pomona.adapters import AdapterWeights, LoraFactors
from pomona.base_model import base_model_sha256
from pomona.coordinator import merged
from pomona.coordinator.layouts import cut_back, export_version, vllm_rank
from pomona.errors import BaseModelError, ConfigError, ExportMismatch
from pomona.storage.opening import open_registry
from pomona.storage.records import NewImport, Version
from pomona.storage.registry import Registry
from pomona.wire import encode_weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
INPUTS = torch.tensor([[2, 5, 7, 1], [3, 3, 9, 1]])
SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 30,
    "max_position_embeddings": 16,
}
Publish = Callable[..., Version]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("POMONA_REGISTRY_URL", raising=False)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with open_registry(tmp_path / "home") as registry:
        yield registry


def bert(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a base model without a head, its names without the model's prefix."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SHAPE)).bert
    nn.Module.to(model, dtype)
    model.save_pretrained(str(folder))
    return folder


def llama(folder: Path, *, tied: bool) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied)).save_pretrained(str(folder))
    return folder


def adapter(model: nn.Module, *, end: str = "query", rank: int = 3, head: str = "") -> AdapterWeights:
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    layers = {
        name: LoraFactors(a=drawn(rank + i, module.in_features), b=drawn(module.out_features, rank + i))
        for i, (name, module) in enumerate(model.named_modules())
        if isinstance(module, nn.Linear) and name.endswith(end)
    }
    ragged = {
        name: LoraFactors(a=factors.a[: rank + i], b=factors.b[:, : rank + i])
        for i, (name, factors) in enumerate(layers.items())
    }
    heads = {name: drawn(*p.shape) for name, p in model.named_parameters() if head and name.startswith(head)}
    return AdapterWeights(layers=ragged, heads=heads)


def publish(registry: Registry, weights: AdapterWeights, base: Path, **recipe: object) -> Version:
    return registry.publish_import(
        NewImport(
            adapter="demo",
            payload=encode_weights(weights),
            base_sha256=base_model_sha256(base),
            base_model="tiny-base",
            base_source=str(base),
            rank=weights.rank,
            recipe={"task": "classification", **recipe},
        )
    )


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result = model.train(False)(input_ids=INPUTS).logits
    assert isinstance(result, Tensor)
    return result


def plain(path: Path) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3, dtype="auto")
    return model


def expected_logits(base: Path, weights: AdapterWeights) -> Tensor:
    model = plain(base).float()
    merged.add_adapter(model, weights)
    return logits(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merged_model_is_loaded_by_plain_transformers(registry: Registry, tmp_path: Path, dtype: torch.dtype) -> None:
    base = bert(tmp_path / "base", dtype)
    (base / "tokenizer.json").write_text("{}")
    before = base_model_sha256(base)
    weights = adapter(plain(base), head="classifier")
    publish(registry, weights, base, labels=["ham", "eggs", "spam"])
    done = export_version(registry, "demo", tmp_path / "out", layout="merged")

    loaded = AutoModelForSequenceClassification.from_pretrained(done.directory, dtype="auto")
    assert loaded.dtype == dtype
    assert loaded.config.id2label == {0: "ham", 1: "eggs", 2: "spam"}
    original = dict(plain(base).named_parameters())
    for name, parameter in loaded.named_parameters():
        want = original[name].double()
        if (module := name.removesuffix(".weight")) in weights.layers:
            want = want + weights.layers[module].b.double() @ weights.layers[module].a.double()
        want = weights.heads.get(name, want)
        assert torch.equal(parameter, want.to(dtype)), name
    if dtype == torch.float32:
        assert_close(logits(loaded), expected_logits(base, weights))
    assert (done.directory / "tokenizer.json").read_text() == "{}"
    assert base_model_sha256(base) == before
    card = (done.directory / "README.md").read_text()
    assert 'base_model_relation: "merge"' in card
    assert 'library_name: "transformers"' in card


def test_a_causal_model_is_merged_but_shared_weights_are_not(registry: Registry, tmp_path: Path) -> None:
    base = llama(tmp_path / "base", tied=False)
    model = AutoModelForCausalLM.from_pretrained(base)
    publish(registry, adapter(model, end="proj"), base, task="causal-lm")
    done = export_version(registry, "demo", tmp_path / "out", layout="merged")
    merged.add_adapter(model, adapter(model, end="proj"))
    assert_close(logits(AutoModelForCausalLM.from_pretrained(done.directory)), logits(model))

    tied = AutoModelForCausalLM.from_pretrained(llama(tmp_path / "tied", tied=True))
    with pytest.raises(ConfigError, match=r"shared with model\.embed_tokens\.weight"):
        merged.add_adapter(tied, adapter(tied, end="lm_head"))


def test_the_base_model_is_asked_for_and_must_be_the_one(registry: Registry, tmp_path: Path) -> None:
    base = bert(tmp_path / "base")
    publish(registry, adapter(plain(base), head="classifier"), base)
    base.rename(tmp_path / "moved")
    with pytest.raises(BaseModelError):
        export_version(registry, "demo", tmp_path / "out", layout="merged")
    other = bert(tmp_path / "other", torch.bfloat16)
    with pytest.raises(BaseModelError, match="expected the base model with sha256"):
        export_version(registry, "demo", tmp_path / "out", layout="merged", base=str(other))
    assert not (tmp_path / "out").exists()
    done = export_version(registry, "demo", tmp_path / "out", layout="merged", base=str(tmp_path / "moved"))
    assert (done.directory / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "moved", "other", "out"]


def test_what_does_not_load_as_it_was_written_is_not_exported(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bert(tmp_path / "base")
    publish(registry, adapter(plain(base), head="classifier"), base)
    opened = merged._open

    def wrong(path: Path, version: Version, refusal: type[Exception], **options: object) -> nn.Module:
        model: nn.Module = opened(path, version, refusal, **options)
        if path != base:
            next(model.parameters()).data += 1.0
        return model

    monkeypatch.setattr(merged, "_open", wrong)
    with pytest.raises(ExportMismatch, match="does not load as it was written"):
        export_version(registry, "demo", tmp_path / "out", layout="merged")
    assert not (tmp_path / "out").exists()


def test_for_vllm_the_rank_is_one_of_its_own_and_heads_are_left_out(registry: Registry, tmp_path: Path) -> None:
    base = bert(tmp_path / "base")
    weights = adapter(plain(base), rank=8, head="classifier")
    publish(registry, weights, base)
    done = export_version(registry, "demo", tmp_path / "out", layout="vllm")
    assert (weights.rank, done.rank) == (9, 16)
    assert done.left_out == ["classifier.bias", "classifier.weight"]
    config = json.loads((done.directory / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (16, 16, None)
    tensors = load_file(done.directory / "adapter_model.safetensors")
    assert not [name for name in tensors if "classifier" in name]
    for module, factors in weights.layers.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        assert (a.shape[0], b.shape[1]) == (16, 16)
        assert_close(b @ a, factors.delta(), atol=1e-6, rtol=1e-5)
    assert "Without its head" in (done.directory / "README.md").read_text()


@pytest.mark.parametrize(
    ("rank", "taken"), [(1, 1), (2, 8), (8, 8), (9, 16), (33, 64), (129, 256), (257, 320), (321, 512), (512, 512)]
)
def test_ranks_are_rounded_up(rank: int, taken: int) -> None:
    assert vllm_rank(rank) == taken


def test_a_rank_that_vllm_has_not_is_refused_or_cut_back(registry: Registry, tmp_path: Path) -> None:
    base = bert(tmp_path / "base")
    wide = LoraFactors(a=torch.randn(600, 16), b=torch.randn(16, 600) / 100)
    publish(registry, AdapterWeights(layers={"bert.encoder.layer.0.attention.self.query": wide}), base)
    with pytest.raises(ConfigError, match="--rank 512"):
        export_version(registry, "demo", tmp_path / "out", layout="vllm")
    assert not (tmp_path / "out").exists()
    done = export_version(registry, "demo", tmp_path / "out", layout="vllm", rank=512)
    assert done.rank == 16  # the product has no more
    assert list(done.kept_energy.values()) == [pytest.approx(1.0)]


def test_a_cut_keeps_the_energy_that_it_says(registry: Registry, tmp_path: Path) -> None:
    base = bert(tmp_path / "base")
    weights = adapter(plain(base), rank=4, head="classifier")
    publish(registry, weights, base)
    done = export_version(registry, "demo", tmp_path / "out", rank=2)
    tensors = load_file(done.directory / "adapter_model.safetensors")
    for module, factors in weights.layers.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        whole, values = factors.delta().double(), torch.linalg.svdvals(factors.delta().double())
        share = float(values[:2].square().sum() / values.square().sum())
        assert done.kept_energy[module] == pytest.approx(share, rel=1e-6)
        assert float((b @ a - whole).norm() / whole.norm()) ** 2 == pytest.approx(1 - share, rel=1e-4)
        assert a.shape[0] == 2
    assert "cut back to rank 2" in (done.directory / "README.md").read_text()
    model = PeftModel.from_pretrained(plain(base), done.directory)
    small, _ = cut_back(weights, 2)
    assert_close(logits(model), expected_logits(base, small), atol=1e-5, rtol=0)


def test_a_layer_within_the_rank_stays_to_the_byte() -> None:
    weights = AdapterWeights(
        layers={"small": LoraFactors(a=torch.ones(2, 3), b=torch.ones(3, 2)),
                "large": LoraFactors(a=torch.eye(3), b=torch.eye(3))}
    )  # fmt: skip
    cut, kept = cut_back(weights, 2)
    assert cut.layers["small"] is weights.layers["small"]
    assert kept == {"small": 1.0, "large": pytest.approx(2 / 3)}
    with pytest.raises(ConfigError):
        cut_back(weights, 0)
