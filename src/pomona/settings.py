"""All settings of a run. Frozen, closed, and checked before the first byte is sent."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from pomona.aggregation_settings import AggregationSettings, DefenceSettings, Fraction, Section, changed
from pomona.forget_settings import RequestSettings
from pomona.mos_settings import StreamSettings
from pomona.privacy_settings import PrivacySettings
from pomona.ranks import RankPattern, layer_rank
from pomona.strategies import ADDING

RankFactor = Annotated[float, Field(gt=0, le=16)]
AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _pairs(given: object) -> object:
    if isinstance(given, Mapping):
        for name, inner in given.items():
            if isinstance(inner, Mapping) and inner:
                raise ValueError(f"a name with dots needs quotes in TOML, as in '{name}.{next(iter(inner))}' = …")
    return tuple(given.items()) if isinstance(given, Mapping) else given


def _distinct(pattern: RankPattern) -> RankPattern:
    if len(dict(pattern)) < len(pattern):
        raise ValueError(f"expected distinct names, got {', '.join(name for name, _ in pattern)}")
    return tuple(sorted(pattern))


class ModelSettings(Section):
    """The frozen base model.

    Attributes:
        base: A name that ships in a package (``all-minilm-l6-v2``) or a folder in Hugging Face's layout.
        sha256: Refuse any base model with another hash; empty: whatever ``base`` has on the coordinator.
        target_modules: Last parts of the names of the linear layers to adapt; empty: every linear layer
            but the head.
        max_length: Longer texts are cut, in tokens.
    """

    base: str = "all-minilm-l6-v2"
    sha256: Sha256 | Literal[""] = ""
    target_modules: tuple[str, ...] = ()
    max_length: Annotated[int, Field(ge=4, le=8192)] = 64


class DataSettings(Section):
    """The coordinator's held-out data, and for simulations everybody's.

    Attributes:
        source: ``wordnet-nouns`` (ships with the package) or a CSV or JSONL file. Its held-out part scores
            every round; simulated clients train on the rest.
        labels: The classes, in order; empty: those of ``source``, sorted. Unused by ``causal-lm``.
        evaluation_examples: At most this many held-out examples are scored, drawn by seed.
        evaluation_split: The part to score; ``all``: the whole of ``source``, where it is held-out data only.
        partition: How simulated clients share the training part.
        dirichlet_alpha: Concentration of the label mix of each client; small is non-IID.
        partition_column: The column that names the client, for ``partition = "column"``.
    """

    source: str = "wordnet-nouns"
    labels: tuple[str, ...] = ()
    evaluation_examples: PositiveInt = 1000
    evaluation_split: Literal["validation", "test", "all"] = "validation"
    partition: Literal["iid", "dirichlet", "column"] = "dirichlet"
    dirichlet_alpha: PositiveFloat = 0.5
    partition_column: str = ""

    @model_validator(mode="after")
    def _column_is_named(self) -> Self:
        if (self.partition == "column") != bool(self.partition_column):
            raise ValueError(
                f'partition = "column" and partition_column go together, '
                f"got partition={self.partition!r} and partition_column={self.partition_column!r}"
            )
        return self


class CohortSettings(Section):
    """Who takes part in a round, and how long it may take.

    Attributes:
        fraction: Share of the enrolled clients that is asked each round (at least one).
        size: Ask exactly this many instead.
        min_clients: Start when this many have enrolled.
        min_replies: Close a round with at least this many accepted updates; with fewer the run fails.
        join_timeout_s: Wait this long for ``min_clients``.
        round_deadline_s: So long after its work begins to be sent a round closes without those who have not answered.
    """

    fraction: Fraction | None = None
    size: PositiveInt | None = None
    min_clients: PositiveInt = 1
    min_replies: PositiveInt = 1
    join_timeout_s: PositiveFloat = 120.0
    round_deadline_s: PositiveFloat = 600.0

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        if self.fraction is not None and self.size is not None:
            raise ValueError(
                f"give cohort.fraction or cohort.size, not both; got fraction={self.fraction} size={self.size}"
            )
        if self.size is not None and self.min_replies > self.size:
            raise ValueError(
                f"cohort.min_replies={self.min_replies} can never be reached by cohort.size={self.size}; "
                "lower min_replies or raise size"
            )
        return self


class TrainingSettings(Section):
    """Local training on a client.

    Attributes:
        local_epochs: Passes over the client's data per round.
        max_steps: Stop a round after this many optimiser steps; 0: no limit.
        batch_size: Examples per step.
        learning_rate: Of AdamW, for the LoRA factors.
        head_learning_rate: Of AdamW, for the parameters trained whole.
        weight_decay: Of AdamW.
        alpha: LoRA's alpha on every client; None: ``alpha_per_rank * rank``.
        alpha_per_rank: ``alpha = alpha_per_rank * rank`` where ``alpha`` is not given, so all ranks share one scale.
        rslora: Scale by ``alpha / sqrt(rank)`` instead of ``alpha / rank``.
        rank_pattern: By the last parts of module names, the rank of those layers as a multiple of the client's; the
            longest name that fits counts, the scale stays that of the client.
    """

    local_epochs: Annotated[int, Field(ge=1, le=1000)] = 1
    max_steps: NonNegativeInt = 0
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 2e-3
    head_learning_rate: PositiveFloat = 1e-2
    weight_decay: NonNegativeFloat = 0.0
    alpha: PositiveFloat | None = None
    alpha_per_rank: PositiveFloat = 2.0
    rslora: bool = False
    rank_pattern: Annotated[tuple[tuple[str, RankFactor], ...], BeforeValidator(_pairs), AfterValidator(_distinct)] = ()

    @model_validator(mode="after")
    def _one_alpha(self) -> Self:
        if self.alpha is not None and changed(self, "alpha_per_rank"):
            raise ValueError(
                f"give training.alpha or training.alpha_per_rank, not both; got {self.alpha} and {self.alpha_per_rank}"
            )
        return self

    def layer_rank(self, module: str, rank: int) -> int:
        """Return the rank of one layer on a client of this rank."""
        return layer_rank(self.rank_pattern, module, rank)

    def alpha_of(self, rank: int) -> float:
        """Return the alpha of a client of this rank."""
        return self.alpha_per_rank * rank if self.alpha is None else self.alpha

    def scale_of(self, rank: int) -> float:
        """Return what stands in front of ``B A`` on a client of this rank."""
        return self.alpha_of(rank) / (math.sqrt(rank) if self.rslora else rank)


class SimulationSettings(Section):
    """What simulated clients have that real ones bring along.

    Attributes:
        ranks: Rank of client ``i`` is ``ranks[i % len(ranks)]``.
        cpus_per_client: Share of a core that Ray reserves for one client.
        gpus_per_client: Share of a GPU that Ray reserves for one client.
    """

    ranks: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (4, 8, 16, 32)
    cpus_per_client: PositiveFloat = 1.0
    gpus_per_client: NonNegativeFloat = 0.0


class RunSettings(Section):
    """One federated run.

    Attributes:
        name: The adapter in the registry that the run publishes versions of.
        task: ``classification`` trains a head beside the adapter, ``causal-lm`` trains the adapter alone.
        rounds: Number of rounds.
        seed: Of everything random: cohorts, fresh adapters, initial head, batches. Noise for privacy has no seed.
        privacy: What is promised to whom; None: nothing.
        continual: Tasks to learn one after another, instead of ``rounds`` of one; None: it is one.
        forget: Classes that the adapter is to forget, instead of ``rounds``; None: it trains.
    """

    name: AdapterName
    task: Literal["classification", "causal-lm"] = "classification"
    rounds: PositiveInt = 3
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    cohort: CohortSettings = CohortSettings()
    training: TrainingSettings = TrainingSettings()
    aggregation: AggregationSettings = AggregationSettings()
    defence: DefenceSettings = DefenceSettings()
    privacy: PrivacySettings | None = None
    simulation: SimulationSettings = SimulationSettings()
    continual: StreamSettings | None = None
    forget: RequestSettings | None = None

    @property
    def exchanges(self) -> int:
        """How often clients are asked for something that is summed: once a round, or as often as its tasks say."""
        return self.rounds if self.continual is None else self.continual.exchanges

    @model_validator(mode="after")
    def _defence_fits(self) -> Self:
        name = self.aggregation.strategy
        if self.defence.kind != "none" and name not in ADDING:
            raise ValueError(
                f"a defence needs a strategy that adds changes ({', '.join(sorted(ADDING))}), got strategy={name!r}"
            )
        if self.defence.kind == "multi-krum" and self.cohort.min_replies < (least := 2 * self.defence.attackers + 3):
            raise ValueError(
                f"multi-krum needs {least} updates to withstand {self.defence.attackers} attackers; "
                f"raise cohort.min_replies, now {self.cohort.min_replies}"
            )
        if self.defence.kind == "trimmed-mean" and self.cohort.min_replies <= (least := 2 * self.defence.attackers):
            raise ValueError(
                f"a mean trimmed by {self.defence.attackers} needs {least + 1} updates; "
                f"raise cohort.min_replies, now {self.cohort.min_replies}"
            )
        return self

    @model_validator(mode="after")
    def _schedule_comes_true(self) -> Self:
        if (last := max((number for number, _ in self.aggregation.rank_schedule), default=0)) > self.rounds:
            raise ValueError(
                f"aggregation.rank_schedule changes the rank in round {last} of a run of {self.rounds} rounds; "
                "lower that round or raise rounds"
            )
        return self

    @model_validator(mode="after")
    def _ranks_stay_within(self) -> Self:
        rank, most = self.aggregation.rank, self.aggregation.max_rank
        for name, _ in self.training.rank_pattern if rank is not None else ():
            if (wide := self.training.layer_rank(name, rank or 1)) > most:
                raise ValueError(
                    f"training.rank_pattern makes the rank of {name!r} {wide}, above aggregation.max_rank={most}; "
                    "lower the pattern or aggregation.rank"
                )
        return self

    @model_validator(mode="after")
    def _trusted_data_are_others(self) -> Self:
        trusted, source = (Path(each).expanduser() for each in (self.defence.trusted_data, self.data.source))
        if self.defence.trusted_data and trusted.absolute() == source.absolute():
            raise ValueError(
                "defence.trusted_data should be other data than those that score the run, got "
                f"{self.data.source!r} as both"
            )
        return self

    @model_validator(mode="after")
    def _tasks_fit(self) -> Self:
        if self.continual is not None:
            for reason in _unfit_for_tasks(self):
                raise ValueError(reason)
        return self

    @model_validator(mode="after")
    def _request_fits(self) -> Self:
        if self.forget is not None:
            for reason in _unfit_for_request(self):
                raise ValueError(reason)
        return self


def _unfit_for_tasks(settings: RunSettings) -> Iterator[str]:
    """Yield why a run cannot learn task after task."""
    continual = settings.continual
    if settings.task != "classification":
        yield f"[continual] learns classes, got task={settings.task!r}; leave the section or the task out"
    if settings.defence.kind != "none":
        kind = settings.defence.kind
        yield f"[continual] averages adapters and adds sums up, without a defence; got defence.kind={kind!r}"
    if _aggregates_otherwise(settings):
        yield "[continual] averages by examples, exactly; of [aggregation] only max_update_norm and max_examples count"
    if settings.training != TrainingSettings():
        yield "[continual] trains as [continual.mos] and [continual.mos.training] say; leave [training] out"
    if settings.model.target_modules:
        yield "[continual] adapts the feed-forward layers of the upper blocks; leave model.target_modules out"
    if changed(settings, "rounds"):
        yield f"[continual] has rounds_per_task for each task; leave rounds out, got {settings.rounds}"
    if continual is not None and continual.tasks and settings.data.labels:
        yield "give the classes as continual.tasks or as data.labels, not both"


def _unfit_for_request(settings: RunSettings) -> Iterator[str]:
    """Yield why a run cannot forget classes with its clients."""
    for name, why in {
        "continual": "a run learns or forgets; forget by another run, of the same adapter",
        "privacy": "gradients and sums of features are exact, and nothing noises them yet",
    }.items():
        if getattr(settings, name) is not None:
            yield f"[forget] and [{name}] do not go together: {why}; leave one out"
    if settings.task != "classification":
        yield f"[forget] takes classes out, got task={settings.task!r}; leave the section or the task out"
    if settings.defence.kind != "none":
        yield f"[forget] adds gradients up, without a defence; got defence.kind={settings.defence.kind!r}"
    if _aggregates_otherwise(settings):
        yield "[forget] averages gradients by rows; of [aggregation] only max_update_norm and max_examples count"
    if settings.training != TrainingSettings() or changed(settings, "rounds"):
        yield "[forget] trains as [forget.settings] says; leave [training] and rounds out"
    if settings.model.target_modules or changed(settings.model, "max_length"):
        yield "[forget] takes layers and texts as the adapter was learned; of [model] only base and sha256 count"
    if settings.data != DataSettings():
        yield "[forget] scores by rows that clients hold out, so the coordinator needs no rows; leave [data] out"
    if settings.cohort.fraction is not None or settings.cohort.size is not None:
        yield "[forget] asks all clients that have rows; leave cohort.fraction and cohort.size out"


def _aggregates_otherwise(settings: RunSettings) -> bool:
    limits = settings.aggregation
    return limits != AggregationSettings(max_update_norm=limits.max_update_norm, max_examples=limits.max_examples)
