"""Forgetting classes on request: one version without them, one certificate, and quarantine for those before.

All three are one transaction. Asked for once more what was forgotten already, the newest version's figures are told
again; what was killed before the transaction is done again, to the same bytes.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

import torch

from pomona.continual.editing import Examples
from pomona.continual.requests import forget_in_knowledge
from pomona.continual.scores import scores_of
from pomona.coordinator.edits import Edit, publish_edit
from pomona.coordinator.memory import Memory, find_base, newest, open_encoder, recall, threads
from pomona.coordinator.reemergence import recheck, recheck_of
from pomona.coordinator.streams import read_split
from pomona.coordinator.task_scores import encoded
from pomona.datasets import Dataset, check_labels
from pomona.errors import DataError
from pomona.failpoints import reach
from pomona.forget_settings import ForgetSettings
from pomona.storage.certificates import Certificate
from pomona.storage.records import Version
from pomona.storage.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetRequest:
    """What ``pomona forget`` was asked for.

    Attributes:
        name: Of the adapter.
        classes: To forget.
        data: Texts of these classes and of others, labelled.
        test: Other ones, to score by; None: part of ``data`` is held out.
        seed: Of what is held out, and of training.
        base: The base model's folder, if it is not where it was.
        settings: Of forgetting.
        threads: Of the CPU. The same number gives the same bytes.
    """

    name: str
    classes: tuple[str, ...]
    data: str
    test: str | None = None
    seed: int = 0
    base: str | None = None
    settings: ForgetSettings = field(default_factory=ForgetSettings)
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """How a request was met; accuracies are of the edited adapter, before the classes lose their rows of the head.

    So are those on classes of earlier requests, with the rows that they last had.

    Attributes:
        acc_forget: On the classes to forget.
        acc_retain: On all classes of no request.
        acc_forgotten_earlier: On all test rows of the classes of earlier requests; None where there are none, or one
            of the classes could not be looked at.
        h_mean: Of ``acc_retain`` and of what ``acc_forget`` lost.
        exactness: How far it holds.
        groups_total: Transformer blocks that the forget-adapter could change.
        groups_changed: Those that it changes.
        certificate: What was recorded.
        adapter: Reference of the version without the classes.
        seconds: Of this call.
        reappeared: Classes of earlier requests that would be told again, had they kept their rows of heads.
        unchecked: Why it could not be looked whether others would.
    """

    acc_forget: float
    acc_retain: float
    acc_forgotten_earlier: float | None
    h_mean: float
    exactness: str
    groups_total: int
    groups_changed: int
    certificate: Certificate
    adapter: str
    seconds: float
    reappeared: Sequence[str] = ()
    unchecked: Mapping[str, str] = field(default_factory=dict)


def forget(registry: Registry, request: ForgetRequest) -> Forgotten:
    """Forget classes, publish what is left, and certify it.

    Args:
        registry: Open for writing.
        request: What to forget.

    Raises:
        AdapterNotFound: There is no such adapter.
        VersionConflict: It was not learned by ``pomona learn``, or somebody else published meanwhile.
        DataError: A class is not known, or was forgotten already; all would go; the data are malformed, have unknown
            labels, or no rows of the classes to forget or of others.
        BaseModelError: The base model is not there, or is another one.
        ConfigError: Forgetting diverged.
        BlobWriteError: The version could not be written; nothing was changed.
    """
    began = time.monotonic()
    memory = newest(registry, request.name)
    if memory is None:
        memory = recall(registry, request.name)  # which says what there is
    data, test = read_split(request.data, request.test, seed=request.seed)
    asked = _asked(request, data, test)
    version = memory.version
    if version.recipe.get("request") != asked:
        _check(request, memory, data, test)
        with threads(request.threads):
            edit = _edit(registry, request, memory, data, test)
        version = publish_edit(registry, memory, request.classes, edit, asked)
        reach("version-published")
    return _told(registry, version, seconds=time.monotonic() - began)


def _asked(request: ForgetRequest, data: Dataset, test: Dataset) -> dict[str, object]:
    """Return a request as a version's recipe has it: asked for the same again, there is nothing to do."""
    rows = json.dumps([[each.texts, each.labels] for each in (data, test)], ensure_ascii=True)
    return {
        "classes": sorted(request.classes),
        "sha256": hashlib.sha256(rows.encode()).hexdigest(),
        "seed": request.seed,
        "settings": request.settings.model_dump(mode="json"),
    }


def check_classes(classes: Sequence[str], memory: Memory) -> None:
    """Do nothing if some classes can be forgotten.

    Raises:
        DataError: One is not known, or was forgotten already; or all would go.
    """
    known = memory.knowledge.classes
    for label in classes:
        if label in memory.forgotten:
            raise DataError(f"{memory.version.ref} has forgotten {label!r} already; see `pomona registry certificate`")
        if label not in known:
            close = get_close_matches(label, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it knows {', '.join(known)}"
            raise DataError(f"{memory.version.ref} knows no class {label!r}; {hint}")
    if len(set(classes)) == len(known):
        raise DataError(f"expected some but not all of the {len(known)} classes that {memory.version.ref} knows")


def _check(request: ForgetRequest, memory: Memory, data: Dataset, test: Dataset) -> None:
    check_classes(request.classes, memory)
    known = memory.knowledge.classes
    for rows in (data, test):
        check_labels(rows, (*known, *memory.forgotten))
        if missing := sorted(set(request.classes) - set(rows.labels)):
            raise DataError(f"{rows.source} has no rows of {', '.join(map(repr, missing))}, which is to be forgotten")
        if not set(rows.labels) & (set(known) - set(request.classes)):
            raise DataError(f"{rows.source} has no rows of classes to keep; a few of each are needed")


def _edit(registry: Registry, request: ForgetRequest, memory: Memory, data: Dataset, test: Dataset) -> Edit:
    _, path = find_base(registry, memory.version, request.base)
    encoder, knowledge = open_encoder(path, memory.stream.mos), memory.knowledge
    rows = data.subset([i for i, label in enumerate(data.labels) if label in knowledge.classes])
    targets = torch.tensor([knowledge.classes.index(label) for label in rows.labels])
    examples = Examples(encoder.of_texts(rows.texts, max_length=memory.stream.max_length), targets)
    met = forget_in_knowledge(
        encoder, knowledge, examples, request.classes, settings=request.settings, seed=request.seed
    )
    reach("classes-forgotten")
    held_out = encoded(encoder, test, max_length=memory.stream.max_length)
    before, edited, left = (
        scores_of(encoder, each, held_out.states, held_out.labels) for each in (knowledge, met.edited, met.left)
    )
    rechecked = recheck(registry, memory, encoder, met.left, held_out, forgets=request.classes)
    return Edit(met=met, before=before, edited=edited, left=left, rechecked=rechecked)


def _told(registry: Registry, version: Version, *, seconds: float) -> Forgotten:
    """Return what was found when a version was made."""
    certificate = next(item for item in registry.certificates(version.adapter) if item.version == version.ref)
    scores, rechecked = version.metrics, recheck_of(version)
    return Forgotten(
        acc_forget=scores["acc_forget"],
        acc_retain=scores["acc_retain"],
        acc_forgotten_earlier=scores.get("acc_forgotten_earlier"),
        h_mean=scores["h_mean"],
        exactness=certificate.exactness,
        groups_total=int(scores["groups_total"]),
        groups_changed=int(scores["groups_changed"]),
        certificate=certificate,
        adapter=version.ref,
        seconds=seconds,
        reappeared=rechecked.reappeared,
        unchecked=rechecked.unchecked,
    )
