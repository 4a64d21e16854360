"""What coordinator and clients say to each other, as closed records of plain JSON. Imports no torch, no flwr.

Every message carries one of these records and, where tensors travel, one payload (:mod:`pomona.wire`).
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, model_validator

from pomona.forget_settings import ForgetSettings
from pomona.mos_settings import MosSettings
from pomona.settings import Sha256, TrainingSettings

ClientName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]

RunId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,100}$")]
Reference = Annotated[str, Field(pattern=r"^[A-Za-z0-9._/@-]{0,200}$")]
Rank = Annotated[int, Field(ge=1, le=4096)]

Trains = Literal["both", "a", "b"]
Initial = Literal["uniform", "orthonormal"]
SumMechanism = Literal["dp-lora", "dp-dylora", "ffa", "ffa-nested"]

ENROL = "query"
TRAIN = "train"
TASK = "train.task"
SUMS = "query.sums"
EDIT = "train.edit"
TELL = "query.tell"
ADVERTISE = "query.advertise"
SHARE = "query.share"
MASK = "query.mask"
UNMASK = "query.unmask"
_MAX_ERROR_CHARS = 500


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class SecureSumPrivacy(_Record):
    """What clients are promised that send nothing but masked vectors, the same in all rounds of a run.

    The terms of each sum follow from it (:func:`pomona.privacy.secure_sum.requests.terms_of`), on both sides, so that
    a round can ask for nothing weaker.

    Attributes:
        mechanism: What is summed, as in the plan.
        clients: So many are asked, at most.
        threshold: So many together can unmask a sum.
        least_survivors: So many are in a sum, or nothing is released.
        colluding: So many may tell the coordinator all they know.
        clip: Bound on the norm of what one client contributes.
        noise_multiplier: What the account counts on: standard deviation of the noise over ``clip``, at least.
        fraction_bits: Of the grid that vectors are rounded to.
        sums: So many are asked for in the run, whatever comes of them; each costs a client some of its privacy.
    """

    mechanism: SumMechanism
    clients: Annotated[int, Field(ge=1, le=2**31)]
    threshold: Annotated[int, Field(ge=1, le=2**31)]
    least_survivors: Annotated[int, Field(ge=1, le=2**31)]
    colluding: Annotated[int, Field(ge=0, le=2**31)]
    clip: PositiveFloat
    noise_multiplier: PositiveFloat
    fraction_bits: Annotated[int, Field(ge=0, le=52)]
    sums: Annotated[int, Field(ge=1, le=2**31)]


class ExamplePrivacy(_Record):
    """How a client trains so that none of its examples can be told from what it sends.

    The same for all clients and in all rounds of a run, and public.

    Attributes:
        noise_multiplier: ``sigma``: standard deviation of the noise on a step's sum of gradients, over ``clip``.
        clip: Bound on the norm of one example's gradient, over all trained parameters.
        sample_rate: Probability with which each example is in a step.
        steps: Optimiser steps of a round, whatever the number of examples.
        rounds: So many updates are asked for in the run, whatever comes of them; each costs a client some of its
            privacy.
    """

    noise_multiplier: PositiveFloat
    clip: PositiveFloat
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    steps: Annotated[int, Field(ge=1, le=2**31)]
    rounds: Annotated[int, Field(ge=1, le=2**31)] = 1


class LocalPrivacy(_Record):
    """How a client hides all that it has from everybody, the coordinator too; the same in all rounds of a run.

    Attributes:
        noise_multiplier: ``sigma``: standard deviation of its noise over ``2 clip``, how far two updates may be apart.
        clip: Bound on how far all trained parameters together may move in a round.
        rounds: So many updates are asked for in the run, whatever comes of them.
    """

    noise_multiplier: PositiveFloat
    clip: PositiveFloat
    rounds: Annotated[int, Field(ge=1, le=2**31)] = 1


class ForgetTerms(_Record):
    """What a run asks clients to forget together.

    Attributes:
        classes: To forget.
        settings: Of forgetting, the same for all.
        seed: Of the first factors, of the order of rows, and of which rows are held out.
    """

    classes: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    settings: ForgetSettings
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)]


class Invitation(_Record):
    """What a client must know before it can say whether it takes part.

    Attributes:
        run_id: The run.
        pomona_version: Version of the coordinator's package.
        task: What is trained.
        base: Name of the base model where it ships in a package, else empty: the client says where it lies.
        base_sha256: Hash of the base model's weights.
        target_modules: As in the run's settings.
        max_length: Longer texts are cut, in tokens.
        labels: The classes, in order; empty for causal language models.
        max_rank: The largest rank that is accepted.
        min_rank: The smallest: what all clients train, where a strategy needs equal ranks.
        training: What a round takes, for clients that choose their rank by it.
        private: The run promises privacy, of whatever unit: a client states neither how many examples it has (it
            says 1) nor its training loss (it says 0).
        example_privacy: The client trains so that it hides its examples, on these terms; None: it does not.
        local_privacy: It noises what it trained before it is sent; None: it does not.
        secure_sum: The client sends no update, but takes part in secure sums on these terms; None: in none.
        continual: The run learns task after task on these terms, and asks by :class:`TaskTraining` and
            :class:`TaskSums`; ``labels`` are in learning order. None: it does not.
        forget: The run forgets classes of what was learned as ``continual`` says, and asks by :class:`EditRequest`;
            ``labels`` are what is known and what was forgotten before. None: it does not.
    """

    run_id: RunId
    pomona_version: Annotated[str, Field(max_length=50)]
    task: Literal["classification", "causal-lm"]
    base: str
    base_sha256: Sha256
    target_modules: Annotated[tuple[str, ...], Field(strict=False)] = ()
    max_length: Annotated[int, Field(ge=1, le=8192)]
    labels: Annotated[tuple[str, ...], Field(strict=False)] = ()
    max_rank: Rank
    min_rank: Rank = 1
    training: TrainingSettings = TrainingSettings()
    private: bool = False
    example_privacy: ExamplePrivacy | None = None
    local_privacy: LocalPrivacy | None = None
    secure_sum: SecureSumPrivacy | None = None
    continual: MosSettings | None = None
    forget: ForgetTerms | None = None

    @model_validator(mode="after")
    def _promises_one_thing(self) -> Self:
        terms = {name: getattr(self, name) for name in ("example_privacy", "local_privacy", "secure_sum")}
        given = [name for name, value in terms.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"expected one promise in an invitation, got {' and '.join(given)}")
        if given and not self.private:
            raise ValueError(
                f"expected an invitation with private=true beside {given[0]}, got private=false: the number of "
                "examples and the loss would be sent without noise"
            )
        if self.continual is not None and (given or self.task != "classification"):
            raise ValueError(
                "expected a run that learns task after task to classify and to promise nothing that clients would have "
                f"to add noise for, got task={self.task!r} and {given[0] if given else 'nothing'}"
            )
        if self.forget is not None and (self.continual is None or self.private):
            raise ValueError("expected a request to forget with how classes were learned, and without privacy")
        return self


class TrainRequest(_Record):
    """One round's work for one client; the payload is the global adapter.

    It states no terms of privacy: those of the invitation hold, so a round can ask for nothing weaker than its run.

    Attributes:
        invitation: Repeated, so that a client that restarted can go on.
        round_number: From 1.
        parent: Reference of the global version in the payload, empty in the first round.
        seed: Seed of the run.
        training: How to train.
        rank: Of the adapter to train, at most what the client enrolled with.
        trainable: So many leading components of each layer of the global adapter are trained on.
        trains: The factors that are trained and sent back.
        adapter_seed: Of the fresh rows of A.
        initial: How they are drawn.
        draws_a: The payload has no A; that of the leading components is drawn from ``adapter_seed``.
        tail_from: The first component of the tail, whose norms the loss penalises.
        tail_penalty: Weight of that penalty; 0: none.
    """

    invitation: Invitation
    round_number: Annotated[int, Field(ge=1, le=2**31)]
    parent: Reference
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)]
    training: TrainingSettings
    rank: Rank
    trainable: Annotated[int, Field(ge=0, le=4096)] = 0
    trains: Trains = "both"
    adapter_seed: Annotated[int, Field(ge=0, le=2**63 - 1)]
    initial: Initial = "uniform"
    draws_a: bool = False
    tail_from: Annotated[int, Field(ge=0, le=4096)] = 0
    tail_penalty: NonNegativeFloat = 0.0


class _TaskRequest(_Record):
    """Work on one task of a run that learns task after task.

    Attributes:
        invitation: Repeated, so that a client that restarted can go on.
        task_number: Place of the task in the run, from 1.
        classes: Of the task, in order.
        parent: Reference of the version that is learned on, empty before the first task.
    """

    invitation: Invitation
    task_number: Annotated[int, Field(ge=1, le=2**31)]
    classes: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    parent: Reference


class TaskTraining(_TaskRequest):
    """One round of a task's training; the payload says where it starts.

    Attributes:
        round_number: Round of the task, from 1.
        seed_number: Place of the task in all that is known, from 1: the order of examples is drawn by it.
    """

    round_number: Annotated[int, Field(ge=1, le=2**31)]
    seed_number: Annotated[int, Field(ge=1, le=2**31)]


class TaskSums(_TaskRequest):
    """Sum features of a task's examples under the adapters in the payload.

    Attributes:
        trained_sha256: Names the task's adapter; goes back with the sums.
    """

    trained_sha256: Sha256


EditStage = Literal["begin", "step", "moves", "end"]


class EditRequest(_Record):
    """One exchange of a request to forget; what comes back depends on the stage.

    Attributes:
        invitation: Repeated, so that a client that restarted can say so.
        attempt: Of the run at the request, from 1; goes back in the place of a task's number.
        parent: Reference of the version that is edited.
        stage: ``begin``: the payload is what is known, and scores of it come back. ``step``: it is the factors after
            ``number`` steps, and gradients come back. ``moves``: it is those after the last step, and how features
            moved comes back. ``end``: it is what is known after the edit, and scores of it come back, with the
            classes and without.
        number: Steps that were taken.
    """

    invitation: Invitation
    attempt: Annotated[int, Field(ge=1, le=2**31)]
    parent: Reference
    stage: EditStage
    number: Annotated[int, Field(ge=0, le=2**31)]


class NoExamples(_Record):
    """A client's answer where it has no examples of a task, or of a request; it is left out of it.

    Attributes:
        name: The client's name.
        run_id: The run.
        task_number: The task, or the attempt at a request.
    """

    name: ClientName
    run_id: RunId
    task_number: Annotated[int, Field(ge=1, le=2**31)]


class Enrolled(_Record):
    """A client's answer to an invitation.

    Attributes:
        name: The client's name.
        rank: LoRA rank it trains.
        num_examples: Size of its training set.
        base_sha256: Hash of the base model it has.
        pomona_version: Version of its package.
    """

    name: ClientName
    rank: Rank
    num_examples: Annotated[int, Field(ge=1, le=2**63 - 1)]
    base_sha256: Sha256
    pomona_version: Annotated[str, Field(max_length=50)]


class Exclusion(_Record):
    """What a client is told when the coordinator does without it.

    Attributes:
        run_id: The run.
        round_number: The round whose update does not count; None: it takes no part in the run.
        reason: Why, and what to do.
    """

    run_id: RunId
    round_number: Annotated[int, Field(ge=1, le=2**31)] | None = None
    reason: Annotated[str, Field(max_length=_MAX_ERROR_CHARS)]


class Refusal(_Record):
    """A client's answer when it cannot do what it was asked.

    Attributes:
        name: The client's name, as far as it is known.
        error: What was expected, what came, what to do.
    """

    name: Annotated[str, Field(max_length=100)]
    error: Annotated[str, Field(max_length=_MAX_ERROR_CHARS)]


def refusal(name: str, error: object) -> Refusal:
    """Return a refusal, its text cut to what may travel."""
    return Refusal(name=name[:100], error=str(error)[:_MAX_ERROR_CHARS])
