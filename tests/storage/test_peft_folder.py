"""An adapter that peft saved computes the same as a version; what a version cannot be is refused with the reason."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification

from pomona.errors import BaseModelError, ConfigError, PayloadError
from pomona.storage.export import export_peft
from pomona.storage.peft_config import read_config
from pomona.storage.peft_folder import read_peft_folder
from pomona.storage.records import NewImport, Version
from pomona.storage.registry import Registry
from pomona.wire import decode_weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 30,
    "max_position_embeddings": 16,
    "num_labels": 3,
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def tiny() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = BertForSequenceClassification(BertConfig(**SHAPE)).train(False)
    return model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model without a head, its names without the model's prefix, as sentence-transformers saves it."""
    folder = tmp_path / "base"
    tiny().bert.save_pretrained(str(folder))  # type: ignore[operator, union-attr]
    return folder


def trained(folder: Path, **settings: object) -> PeftModel:
    """Save an adapter with random factors and a random head by peft itself, and return it."""
    options: dict[str, Any] = {"r": 4, "target_modules": ["query", "dense"], "task_type": "SEQ_CLS", **settings}
    model = get_peft_model(tiny(), LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return model


def deltas(model: PeftModel) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def publish(registry: Registry, folder: Path, base: Path, name: str = "taken-in") -> Version:
    read = read_peft_folder(folder, base)
    return registry.publish_import(
        NewImport(
            adapter=name,
            payload=read.payload,
            base_sha256="b" * 64,
            base_model="tiny-base",
            base_source=str(base),
            rank=read.rank,
            recipe=read.recipe,
        )
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 4},
        {"lora_alpha": 7},
        {"lora_alpha": 16, "use_rslora": True},
        {"rank_pattern": {"intermediate.dense": 2, "layer.1.*query": 6}},
        {"alpha_pattern": {"query": 3, r"layer\.0.*dense": 11}},
        {
            "rank_pattern": {"^bert.encoder.layer.0.attention.self.query": 1},
            "alpha_pattern": {"query": 5},
            "use_rslora": True,
        },
        {"init_lora_weights": "gaussian", "lora_dropout": 0.3},
        {"modules_to_save": ["classifier"]},
    ],
    ids=str,
)
def test_it_computes_what_peft_computes(tmp_path: Path, base: Path, settings: dict[str, object]) -> None:
    model = trained(tmp_path / "adapter", **settings)
    read = read_peft_folder(tmp_path / "adapter", base)
    weights, _ = decode_weights(read.payload)
    expected = deltas(model)
    assert weights.layers.keys() == expected.keys()
    for name, factors in weights.layers.items():
        assert_close(factors.delta(), expected[name], atol=1e-5, rtol=1e-5)
    assert read.rank == weights.rank == max(factors.rank for factors in weights.layers.values())
    assert weights.heads.keys() == {"classifier.weight", "classifier.bias"}
    assert read.recipe["task"] == "classification"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_factors_are_widened_exactly(tmp_path: Path, base: Path, dtype: torch.dtype) -> None:
    trained(tmp_path / "adapter", lora_alpha=4)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    narrow = {key: value.to(dtype) for key, value in load_file(file).items()}
    save_file(narrow, file)
    weights, _ = decode_weights(read_peft_folder(tmp_path / "adapter", base).payload)
    for name, factors in weights.layers.items():
        assert torch.equal(factors.b, narrow[f"base_model.model.{name}.lora_B.weight"].float())
        assert torch.equal(factors.a, narrow[f"base_model.model.{name}.lora_A.weight"].float())


def test_export_import_export_keeps_every_byte(registry: Registry, tmp_path: Path, base: Path) -> None:
    trained(tmp_path / "adapter", rank_pattern={"query": 2}, lora_alpha=7)
    first = publish(registry, tmp_path / "adapter", base)
    out = export_peft(registry, first.ref, tmp_path / "first")
    second = publish(registry, out, base)
    again = export_peft(registry, second.ref, tmp_path / "second")
    assert (first.ref, second.ref, second.kind, second.run_id) == ("taken-in/1", "taken-in/2", "import", None)
    content = [(folder / "adapter_model.safetensors").read_bytes() for folder in (out, again)]
    assert content[0] == content[1]
    third = publish(registry, again, base)
    assert third.sha256 == second.sha256


