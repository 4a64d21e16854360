"""A client's part in a request to forget that clients meet together, on rows that do not leave it.

A part of its rows, drawn by their text alone, is held out and scored before and after; the others give gradients and
sums of how far features moved. What is known of all classes comes at the beginning and stays in memory, so a client
that is started anew in the middle cannot go on.
"""

import logging
import math
import secrets
from dataclasses import dataclass
from pathlib import Path

import torch

from pomona.continual.edit_rounds import EditState, start_edit
from pomona.continual.editing import Examples
from pomona.continual.encoder import Adapter, FrozenEncoder, States
from pomona.continual.knowledge import Knowledge
from pomona.continual.moves_payload import encode_moves
from pomona.continual.request_known import decode_known
from pomona.continual.request_payload import RequestFacts, decode_edit, encode_gradients, encode_scores
from pomona.continual.requests import RequestOwner
from pomona.continual.scores import Scores, scores_of
from pomona.datasets import Dataset, split_of
from pomona.errors import BaseModelError, ConfigError, PayloadError
from pomona.protocol import EditRequest, ForgetTerms, Invitation, NoExamples

_log = logging.getLogger(__name__)

Answer = tuple[str, str, bytes]


@dataclass(frozen=True, slots=True)
class _Begun:
    """What a client works with from the beginning of an attempt on."""

    attempt: int
    owner: RequestOwner
    held_out: States
    labels: tuple[str, ...]
    like: Adapter


class ForgetWork:
    """One client's encoder, rows and place in one request."""

    def __init__(self, client: str, invitation: Invitation, path: Path, dataset: Dataset) -> None:
        """Load the encoder.

        Raises:
            ConfigError: The run forgets nothing.
            BaseModelError: It is no encoder for texts, or has fewer blocks.
        """
        if invitation.continual is None or invitation.forget is None:
            raise ConfigError("expected a run that forgets classes, got another; a bug of the coordinator's")
        self._client, self._invitation = client, invitation
        self._terms: ForgetTerms = invitation.forget
        self._encoder = FrozenEncoder(path, adapted_blocks=invitation.continual.adapted_blocks)
        if self._encoder.takes_images:
            raise BaseModelError("expected a text encoder, got a base model for images")
        self._dataset = dataset
        self._begun: _Begun | None = None

    @property
    def base_sha256(self) -> str:
        """Hash of the base model's weights."""
        return self._encoder.manifest.base_sha256

    def __len__(self) -> int:
        return len(self._dataset)

    def answer(self, request: EditRequest, payload: bytes) -> Answer:
        """Do what a stage of the request asks for.

        Raises:
            PayloadError: The payload is not of that stage, or the client was not there at the beginning.
            DataError: A class to forget is not known, or all would go.
            ConfigError: The loss became NaN or infinite.
        """
        if request.stage == "begin":
            return self._begin(request, payload)
        begun = self._begun
        if begun is None or begun.attempt != request.attempt:
            raise PayloadError("this client was started after the request had begun, and does not know what is edited")
        if request.stage == "end":
            edited = self._known(payload)
            left = edited.without([label for label in self._terms.classes if label in edited.classes])
            return self._scored(request, begun, edited, left)
        state = self._state(request, payload, begun)
        facts = self._facts(request)
        if request.stage == "moves":
            return "moves", "{}", encode_moves(begun.owner.moves(state), facts)
        share = begun.owner.gradients(state)
        for each in (share.retained, share.forgotten):
            if each is not None and not math.isfinite(each.loss):
                raise ConfigError(
                    f"forgetting diverged at step {state.number}, its loss is {each.loss}; the run needs a lower "
                    "learning_rate"
                )
        return "gradients", "{}", encode_gradients(share, facts)

    def _begin(self, request: EditRequest, payload: bytes) -> Answer:
        """Take what is known, and score it by the rows that are held out."""
        known, self._begun = self._known(payload), None
        rows = list(enumerate(zip(self._dataset.texts, self._dataset.labels, strict=True)))
        out = [i for i, (text, _) in rows if split_of(text, seed=self._terms.seed) == "test"]
        kept = set(range(len(rows))) - set(out)
        mine = self._dataset.subset([i for i, (_, label) in rows if i in kept and label in known.classes])
        if not len(mine):
            return self._nothing(request)
        held_out, length = self._dataset.subset(out), self._invitation.max_length
        targets = torch.tensor([known.classes.index(label) for label in mine.labels])
        owner = RequestOwner(
            self._encoder,
            known,
            Examples(self._encoder.of_texts(mine.texts, max_length=length), targets),
            self._terms.classes,
            settings=self._terms.settings,
            seed=self._terms.seed,
        )
        like = start_edit(self._encoder, rank=self._terms.settings.rank, seed=self._terms.seed).adapter
        states = self._encoder.of_texts(held_out.texts, max_length=length) if len(held_out) else States(())
        begun = _Begun(request.attempt, owner, states, held_out.labels, like)
        self._begun = begun
        _log.info("%s: %d rows to forget and to keep, %d held out", self._client, len(mine), len(held_out))
        return self._scored(request, begun, known)

    def _known(self, payload: bytes) -> Knowledge:
        labels = self._invitation.labels
        return decode_known(payload, self._encoder.manifest, width=self._encoder.width, classes=labels)

    def _state(self, request: EditRequest, payload: bytes, begun: _Begun) -> EditState:
        steps = self._terms.settings.steps
        if request.stage == "step" and request.number >= steps:
            raise PayloadError(f"expected one of {steps} steps, got step {request.number}")
        return EditState(request.number, decode_edit(payload, begun.like), {}, {})

    def _scored(self, request: EditRequest, begun: _Begun, *known: Knowledge) -> Answer:
        found = [self._scores(each, begun) for each in known]
        return "scores", "{}", encode_scores(found, self._invitation.labels, self._facts(request))

    def _scores(self, known: Knowledge, begun: _Begun) -> Scores:
        return scores_of(self._encoder, known, begun.held_out, begun.labels) if begun.labels else Scores({}, {})

    def _nothing(self, request: EditRequest) -> Answer:
        told = NoExamples(name=self._client, run_id=self._invitation.run_id, task_number=request.attempt)
        return "nothing", told.model_dump_json(), b""

    def _facts(self, request: EditRequest) -> RequestFacts:
        return RequestFacts(
            client=self._client,
            parent=request.parent,
            base_sha256=self.base_sha256,
            number=request.number,
            nonce=secrets.token_hex(16),
        )
