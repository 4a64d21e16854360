"""The re-emergence alarm: earlier requests to forget are looked at again after every later task and edit.

The last version that knew a forgotten class is read once more, whatever its quarantine, and what it has of the class is
put back in memory under the adapters and edits of now (:mod:`pomona.continual.reemergence`). How many test rows of the
class would then be told is what is stated. Nothing of that is published, and no byte of the registry changes.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

from pydantic import Field, NonNegativeInt, ValidationError

from pomona.aggregation_settings import Section
from pomona.continual.encoder import FrozenEncoder
from pomona.continual.knowledge import Knowledge
from pomona.continual.reemergence import restored
from pomona.continual.scores import Scores, scores_of
from pomona.coordinator.increments import learned_on
from pomona.coordinator.memory import Memory, recall
from pomona.coordinator.task_scores import Rows
from pomona.errors import BlobCorrupt, PayloadError
from pomona.storage.records import Version
from pomona.storage.registry import Registry

TOLERANCE = 0.03
"""By how much more of a class's rows may be told than right after the request.

An edit is trained until next to none are, and may leave a few, which its request states as ``acc_forget``: so that, and
not 0, is what a later figure is compared with. Three points are what the benchmark of forgetting allows the classes of
earlier requests. Every later change moves features a little, and of few test rows one alone is more than three points,
so one row more is never an alarm.
"""

_KEY = "rechecked"
_AT_CLIENTS = (
    "its rows stay with clients, and what was known of it is not sent to them again; learn or forget with rows here"
)


class Recheck(Section):
    """What became of forgotten classes, had they kept their rows of heads and their statistics; a part of a recipe.

    Attributes:
        right: Test rows of each class that would be answered with it.
        rows: Test rows of each class that was looked at.
        reappeared: Classes that would be told again.
        unchecked: Why a class was not looked at that should have been.
    """

    right: dict[str, NonNegativeInt] = Field(default_factory=dict)
    rows: dict[str, NonNegativeInt] = Field(default_factory=dict)
    reappeared: tuple[str, ...] = ()
    unchecked: dict[str, str] = Field(default_factory=dict)

    def metrics(self, earlier: Collection[str]) -> dict[str, float]:
        """Return the one pooled figure, ``acc_forgotten_earlier``: 0 is wanted.

        It is the share of right answers on all test rows of the classes of earlier requests together, as ``Acc_o`` of
        GS-LoRA, each class with the rows of heads and the statistics that it last had. The same for tasks and requests.

        Args:
            earlier: Classes of the requests before.

        Returns:
            Nothing where there are no such rows, or one of the classes could not be looked at.
        """
        there = [label for label in earlier if label in self.rows]
        if not there or set(earlier) & set(self.unchecked):
            return {}
        return {
            "acc_forgotten_earlier": sum(map(self.right.__getitem__, there)) / sum(map(self.rows.__getitem__, there))
        }

    def log(self, log: logging.Logger) -> None:
        """Warn of what reappeared, and of what could not be looked at."""
        if self.reappeared:
            log.warning("%s was to be forgotten, and would be told again", ", ".join(self.reappeared))
        for label, why in self.unchecked.items():
            log.warning("whether %s would be told again was not looked at: %s", label, why)

    def facts(self) -> dict[str, object]:
        """Return it as a recipe has it; nothing where nothing was forgotten."""
        return {_KEY: self.model_dump(mode="json")} if self != Recheck() else {}


def recheck(
    registry: Registry,
    memory: Memory | None,
    encoder: FrozenEncoder,
    knowledge: Knowledge,
    test: Rows,
    *,
    relearned: Collection[str] = (),
    forgets: Sequence[str] = (),
) -> Recheck:
    """Look whether forgotten classes would be told again.

    It takes one reading of each version that was the last to know one of them, and one pass of their test rows through
    each adapter that answers.

    Args:
        registry: Where the versions are; is only read.
        memory: The version before the change; None: there is none.
        encoder: The one that all tasks were learned with.
        knowledge: After the change.
        test: Labelled rows, of any classes.
        relearned: Forgotten classes that were learned again by the change: they are not looked for.
        forgets: Classes that the change forgot: their figures are what later ones are compared with.
    """
    if memory is None:
        return Recheck()
    wanted = (set(memory.forgotten) - set(relearned)) & set(test.labels)
    history = _history(registry, memory, wanted)
    earlier, unchecked = _recalled(registry, history, wanted - set(knowledge.classes))
    known = restored(knowledge, {**earlier, **dict.fromkeys(forgets, memory.knowledge)})
    gone = wanted - set(known.classes) - unchecked.keys()
    unchecked |= dict.fromkeys(gone, "its task is no part of what is known")
    looked_at = (wanted | set(forgets)) & set(known.classes)
    found = _scored(encoder, known, test, looked_at)
    back = [
        label
        for label in sorted(wanted & looked_at)
        if reappears(found.right.get(label, 0), found.counts[label], after=_told_after(history, label))
    ]
    return _stated(found, reappeared=back, unchecked=unchecked)


def rechecked_by_clients(memory: Memory, forgets: Sequence[str], edited: Scores) -> Recheck:
    """Return what a request that clients met says of re-emergence.

    Of its own classes that is what the clients counted before these lost their rows. Classes of earlier requests cannot
    be looked at: only clients have their rows, and what was known of them would have to be sent out again.

    Args:
        memory: The version before the request.
        forgets: The classes of the request.
        edited: What clients counted with the edit.
    """
    own = Scores(
        {label: edited.right.get(label, 0) for label in forgets}, {each: edited.counts[each] for each in forgets}
    )
    return _stated(own, unchecked=dict.fromkeys(memory.forgotten, _AT_CLIENTS))


def recheck_of(version: Version) -> Recheck:
    """Return what was found when a version was made.

    Raises:
        PayloadError: Its recipe is malformed.
    """
    try:
        return Recheck.model_validate(version.recipe.get(_KEY, {}))
    except ValidationError as error:
        raise PayloadError(f"{version.ref} does not say how it was looked at: {error}") from error


def reappears(right: int, rows: int, *, after: float) -> bool:
    """Return whether a class would be told again: more than right after its request, see :data:`TOLERANCE`.

    Args:
        right: Test rows that would be told.
        rows: Test rows.
        after: Share that was told right after the request, in ``[0, 1]``.

    Example:
        >>> reappears(4, 100, after=0.0), reappears(1, 5, after=0.0), reappears(4, 100, after=0.02)
        (True, False, False)
    """
    return right - after * rows > max(TOLERANCE * rows, 1.0) + 1e-9


def _scored(encoder: FrozenEncoder, knowledge: Knowledge, test: Rows, labels: Collection[str]) -> Scores:
    places = [i for i, label in enumerate(test.labels) if label in labels]
    if not places:
        return Scores({}, {})
    return scores_of(encoder, knowledge, test.states.subset(places), [test.labels[i] for i in places])


def _stated(found: Scores, *, reappeared: Sequence[str] = (), unchecked: Mapping[str, str]) -> Recheck:
    return Recheck(
        right={label: found.right.get(label, 0) for label in sorted(found.counts)},
        rows={label: found.counts[label] for label in sorted(found.counts)},
        reappeared=tuple(reappeared),
        unchecked=dict(sorted(unchecked.items())),
    )


def _history(registry: Registry, memory: Memory, labels: Collection[str]) -> dict[str, tuple[Version, Version]]:
    """Return the last version that knew each class, and the one after it."""
    if not labels:
        return {}
    chain = [node.version for node in learned_on(registry.lineage(memory.version.ref))]
    return {label: step for step in pairwise(chain) for label in labels if label in _knows(step[0])}


def _knows(version: Version) -> Sequence[object]:
    known = version.recipe.get("knows")
    return known if isinstance(known, list) else ()


def _recalled(
    registry: Registry, history: Mapping[str, tuple[Version, Version]], labels: set[str]
) -> tuple[dict[str, Knowledge], dict[str, str]]:
    """Return what was last known of each class, each version read once; and why there is nothing of the others."""
    unchecked = {label: "no version that this one was learned on knew it" for label in labels if label not in history}
    refs: dict[str, list[str]] = {}
    for label in labels - unchecked.keys():
        refs.setdefault(history[label][0].ref, []).append(label)
    found: dict[str, Knowledge] = {}
    for ref, of_version in refs.items():
        try:
            found |= dict.fromkeys(of_version, recall(registry, ref, quarantined=True).knowledge)
        except (BlobCorrupt, PayloadError) as error:
            unchecked |= dict.fromkeys(of_version, f"{ref}, the last that knew it, cannot be read: {error}")
    return found, unchecked


def _told_after(history: Mapping[str, tuple[Version, Version]], label: str) -> float:
    """Return the share of a class's rows that was told right after its request; 0 where nobody wrote it down."""
    if label not in history:
        return 0.0
    version = history[label][1]
    found = recheck_of(version)
    if label in found.rows:
        return found.right[label] / found.rows[label]
    return version.metrics.get("acc_forget", 0.0)
