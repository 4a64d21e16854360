"""What a client does when it is asked: enrol, and train for one round. Knows no network.

Requests come as JSON and bytes from a coordinator that the client need not trust; answers go back the same way. What
the client cannot do it says in a :class:`~pomona.protocol.Refusal`, never with an exception that ends it.
"""

import logging
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from pydantic import ValidationError

from pomona import __version__, protocol
from pomona.adapters import AdapterUpdate, AdapterWeights
from pomona.base_model import check_base_model, find_base_model, is_packaged
from pomona.batches import Encoded
from pomona.client.capacity import Budget, choose_rank
from pomona.client.forget_work import ForgetWork
from pomona.client.required_privacy import RequiredPrivacy, accept, pay
from pomona.client.secure_rounds import SecureRounds
from pomona.client.task_work import TaskWork
from pomona.client.train import Trained, train_locally
from pomona.datasets import Dataset, check_labels
from pomona.errors import BaseModelError, ConfigError, DataError, PayloadError, PomonaError
from pomona.logs import bind
from pomona.lora_model import AdaptedModel
from pomona.privacy.secure_sum.records import Roster, UnmaskRequest
from pomona.privacy.secure_sum.requests import MaskRequest, SumRequest
from pomona.protocol import (
    EDIT,
    ENROL,
    SUMS,
    TASK,
    TELL,
    TRAIN,
    EditRequest,
    Enrolled,
    Exclusion,
    Invitation,
    TaskSums,
    TaskTraining,
    TrainRequest,
    refusal,
)
from pomona.seeds import fresh_a, seed_of
from pomona.wire import Factor, decode_weights, encode_update

_log = logging.getLogger(__name__)

Answer = tuple[str, str, bytes]

