"""A client's part in a run that learns task after task: its rows of a task, trained on and summed up.

The texts of a task go through the frozen lower blocks once. What leaves is an adapter, a head's rows and sums of
features; of a task that the client has no rows of, only that.
"""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pomona.continual.encoder import FrozenEncoder, States
from pomona.continual.heads import LinearHead
from pomona.continual.share import round_seed, summed_share, train_share
from pomona.continual.share_payload import (
    ShareFacts,
    TrainedFacts,
    decode_start,
    decode_under,
    encode_sums,
    encode_trained,
)
from pomona.continual.tasks import Task
from pomona.datasets import Dataset
from pomona.errors import BaseModelError, ConfigError, PayloadError
from pomona.mos_settings import MosSettings
from pomona.protocol import Invitation, NoExamples, TaskSums, TaskTraining

_log = logging.getLogger(__name__)

Answer = tuple[str, str, bytes]


@dataclass(frozen=True, slots=True)
class _Rows:
    """The client's rows of one task."""

    states: States
    targets: torch.Tensor


class TaskWork:
    """One client's encoder and data, for one run; the rows of the last task stay in memory."""

    def __init__(self, client: str, invitation: Invitation, path: Path, dataset: Dataset) -> None:
        """Load the encoder.

        Raises:
            ConfigError: The run does not learn task after task.
            BaseModelError: It is no encoder for texts, or has fewer blocks.
        """
        if invitation.continual is None:
            raise ConfigError("expected a run that learns task after task, got another; a bug of the coordinator's")
        self._client, self._invitation = client, invitation
        self._settings: MosSettings = invitation.continual
        self._encoder = FrozenEncoder(path, adapted_blocks=self._settings.adapted_blocks)
        if self._encoder.takes_images:
            raise BaseModelError("expected a text encoder, got a base model for images")
        self._dataset = dataset
        self._last: tuple[tuple[str, ...], _Rows | None] | None = None

    @property
    def base_sha256(self) -> str:
        """Hash of the base model's weights."""
        return self._encoder.manifest.base_sha256

    def __len__(self) -> int:
        return len(self._dataset)

    def train(self, request: TaskTraining, payload: bytes) -> Answer:
        """Train one round of a task.

        Raises:
            PayloadError: The payload is not where a round starts.
            ConfigError: Training diverged.
        """
        rows = self._rows(request)
        if rows is None:
            return self._nothing(request)
        start = decode_start(
            payload,
            self._encoder.manifest,
            classes=len(request.classes),
            width=self._encoder.width,
            rank=self._settings.rank,
        )
        seed = round_seed(self._settings, task=request.seed_number, round_number=request.round_number)
        adapter, head = train_share(self._encoder, start, rows.states, rows.targets, settings=self._settings, seed=seed)
        _log.info(
            "%s: task %d, round %d, %d examples",
            self._client,
            request.task_number,
            request.round_number,
            len(rows.states),
        )
        facts = TrainedFacts.model_validate({**self._facts(request, rows), "round_number": request.round_number})
        return "trained", "{}", encode_trained(adapter, head, facts)

    def sums(self, request: TaskSums, payload: bytes) -> Answer:
        """Sum the features of a task's rows.

        Raises:
            PayloadError: The payload is not adapters of this encoder.
        """
        rows = self._rows(request)
        if rows is None:
            return self._nothing(request)
        own, first = decode_under(payload, self._encoder.manifest)
        features = self._encoder.all_features(rows.states, own)
        part = summed_share(
            features,
            features if first is None else self._encoder.all_features(rows.states, first),
            rows.targets,
            task=Task(request.task_number, request.classes),
            trained=(own, LinearHead.zeros(len(request.classes), self._encoder.width)),
            settings=self._settings,
        )
        facts = ShareFacts.model_validate(self._facts(request, rows))
        sums = encode_sums(part, facts, trained_sha256=request.trained_sha256, is_first=first is None)
        return "sums", "{}", sums

    def _rows(self, request: TaskTraining | TaskSums) -> _Rows | None:
        """Return the rows of a task, None where there are none."""
        if strange := sorted(set(request.classes) - set(self._invitation.labels)):
            raise PayloadError(f"expected classes of the run, got {strange[0][:80]!r}")
        if self._last is None or self._last[0] != request.classes:
            self._last = request.classes, self._encoded(request.classes)
        return self._last[1]

    def _encoded(self, classes: Sequence[str]) -> _Rows | None:
        place = {label: i for i, label in enumerate(classes)}
        data = self._dataset.subset([i for i, label in enumerate(self._dataset.labels) if label in place])
        if not len(data):
            return None
        states = self._encoder.of_texts(data.texts, max_length=self._invitation.max_length)
        return _Rows(states, torch.tensor([place[label] for label in data.labels]))

    def _nothing(self, request: TaskTraining | TaskSums) -> Answer:
        told = NoExamples(name=self._client, run_id=self._invitation.run_id, task_number=request.task_number)
        return "nothing", told.model_dump_json(), b""

    def _facts(self, request: TaskTraining | TaskSums, rows: _Rows) -> dict[str, object]:
        return {
            "client": self._client,
            "run_id": self._invitation.run_id,
            "task_number": request.task_number,
            "parent": request.parent,
            "base_sha256": self.base_sha256,
            "num_examples": 1 if self._invitation.private else len(rows.states),
            "nonce": secrets.token_hex(16),
        }
