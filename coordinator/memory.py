"""What a learned adapter knows, read from the registry: one record for learning on, predicting and forgetting."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from pomona.adapters import AdapterWeights, LoraFactors
from pomona.aggregation_settings import Section
from pomona.base_model import base_model_sha256, find_base_model
from pomona.continual.encoder import FrozenEncoder
from pomona.continual.knowledge import Knowledge
from pomona.coordinator.increments import State, collect
from pomona.coordinator.streams import Past
from pomona.errors import AdapterNotFound, BaseModelError, PayloadError, VersionConflict
from pomona.mos_settings import MosSettings
from pomona.storage.records import Version
from pomona.storage.registry import Registry
from pomona.storage.versions import refuse_quarantined

DEFAULT_BASE = "all-minilm-l6-v2"
KINDS = ("task", "forget")


class StreamRecord(Section):
    """Which stream a version was learned in, and how far; a part of its recipe.

    Attributes:
        sha256: Of the stream's data and tasks.
        seed: Of the order of classes, and of what was held out.
        max_length: Of texts, in tokens.
        mos: How it was learned.
        start: Reference of the version before the first task; None: there was none.
        done: Tasks that are learned.
        classes: Of each task of the stream.
        rows: Accuracy on each task after each task that is learned.
        examples: Test examples of each task.
    """

    sha256: str
    seed: int
    max_length: int
    mos: MosSettings
    start: str | None
    done: int
    classes: tuple[tuple[str, ...], ...]
    rows: tuple[tuple[float, ...], ...]
    examples: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """A version with everything that it knows.

    Attributes:
        version: Which one.
        state: As the registry keeps it; the next version is an increment on it.
        knowledge: What prediction needs.
        forgotten: Classes that it was asked to forget and has not learned again.
        stream: The last stream that was learned, or begun.
    """

    version: Version
    state: State
    knowledge: Knowledge
    forgotten: tuple[str, ...]
    stream: StreamRecord

    @property
    def past(self) -> Past:
        """What a new stream has to know of it."""
        return Past(self.knowledge.classes, self.forgotten, len(self.knowledge.tasks))


def recall(registry: Registry, ref: str, *, quarantined: bool = False) -> Memory:
    """Read a version that was learned.

    Args:
        registry: Where it is.
        ref: Which version.
        quarantined: Read it even where it may not be used.

    Raises:
        AdapterNotFound: There is no such version.
        VersionConflict: It was not learned by ``pomona learn``.
        VersionQuarantined: It may not be used.
        BlobCorrupt: Its bytes are missing or were changed.
        PayloadError: They are not what was learned.
    """
    version = registry.resolve(ref)
    refuse_learned_otherwise(version)
    if not quarantined:
        refuse_quarantined(version)
    state = collect(registry, version.ref)
    try:
        forgotten = tuple(map(str, state.facts["forgotten"]))  # type: ignore[call-overload]
        stream = StreamRecord.model_validate(version.recipe["stream"])
        knowledge = knowledge_of(state)
    except (KeyError, TypeError, ValidationError) as error:
        raise PayloadError(f"{version.ref} does not say how it was learned: {error}") from error
    state = _apart(state, knowledge)
    return Memory(version=version, state=state, knowledge=knowledge, forgotten=forgotten, stream=stream)


def newest(registry: Registry, name: str) -> Memory | None:
    """Read the newest version of an adapter; None where there is none yet.

    Raises:
        VersionConflict: It was not learned by ``pomona learn``.
        VersionQuarantined: It may not be used.
        PayloadError: As in :func:`recall`.
    """
    try:
        versions = registry.versions(name)
    except AdapterNotFound:
        return None
    return recall(registry, versions[-1].ref) if versions else None


def refuse_learned_otherwise(version: Version) -> None:
    """Do nothing if a version was made by ``pomona learn`` or ``pomona forget``.

    Raises:
        VersionConflict: It was not.
    """
    if version.kind not in KINDS:
        made = f"round {version.round_number} of run {version.run_id}" if version.run_id else f"an {version.kind}"
        raise VersionConflict(
            f"{version.ref} was made by {made}, not by `pomona learn`, which cannot go on from it; choose another name"
        )


def find_base(registry: Registry, version: Version | None, base: str | None) -> tuple[str, Path]:
    """Return what the base model is called, and its folder.

    Args:
        registry: Knows where it was before.
        version: Must be on the same base model; None: any will do.
        base: Folder or packaged name; None: where it was before, or the packaged one.

    Raises:
        BaseModelError: It is not there, or is another than that of the version.
    """
    source = base or (registry.base_model_source(version.base_sha256) if version else "") or DEFAULT_BASE
    path = find_base_model(source)
    found = base_model_sha256(path)
    if version is not None and found != version.base_sha256:
        raise BaseModelError(
            f"{version.ref} was learned on base model {version.base_model} ({version.base_sha256[:12]}), got "
            f"{found[:12]} in {path}; name that one by --base"
        )
    return source, path


def open_encoder(path: Path, mos: MosSettings) -> FrozenEncoder:
    """Load the base model as the encoder that was, or is, learned on.

    Raises:
        BaseModelError: It cannot be loaded, or has fewer blocks.
    """
    return FrozenEncoder(path, adapted_blocks=mos.adapted_blocks)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute on so many threads: sums are split among them, so other counts give other last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def knowledge_of(state: State) -> Knowledge:
    """Return the knowledge that the registry keeps as a state.

    Raises:
        PayloadError: It is none.
    """
    facts = state.facts.get("knowledge")
    if not isinstance(facts, dict):
        raise PayloadError("expected a state that says what is known, got another")
    return Knowledge.from_tensors(state.tensors, facts)


def state_of(knowledge: Knowledge, forgotten: Sequence[str]) -> State:
    """Return what the registry keeps of some knowledge and of what is no part of it any more."""
    tensors, facts = knowledge.to_tensors()
    return _apart(State(tensors, {"knowledge": facts, "forgotten": list(forgotten)}), knowledge)


def _apart(state: State, knowledge: Knowledge) -> State:
    """Return a state that does not change with the knowledge, whose adapters the published code writes into."""
    if not knowledge.settings.official_compat:
        return state
    return State({name: tensor.clone() for name, tensor in state.tensors.items()}, state.facts)


def feature_adapter(knowledge: Knowledge) -> AdapterWeights:
    """Return the adapter of the newest task with all edits, its scale folded in."""
    adapter = knowledge.adapter(len(knowledge.tasks) - 1)
    return AdapterWeights(layers={name: LoraFactors(a=each.a, b=each.scale * each.b) for name, each in adapter.items()})


def recipe(knowledge: Knowledge, stream: StreamRecord, *, method: str) -> dict[str, object]:
    """Return how a version was made, as it records it."""
    return {
        "task": "feature-extraction",
        "method": method,
        "head": knowledge.settings.head,
        "knows": list(knowledge.classes),
        "stream": stream.model_dump(mode="json"),
    }