def test_the_second_name_and_lineage_of_an_import(registry: Registry, tmp_path: Path, base: Path) -> None:
    trained(tmp_path / "adapter")
    version = publish(registry, tmp_path / "adapter", base)
    node = registry.lineage("taken-in")
    assert (node.version.ref, node.parents, node.submissions) == (version.ref, [], ())
    assert (version.exactness, version.retained_energy) == ("exact", 1.0)
    assert version.recipe["imported"]["lora_alpha"] == 8  # type: ignore[index]
    with pytest.raises(ConfigError, match="adapter name"):
        publish(registry, tmp_path / "adapter", base, name="../x")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "biases"),
        ({"lora_bias": True}, "bias"),
        ({"init_lora_weights": "pissa"}, "changes the base model's own weights"),
        ({"init_lora_weights": "pissa_niter_16"}, "changes the base model's own weights"),
        ({"init_lora_weights": "olora"}, "changes the base model's own weights"),
        ({"init_lora_weights": "loftq"}, "changes the base model's own weights"),
        ({"init_lora_weights": "corda"}, "changes the base model's own weights"),
        ({"init_lora_weights": "lora_ga"}, "changes the base model's own weights"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"layer_replication": [[0, 2]]}, "repeated"),
        ({"target_parameters": ["x"]}, "no linear layers"),
        ({"something_new": 3}, "not known here"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "its task is"),
        ({"rank_pattern": {"(a+)+b": 2}}, "repeats a group"),
        ({"rank_pattern": {".*" * 3 + "X": 2}}, "repetitions"),
        ({"alpha_pattern": {"[a-z]{1,90}" * 3: 2}}, "repetitions"),
        ({"alpha_pattern": {"a" * 300: 2}}, "too long"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_plain_lora_is_refused_with_the_reason(changes: Mapping[str, object], reason: str) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "task_type": "SEQ_CLS", **changes}
    with pytest.raises(ConfigError, match=f"cannot be imported: .*{reason}"):
        read_config(json.dumps(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": "4"},
        {"r": True},
        {"lora_alpha": None},
        {"lora_alpha": "8"},
        {"rank_pattern": ["x"]},
        {"rank_pattern": {"x": -1}},
        {"rank_pattern": {"[": 1}},
        {"alpha_pattern": {"x": "1"}},
        {"modules_to_save": "classifier"},
    ],
    ids=str,
)
def test_a_malformed_configuration_is_refused(changes: Mapping[str, object]) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **changes}
    with pytest.raises(PayloadError):
        read_config(json.dumps(config))


