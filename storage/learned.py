"""What was learned of a task, or is left after a request to forget, as it goes into the registry.

Unlike the result of a round (:class:`~pomona.storage.records.NewVersion`) it need not come from a run. Where it does,
because clients learned or forgot together, it says which round of theirs it closes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pomona.storage.records import Exactness, Parent


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedRound:
    """A round that a version closes which was learned, or is left after a request.

    Attributes:
        run_id: The run.
        round_number: Its round.
        weights: As in :class:`~pomona.storage.records.NewVersion`, like all that follow.
        reduced: Why a client in ``weights`` counts for less than its share.
        bytes_down: Bytes sent to clients.
        bytes_up: Bytes received from clients.
        seconds: Wall-clock time of the round.
    """

    run_id: str
    round_number: int
    weights: Mapping[str, float]
    reduced: Mapping[str, str] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NewLearned:
    """What was learned of one task, or what is left after a request to forget, as it is to be published.

    Attributes:
        adapter: Name of the adapter; made where there is none.
        payload: Safetensors bytes of what this version adds to those it is made of.
        base_sha256: As in :class:`~pomona.storage.records.NewImport`, like the two after it.
        rank: Largest rank of any layer, 0 where no layer is adapted.
        kind: ``task``, ``forget``, or ``remainder``: what is left of a federated adapter without a client.
        exactness: ``behavioural`` where what was to be forgotten is only hidden; a task has that of the version before.
        recipe: How it was made.
        metrics: Scores of this version.
        expected_head: As in :class:`~pomona.storage.records.NewVersion`.
        parents: Versions that it is made of.
        closes: The round of a run whose clients made it; None: it was made at one place.
    """

    adapter: str
    payload: bytes = field(repr=False)
    base_sha256: str
    base_model: str
    base_source: str
    rank: int
    kind: Literal["task", "forget", "remainder"]
    exactness: Exactness = "exact"
    recipe: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    expected_head: str | None = None
    parents: Sequence[Parent] = ()
    closes: ClosedRound | None = None
