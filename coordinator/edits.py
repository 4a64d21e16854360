"""Publish an edit: the version without the classes, its certificate, and quarantine for those before, at once.

All three are one transaction, whoever trained the edit and on whose data. What a request leaves in use of what was
trained on the examples is worked out here too, since the certificate says how far it holds.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pomona.continual.exactness import Verdict, exactness_of
from pomona.continual.knowledge import Knowledge
from pomona.continual.requests import MetRequest
from pomona.continual.scores import Scores
from pomona.continual.verification import Assessment, assess
from pomona.coordinator.increments import encode_increment
from pomona.coordinator.memory import Memory, feature_adapter, recipe, state_of
from pomona.coordinator.reemergence import Recheck
from pomona.storage.certificates import Certificate, NewCertificate
from pomona.storage.learned import ClosedRound, NewLearned
from pomona.storage.records import Parent, Version
from pomona.storage.registry import Registry
from pomona.storage.values import json_value

METHOD = "gs-lora"
SHORTFALL = "what the edit failed to do"  # of a certificate's evidence, where there is something to say


@dataclass(frozen=True, slots=True)
class Edit:
    """The knowledge after a request, and what shows how well it was met.

    Attributes:
        met: What was edited, and what is left without the classes.
        before: Scores before the request.
        edited: After it, with the classes' rows and statistics still there.
        left: Of what is to be used.
        rechecked: What became of the classes of earlier requests, and what later changes are compared with.
    """

    met: MetRequest
    before: Scores
    edited: Scores
    left: Scores
    rechecked: Recheck


def publish_edit(
    registry: Registry,
    memory: Memory,
    classes: Sequence[str],
    edit: Edit,
    asked: Mapping[str, object],
    *,
    closes: ClosedRound | None = None,
    clients: Mapping[str, Sequence[str]] | None = None,
) -> Version:
    """Publish what a request leaves.

    Args:
        registry: Open for writing.
        memory: What was edited.
        classes: That were to be forgotten.
        edit: How.
        asked: The request, as the recipe has it.
        closes: The round of the run whose clients met it; None: it was met at one place.
        clients: Who trained the edit and whose features moved, where it was met by clients.

    Raises:
        VersionConflict: Somebody else published meanwhile.
        BlobWriteError: The version could not be written; nothing was changed.
    """
    name, left, found = memory.version.adapter, edit.met.left, edit.met.forgotten
    told = _assessment(memory, classes, edit)
    verdict = verdict_of(memory.knowledge, classes, edit.met.stale, edited=bool(found.groups_changed))
    verdict = with_earlier(verdict, classes, registry.certificates(name))
    missed = shortfall(len(found.groups_changed), edit.before.accuracy(classes), told.acc_forget)
    gone = set(map(json_value, classes))  # as the registry has them
    affected = [each.ref for each in registry.versions(name) if gone & set(_listed(each.recipe.get("knows")))]
    made = recipe(left, memory.stream, method=METHOD)
    return registry.publish_learned(
        NewLearned(
            adapter=name,
            payload=encode_increment(memory.state, state_of(left, (*memory.forgotten, *classes))),
            base_sha256=memory.version.base_sha256,
            base_model=memory.version.base_model,
            base_source=registry.base_model_source(memory.version.base_sha256),
            rank=feature_adapter(left).rank,
            kind="forget",
            exactness="behavioural"
            if "behavioural" in (verdict.exactness, memory.version.exactness)
            else "approximate",
            recipe={
                **made,
                "request": asked,
                "groups_changed": list(found.groups_changed),
                **edit.rechecked.facts(),
                **_names(clients),
            },
            metrics=_metrics(memory, classes, edit, told),
            expected_head=memory.version.ref,
            parents=[Parent(ref=memory.version.ref, kind="forget")],
            closes=closes,
        ),
        certificate=NewCertificate(
            adapter=name,
            scope="class",
            subjects=tuple(classes),
            method=METHOD,
            exactness=verdict.exactness,
            reason=f"{verdict.why}; {missed}" if missed else verdict.why,
            evidence={**_evidence(memory, classes, edit, told), **({SHORTFALL: missed} if missed else {})},
            affected=affected,
        ),
        quarantined=affected,
    )


def shortfall(groups_changed: int, before: float, after: float) -> str:
    """Return what an edit failed to do, in one clause; nothing where it did what it is for.

    Args:
        groups_changed: Blocks that the forget-adapter changes.
        before: Accuracy on the classes to forget before the edit, in ``[0, 1]``.
        after: With the edit, before the classes lose their rows and statistics.

    Example:
        >>> shortfall(1, 0.5, 0.0)
        ''
    """
    if not groups_changed:
        return "the edit changed no block: only rows and statistics of the classes are gone"
    if after >= before > 0.0:
        return f"the edit did not lower the accuracy on the classes ({before:.4f} before, {after:.4f} with it)"
    return ""


def verdict_of(
    knowledge: Knowledge, classes: Collection[str], stale: Collection[str], *, edited: bool = True
) -> Verdict:
    """Return how far a request holds.

    A later task starts from, and is merged towards, the adapters before it. Of the heads those count that answer.

    Args:
        knowledge: Before the request.
        classes: That were to be forgotten.
        stale: Names of sums that could not be renewed.
        edited: Whether the forget-adapter changes anything; one that is zero is not in use.
    """
    holders = [task for task in knowledge.tasks if set(classes) & set(task.classes)]
    first = knowledge.tasks.index(holders[0])
    heads = {
        "aligned": ["the head over all classes"],
        "combined": [f"the head of task {task.number}" for task in holders if set(task.classes) - set(classes)],
    }
    counting = [f"the ridge sums of task {task.number}" for task in holders]
    adapters = [f"the adapter of task {task.number}" for task in knowledge.tasks[first:]]
    found = exactness_of(
        adapters=[*adapters, "the forget-adapter"] if edited else adapters,
        heads=heads.get(knowledge.settings.head, []),
        sums=[name for name in counting if name in stale],
    )
    behind = ", ".join(name for name in stale if name not in counting)
    return Verdict(found.exactness, f"{found.why}; {behind} are of features before the edit") if behind else found


def with_earlier(verdict: Verdict, classes: Collection[str], certificates: Sequence[Certificate]) -> Verdict:
    """Return a verdict that claims no more than what was said when one of the classes was forgotten before.

    A class that was learned again is of a later task, but what was trained on it the first time may still be in use.

    Args:
        verdict: By what is known now.
        classes: That were to be forgotten.
        certificates: Of the adapter, until now.
    """
    before = [each for each in certificates if each.scope == "class" and set(classes) & set(each.subjects)]
    if not before:
        return verdict
    behind = (
        f"certificate {', '.join(str(each.id) for each in before)} says what is in use of when it was learned before"
    )
    weakest = "behavioural" if any(each.exactness == "behavioural" for each in before) else verdict.exactness
    return Verdict(weakest, f"{verdict.why}; {behind}")


def _assessment(memory: Memory, classes: Sequence[str], edit: Edit) -> Assessment:
    before, after = edit.before.accuracies(), edit.edited.accuracies()
    return assess(before, after, edit.edited.counts, classes, memory.forgotten)


def _kept(memory: Memory, classes: Sequence[str], scores: Scores) -> set[str]:
    return set(scores.counts) - {*classes, *memory.forgotten}


def _metrics(memory: Memory, classes: Sequence[str], edit: Edit, told: Assessment) -> dict[str, float]:
    return {
        "accuracy": edit.left.accuracy(_kept(memory, classes, edit.left)),
        "acc_forget": told.acc_forget,
        "acc_retain": told.acc_retain,
        "h_mean": told.h_mean,
        "groups_total": float(edit.met.forgotten.groups_total),
        "groups_changed": float(len(edit.met.forgotten.groups_changed)),
        **edit.rechecked.metrics(memory.forgotten),
    }


def _evidence(memory: Memory, classes: Sequence[str], edit: Edit, told: Assessment) -> dict[str, object]:
    kept = _kept(memory, classes, edit.before)
    return {
        "accuracy on what was to be forgotten": {
            "before": edit.before.accuracy(classes),
            "edited": told.acc_forget,
            "published": edit.left.accuracy(classes),
        },
        "accuracy on what is kept": {
            "before": edit.before.accuracy(kept),
            "edited": told.acc_retain,
            "published": edit.left.accuracy(kept),
        },
        "blocks changed": list(edit.met.forgotten.groups_changed),
        "sums of features before the edit": list(edit.met.stale),
    }


def _names(clients: Mapping[str, Sequence[str]] | None) -> dict[str, object]:
    return {} if clients is None else {"clients": {part: list(names) for part, names in clients.items()}}


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else ()