_MOST = 5  # classes that a message names
_UNSAID = "this client's data cannot be used; its own log says why"


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Who a client is.

    Attributes:
        name: Its name.
        rank: LoRA rank that it trains; None: as large as its machine can carry, measured when it is invited.
        budget: What it may spend, where the rank is measured.
        load_data: Loads its training set, for the task given.
        model_folder: Where its copy of the base model lies; empty: only base models that ship in a package.
        required_privacy: What it insists on, whatever it is asked; None: it trains as it is asked.
    """

    name: str
    rank: int | None
    load_data: Callable[[str], Dataset]
    budget: Budget = field(default_factory=Budget)
    model_folder: str = ""
    required_privacy: RequiredPrivacy | None = None


class Trainer:
    """Answers requests; keeps the model and the tokenised data of the last run in memory."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._model: tuple[Invitation, AdaptedModel] | None = None
        self._data: tuple[Invitation, Encoded] | None = None
        self._measured: tuple[Invitation, int] | None = None
        self._sums = SecureRounds()
        self._tasks: tuple[Invitation, TaskWork | ForgetWork] | None = None

    def become(self, profile: Profile) -> None:
        """Answer for another client from now on; the model stays, the data go."""
        if profile.name != self._profile.name:
            self._data = self._measured = self._tasks = None
            self._sums = SecureRounds()
        self._profile = profile

    def answer(self, kind: str, json: str, payload: bytes) -> Answer:
        """Answer one request.

        Args:
            kind: Type of message: to enrol, to train, to work on a task, or a stage of a secure sum.
            json: The record.
            payload: The global adapter, where one is trained on.

        Returns:
            Name of the answer's record class, its JSON, and the update's bytes.
        """
        try:
            if kind == ENROL:
                return self._enrol(Invitation.model_validate_json(json))
            if kind == TRAIN:
                request = TrainRequest.model_validate_json(json)
                bind(client=self._profile.name, run_id=request.invitation.run_id, round=request.round_number)
                return self._train(request, payload)
            if kind == TELL:
                return self._told(Exclusion.model_validate_json(json))
            work = {TASK: self._task, SUMS: self._task, EDIT: self._edit}.get(kind, self._summed)
            return work(kind, json, payload)
        except ValidationError as error:
            reason = f"the coordinator's request is malformed: {error.errors(include_url=False)[0]['msg']}"
            return self._refuse(reason)
        except PomonaError as error:
            return self._refuse(str(error), quotes_data=isinstance(error, DataError))

    def _task(self, kind: str, json: str, payload: bytes) -> Answer:
        """Train a round of a task, or sum its features."""
        request = TaskTraining.model_validate_json(json) if kind == TASK else TaskSums.model_validate_json(json)
        bind(client=self._profile.name, run_id=request.invitation.run_id, round=request.task_number)
        work = self._task_work(request.invitation)
        if not isinstance(work, TaskWork):
            raise PayloadError("expected a stage of the request to forget, as the run says, got a task to learn")
        return work.train(request, payload) if isinstance(request, TaskTraining) else work.sums(request, payload)

    def _edit(self, _kind: str, json: str, payload: bytes) -> Answer:
        """Do a client's part in a request to forget."""
        request = EditRequest.model_validate_json(json)
        bind(client=self._profile.name, run_id=request.invitation.run_id, round=request.attempt)
        work = self._task_work(request.invitation)
        if not isinstance(work, ForgetWork):
            raise PayloadError("expected work on a task, as the run says, got a request to forget")
        return work.answer(request, payload)

    def _summed(self, kind: str, json: str, payload: bytes) -> Answer:
        """Answer a stage of a secure sum."""
        match kind:
            case protocol.ADVERTISE:
                request = SumRequest.model_validate_json(json)
                bind(client=self._profile.name, run_id=request.invitation.run_id, round=request.round_number)
                model, _ = self._prepare(request.invitation)
                keys = self._sums.advertise(self._profile.name, request, model.manifest)
                return "keys", keys.model_dump_json(), b""
            case protocol.SHARE:
                return "shares", self._sums.share_keys(Roster.model_validate_json(json)).model_dump_json(), b""
            case protocol.MASK:
                return self._mask(MaskRequest.model_validate_json(json), payload)
            case protocol.UNMASK:
                return "unmasking", self._sums.unmask(UnmaskRequest.model_validate_json(json)).model_dump_json(), b""
        raise PayloadError(f"expected a request to {ENROL}, {TRAIN} or take part in a secure sum, got {kind!r}")

    def _mask(self, request: MaskRequest, payload: bytes) -> Answer:
        """Train, and return what comes of it behind masks; nothing else of it leaves this process."""
        work = request.train
        self._sums.check_work(work)
        model, data = self._prepare(work.invitation)
        try:
            trained = self._trained(work, payload, model, data)
        except ConfigError as error:
            _log.error("%s: round %d: %s; it counts as no change", self._profile.name, work.round_number, error)
            trained = None
        record, words = self._sums.masked_input(request, trained)
        return "masked", record.model_dump_json(), words

    def _refuse(self, reason: str, *, quotes_data: bool = False) -> Answer:
        _log.error("%s: %s", self._profile.name, reason)
        told = _UNSAID if quotes_data and self._profile.required_privacy else reason
        return "refusal", refusal(self._profile.name, told).model_dump_json(), b""

    def _told(self, exclusion: Exclusion) -> Answer:
        name, run_id, number = self._profile.name, exclusion.run_id, exclusion.round_number
        if number is None:
            _log.error("%s takes no part in run %s: %s", name, run_id, exclusion.reason)
        else:
            _log.warning(
                "%s: its update of round %d of run %s does not count: %s", name, number, run_id, exclusion.reason
            )
        return "told", "{}", b""

    def _enrol(self, invitation: Invitation) -> Answer:
        rank, examples, base_sha256 = self._stated(invitation)
        answer = Enrolled(
            name=self._profile.name,
            rank=rank,
            num_examples=1 if invitation.private else examples,
            base_sha256=base_sha256,
            pomona_version=__version__,
        )
        _log.info(
            "%s: enrolled in run %s with rank %d and %d examples",
            answer.name,
            invitation.run_id,
            answer.rank,
            examples,
        )
        return "enrolled", answer.model_dump_json(), b""

    def _stated(self, invitation: Invitation) -> tuple[int, int, str]:
        """Return what the client says of itself: its rank, its number of examples and the hash of its base model."""
        if invitation.continual is not None:
            work = self._task_work(invitation)
            return invitation.continual.rank, len(work), work.base_sha256
        model, data = self._prepare(invitation)
        return self._rank(invitation, model, data), len(data), model.manifest.base_sha256

    def _train(self, request: TrainRequest, payload: bytes) -> Answer:
        model, data = self._prepare(request.invitation)
        if request.invitation.secure_sum is not None:
            raise PayloadError("expected the stages of a secure sum, as the run promises, got a request for an update")
        trained = self._trained(request, payload, model, data)
        run_id, number, private = request.invitation.run_id, request.round_number, request.invitation.private
        update = AdapterUpdate(
            client=self._profile.name,
            run_id=run_id,
            round_number=number,
            parent=request.parent,
            base_sha256=model.manifest.base_sha256,
            rank=request.rank,
            alpha=request.training.alpha_of(request.rank),
            rslora=request.training.rslora,
            num_examples=1 if private else len(data),
            nonce=secrets.token_hex(16),
            weights=trained.weights,
            train_loss=0.0 if private else trained.loss,
        )
        untrained: Factor | None = {"both": None, "a": "b", "b": "a"}[request.trains]
        return "update", "{}", encode_update(update, without=untrained)

    def _trained(self, request: TrainRequest, payload: bytes, model: AdaptedModel, data: Encoded) -> Trained:
        if request.rank > (largest := self._largest_rank(request.invitation)):
            raise PayloadError(f"asked to train rank {request.rank}, this client takes at most {largest}")
        name, number, invitation = self._profile.name, request.round_number, request.invitation
        start = _start(request, payload, model)
        if self._profile.required_privacy is not None:
            pay(self._profile.required_privacy, invitation, round_number=number)
        trained = train_locally(
            model,
            data,
            start=start,
            rank=request.rank,
            training=request.training,
            adapter_seed=request.adapter_seed,
            batch_seed=seed_of(request.seed, number, name),
            trainable=request.trainable,
            trains=request.trains,
            initial=request.initial,
            tail=(request.tail_from, request.tail_penalty),
            example_privacy=invitation.example_privacy,
            local_privacy=invitation.local_privacy,
        )
        _log.info("%s: round %d, %d steps, training loss %.3f", name, number, trained.steps, trained.loss)
        return trained

    def _largest_rank(self, invitation: Invitation) -> int:
        """Return the rank it enrolled with, as far as it knows: one that was measured is forgotten by a restart."""
        if self._profile.rank is not None:
            return self._profile.rank
        return self._measured[1] if self._measured and self._measured[0] == invitation else invitation.max_rank

    def _rank(self, invitation: Invitation, model: AdaptedModel, data: Encoded) -> int:
        """Return the client's rank; measured once per run where it is not given."""
        if self._profile.rank is not None:
            return self._profile.rank
        if invitation.private and self._profile.budget.round_s is not None:
            raise ConfigError(
                "this run is private, and a rank that fits the time of a round would tell how many examples are here; "
                "join without --round-s, or give --rank"
            )
        if self._measured is None or self._measured[0] != invitation:
            choice = choose_rank(
                model,
                data,
                training=invitation.training,
                min_rank=invitation.min_rank,
                max_rank=invitation.max_rank,
                budget=self._profile.budget,
            )
            _log.info("%s: chose rank %d: %s", self._profile.name, choice.rank, choice.reason)
            self._measured = invitation, choice.rank
        return self._measured[1]

    def _prepare(self, invitation: Invitation) -> tuple[AdaptedModel, Encoded]:
        """Return the model and the client's data; loaded once per run.

        Raises:
            ConfigError: The coordinator runs another version, or refuses the client's rank.
            BaseModelError: The base model is not here, or is another one.
            DataError: The data are malformed or carry a label that the run does not know.
            PrivacyNotPromised: The client insists on privacy, and the run promises another, or none.
            PrivacyBudgetExhausted: The run would cost the client more than it allows.
            PrivacyLedgerError: It is not known what the client has spent.
        """
        if self._profile.required_privacy is not None:
            accept(self._profile.required_privacy, invitation)
        self._sums.hold(invitation)
        if self._data is None or self._data[0] != invitation:
            dataset = _checked_data(invitation, self._profile)
            model = self._load_model(invitation)
            encoded = model.encode(dataset.texts, dataset.labels, max_length=invitation.max_length)
            self._data = invitation, encoded
        return self._load_model(invitation), self._data[1]

    def _task_work(self, invitation: Invitation) -> TaskWork | ForgetWork:
        """Return the encoder and the client's data, for a run that learns or forgets classes; loaded once per run.

        Raises:
            As :meth:`_prepare`.
        """
        if self._profile.required_privacy is not None:
            accept(self._profile.required_privacy, invitation)
        if self._tasks is None or self._tasks[0] != invitation:
            dataset = _checked_data(invitation, self._profile)
            self._model = self._data = self._tasks = None  # let go of what another run needed
            path = find_base_model(_base(invitation, self._profile))
            check_base_model(path, expected_sha256=invitation.base_sha256)
            if not len(dataset) and not invitation.private:  # whether a client takes part must not tell what it has
                raise DataError(f"{dataset.source} has no examples of the run's classes: {_listed(invitation.labels)}")
            work = TaskWork if invitation.forget is None else ForgetWork
            self._tasks = invitation, work(self._profile.name, invitation, path, dataset)
        return self._tasks[1]

    def _load_model(self, invitation: Invitation) -> AdaptedModel:
        if self._model is None or self._model[0] != invitation:
            self._model = None  # let go of the old model before the next one is loaded
            path = find_base_model(_base(invitation, self._profile))
            check_base_model(path, expected_sha256=invitation.base_sha256)
            model = AdaptedModel(
                path, task=invitation.task, labels=invitation.labels, target_modules=invitation.target_modules
            )
            self._model = invitation, model
        return self._model[1]


