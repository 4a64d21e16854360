"""What a version of a learned adapter adds to the version it was learned on: no tensor is kept twice.

A state is a set of named tensors and what JSON can say besides. A version's payload holds the tensors that are new or
other than in the version before, bit for bit, the names of those that are gone, and the hash of the whole state::

    state_n = (state_{n-1} without removed_n) with tensors_n,       sha256(state_n) = sha256_n

so a registry of many tasks grows by what each of them adds, and reading a version reads each tensor's bytes once. A
version is made of one other by an edge of kind ``task`` or ``forget``; other edges are not followed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from safetensors.torch import save
from torch import Tensor

from pomona.errors import PayloadError
from pomona.payload import PayloadHeader, TensorInfo, parse_object, read_header
from pomona.storage.records import LineageNode
from pomona.storage.registry import Registry

_METADATA_KEY = "pomona"
_FORMAT = "increment/1"
_NOTHING = "nothing"
_DTYPES = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64}
_MAX_TENSORS = 1 << 16
_MAX_HEADER_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class State:
    """Everything that a version knows.

    Attributes:
        tensors: By name; float32, float64 or int64, none without elements.
        facts: Whatever else; JSON.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)

    def sha256(self) -> str:
        """Return a hash of names, shapes, dtypes and values, whatever their order."""
        found = hashlib.sha256(_canonical(self.facts).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            found.update(_canonical([name, str(tensor.dtype), list(tensor.shape)]).encode())
            found.update(_bytes(tensor))
        return found.hexdigest()


NOTHING = State()


def encode_increment(before: State, after: State) -> bytes:
    """Return the payload that makes one state of another; equal states give equal bytes.

    Raises:
        ValueError: A tensor has another dtype or no elements, or the facts are no JSON.
        PayloadError: It has more tensors, or says more beside them, than :func:`apply_increment` reads.
    """
    changed = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in after.tensors.items()
        if name not in before.tensors or not _same(before.tensors[name], tensor)
    }
    for name, tensor in changed.items():
        if tensor.dtype not in _DTYPES.values() or not tensor.numel():
            raise ValueError(f"{name} should be float32, float64 or int64 and not empty, got {tensor.dtype}")
    removed = sorted(before.tensors.keys() - after.tensors.keys())
    if not changed:  # a payload has at least one tensor
        changed, removed = {_NOTHING: torch.zeros(1)}, [*removed, _NOTHING]
    try:
        told = {
            "format": _FORMAT,
            "facts": dict(after.facts),
            "removed": removed,
            "before": before.sha256(),
            "sha256": after.sha256(),
        }
        payload = save(changed, {_METADATA_KEY: _canonical(told)})
    except TypeError as error:
        raise ValueError(f"the facts should be JSON: {error}") from error
    if len(changed) > _MAX_TENSORS or int.from_bytes(payload[:8], "little") > _MAX_HEADER_BYTES:
        raise PayloadError(
            f"a version has at most {_MAX_TENSORS} new tensors and {_MAX_HEADER_BYTES >> 20} MiB beside them, got "
            f"{len(changed)} and {int.from_bytes(payload[:8], 'little') >> 20} MiB; use shorter labels, or fewer"
        )
    return payload


def apply_increment(before: State, payload: bytes, *, source: str) -> State:
    """Return the state that a payload makes of the one before.

    Args:
        before: What the version was learned on.
        payload: What :func:`encode_increment` made, or anything else.
        source: Which version it is, for the error.

    Raises:
        PayloadError: The bytes are no increment, or one on another state.
    """
    increment = _increment(payload, source)
    after = increment.on(before)
    if (increment.before, increment.sha256) != (before.sha256(), after.sha256()):
        raise _on_another(source)
    return after


def collect(registry: Registry, ref: str) -> State:
    """Return everything that a version knows, from the versions that it was learned on.

    Each of them names the hash of the one before, and that of the last is computed: so the time it takes grows with the
    tensors, and not with their number times that of the versions.

    Raises:
        AdapterNotFound: There is no such version.
        BlobCorrupt: The bytes of one are missing or were changed.
        PayloadError: One of them was not learned, or on another version than its lineage says.
    """
    state, source = NOTHING, ref
    sha256: object = NOTHING.sha256()
    for node in learned_on(registry.lineage(ref)):
        source = node.version.ref
        increment = _increment(registry.payload(source), source)
        if increment.before != sha256:
            raise _on_another(source)
        state, sha256 = increment.on(state), increment.sha256
    if state.sha256() != sha256:
        raise _on_another(source)
    return state


def learned_on(node: LineageNode) -> Sequence[LineageNode]:
    """Return a version and those that it was learned on, the first one first.

    Raises:
        PayloadError: A version was learned on two.
    """
    chain = [node]
    while parents := [each for each in chain[-1].parents if each.kind in {"task", "forget"}]:
        if len(parents) > 1:
            raise PayloadError(
                f"expected {chain[-1].version.ref} to be learned on one version, "
                f"got {', '.join(each.version.ref for each in parents)}"
            )
        chain.append(parents[0])
    return chain[::-1]


@dataclass(frozen=True, slots=True)
class _Increment:
    """What a payload says."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, object]
    removed: frozenset[str]
    before: object
    sha256: object

    def on(self, state: State) -> State:
        kept = {**state.tensors, **self.tensors}
        return State({name: tensor for name, tensor in kept.items() if name not in self.removed}, self.facts)


def _increment(payload: bytes, source: str) -> _Increment:
    try:
        header = read_header(
            payload, dtypes=_DTYPES.keys(), max_tensors=_MAX_TENSORS, max_header_bytes=_MAX_HEADER_BYTES
        )
        told = parse_object(header.metadata.get(_METADATA_KEY, "{}"), source="the metadata")
    except PayloadError as error:
        raise PayloadError(f"the bytes of {source} are nothing that was learned: {error}") from error
    facts, removed = told.get("facts"), told.get("removed")
    if told.get("format") != _FORMAT or not isinstance(facts, dict) or not isinstance(removed, list):
        raise PayloadError(f"expected {source} to be of the format {_FORMAT}, got {told.get('format')!r}")
    gone = frozenset(map(str, removed))
    return _Increment(_read(payload, header), facts, gone, told.get("before"), told.get("sha256"))


def _on_another(source: str) -> PayloadError:
    return PayloadError(f"{source} was learned on another version than its lineage says; `pomona registry verify`")


def _read(payload: bytes, header: PayloadHeader) -> dict[str, Tensor]:
    return {name: _cut(payload, info) for name, info in header.tensors.items()}


def _cut(payload: bytes, info: TensorInfo) -> Tensor:
    data = bytearray(memoryview(payload)[info.start : info.end])
    return torch.frombuffer(data, dtype=_DTYPES[info.dtype]).reshape(info.shape)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _canonical(value: object) -> str:
    plain = dict(value) if isinstance(value, Mapping) else value
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
