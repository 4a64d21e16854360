"""How classes are forgotten on request: frozen, closed, checked before the first byte is read. Imports no torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from pomona.aggregation_settings import Fraction, Section


class EditSettings(Section):
    """How an edit is trained, whatever its loss.

    Attributes:
        rank: Rank of the fresh adapter.
        steps: Optimiser steps. Too few forget too little.
        batch_size: Retained examples in a step.
        forget_batch_size: Examples of the forgotten classes in a step.
        learning_rate: Of Adam at the first step; it falls along a cosine.
    """

    rank: Annotated[int, Field(ge=1, le=256)] = 8
    steps: Annotated[int, Field(ge=1, le=100_000)] = 120
    batch_size: PositiveInt = 24
    forget_batch_size: PositiveInt = 8
    learning_rate: PositiveFloat = 5e-3


class ForgetSettings(EditSettings):
    """How classes are forgotten.

    Attributes:
        beta: Weight of the bounded forgetting loss.
        margin: Of the bound above ``ln K``, in nats.
        retention: What retained examples are held to. ``answers``: what the classifier said of them before the edit,
            without the classes to forget. ``labels``: their classes, as in the paper.
        hinge: Whether the bound holds for every example, or for the mean of a batch as in the paper, where some
            examples may pay for others.
        sparsity: ``lambda`` of the proximal step; 0: none.
        warm_up: Share of the steps before the first proximal one, so that a block is judged by what it learned.
        push: ``w_f``; 0: GS-LoRA.
        pull: ``w_r``; 0: GS-LoRA.
        push_bound: ``bound_D`` as a share of the divergence between examples and the prototypes of other classes.
    """

    beta: NonNegativeFloat = 0.3
    margin: NonNegativeFloat = 3.0
    retention: Literal["answers", "labels"] = "answers"
    hinge: Literal["example", "batch"] = "example"
    sparsity: NonNegativeFloat = 0.3
    warm_up: Annotated[float, Field(ge=0, le=1)] = 0.2
    push: NonNegativeFloat = 0.0
    pull: NonNegativeFloat = 0.0
    push_bound: Fraction = 1.0


class RequestSettings(Section):
    """A request to forget that clients meet together, each on its own rows.

    Attributes:
        classes: To forget; all others are kept.
        settings: Of forgetting; ``push`` and ``pull`` stay 0, since no client has the prototypes of all rows.
    """

    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    settings: ForgetSettings = ForgetSettings()

    @model_validator(mode="after")
    def _can_be_shared(self) -> Self:
        if twice := sorted({label for label in self.classes if self.classes.count(label) > 1}):
            raise ValueError(f"class {twice[0]!r} is twice in forget.classes; name it once")
        if self.settings.push or self.settings.pull:
            raise ValueError(
                "forget.settings.push and pull are of GS-LoRA++, which needs prototypes of all examples, and those of "
                "clients are not at one place; set both to 0"
            )
        return self
