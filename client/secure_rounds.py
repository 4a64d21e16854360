"""A client's part in the rounds of a run that nobody need trust with an update: it sends masked vectors, and no update.

What was promised when the client was first asked holds for the run: the terms of every sum follow from it, and a
coordinator that comes with another promise, an earlier round or another round's work is refused. A process that
restarts has lost its secrets and refuses the stages that are left, which the others take for a client that dropped out.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pomona.client.train import Trained
from pomona.errors import ConfigError, PayloadError
from pomona.manifest import AdapterManifest
from pomona.privacy.contributions import Shapes, contribution, shapes
from pomona.privacy.secure_sum.client import SecureSumClient
from pomona.privacy.secure_sum.records import AdvertisedKeys, MaskedVector, Roster, SharedKeys, Unmasking, UnmaskRequest
from pomona.privacy.secure_sum.requests import MaskRequest, SumRequest, terms_of
from pomona.protocol import Invitation, SecureSumPrivacy, TrainRequest


class SecureRounds:
    """The sums that a client takes part in: one at a time, none twice, each on the terms of its run."""

    def __init__(self) -> None:
        self._promised: dict[str, SecureSumPrivacy | None] = {}
        self._last: dict[str, tuple[int, int]] = {}
        self._begun: dict[str, int] = {}  # sums, by run
        self._open: tuple[SumRequest, SecureSumClient, Shapes] | None = None

    def hold(self, invitation: Invitation) -> None:
        """Remember what a run promises, or compare it with what is remembered.

        Raises:
            ConfigError: It promised something else before.
        """
        if self._promised.setdefault(invitation.run_id, invitation.secure_sum) != invitation.secure_sum:
            raise ConfigError(
                f"run {invitation.run_id} promised other terms of its secure sums, or none, when this client was first "
                "asked; what was promised holds for a run, start another with the new terms"
            )

    def advertise(self, name: str, request: SumRequest, manifest: AdapterManifest) -> AdvertisedKeys:
        """Begin a sum, and give up the one before it.

        Args:
            name: Of this client.
            request: That asks for it.
            manifest: Of the adapter that the client trains.

        Raises:
            ConfigError: The run promises no secure sum, or one whose terms cannot be kept.
            PayloadError: This sum or a later one was begun before.
        """
        self._open = None
        run_id, promised = request.invitation.run_id, request.invitation.secure_sum
        if promised is None:
            raise ConfigError(f"run {run_id} promises no secure sum; expected privacy.trust='distributed'")
        place = request.round_number, request.attempt
        if place <= self._last.get(run_id, (0, 0)):
            raise PayloadError(
                f"expected a sum after round {self._last[run_id][0]}, attempt {self._last[run_id][1]} of run {run_id}, "
                f"got round {place[0]}, attempt {place[1]}"
            )
        if self._begun.get(run_id, 0) >= promised.sums:
            raise ConfigError(
                f"run {run_id} promised to ask for {promised.sums} sums, and asks for one more; each costs some "
                "privacy, so begin another run, with more spare_rounds"
            )
        self._last[run_id], self._begun[run_id] = place, self._begun.get(run_id, 0) + 1
        into = shapes(promised.mechanism, manifest, training=request.invitation.training, rank=request.rank)
        terms = terms_of(promised, round_id=request.round_id, dimensions=sum(map(math.prod, into.values())))
        client = SecureSumClient(name, terms)
        self._open = request, client, into
        return client.advertise()

    def share_keys(self, roster: Roster) -> SharedKeys:
        """Seal shares for the others.

        Raises:
            PayloadError: As :meth:`~pomona.privacy.secure_sum.client.SecureSumClient.share_keys`, or no sum was begun.
        """
        return self._now()[1].share_keys(roster)

    def check_work(self, work: TrainRequest) -> None:
        """Check that a round's work is that of the sum that was begun.

        Raises:
            PayloadError: It is of another run or round, or wider; or no sum was begun.
        """
        opened, _, _ = self._now()
        if (work.invitation, work.round_number) != (opened.invitation, opened.round_number):
            raise PayloadError(
                f"expected the work of round {opened.round_number} of run {opened.invitation.run_id}, whose sum was "
                f"begun, got that of round {work.round_number} of run {work.invitation.run_id}, or another invitation"
            )
        if work.training != opened.invitation.training or work.rank > opened.rank:
            raise PayloadError(f"expected work of rank {opened.rank} at most, trained as the run is, got other work")

    def masked_input(self, request: MaskRequest, trained: Trained | None) -> tuple[MaskedVector, bytes]:
        """Return what a client adds to the sum, masked.

        Args:
            request: That asks for it; its work was checked.
            trained: What came of the work; None where training diverged, which then counts as no change: whether a
                client answers must not depend on its data.

        Raises:
            PayloadError: As :meth:`~pomona.privacy.secure_sum.client.SecureSumClient.masked_input`, or the work is not
                what is summed; or no sum was begun.
        """
        opened, client, into = self._now()
        return client.masked_input(request.delivery, _moves(opened, request.train, into, trained))

    def unmask(self, request: UnmaskRequest) -> Unmasking:
        """Reveal a share of every client's secret, and forget the sum.

        Raises:
            PayloadError: As :meth:`~pomona.privacy.secure_sum.client.SecureSumClient.unmask`, or no sum was begun.
        """
        (_, client, _), self._open = self._now(), None
        return client.unmask(request)

    def _now(self) -> tuple[SumRequest, SecureSumClient, Shapes]:
        if self._open is None:
            raise PayloadError("expected a stage of a secure sum that this process has begun; it waits for the next")
        return self._open


def _moves(opened: SumRequest, work: TrainRequest, into: Shapes, trained: Trained | None) -> Mapping[str, Tensor]:
    promised = opened.invitation.secure_sum
    assert promised is not None  # as the sum was begun
    if trained is None:
        return {key: torch.zeros(shape, dtype=torch.float64) for key, shape in into.items()}
    scale = work.training.scale_of(work.rank)
    try:
        return contribution(promised.mechanism, trained.weights, trained.before, scale=scale, into=into)
    except ValueError as error:
        raise PayloadError(f"the work of the round is not what its sum is of: {error}") from error