def _start(request: TrainRequest, payload: bytes, model: AdaptedModel) -> AdapterWeights:
    if not request.draws_a:
        return decode_weights(payload)[0]
    known = {
        name: fresh_a(name, request.training.layer_rank(name, request.trainable), in_, seed=request.adapter_seed)
        for name, (_, in_) in model.manifest.layers.items()
    }
    return decode_weights(payload, known=known, known_factor="a")[0]


def _checked_data(invitation: Invitation, profile: Profile) -> Dataset:
    if invitation.pomona_version != __version__:
        raise ConfigError(
            f"the coordinator runs pomona {invitation.pomona_version}, this client {__version__}; install the same"
        )
    if profile.rank is not None and profile.rank > invitation.max_rank and invitation.continual is None:
        raise ConfigError(
            f"expected a rank of at most max_rank={invitation.max_rank}, got {profile.rank}; join with a lower --rank"
        )
    if profile.rank is not None and profile.rank < invitation.min_rank:
        raise ConfigError(
            f"all clients of this run train rank {invitation.min_rank}, got {profile.rank}; join with a higher --rank, "
            "or choose a strategy of unequal ranks"
        )
    dataset = profile.load_data(invitation.task)
    if invitation.task == "classification":
        if profile.required_privacy is not None or invitation.continual is not None:
            dataset = _known_only(dataset, invitation.labels)
        check_labels(dataset, invitation.labels)
    return dataset


def _known_only(dataset: Dataset, labels: Collection[str]) -> Dataset:
    """Leave out examples of labels that a run does not know.

    A refusal would tell that there are such: by invitations of few labels, a coordinator would learn who is there. And
    where tasks come one after another, those of other runs are in the same data.
    """
    known = dataset.subset(i for i, label in enumerate(dataset.labels) if label in labels)
    if len(known) < len(dataset):
        _log.warning("%d examples have labels that the run does not know, and are left out", len(dataset) - len(known))
    return known


def _base(invitation: Invitation, profile: Profile) -> str:
    if profile.model_folder:
        return profile.model_folder
    if not is_packaged(invitation.base):
        raise BaseModelError(
            f"the run's base model (sha256 {invitation.base_sha256[:12]}) ships in no package; "
            "join with --model FOLDER that holds it"
        )
    return invitation.base


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(map(repr, names[:_MOST])) + more
