"""What coordinator and owners send each other for one task, as bytes: adapters down; adapters, heads and sums up.

One safetensors file each, read by :mod:`pomona.payload`. The reader knows beforehand which tensors there must be, of
which shapes and dtypes, and takes no others; what a sender states beside them is one closed record. Numbers are checked
to be finite here, and what they may be by :mod:`pomona.continual.share_verification`.

``A`` of a task's adapter goes down and is not sent back: nobody changes it.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save
from torch import Tensor

from pomona.adapters import LoraFactors
from pomona.continual.encoder import Adapter
from pomona.continual.heads import LinearHead
from pomona.continual.knowledge import TaskKnowledge
from pomona.continual.packing import (
    ridge_from_tensors,
    ridge_to_tensors,
    statistics_from_tensors,
    statistics_to_tensors,
    within,
)
from pomona.continual.share import TaskStart, TrainedShare
from pomona.continual.tasks import Task
from pomona.errors import PayloadError
from pomona.manifest import LORA_A, LORA_B, AdapterManifest
from pomona.mos_settings import MosSettings
from pomona.payload import parse_object, read_header
from pomona.protocol import ClientName, Reference, RunId
from pomona.settings import Sha256

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

_METADATA_KEY = "pomona"
_DTYPES = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64}
_MAX_HEADER_BYTES = 1 << 20
_MAX_RANK = 4096
_EDIT, _OWN, _FIRST, _MEAN = "edit.", "own.", "first.", "mean."

Count = Annotated[int, Field(ge=1, le=2**31)]


class Facts(BaseModel):
    """What a payload states beside its tensors: closed, and finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ShareFacts(Facts):
    """What an owner states of what it sends; nothing of it is believed.

    Attributes:
        client: Its name.
        run_id: The run.
        task_number: Place of the task in the run, from 1.
        parent: Reference of the version that was learned on, empty before the first task.
        base_sha256: Hash of the base model it has.
        num_examples: Of the task.
        nonce: Random, new each time.
    """

    client: ClientName
    run_id: RunId
    task_number: Count
    parent: Reference
    base_sha256: Sha256
    num_examples: Count
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class TrainedFacts(ShareFacts):
    """Of what was trained.

    Attributes:
        round_number: Round of the task, from 1.
    """

    format: Literal["task-trained/1"] = "task-trained/1"
    round_number: Count


class SumsFacts(ShareFacts):
    """Of sums.

    Attributes:
        trained_sha256: Names the adapter that the features were taken under.
        ridge: Examples behind sums of random features, in all and held out; empty where there are none.
    """

    format: Literal["task-sums/1"] = "task-sums/1"
    trained_sha256: Sha256
    ridge: dict[Literal["total", "held_out"], Annotated[int, Field(ge=0, le=2**31)]]


FactsT = TypeVar("FactsT", bound=Facts)


def encode_start(start: TaskStart) -> bytes:
    """Encode where a round starts, for those who train it."""
    tensors = {**_factors(start.adapter), **_head(start.head), **_factors(start.edit, _EDIT)}
    if start.towards is not None:
        tensors |= {f"{_MEAN}{LORA_B}{name}": factors.b for name, factors in start.towards.items()}
    return encode_tensors(tensors, {})


