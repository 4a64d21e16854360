"""What a run forgets: the version that it edits, and the terms that its clients are told."""

from dataclasses import dataclass

from pomona.coordinator.forgetting import check_classes
from pomona.coordinator.memory import Memory, newest, recall
from pomona.errors import ConfigError
from pomona.mos_settings import MosSettings
from pomona.protocol import ForgetTerms
from pomona.settings import RunSettings
from pomona.storage.registry import Registry


@dataclass(frozen=True, slots=True)
class RequestTerms:
    """What clients are told of a request.

    Attributes:
        labels: What is known, in learning order, and what was forgotten before.
        mos: How it was learned.
        max_length: Of texts, in tokens.
        forget: What is asked for.
        parent: Reference of the version that is edited.
        base_sha256: Of the base model that it was learned on.
    """

    labels: tuple[str, ...]
    mos: MosSettings
    max_length: int
    forget: ForgetTerms
    parent: str
    base_sha256: str


def edited_memory(registry: Registry, settings: RunSettings, *, run_id: str) -> Memory:
    """Return what a run edits: the newest version of its adapter when it began.

    Raises:
        AdapterNotFound: There is no such adapter.
        VersionConflict: It was not learned by tasks.
    """
    if begun := registry.rounds(run_id):
        return recall(registry, str(begun[0].parent), quarantined=True)
    return newest(registry, settings.name) or recall(registry, settings.name)  # which says what there is


def request_terms(registry: Registry, settings: RunSettings, *, run_id: str) -> RequestTerms:
    """Return what the clients of a run that forgets are told.

    Raises:
        As :func:`edited_memory`.
        ConfigError: The run forgets nothing.
        DataError: A class is not known, or was forgotten already; or all would go.
    """
    if settings.forget is None:
        raise ConfigError("expected a run with [forget], which says what is forgotten")
    memory = edited_memory(registry, settings, run_id=run_id)
    check_classes(settings.forget.classes, memory)
    return RequestTerms(
        labels=(*memory.knowledge.classes, *memory.forgotten),
        mos=memory.knowledge.settings,
        max_length=memory.stream.max_length,
        forget=ForgetTerms(classes=settings.forget.classes, settings=settings.forget.settings, seed=settings.seed),
        parent=memory.version.ref,
        base_sha256=memory.version.base_sha256,
    )