def test_a_default_configuration_of_peft_is_taken() -> None:
    """Every setting that the installed peft writes by default is known."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query"]).to_dict()  # type: ignore[no-untyped-call]
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    assert read_config(json.dumps(plain, default=str)).scale_of("query") == 2.0


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


ROOT = "base_model.model.bert"
QUERY = f"{ROOT}.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "refusal", "reason"),
    [
        (lambda x: x.update({f"{QUERY}.lora_magnitude_vector": torch.ones(16)}), ConfigError, "DoRA"),
        (lambda x: x.update({f"{ROOT}.embeddings.lora_embedding_A": torch.ones(4, 30)}), ConfigError, "embedding"),
        (lambda x: x.update({f"{QUERY}.lora_B.bias": torch.ones(16)}), ConfigError, "bias"),
        (lambda x: x.update({f"{QUERY}.base_layer.weight": torch.ones(16, 16)}), ConfigError, "base model"),
        (lambda x: x.update({f"{ROOT}.pooler.dense.weight": torch.ones(16, 16)}), PayloadError, "modules_to_save"),
        (lambda x: x.update({"stranger": torch.ones(1)}), PayloadError, "start with"),
        (lambda x: x.pop(f"{QUERY}.lora_A.weight"), PayloadError, "same modules"),
        (lambda x: x.update({f"{QUERY}.lora_A.weight": torch.ones(3, 16)}), PayloadError, "rank 4"),
        (lambda x: x.update({f"{QUERY}.lora_A.weight": torch.ones(4, 17)}), BaseModelError, "base model has"),
        (lambda x: x.update({f"{QUERY}.lora_B.weight": torch.full((16, 4), math.nan)}), PayloadError, "NaN"),
        (lambda x: x.update({f"{QUERY}.lora_B.weight": torch.ones(16, 4).double()}), PayloadError, "dtype"),
        (lambda x: [x.pop(key) for key in list(x) if "lora_" in key], PayloadError, "at least one"),
        (
            lambda x: [x.update({key.replace("query", "nobody"): x.pop(key)}) for key in list(x)],
            BaseModelError,
            "no such",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_tensors_say_is_checked(
    tmp_path: Path, base: Path, change: Callable[[dict[str, Tensor]], object], refusal: type[Exception], reason: str
) -> None:
    trained(tmp_path / "adapter")
    edit(tmp_path / "adapter", change)
    with pytest.raises(refusal, match=reason):
        read_peft_folder(tmp_path / "adapter", base)


def test_modules_that_are_no_head_are_refused(tmp_path: Path, base: Path) -> None:
    trained(tmp_path / "adapter", modules_to_save=["pooler"])
    with pytest.raises(ConfigError, match="no classification head"):
        read_peft_folder(tmp_path / "adapter", base)


HEAD = "base_model.model.classifier"


@pytest.mark.parametrize(
    ("head", "labels", "refusal", "reason"),
    [
        ({"weight": (3, 99), "bias": (3,)}, 3, BaseModelError, "takes 99 inputs"),
        ({"weight": (3, 16), "bias": (4,)}, 3, PayloadError, "expected a bias of shape"),
        ({"weight": (3, 16), "bias": (3,)}, 5, PayloadError, "names 5 classes"),
        ({"weight": (3, 16), "bias": (3,)}, 3, None, ""),
        ({"dense.weight": (8, 16), "out_proj.weight": (3, 8), "out_proj.bias": (3,)}, 3, None, ""),
    ],
)
def test_a_head_fits_the_base_model_and_the_labels(
    tmp_path: Path,
    base: Path,
    head: Mapping[str, tuple[int, ...]],
    labels: int,
    refusal: type[Exception] | None,
    reason: str,
) -> None:
    """An export of another would not load, and name a class for what it never learned."""
    folder = tmp_path / "adapter"
    trained(folder)
    edit(folder, lambda x: [x.pop(key) for key in list(x) if key.startswith(HEAD)])
    edit(folder, lambda x: x.update({f"{HEAD}.{name}": torch.ones(shape) for name, shape in head.items()}))
    (folder / "labels.json").write_text(json.dumps([f"class-{i}" for i in range(labels)]))
    if refusal is None:
        read_peft_folder(folder, base, task="classification")
        return
    with pytest.raises(refusal, match=reason):
        read_peft_folder(folder, base, task="classification")


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "adapter")
    other = BertForSequenceClassification(BertConfig(**{**SHAPE, "hidden_size": 8})).bert
    other.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(BaseModelError, match=r"--base"):
        read_peft_folder(tmp_path / "adapter", tmp_path / "other")


def test_files_are_asked_for_by_name_and_nothing_pickled_is_read(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter_config\.json"):
        read_peft_folder(tmp_path, base)
    trained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ConfigError, match="pickled and never loaded"):
        read_peft_folder(tmp_path / "adapter", base)


def test_a_task_is_asked_for_where_there_is_none(tmp_path: Path, base: Path) -> None:
    trained(tmp_path / "adapter", modules_to_save=["classifier"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": None}))
    with pytest.raises(ConfigError, match="--task"):
        read_peft_folder(tmp_path / "adapter", base)
    assert read_peft_folder(tmp_path / "adapter", base, task="classification").recipe["task"] == "classification"


def test_labels_travel_along(registry: Registry, tmp_path: Path, base: Path) -> None:
    trained(tmp_path / "adapter")
    (tmp_path / "adapter" / "labels.json").write_text('["ham", "eggs", "spam"]')
    publish(registry, tmp_path / "adapter", base)
    out = export_peft(registry, "taken-in", tmp_path / "out")
    assert json.loads((out / "labels.json").read_text()) == ["ham", "eggs", "spam"]
    for broken in ("{", "[1]", "{}", json.dumps(["x" * 501, "b", "c"])):
        (tmp_path / "adapter" / "labels.json").write_text(broken)
        with pytest.raises(PayloadError, match=r"labels\.json"):
            read_peft_folder(tmp_path / "adapter", base)
