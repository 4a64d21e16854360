"""How updates are aggregated and defended, as a run file says it."""

from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from pomona.strategies import ADDING, EQUAL_RANK, REDISTRIBUTING, StrategyName

Fraction = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A part of a run's settings: frozen, closed, finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def changed(section: Section, name: str) -> bool:
    """Return whether a setting differs from its default; one that is read back from a record is always set."""
    return bool(getattr(section, name) != type(section).model_fields[name].default)


class ServerOptimizerSettings(Section):
    """What the coordinator does with the change that a round makes.

    Attributes:
        kind: ``fedavg`` takes it as it is, ``fedavgm`` adds momentum, ``fedadam`` sizes the step of each layer too.
        learning_rate: Of the server; None: 1 for ``fedavg`` and ``fedavgm``, 0.01 for ``fedadam``, whose steps do not
            shrink with the change.
        momentum: ``beta_1``.
        beta_2: Memory of the second moment, for ``fedadam``.
        tau: Added to the root of the second moment, for ``fedadam``.
    """

    kind: Literal["fedavg", "fedavgm", "fedadam"] = "fedavg"
    learning_rate: PositiveFloat | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta_2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: PositiveFloat = 1e-3

    @model_validator(mode="after")
    def _kind_has_them(self) -> Self:
        unused = {"fedavg": ("momentum", "beta_2", "tau"), "fedavgm": ("beta_2", "tau"), "fedadam": ()}[self.kind]
        if given := [name for name in unused if changed(self, name)]:
            names = ", ".join(given)
            raise ValueError(f"{names} would change nothing with kind={self.kind!r}; leave out or change kind")
        return self

    @property
    def step(self) -> float:
        """The learning rate that holds."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-2 if self.kind == "fedadam" else 1.0


class SelfPruningSettings(Section):
    """Ranks that shrink where a client does not need them.

    Attributes:
        penalty: Weight of the tail's norms in the clients' loss.
        decay: The tail is what comes after this share of a client's rank.
    """

    penalty: NonNegativeFloat = 1e-2
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.75


class AggregationSettings(Section):
    """How updates become the next global adapter.

    Attributes:
        strategy: A name that ``pomona strategies`` lists.
        rank: Rank that all clients train, for strategies that need equal ranks; the others take each client's own.
        max_rank: Rank of the global adapter, and the most a client may have.
        rank_schedule: ``[[round, rank], ...]``: from that round on clients train at most that rank; rounds ascend.
        energy: Keep the smallest rank whose singular values hold this share of the energy, for ``flora-bounded``,
            ``ffa-nested`` and ``flexlora``; the others truncate nothing.
        max_update_norm: Refuse an update with a larger Frobenius norm over all its layers and heads.
        max_examples: Refuse an update that claims more examples.
        warm_start: Clients go on from the largest components of the global adapter, for ``flora-bounded``.
        rank_partitioned: Average each component over the clients that have it, for ``hetlora`` and ``flexlora``.
        self_pruning: Clients give up ranks that they do not use, for ``hetlora``.
        server_optimizer: For ``flora-bounded`` and ``ffa-nested``.
    """

    strategy: StrategyName = "flora-bounded"
    rank: Annotated[int, Field(ge=1, le=4096)] | None = None
    max_rank: Annotated[int, Field(ge=1, le=4096)] = 64
    rank_schedule: tuple[tuple[PositiveInt, Annotated[int, Field(ge=1, le=4096)]], ...] = ()
    energy: Fraction = 1.0
    max_update_norm: PositiveFloat = 1e4
    max_examples: PositiveInt = 10_000_000
    warm_start: bool = False
    rank_partitioned: bool = False
    self_pruning: SelfPruningSettings | None = None
    server_optimizer: ServerOptimizerSettings = ServerOptimizerSettings()

    @model_validator(mode="after")
    def _options_fit_the_strategy(self) -> Self:
        name = self.strategy
        if (name in EQUAL_RANK) != (self.rank is not None):
            raise ValueError(
                f"aggregation.rank goes with the strategies of equal ranks ({', '.join(sorted(EQUAL_RANK))}) and no "
                f"other; got strategy={name!r} and rank={self.rank}"
            )
        if self.rank is not None and self.rank > self.max_rank:
            raise ValueError(f"aggregation.rank={self.rank} is above aggregation.max_rank={self.max_rank}; lower it")
        if self.rank_schedule and self.rank is not None:
            raise ValueError("aggregation.rank and aggregation.rank_schedule contradict each other; give one")
        if self.rank_schedule and self.self_pruning is not None:
            raise ValueError("aggregation.rank_schedule and aggregation.self_pruning contradict each other; give one")
        rounds = [number for number, _ in self.rank_schedule]
        if rounds != sorted(set(rounds)):
            raise ValueError(f"the rounds of aggregation.rank_schedule should ascend, got {rounds}")
        if (most := max((rank for _, rank in self.rank_schedule), default=0)) > self.max_rank:
            raise ValueError(
                f"aggregation.rank_schedule has rank {most}, above aggregation.max_rank={self.max_rank}; "
                "lower it or raise max_rank"
            )
        for option, given, fitting in (
            ("warm_start", self.warm_start, {"flora-bounded"}),
            ("rank_partitioned", self.rank_partitioned, REDISTRIBUTING),
            ("self_pruning", self.self_pruning is not None, {"hetlora"}),
            ("server_optimizer", self.server_optimizer != ServerOptimizerSettings(), ADDING),
            ("energy", self.energy < 1.0, ADDING | {"flexlora"}),
        ):
            if given and name not in fitting:
                raise ValueError(f"aggregation.{option} is for {', '.join(sorted(fitting))}, got strategy={name!r}")
        return self


class DefenceSettings(Section):
    """What protects the sum from poisoned updates.

    Attributes:
        kind: ``norm-bounding`` scales large updates down, ``multi-krum`` and ``trimmed-mean`` leave out those far from
            the others, ``geometric-median`` weighs all by their distance from it, ``fltrust`` by the angle to what
            the coordinator learns itself from ``trusted_data``.
        attackers: How many of a round are assumed, for ``multi-krum`` and ``trimmed-mean``.
        norm_factor: The bound as a multiple of the median norm, for ``norm-bounding``.
        equal_weights: Count clients alike and not by their examples, which an attacker states itself.
        trusted_data: A file of the coordinator's own clean examples, for ``fltrust``; a few hundred will do.
    """

    kind: Literal["none", "norm-bounding", "multi-krum", "geometric-median", "trimmed-mean", "fltrust"] = "none"
    attackers: NonNegativeInt = 0
    norm_factor: PositiveFloat = 1.0
    equal_weights: bool = False
    trusted_data: str = ""

    @model_validator(mode="after")
    def _attackers_are_assumed(self) -> Self:
        if (self.kind in {"multi-krum", "trimmed-mean"}) != (self.attackers > 0):
            raise ValueError(
                "defence.attackers goes with multi-krum and trimmed-mean, at least 1, and with no other; "
                f"got kind={self.kind!r} and attackers={self.attackers}"
            )
        if self.kind != "norm-bounding" and changed(self, "norm_factor"):
            raise ValueError(f"defence.norm_factor goes with norm-bounding and with no other; got kind={self.kind!r}")
        if (self.kind == "fltrust") != bool(self.trusted_data):
            raise ValueError(
                "defence.trusted_data goes with fltrust and with no other; "
                f"got kind={self.kind!r} and trusted_data={self.trusted_data!r}"
            )
        return self
