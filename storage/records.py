"""What goes into the registry and what comes out: frozen records, nothing of the database behind them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

RunState = Literal["running", "finished", "failed"]
RoundState = Literal["open", "committed", "failed"]
SubmissionStatus = Literal["accepted", "rejected", "late", "quarantined"]
Exactness = Literal["exact", "truncated", "approximate", "behavioural"]
ParentKind = Literal["parent", "round", "stack", "merge", "task", "forget", "import"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSubmission:
    """One client's answer, as it is to be recorded.

    Attributes:
        run_id: The run.
        round_number: The round, from 1.
        client: Name of the client.
        rank: LoRA rank that the client states.
        alpha: LoRA alpha that the client states.
        num_examples: Size of the training set that the client states.
        nonce: New for every update; sent again, it names the same update.
        status: ``accepted`` keeps the payload, ``rejected`` and ``late`` only its hash and size.
        reason: Why it was not accepted.
        payload: The bytes as they came.
        train_loss: Mean loss that the client states.
        spectrum: How large its change is, and in how few directions; empty where that was not found out.
    """

    run_id: str
    round_number: int
    client: str
    rank: int
    alpha: float
    num_examples: int
    nonce: str
    status: SubmissionStatus
    reason: str = ""
    payload: bytes = field(repr=False)
    train_loss: float = 0.0
    spectrum: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One client's answer, as it was recorded.

    Numbers that the client stated are ``None`` where they were no finite number of a sensible size.

    Attributes:
        id: The receipt: the same update recorded again has the same one.
        sha256: Hash of the payload.
        bytes: Size of the payload.
        weight: Its weight in the version it went into.
        version: Reference of the version it went into.
    """

    id: int
    run_id: str
    round_number: int
    client: str
    rank: int | None
    alpha: float | None
    num_examples: int | None
    sha256: str
    bytes: int
    nonce: str
    status: SubmissionStatus
    reason: str
    weight: float | None
    received_at: datetime
    train_loss: float | None
    version: str | None
    spectrum: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """One version that another is made of.

    Attributes:
        ref: The version: ``name/3``, ``name@alias``, or ``name`` for its newest.
        kind: How it went in. ``parent``: the clients of a round trained on it. ``round``: it is the result of another
            round. ``stack``: its factors are blocks of the new ones. ``merge``: it is a term of a weighted sum.
            ``task``: it is what was learned of an earlier task. ``forget``: something of it was taken out. ``import``:
            it was exported, changed elsewhere, and imported again.
        coefficient: Share of it; negative where it was subtracted.
    """

    ref: str
    kind: ParentKind
    coefficient: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NewVersion:
    """The result of a round, as it is to be published.

    Attributes:
        run_id: The run.
        round_number: The round that this closes.
        adapter: Name of the adapter; must be that of the run.
        payload: The adapter's safetensors bytes, scale folded in.
        base_sha256: Hash of the base model's weights.
        rank: Largest rank of any layer.
        exactness: Whether the aggregate was kept whole, truncated, or is not the mean of what clients trained.
        retained_energy: Share of the aggregate's energy that was kept, smallest over layers.
        recipe: How it was made: ``task``, ``strategy``, ``labels`` and whatever else explains it.
        metrics: Scores of this version.
        weights: Weight of every client that went into it.
        reduced: Why a client in ``weights`` counts for less than its share.
        quarantined: Why a client whose update was accepted counts for nothing; its bytes are kept for inspection.
        bytes_down: Bytes sent to clients in the round.
        bytes_up: Bytes received from clients in the round.
        seconds: Wall-clock time of the round.
        expected_head: Reference of what must be the adapter's newest version, ``""`` where there must be none yet;
            ``None`` where it does not matter.
        parents: What it is made of, if that is more than the version that the round's clients trained on, which must
            then be among them.
        kind: ``task`` where the round is a task that was learned, and the payload what that adds to those before.
    """

    run_id: str
    round_number: int
    adapter: str
    payload: bytes = field(repr=False)
    base_sha256: str
    rank: int
    exactness: Exactness
    retained_energy: float = 1.0
    recipe: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    reduced: Mapping[str, str] = field(default_factory=dict)
    quarantined: Mapping[str, str] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    expected_head: str | None = None
    parents: Sequence[Parent] = ()
    kind: Literal["round", "task"] = "round"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewImport:
    """An adapter that no run made, as it is to be published.

    Attributes:
        adapter: Name of the adapter; made where there is none.
        payload: The adapter's safetensors bytes, scale folded in.
        base_sha256: Hash of the base model's weights.
        base_model: Name of the base model, for a registry that does not know it yet.
        base_source: Where the base model was found, likewise.
        rank: Largest rank of any layer.
        recipe: ``task``, ``labels`` and what it was imported from.
        expected_head: As in :class:`NewVersion`.
        parents: Versions that it is made of; by default it has none.
    """

    adapter: str
    payload: bytes = field(repr=False)
    base_sha256: str
    base_model: str
    base_source: str
    rank: int
    recipe: Mapping[str, object] = field(default_factory=dict)
    expected_head: str | None = None
    parents: Sequence[Parent] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One immutable version of an adapter; only its tags and the aliases that point at it ever change.

    Attributes:
        adapter: Name of the adapter.
        number: From 1, without gaps.
        sha256: Hash of the payload.
        bytes: Size of the payload.
        kind: How it came to be: ``round``, ``import``, ``task``, ``forget`` or ``remainder``.
        metrics: Scores; one that was not finite reads as NaN.
        quarantined: Why it leaves the registry no more; ``""`` where it may.
    """

    id: int
    adapter: str
    number: int
    sha256: str
    bytes: int
    base_sha256: str
    base_model: str
    rank: int
    kind: str
    exactness: Exactness
    retained_energy: float
    run_id: str | None
    round_number: int | None
    recipe: Mapping[str, object]
    created_at: datetime
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    aliases: Sequence[str]
    quarantined: str = ""

    @property
    def ref(self) -> str:
        """The reference that will always name this version."""
        return f"{self.adapter}/{self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One federated run.

    Attributes:
        settings_json: The settings, as text.
        initial_metrics: Scores before the first round.
    """

    id: str
    adapter: str
    base_sha256: str
    settings_json: str
    state: RunState
    reason: str
    started_at: datetime
    finished_at: datetime | None
    initial_metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round of a run.

    Attributes:
        parent: Reference of the version that clients trained on; ``None`` where there was none.
        cohort: Names of the clients that were asked.
        frozen_at: From when on it takes no more updates; ``None`` while it does.
        accepted: Number of accepted submissions so far; likewise ``rejected`` and ``late``.
        version: What the round published, once committed.
    """

    run_id: str
    number: int
    state: RoundState
    reason: str
    parent: str | None
    cohort: Sequence[str]
    opened_at: datetime
    frozen_at: datetime | None
    closed_at: datetime | None
    bytes_down: int
    bytes_up: int
    seconds: float
    accepted: int
    rejected: int
    late: int
    quarantined: int
    version: Version | None

    @property
    def metrics(self) -> Mapping[str, float]:
        """Scores of the published version, empty before that."""
        return self.version.metrics if self.version else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A client that enrolled in a run.

    Attributes:
        excluded: Why it takes no part, ``""`` when it does.
    """

    run_id: str
    name: str
    rank: int | None
    num_examples: int | None
    excluded: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSummary:
    """One adapter in a listing.

    Attributes:
        versions: How many there are.
        latest: The newest, ``None`` before the first is published.
        aliases: Version number by alias.
    """

    name: str
    created_at: datetime
    versions: int
    latest: Version | None
    aliases: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LineageNode:
    """A version, how its child came from it, and what it was made of.

    Nodes are shared where two children have one parent.

    Attributes:
        kind: Kind of the edge to the child, ``""`` at the root.
        coefficient: Share of this version in the child, 1 at the root.
        parents: What this version was made from.
        submissions: What clients sent for the round that made it, not only what was accepted.
    """

    version: Version
    kind: str
    coefficient: float
    parents: Sequence["LineageNode"] = field(repr=False)
    submissions: Sequence[Submission] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPage:
    """Some of the versions that a search found.

    Attributes:
        versions: In the order that was asked for.
        next_page_token: What to ask with for those after them; ``None`` where there are no more.
    """

    versions: Sequence[Version]
    next_page_token: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasMove:
    """One move of an alias.

    Attributes:
        version: Number of the version it points at from then on; ``None`` where the alias was removed.
        previous: Number of the version it pointed at before; ``None`` where there was no such alias.
    """

    adapter: str
    alias: str
    version: int | None
    previous: int | None
    moved_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricPoint:
    """A metric of one version; NaN where it was not finite."""

    version: int
    created_at: datetime
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricHistory:
    """A metric over the versions of an adapter that have it, oldest first."""

    metric: str
    points: Sequence[MetricPoint]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A release that is about to be made under differential privacy.

    Attributes:
        population: Whose budget it draws on.
        run_id: The run that makes it.
        round_number: And the round.
        attempt: From 1; a round whose release came to nothing is tried again as another attempt, and paid again.
        unit: Whose presence is hidden.
        adjacency: Between which data: one budget is of one promise.
        plan_sha256: Hash of the plan that it is made under.
        epsilon: What all releases to this population cost with this one.
        delta: At which.
        budget: What they may cost.
        noise_multiplier: As the account sees it.
        sample_rate: As the account sees it.
        releases: How many of them; more than one where each step of a client's training is.
        library: That keeps the account, with its version.
    """

    population: str
    run_id: str
    round_number: int
    attempt: int
    unit: str
    adjacency: str
    plan_sha256: str
    epsilon: float
    delta: float
    budget: float
    noise_multiplier: float
    sample_rate: float
    library: str
    releases: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """One row of the privacy ledger.

    Attributes:
        seq: From 1 in each population, without gaps.
        state: ``reserved``, ``released`` or ``burned``.
        release_sha256: Hash of what was released.
        previous: Hash of the population's row before.
        sha256: Hash of this one.
    """

    population: str
    seq: int
    at: datetime
    state: str
    run_id: str
    round: int
    attempt: int
    unit: str
    adjacency: str
    plan_sha256: str
    epsilon: float
    delta: float
    budget: float
    noise_multiplier: float
    sample_rate: float
    releases: int
    library: str
    release_sha256: str | None
    previous: str
    sha256: str
