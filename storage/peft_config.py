"""What PEFT's ``adapter_config.json`` says about an adapter, and why some cannot be taken in.

A version of the registry is a plain sum ``W + B A``. Whatever is more than LoRA, or was trained on another base than
the one that is named, would be something else when read back; it is refused by name. A setting that is not known here
is refused too unless it is empty, because a later PEFT may mean anything by it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, TypeVar

from pomona.errors import ConfigError, PayloadError
from pomona.payload import parse_object

Task = Literal["classification", "causal-lm"]
Value = TypeVar("Value", int, float)

_TASKS: dict[str, Task] = {"SEQ_CLS": "classification", "CAUSAL_LM": "causal-lm"}

# settings that change nothing about the factors once they are trained; the tensors' names say which layers have them
_NEUTRAL = frozenset(
    [
        "auto_mapping",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "lora_ga_config",
        "loftq_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
    ]
)
_READ = frozenset(
    [
        "alpha_pattern",
        "base_model_name_or_path",
        "bias",
        "fan_in_fan_out",
        "init_lora_weights",
        "lora_alpha",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "task_type",
        "use_rslora",
    ]
)
_REASONS = {
    "use_dora": "DoRA scales the rows of the sum, which is no low-rank update",
    "lora_bias": "it trains a bias beside the factors",
    "layer_replication": "its base model has layers repeated",
    "megatron_config": "its layers are split over machines",
    "target_parameters": "it adapts parameters that are no linear layers",
    "trainable_token_indices": "it trains rows of the embedding",
    "alora_invocation_tokens": "it is switched on by tokens (activated LoRA)",
    "use_qalora": "its inputs are pooled (QALoRA)",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between adapters",
    "ensure_weight_tying": "it ties what it trains to other weights",
}
_KEEPS_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")

_MAX_PATTERN = 200
_SLOW_PATTERN = re.compile(r"\)[*+?{]|[*+}][*+{]")  # repeated groups: matching could take for ever
_REPEATED = re.compile(r"(?<!\\)(?:[*+]|\{\d*,\d*\})")
_MOST_REPEATED = 2  # in one pattern: each multiplies the time by the length of a module's name


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """What is needed to read the factors.

    Attributes:
        rank: Rank of a layer that no pattern names.
        alpha: Alpha of a layer that no pattern names.
        rslora: Scale by ``alpha / sqrt(rank)``.
        rank_patterns: Rank by pattern of the end of a module's name, as PEFT matches it.
        alpha_patterns: Alpha likewise.
        heads: Names of modules that are trained whole, or their ends.
        task: What the adapter is for, ``None`` where it does not say.
        base_name: What it calls its base model.
    """

    rank: int
    alpha: float
    rslora: bool
    rank_patterns: Mapping[str, int]
    alpha_patterns: Mapping[str, float]
    heads: Sequence[str]
    task: Task | None
    base_name: str

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's factors."""
        return _match(self.rank_patterns, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return the factor in front of ``B A``: ``alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA."""
        rank = self.rank_of(module)
        return _match(self.alpha_patterns, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def read_config(text: str) -> PeftConfig:
    """Read ``adapter_config.json``.

    Raises:
        PayloadError: It is no such file.
        ConfigError: It describes something that a version cannot be; the message says why.

    Example:
        >>> read_config('{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": true}').scale_of("query")
        4.0
        >>> read_config('{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": true}')
        Traceback (most recent call last):
        pomona.errors.ConfigError: this adapter cannot be imported: use_dora is set, and DoRA scales the rows of the \
sum, which is no low-rank update
    """
    config = parse_object(text, source="adapter_config.json")
    _refuse_what_is_no_lora(config)
    rank, task = config.get("r"), config.get("task_type")
    if type(rank) is not int or rank < 1:
        raise PayloadError(f"adapter_config.json should have a rank r of at least 1, got {rank!r}")
    heads = config.get("modules_to_save") or []
    if not isinstance(heads, list) or not all(isinstance(name, str) for name in heads):
        raise PayloadError(f"adapter_config.json should list modules_to_save by name, got {str(heads)[:80]!r}")
    if task is not None and task not in _TASKS:
        _refuse(f"its task is {task}, and versions are for {', '.join(_TASKS)}")
    return PeftConfig(
        rank=rank,
        alpha=_number(config.get("lora_alpha"), "lora_alpha"),
        rslora=bool(config.get("use_rslora")),
        rank_patterns={key: _rank(value) for key, value in _patterns(config, "rank_pattern").items()},
        alpha_patterns={
            key: _number(value, "alpha_pattern") for key, value in _patterns(config, "alpha_pattern").items()
        },
        heads=tuple(heads),
        task=_TASKS[task] if isinstance(task, str) else None,
        base_name=str(config.get("base_model_name_or_path") or "")[:500],
    )


def _refuse_what_is_no_lora(config: Mapping[str, object]) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        _refuse(f"its type is {str(kind)[:40]}, and only LORA is a low-rank update")
    for name, value in config.items():
        if value and name in _REASONS:
            _refuse(f"{name} is set, and {_REASONS[name]}")
        if value and name not in _READ | _NEUTRAL:
            _refuse(f"it sets {name[:80]!r}, which is not known here and may change what the factors mean")
    if (bias := config.get("bias", "none")) != "none":
        _refuse(f"it trains biases (bias={str(bias)[:40]!r}), which are no part of a version")
    if config.get("fan_in_fan_out"):
        _refuse("its layers are stored transposed (fan_in_fan_out, as in GPT-2), and runs adapt linear layers only")
    initial = config.get("init_lora_weights", True)
    if not any(initial is known or initial == known for known in _KEEPS_THE_BASE):
        _refuse(
            f"init_lora_weights={str(initial)[:40]!r} changes the base model's own weights before training; convert it "
            "to plain LoRA first (peft's path_initial_model_for_weight_conversion)"
        )


def _patterns(config: Mapping[str, object], name: str) -> Mapping[str, object]:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise PayloadError(f"adapter_config.json should have an object as {name}, got {type(patterns).__name__}")
    for pattern in patterns:
        if len(pattern) > _MAX_PATTERN or _SLOW_PATTERN.search(pattern):
            _refuse(f"the pattern {pattern[:80]!r} in {name} is too long, or repeats a group")
        if len(_REPEATED.findall(pattern)) > _MOST_REPEATED:
            _refuse(f"the pattern {pattern[:80]!r} in {name} has more than {_MOST_REPEATED} repetitions")
        try:
            re.compile(pattern)
        except re.error as error:
            raise PayloadError(f"the pattern {pattern[:80]!r} in {name} cannot be read: {error}") from error
    return patterns


def _match(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _rank(value: object) -> int:
    if type(value) is not int or value < 1:
        raise PayloadError(f"adapter_config.json should have ranks of at least 1 in rank_pattern, got {value!r}")
    return value


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise PayloadError(f"adapter_config.json should have a finite number as {name}, got {value!r}")
    return float(value)


def _refuse(reason: str) -> NoReturn:
    raise ConfigError(f"this adapter cannot be imported: {reason}")