def decode_start(payload: bytes, manifest: AdapterManifest, *, classes: int, width: int, rank: int) -> TaskStart:
    """Read what :func:`encode_start` made, or anything else.

    Args:
        payload: The bytes.
        manifest: Layers that an adapter has here.
        classes: Of the task.
        width: Of features.
        rank: Of a task's adapter.

    Raises:
        PayloadError: The bytes are not that.
    """
    tensors, _ = decode_tensors(payload)
    own: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {**_head_shapes(classes, width)}
    for name, (out, in_) in manifest.layers.items():
        own |= {f"{LORA_A}{name}": (torch.float32, (rank, in_)), f"{LORA_B}{name}": (torch.float32, (out, rank))}
    mean = {f"{_MEAN}{LORA_B}{name}": (torch.float32, (out, rank)) for name, (out, _) in manifest.layers.items()}
    towards = mean if any(key.startswith(_MEAN) for key in tensors) else {}
    edit = within(tensors, _EDIT)
    check_tensors({key: each for key, each in tensors.items() if not key.startswith(_EDIT)}, {**own, **towards})
    adapter = {name: LoraFactors(a=tensors[LORA_A + name], b=tensors[LORA_B + name]) for name in manifest.layers}
    return TaskStart(
        adapter,
        LinearHead(tensors["head.weight"], tensors["head.bias"]),
        {name: LoraFactors(a=factors.a, b=tensors[f"{_MEAN}{LORA_B}{name}"]) for name, factors in adapter.items()}
        if towards
        else None,
        _any_adapter(edit, manifest),
    )


def encode_trained(adapter: Adapter, head: LinearHead, facts: TrainedFacts) -> bytes:
    """Encode what an owner trained."""
    return encode_factors_b(adapter, head, facts.model_dump(mode="json"))


def decode_trained(payload: bytes, start: TaskStart) -> tuple[TrainedFacts, TrainedShare]:
    """Read what :func:`encode_trained` made of a start, or anything else.

    Raises:
        PayloadError: The bytes are not that, or a number is not finite.
    """
    adapter, head, stated = decode_factors_b(payload, start)
    facts = read_facts(TrainedFacts, stated)
    return facts, TrainedShare(facts.num_examples, adapter, head)


def encode_factors_b(adapter: Adapter, head: LinearHead, facts: Mapping[str, object]) -> bytes:
    """Encode an adapter without ``A``, a head, and facts that JSON can say."""
    return encode_tensors({**{f"{LORA_B}{name}": each.b for name, each in adapter.items()}, **_head(head)}, facts)


def decode_factors_b(payload: bytes, start: TaskStart) -> tuple[Adapter, LinearHead, dict[str, object]]:
    """Read what :func:`encode_factors_b` made of an adapter that has the ``A`` of a start, or anything else.

    Raises:
        PayloadError: The bytes are not that, or a number is not finite.
    """
    shapes: Shapes = {
        **{f"{LORA_B}{name}": (torch.float32, tuple(each.b.shape)) for name, each in start.adapter.items()},
        **_head_shapes(start.head.classes, start.head.weight.shape[1]),
    }
    tensors, facts = decode_tensors(payload, most=bytes_of(shapes))
    check_tensors(tensors, shapes)
    adapter = {name: LoraFactors(a=each.a, b=tensors[f"{LORA_B}{name}"]) for name, each in start.adapter.items()}
    return adapter, LinearHead(tensors["head.weight"], tensors["head.bias"]), facts


def encode_under(own: Adapter, first: Adapter | None) -> bytes:
    """Encode the adapters that features are summed under: a task's, and the first one's where that is another."""
    return encode_tensors({**_factors(own, _OWN), **_factors(first or {}, _FIRST)}, {})


def decode_under(payload: bytes, manifest: AdapterManifest) -> tuple[Adapter, Adapter | None]:
    """Read what :func:`encode_under` made, or anything else.

    Raises:
        PayloadError: The bytes are not that, or a number is not finite.
    """
    tensors, _ = decode_tensors(payload)
    if strange := sorted(key for key in tensors if not key.startswith((_OWN, _FIRST))):
        raise PayloadError(f"expected factors of one or two adapters, got {strange[0][:80]!r}")
    own, first = (_any_adapter(within(tensors, prefix), manifest) for prefix in (_OWN, _FIRST))
    if not own:
        raise PayloadError("expected the factors of a task's adapter, got none")
    return own, first or None


