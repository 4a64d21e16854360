"""A base model with an adapter added to its weights, as a new folder that plain transformers loads.

``W' = W + B A`` is computed in float64 and rounded once to the base model's own type. In bfloat16 that rounding takes
more than a small update has, which is why the registry keeps adapters and merging happens on export only.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from pomona.adapters import AdapterWeights
from pomona.base_model import check_base_model, find_base_model
from pomona.errors import BaseModelError, ConfigError, ExportMismatch
from pomona.storage.export import description, write_files
from pomona.storage.records import LineageNode, Version
from pomona.storage.registry import Registry

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model")


def write_merged(
    registry: Registry,
    node: LineageNode,
    weights: AdapterWeights,
    folder: Path,
    *,
    base: str | None,
    notes: Sequence[str],
) -> None:
    """Write the merged model into an empty folder, load it again, and compare.

    Args:
        registry: Where the base model's record is.
        node: The version that is exported.
        weights: Its factors and heads, or a recompression of them.
        folder: Where to write.
        base: The base model's folder or packaged name; None: where it was when it was added to the registry.
        notes: Sentences for the model card.

    Raises:
        BaseModelError: The base model is not there, is another one, or has no such layers.
        ConfigError: The version cannot be merged.
        ExportMismatch: What was written does not load, or not as it was written.
    """
    version = node.version
    path = find_base_model(base or registry.base_model_source(version.base_sha256))
    check_base_model(path, expected_sha256=version.base_sha256)
    _silence()
    model = _load(path, version, weights.heads)
    add_adapter(model, weights)
    model.save_pretrained(str(folder))
    for pattern in _TOKENIZER_FILES:
        for file in path.glob(pattern):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
    _check(folder, model, version)
    write_files(folder, description(node, library="transformers", notes=notes))


@torch.no_grad()
def add_adapter(model: nn.Module, weights: AdapterWeights) -> None:
    """Add an adapter to the weights of a model in memory, and set its heads.

    Raises:
        BaseModelError: A layer or head is not in the model, or has another shape.
        ConfigError: A layer's weight is shared with another, which must not change.
    """
    shared = _shared(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for module, factors in weights.layers.items():
        name = f"{module}.weight"
        weight = _parameter(parameters, name, (factors.b.shape[0], factors.a.shape[1]))
        if name in shared:
            raise ConfigError(
                f"{name} is shared with {shared[name]}; merging would change both, export for peft instead"
            )
        delta = factors.scale * factors.b.double() @ factors.a.double()
        weight.copy_((weight.double() + delta).to(weight.dtype))
    for name, head in weights.heads.items():
        _parameter(parameters, name, tuple(head.shape)).copy_(head)


def _parameter(parameters: Mapping[str, nn.Parameter], name: str, shape: tuple[int, ...]) -> Tensor:
    found = parameters.get(name)
    if found is None or tuple(found.shape) != shape:
        raise BaseModelError(
            f"expected {name} of shape {shape} in the base model, got {'none' if found is None else tuple(found.shape)}"
        )
    return found


def _shared(model: nn.Module) -> dict[str, str]:
    """Return, for each parameter that has several names, another of its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: same[i - 1] for same in names.values() if len(same) > 1 for i, name in enumerate(same)}


def _load(path: Path, version: Version, heads: Mapping[str, Tensor]) -> Any:  # noqa: ANN401 - transformers' classes
    labels = version.recipe.get("labels")
    names = [str(label) for label in labels] if isinstance(labels, Sequence) and not isinstance(labels, str) else []
    options: dict[str, object] = {}
    if version.recipe.get("task") == "classification":
        count = len(names) or _classes(heads, version.ref)
        options["num_labels"] = count
        if names:
            options |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return _open(path, version, BaseModelError, **options)


def _open(path: Path, version: Version, refusal: type[Exception], **options: object) -> Any:  # noqa: ANN401
    causal = version.recipe.get("task") == "causal-lm"
    loader: Any = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    try:
        return loader.from_pretrained(
            path, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype="auto", **options
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise refusal(f"cannot load the model in {path}: {error}") from error


def _classes(heads: Mapping[str, Tensor], ref: str) -> int:
    """Return the number of classes where the recipe does not name them: the rows of the one head."""
    rows = {head.shape[0] for head in heads.values()}
    if len(rows) != 1:
        raise ConfigError(f"the recipe of {ref} names no labels, and its heads have {sorted(rows)} rows; expected one")
    return int(rows.pop())


def _check(folder: Path, model: nn.Module, version: Version) -> None:
    loaded: nn.Module = _open(folder, version, ExportMismatch)
    expected, found = model.state_dict(), loaded.state_dict()
    for name, tensor in expected.items():
        same = name in found and found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        if not same:
            raise ExportMismatch(f"{name} of the merged model does not load as it was written; nothing was exported")


def _silence() -> None:
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
