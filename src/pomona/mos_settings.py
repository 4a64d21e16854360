"""How tasks are learned one after another: frozen, closed, checked before the first byte is read. Imports no torch."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pomona.aggregation_settings import Section, changed

Moments = Literal["full", "diagonal"]
HeadKind = Literal["combined", "gaussian", "aligned", "ridge", "ridge-own"]


class LoopSettings(Section):
    """How long and how fast an adapter and its head are trained.

    Attributes:
        epochs: Passes over the task's examples, at least.
        min_steps: Optimiser steps, at least: few examples are passed more often.
        max_steps: Optimiser steps, at most.
        batch_size: Examples for a step.
        learning_rate: Of the adapter, at first; falls to 0 along a cosine.
        head_learning_rate: Of the head.
        weight_decay: Pulls both to 0.
    """

    epochs: PositiveInt = 4
    min_steps: NonNegativeInt = 60
    max_steps: PositiveInt = 1000
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 5e-3
    head_learning_rate: PositiveFloat = 1e-2
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def steps(self, examples: int) -> int:
        """Return how many optimiser steps so many examples are trained for."""
        return min(max(self.epochs * math.ceil(examples / self.batch_size), self.min_steps), self.max_steps)


class AlignmentSettings(Section):
    """How a head is aligned.

    Attributes:
        epochs: Passes, each over features of its own.
        samples_per_class: Features drawn of each class for a pass.
        batch_size: Features for an optimiser step.
        learning_rate: At first; it falls to 0 along a cosine.
        momentum: Of the steps.
        weight_decay: Pulls weights to 0.
    """

    epochs: PositiveInt = 10
    samples_per_class: PositiveInt = 64
    batch_size: PositiveInt = 128
    learning_rate: PositiveFloat = 0.03
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 5e-4


class MosSettings(Section):
    """Settings of a stream; all of its tasks have the same.

    Attributes:
        seed: Of everything that is drawn.
        adapted_blocks: Upper blocks of the encoder that adapters may change.
        rank: Of a task's adapter.
        alpha: The update is ``alpha / rank B A``.
        start: ``warm``: a task starts from the adapter before it. ``fresh``: from no change.
        merge_weight: ``alpha`` of the merge towards the mean of earlier adapters after every step; 0: none.
        training: Of the adapters.
        moments: What is kept of a class beside its mean: all of its covariance, or the variances.
        head: What answers. ``aligned``: as the paper, a linear head aligned by replay under a retrieved adapter, and
            prototypes. ``gaussian``: the classes' normal distributions under the first adapter, exact. ``combined``:
            those choose tasks, and each task's own adapter and head tell its classes apart. ``ridge``: RanPAC's
            head under the first adapter, exact; ``ridge-own``: under the tasks' own adapters.
        alignment: Of the linear head.
        refinement_steps: Passes of self-refined retrieval, at most, for ``aligned``.
        ensemble: Whether prototypes under the first adapter have a say, for ``aligned``.
        regularized_replay: Whether features to align with are drawn with covariances drawn to that of all classes, as
            the ``gaussian`` head has them, rather than with each class's own, as the paper does.
        replay_directions: With ``regularized_replay = false``: leading directions of a class's covariance that features
            to align with are drawn along, the rest as variances (low-rank plus diagonal); None: all of it.
        prior: Examples that the covariance within all classes counts for in that of a class, as a multiple of the
            width of features.
        sphere_examples: Examples of each class with which a sphere is half of the covariance within all classes; its
            share falls with their square.
        experts: Adapters that an example goes through, at most, for ``combined``.
        expert_weight: Weight of a task's own head, for ``combined``.
        temperature: What log densities are divided by, for ``combined``: of many dimensions they are too sure.
        ridge_dimensions: Random features of a ridge head.
        official_compat: Do what the published code does rather than what the paper says: stored adapters are merged
            again, and overwritten, whenever they are used. For comparison only.
    """

    seed: int = 0
    adapted_blocks: PositiveInt = 2
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    start: Literal["warm", "fresh"] = "warm"
    merge_weight: Annotated[float, Field(ge=0, lt=1)] = 0.1
    training: LoopSettings = LoopSettings()
    moments: Moments = "full"
    head: HeadKind = "combined"
    alignment: AlignmentSettings = AlignmentSettings()
    refinement_steps: Annotated[int, Field(ge=1, le=4)] = 4
    ensemble: bool = True
    regularized_replay: bool = True
    replay_directions: PositiveInt | None = None
    prior: PositiveFloat = 3.0
    sphere_examples: NonNegativeFloat = 10.0
    experts: PositiveInt = 3
    expert_weight: NonNegativeFloat = 0.5
    temperature: PositiveFloat = 2.0
    ridge_dimensions: Annotated[int, Field(ge=1, le=20_000)] = 1000
    official_compat: bool = False

    @model_validator(mode="after")
    def _compat_is_of_the_paper(self) -> Self:
        if self.official_compat and (self.head != "aligned" or not self.merge_weight):
            raise ValueError("official_compat is of head='aligned' with merge_weight above 0; set these too")
        if self.replay_directions is not None and (
            self.head != "aligned" or self.regularized_replay or self.moments != "full"
        ):
            raise ValueError(
                "replay_directions would change nothing here; it is of head='aligned' with regularized_replay=false "
                "and moments='full'"
            )
        if self.head != "combined" and (given := [n for n in ("experts", "expert_weight") if changed(self, n)]):
            raise ValueError(f"{', '.join(given)} would change nothing with head={self.head!r}; leave out")
        return self

    @property
    def keeps_ridge_sums(self) -> bool:
        """Whether the head needs sums of random features."""
        return self.head in ("ridge", "ridge-own")


class StreamSettings(Section):
    """Tasks that are learned one after another, each by rounds of its own.

    Attributes:
        tasks: The classes of each task, in the order in which they are learned.
        classes_per_task: Instead of ``tasks``: so many of the classes of ``data`` a task, in an order drawn by the seed
            of the run.
        rounds_per_task: Rounds of training of each task's adapter; one more then sums up its features.
        mos: How tasks are learned and answered; its seed is that of the run.
    """

    tasks: tuple[Annotated[tuple[str, ...], Field(min_length=1)], ...] = ()
    classes_per_task: PositiveInt | None = None
    rounds_per_task: PositiveInt = 3
    mos: MosSettings = MosSettings()

    def rounds_of(self, classes: int) -> int:
        """Return how many rounds train a task of so many classes: a single one has nothing to be told apart from."""
        return self.rounds_per_task if classes > 1 else 0

    @property
    def exchanges(self) -> int:
        """How often the clients of the tasks that are named are asked: each task's rounds, and once for its sums."""
        return sum(self.rounds_of(len(classes)) + 1 for classes in self.tasks)

    @model_validator(mode="after")
    def _tasks_are_known(self) -> Self:
        if bool(self.tasks) == (self.classes_per_task is not None):
            raise ValueError(
                "give continual.tasks or continual.classes_per_task, and not both, to say what is learned together"
            )
        classes = [label for task in self.tasks for label in task]
        if twice := sorted({label for label in classes if classes.count(label) > 1}):
            raise ValueError(f"class {twice[0]!r} is twice in continual.tasks; a class is learned once")
        if changed(self.mos, "seed"):
            raise ValueError("continual.mos.seed: leave it out, the seed of the run is that of everything")
        if self.mos.official_compat:
            raise ValueError(
                "continual.mos.official_compat overwrites stored adapters, which clients do not have; it is for "
                "`pomona learn`"
            )
        return self