def encode_sums(part: TaskKnowledge, facts: ShareFacts, *, trained_sha256: str, is_first: bool) -> bytes:
    """Encode the sums of an owner.

    Args:
        part: Its sums.
        facts: What it states.
        trained_sha256: Names the adapter that the features were taken under.
        is_first: Whether the task's adapter is the first one, so that one set of sums says all.
    """
    ridge, counts = ridge_to_tensors(part.ridge)
    tensors = {f"statistics.{key}": value for key, value in statistics_to_tensors(part.statistics).items()}
    if not is_first:
        tensors |= {f"{_FIRST}{key}": value for key, value in statistics_to_tensors(part.first).items()}
    tensors |= {f"ridge.{key}": value for key, value in ridge.items()}
    stated = SumsFacts.model_validate({**facts.model_dump(), "trained_sha256": trained_sha256, "ridge": counts})
    return encode_tensors(tensors, stated.model_dump(mode="json"))


def decode_sums(
    payload: bytes, *, task: Task, adapter: Adapter, head: LinearHead, settings: MosSettings, is_first: bool
) -> tuple[SumsFacts, TaskKnowledge]:
    """Read what :func:`encode_sums` made, or anything else.

    Args:
        payload: The bytes.
        task: The task, with its number in what is known.
        adapter: Its adapter, which the coordinator knows.
        head: Its head, likewise.
        settings: Of the stream.
        is_first: Whether the task's adapter is the first one.

    Raises:
        PayloadError: The bytes are not that, or a number is not finite.
    """
    shapes = sum_shapes(settings, classes=len(task.classes), width=head.weight.shape[1], is_first=is_first)
    tensors, stated = decode_tensors(payload, most=bytes_of(shapes))
    check_tensors(tensors, shapes)
    facts = read_facts(SumsFacts, stated)
    if set(facts.ridge) != ({"total", "held_out"} if settings.keeps_ridge_sums else set()):
        raise PayloadError(f"expected counts of the sums of random features as this run has them, got {facts.ridge}")
    if int(tensors["statistics.count"].min()) < 0 or int(tensors.get(f"{_FIRST}count", torch.zeros(1)).min()) < 0:
        raise PayloadError("expected counts of at least 0, got a negative one")
    statistics = statistics_from_tensors(within(tensors, "statistics."))
    part = TaskKnowledge(
        number=task.number,
        classes=task.classes,
        adapter=adapter,
        head=head,
        statistics=statistics,
        first=statistics if is_first else statistics_from_tensors(within(tensors, _FIRST)),
        ridge=ridge_from_tensors(within(tensors, "ridge."), {str(key): value for key, value in facts.ridge.items()}),
    )
    return facts, part


def sum_shapes(settings: MosSettings, *, classes: int, width: int, is_first: bool) -> Shapes:
    """Return which tensors the sums of a task are."""
    moments = width if settings.moments == "diagonal" else triangle(width)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for prefix in ("statistics.",) if is_first else ("statistics.", _FIRST):
        shapes |= {
            f"{prefix}count": (torch.int64, (classes,)),
            f"{prefix}total": (torch.float64, (classes, width)),
            f"{prefix}moment": (torch.float64, (classes, moments)),
        }
    for prefix in ("ridge.total.", "ridge.held_out.") if settings.keeps_ridge_sums else ():
        side = settings.ridge_dimensions
        shapes[f"{prefix}gram"] = (torch.float64, (triangle(side),))
        shapes[f"{prefix}cross"] = (torch.float64, (side, classes))
    return shapes


def bytes_of(shapes: Shapes) -> int:
    """Return how many bytes a payload of some tensors has, at most."""
    sizes = (dtype.itemsize * torch.Size(shape).numel() for dtype, shape in shapes.values())
    return sum(sizes) + _MAX_HEADER_BYTES + 8


