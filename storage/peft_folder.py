"""Reading an adapter that PEFT wrote, so that it becomes a version: all scaling folded in, names and shapes checked.

PEFT computes ``W + s B A`` with a scale per layer; a version has the scale 1, so ``s B`` is stored, multiplied in
float64 and rounded once. Where ``s`` is 1, as in what this registry exports, the bytes of the factors stay the same.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pomona.base_model import weight_files
from pomona.errors import BaseModelError, ConfigError, PayloadError
from pomona.manifest import HEAD, LORA_A, LORA_B
from pomona.payload import TensorInfo, read_header
from pomona.storage.peft_config import PeftConfig, Task, read_config

PEFT_HEADS = ("classifier", "score")  # for SEQ_CLS, peft saves these whole whatever it is told

_MOST_LABELS, _LONGEST_LABEL = 100_000, 500
_ROOT = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_REFUSED = {
    "lora_magnitude_vector": "DoRA scales the rows of the sum, which is no low-rank update",
    "lora_embedding_": "it adapts an embedding, and runs adapt linear layers only",
    "lora_B.bias": "it trains a bias beside the factors",
    "base_layer": "it carries weights of the base model, which a version never changes",
}

Floats = NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedAdapter:
    """An adapter in the registry's own form.

    Attributes:
        payload: Its safetensors bytes, scale folded in.
        rank: The largest rank of any layer.
        recipe: ``task``, ``labels`` where the folder has them, and what it was imported from.
    """

    payload: bytes = field(repr=False)
    rank: int
    recipe: Mapping[str, object]


def read_peft_folder(folder: Path, base: Path, *, task: Task | None = None) -> ImportedAdapter:
    """Read a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        folder: The adapter.
        base: Folder of the base model that it was trained on.
        task: What the adapter is for, where its configuration does not say.

    Raises:
        ConfigError: The folder has no such files, or describes something that a version cannot be.
        PayloadError: A file is malformed, or the two contradict each other.
        BaseModelError: The base model has no such layers, or of other shapes.
    """
    config = read_config(_read_text(folder, "adapter_config.json"))
    task = config.task or task
    if task is None:
        raise ConfigError("the adapter does not say what it is for; give --task classification or causal-lm")
    tensors = _read_tensors(_read_bytes(folder, "adapter_model.safetensors"))
    shapes = _shapes(base)
    pairs, heads = _sorted_out(tensors)
    for name in heads:
        _require_head(name, config, shapes, task=task)
    labels = _labels(folder)
    _require_head_shapes(heads, hidden=_hidden_size(base), labels=len(labels.get("labels", ())))
    payload: dict[str, Floats] = {HEAD + name: head for name, head in heads.items()}
    for module, (a, b) in pairs.items():
        _require_fit(module, a, b, config, shapes)
        payload |= {LORA_A + module: a, LORA_B + module: _scaled(b, config.scale_of(module), module)}
    for key, value in payload.items():
        if not np.isfinite(value).all():
            raise PayloadError(f"{key} of the adapter has NaN or an infinity, or has one when its scale is folded in")
    return ImportedAdapter(
        payload=_encoded(payload),
        rank=max(a.shape[0] for a, _ in pairs.values()),
        recipe={"task": task, **labels, "imported": _origin(config)},
    )


def _sorted_out(tensors: Mapping[str, Floats]) -> tuple[dict[str, tuple[Floats, Floats]], dict[str, Floats]]:
    """Split the tensors of a file into factors by module and parameters trained whole."""
    downs: dict[str, Floats] = {}
    ups: dict[str, Floats] = {}
    heads: dict[str, Floats] = {}
    for key, tensor in tensors.items():
        for part, reason in _REFUSED.items():
            if part in key:
                raise ConfigError(f"this adapter cannot be imported: it has {key!r}; {reason}")
        if not key.startswith(_ROOT):
            raise PayloadError(f"expected names that start with {_ROOT!r}, got {key!r}")
        name = key.removeprefix(_ROOT)
        if name.endswith(_DOWN):
            downs[name.removesuffix(_DOWN)] = tensor
        elif name.endswith(_UP):
            ups[name.removesuffix(_UP)] = tensor
        else:
            heads[name] = tensor
    if not downs or downs.keys() != ups.keys():
        raise PayloadError(
            f"expected lora_A and lora_B of the same modules, at least one; got lora_A of {len(downs)} modules and "
            f"lora_B of {len(ups)}"
        )
    return {module: (downs[module], ups[module]) for module in sorted(downs)}, heads


def _require_fit(module: str, a: Floats, b: Floats, config: PeftConfig, shapes: Shapes) -> None:
    rank = config.rank_of(module)
    if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
        raise PayloadError(
            f"expected (rank, in) and (out, rank) of rank {rank} for {module}, as adapter_config.json says, "
            f"got {a.shape} and {b.shape}"
        )
    found = _shape_of(f"{module}.weight", shapes)
    if found != (b.shape[0], a.shape[1]):
        raise BaseModelError(
            f"the adapter changes {module} of shape {(b.shape[0], a.shape[1])}, the base model has "
            f"{'no such layer' if found is None else found}; give the base model that it was trained on (--base)"
        )


def _require_head(name: str, config: PeftConfig, shapes: Shapes, *, task: Task) -> None:
    """A head is on top of the base model: PEFT's own names for one, or what the base model has no weights of."""
    parts = name.split(".")
    saved = any(f".{name}".startswith(f".{head}.") or f".{head}." in f".{name}" for head in config.heads)
    if not saved and not set(parts) & set(PEFT_HEADS):
        raise PayloadError(f"the adapter has {name!r}, which is no factor and is not in modules_to_save")
    known_head = bool(set(parts) & set(PEFT_HEADS))
    if task != "classification" or not (known_head or _shape_of(name, shapes) is None):
        raise ConfigError(
            f"this adapter cannot be imported: it trains {name!r} whole, which is no classification head; a version "
            "never changes the base model's own weights"
        )


