"""Write a version as a folder that plain ``peft`` loads on the same base model.

PEFT multiplies ``lora_B @ lora_A`` by ``lora_alpha / r``. The scale of a version is folded into its factors
already, so ``lora_alpha = r``. Layers of smaller rank are padded with zeros, which adds nothing to the product.
"""

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pomona.errors import BlobWriteError, ConfigError, PayloadError
from pomona.manifest import split_key
from pomona.storage.records import LineageNode, Version
from pomona.storage.registry import Registry

MARKER = "pomona.json"

_TASK_TYPES = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
_PEFT_HEADS = ("classifier", "score")  # peft saves these whole for SEQ_CLS, whatever the configuration says

Array = NDArray[np.generic]


def export_peft(registry: Registry, ref: str, directory: Path, *, overwrite: bool = False) -> Path:
    """Write a version as a PEFT folder, whole or not at all.

    Args:
        registry: Where the version is.
        ref: Which version.
        directory: The folder to create; an empty one may be there.
        overwrite: Replace an earlier export in ``directory``, but nothing else.

    Returns:
        The folder's absolute path.

    Raises:
        AdapterNotFound: There is no such version.
        BlobCorrupt: Its bytes were changed.
        ConfigError: Something else is in ``directory``, or PEFT cannot express the version.
        PayloadError: The bytes are no adapter.
        BlobWriteError: The folder could not be written; nothing was left there.
    """
    target = directory.expanduser().resolve()
    _require_room(target, overwrite=overwrite)
    node = registry.lineage(ref)
    contents = peft_files(node, registry.payload(node.version.ref))
    staging = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        for name, content in contents.items():
            _write(staging / name, content)
        _swap(staging, target)
    except OSError as error:
        raise BlobWriteError(
            f"cannot write the export to {target}: {error.strerror or error}; nothing was left there"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def peft_files(node: LineageNode, payload: bytes) -> dict[str, bytes]:
    """Return the contents of the folder by file name.

    Raises:
        ConfigError: PEFT cannot express the version.
        PayloadError: The bytes are no adapter.
    """
    version = node.version
    tensors, modules, heads = _peft_tensors(payload, version.ref)
    rank = max(tensors[_peft_key(module, "lora_A")].shape[0] for module in modules)
    config = _config(version, rank, modules, _modules_to_save(heads, version.ref))
    facts = {"ref": version.ref, "sha256": version.sha256, "base_sha256": version.base_sha256}
    contents = {
        "adapter_config.json": _json(config),
        "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
        "README.md": _card(node).encode(),
        MARKER: _json(facts),
    }
    if "labels" in version.recipe:
        contents["labels.json"] = _json(version.recipe["labels"])
    return contents


def _peft_tensors(payload: bytes, ref: str) -> tuple[dict[str, Array], list[str], list[str]]:
    try:
        stored = load(payload)
        kinds = {key: split_key(key) for key in stored}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise PayloadError(f"the bytes of {ref} are no adapter: {error}") from error
    factors = [key for key, (kind, _) in kinds.items() if kind != "head"]
    modules = sorted({kinds[key][1] for key in factors})
    if not modules or len(factors) != 2 * len(modules) or any(stored[key].ndim != 2 for key in factors):
        raise PayloadError(f"expected lora_A and lora_B of at least one module in {ref}, got {sorted(stored)[:6]}")
    rank = max(1, *(min(stored[key].shape) if False else _rank(kinds[key][0], stored[key]) for key in factors))
    tensors: dict[str, Array] = {}
    for key, (kind, name) in kinds.items():
        if kind == "head":
            tensors[_peft_key(name)] = stored[key]
        else:
            tensors[_peft_key(name, kind)] = _pad(stored[key], rank, axis=0 if kind == "lora_A" else 1)
    return tensors, modules, [name for kind, name in kinds.values() if kind == "head"]