def check_tensors(tensors: Mapping[str, Tensor], expected: Shapes) -> None:
    """Do nothing if tensors have exactly the names, dtypes and shapes that are expected, and finite numbers.

    Raises:
        PayloadError: They do not.
    """
    if different := sorted(tensors.keys() ^ expected.keys()):
        what = "not expected" if different[0] in tensors else "missing"
        raise PayloadError(f"tensor {different[0][:80]!r} is {what}; expected {len(expected)}, got {len(tensors)}")
    for name, (dtype, shape) in expected.items():
        if tensors[name].dtype != dtype or tuple(tensors[name].shape) != shape:
            raise PayloadError(
                f"expected {name} as {dtype} of shape {shape}, got {tensors[name].dtype} of "
                f"{tuple(tensors[name].shape)}"
            )
    _check_finite(tensors)


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise PayloadError(f"{name} has NaN or an infinity")


def encode_tensors(tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> bytes:
    """Return tensors and facts as one payload; equal ones give equal bytes."""
    text = json.dumps(dict(facts), sort_keys=True, allow_nan=False, separators=(",", ":"))
    # a copy, because safetensors refuses tensors that share memory
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    return save(plain, {_METADATA_KEY: text})


def decode_tensors(payload: bytes, *, most: int | None = None) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read what :func:`encode_tensors` made, or anything else.

    Raises:
        PayloadError: The bytes are too many, or are not that.
    """
    if most is not None and len(payload) > most:
        raise PayloadError(f"expected at most {most} bytes, got {len(payload)}")
    header = read_header(payload, dtypes=_DTYPES.keys(), max_header_bytes=_MAX_HEADER_BYTES)
    if set(header.metadata) != {_METADATA_KEY}:
        raise PayloadError(f"expected metadata {_METADATA_KEY!r} and no other, got {sorted(header.metadata)[:3]}")
    facts = parse_object(header.metadata[_METADATA_KEY], source="the metadata")
    tensors = {}
    for name, info in header.tensors.items():
        data = bytearray(memoryview(payload)[info.start : info.end])  # cut by the header that was checked
        tensors[name] = torch.frombuffer(data, dtype=_DTYPES[info.dtype]).reshape(info.shape)
    return tensors, facts


def read_facts(kind: type[FactsT], stated: Mapping[str, object]) -> FactsT:
    """Read stated facts as a closed record.

    Raises:
        PayloadError: They are not one.
    """
    try:
        return kind.model_validate(stated)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))[:80]
        raise PayloadError(f"the metadata are malformed: {where}: {problem['msg']}") from error


def _factors(adapter: Adapter, prefix: str = "") -> dict[str, Tensor]:
    """Return both factors of each layer, scale folded into ``B``."""
    found = {}
    for name, each in adapter.items():
        found[f"{prefix}{LORA_A}{name}"] = each.a
        found[f"{prefix}{LORA_B}{name}"] = each.b if each.scale == 1.0 else each.scale * each.b
    return found


def _any_adapter(tensors: Mapping[str, Tensor], manifest: AdapterManifest) -> dict[str, LoraFactors]:
    """Return an adapter of any rank, on some of the layers of an encoder."""
    names = [name for name in manifest.layers if f"{LORA_A}{name}" in tensors]
    ranks = {name: tensors[f"{LORA_A}{name}"].shape[0] for name in names if tensors[f"{LORA_A}{name}"].ndim}
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in names:
        (out, in_), rank = manifest.layers[name], min(ranks.get(name, 0), _MAX_RANK)
        shapes |= {f"{LORA_A}{name}": (torch.float32, (rank, in_)), f"{LORA_B}{name}": (torch.float32, (out, rank))}
    check_tensors(tensors, shapes)
    return {name: LoraFactors(a=tensors[LORA_A + name], b=tensors[LORA_B + name]) for name in names}


def _head(head: LinearHead) -> dict[str, Tensor]:
    return {"head.weight": head.weight, "head.bias": head.bias}


def _head_shapes(classes: int, width: int) -> Shapes:
    return {"head.weight": (torch.float32, (classes, width)), "head.bias": (torch.float32, (classes,))}


def triangle(side: int) -> int:
    """Return how many entries the upper triangle of a square matrix has."""
    return side * (side + 1) // 2