def _require_head_shapes(heads: Mapping[str, Floats], *, hidden: int | None, labels: int) -> None:
    """Check that layers of a head fit each other, what is below them, and the labels.

    Args:
        heads: Parameters trained whole, by name.
        hidden: Width of the base model's output; None: not known.
        labels: How many there are; 0: none are named.
    """
    weights = {name: each for name, each in heads.items() if each.ndim == 2}
    widths = {hidden} | {each.shape[0] for each in weights.values()}
    for name, weight in weights.items():
        bias = heads.get(f"{name.removesuffix('weight')}bias")
        if bias is not None and bias.shape != (weight.shape[0],):
            raise PayloadError(f"expected a bias of shape ({weight.shape[0]},) beside {name}, got {bias.shape}")
        if hidden is not None and weight.shape[1] not in widths:
            raise BaseModelError(
                f"the adapter's {name} takes {weight.shape[1]} inputs, the base model gives {hidden}; give the base "
                "model that it was trained on (--base)"
            )
    if weights and labels and labels not in {each.shape[0] for each in weights.values()}:
        rows = ", ".join(f"{name} has {each.shape[0]} rows" for name, each in weights.items())
        raise PayloadError(f"labels.json names {labels} classes, but {rows}")


def _hidden_size(base: Path) -> int | None:
    """Return the width of a base model's output, as its configuration says it."""
    try:
        config = json.loads((base / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict):
        return None
    found = (config.get(name) for name in ("hidden_size", "d_model", "dim", "n_embd"))
    return next((size for size in found if isinstance(size, int)), None)


def _scaled(b: Floats, scale: float, module: str) -> Floats:
    if scale == 1.0:
        return b
    with np.errstate(over="ignore"):
        folded: Floats = (b.astype(np.float64) * scale).astype(np.float32)
    if bool(b.any()) and not folded.any():
        raise PayloadError(f"the scale {scale:g} of {module} makes its factors vanish in float32")
    return folded


def _shape_of(name: str, shapes: Shapes) -> tuple[int, ...] | None:
    """Return the shape of a base model's weight; checkpoints name them with or without the model's own prefix."""
    for known in (name, name.partition(".")[2]):
        if known in shapes:
            return shapes[known]
    return next((shape for key, shape in shapes.items() if key.endswith("." + name)), None)


def _shapes(base: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for path in weight_files(base):
            with safe_open(path, framework="np") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BaseModelError(f"cannot read the base model's weights in {base}: {error}") from error
    return shapes


def _read_tensors(content: bytes) -> dict[str, Floats]:
    header = read_header(content, dtypes=("F32", "F16", "BF16"))
    return {name: _widened(content, info) for name, info in header.tensors.items()}


def _widened(content: bytes, info: TensorInfo) -> Floats:
    """Return a tensor in float32, which holds every float16 and bfloat16 exactly."""
    data = memoryview(content)[info.start : info.end]
    match info.dtype:
        case "F16":
            values = np.frombuffer(data, "<f2").astype(np.float32)
        case "BF16":
            values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        case _:
            values = np.frombuffer(data, "<f4").copy()
    return values.reshape(info.shape)


def _encoded(tensors: Mapping[str, Floats]) -> bytes:
    payload = save({key: np.ascontiguousarray(value) for key, value in tensors.items()}, metadata={"pomona": "{}"})
    read_header(payload)
    return payload


def _labels(folder: Path) -> dict[str, Sequence[str]]:
    if not (folder / "labels.json").is_file():
        return {}
    try:
        labels = json.loads(_read_text(folder, "labels.json"))
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"labels.json cannot be read: {error}") from error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise PayloadError("labels.json should be a list of texts")
    if len(labels) > _MOST_LABELS or any(len(label) > _LONGEST_LABEL for label in labels):
        raise PayloadError(
            f"labels.json should name at most {_MOST_LABELS:,} classes in at most {_LONGEST_LABEL} characters each"
        )
    return {"labels": labels}


def _origin(config: PeftConfig) -> dict[str, object]:
    return {
        "base_model_name_or_path": config.base_name,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "rank_pattern": dict(config.rank_patterns),
        "alpha_pattern": dict(config.alpha_patterns),
    }


def _read_text(folder: Path, name: str) -> str:
    try:
        return _read_bytes(folder, name).decode()
    except UnicodeDecodeError as error:
        raise PayloadError(f"{name} is not UTF-8: {error}") from error


def _read_bytes(folder: Path, name: str) -> bytes:
    path = folder / name
    if not path.is_file():
        pickled = " (adapter_model.bin is pickled and never loaded)" if (folder / "adapter_model.bin").exists() else ""
        raise ConfigError(f"expected a PEFT adapter's folder with {name}, there is none in {folder}{pickled}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
