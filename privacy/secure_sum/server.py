"""The server's side of a secure sum: it hands records on, adds masked vectors up, and learns the total."""

import hashlib
from collections.abc import Collection, Iterable

import numpy as np
from numpy.typing import NDArray

from pomona.errors import NotEnoughClients, PayloadError, UpdateRejected
from pomona.privacy.secure_sum import keys, masking
from pomona.privacy.secure_sum.records import (
    AdvertisedKeys,
    Delivery,
    MaskedVector,
    RevealedShare,
    Roster,
    RosterEntry,
    SealedShares,
    SharedKeys,
    Stage,
    Unmasking,
    UnmaskRequest,
)
from pomona.privacy.secure_sum.secret_sharing import combine
from pomona.privacy.secure_sum.terms import Terms


class SecureSumServer:
    """The server in one round. Records come in any order within a stage; what ends a stage opens the next.

    A record that cannot be used is that client's (:class:`~pomona.errors.UpdateRejected`), and the round goes on
    without it. Too few clients at the end of a stage, or shares that do not combine, end the round for good: it is
    burnt, nothing of it is released, and it still counts as spent.

    It holds public keys, sealed shares, one running sum, and the shares that survivors reveal; of a vector nothing but
    what it added to that sum. Memory is that of a few vectors, whatever the number of clients.

    Args:
        terms: Of the sum.
        invited: Names of those who may take part, at most ``terms.clients``.

    Raises:
        ValueError: More are invited than the terms are for.
    """

    def __init__(self, terms: Terms, invited: Collection[str]) -> None:
        if len(invited) > terms.clients:
            raise ValueError(f"expected at most {terms.clients} clients, got {len(invited)}")
        self._terms, self._allowed = terms, frozenset(invited)
        self._stage = Stage.ADVERTISE
        self._roster: dict[str, RosterEntry] = {}
        self._shared: dict[str, SharedKeys] = {}
        self._sum = masking.zeros(terms)
        self._survivors: list[str] = []
        self._unmaskings: dict[str, Unmasking] = {}

    def add_keys(self, sender: str, record: AdvertisedKeys) -> None:
        """Take a client's public keys.

        Raises:
            UpdateRejected: It was not invited, did so before or too late, or has keys that are none or that somebody
                else has.
        """
        self._admit(sender, record.round_id, Stage.ADVERTISE, self._roster)
        if not all(keys.is_public_key(bytes.fromhex(key)) for key in (record.encryption_key, record.mask_key)):
            raise UpdateRejected(sender, "expected public keys of X25519, got one that agrees with everybody")
        known = {key for each in self._roster.values() for key in (each.encryption_key, each.mask_key)}
        if len(known | {record.encryption_key, record.mask_key}) < len(known) + 2:
            raise UpdateRejected(sender, "expected two keys of its own, got one that is known")
        self._roster[sender] = RosterEntry(name=sender, encryption_key=record.encryption_key, mask_key=record.mask_key)

    def roster(self) -> Roster:
        """End the first stage, and return what everybody in it is sent.

        Raises:
            NotEnoughClients: The round is burnt.
            ValueError: Another stage is open.
        """
        self._advance(Stage.ADVERTISE, self._roster, self._terms.least_survivors)
        self._roster = dict(sorted(self._roster.items()))
        self._allowed = frozenset(self._roster)
        return Roster(round_id=self._terms.round_id, clients=tuple(self._roster.values()))

    def add_shares(self, sender: str, record: SharedKeys) -> None:
        """Take a client's sealed shares.

        Raises:
            UpdateRejected: It has no business here, did so before or too late, or the shares are not one for each
                other client.
        """
        self._admit(sender, record.round_id, Stage.SHARE, self._shared)
        peers = [each.peer for each in record.shares]
        if sorted(peers) != [name for name in self._roster if name != sender]:
            raise UpdateRejected(sender, "expected shares for every other client of the roster, each once")
        self._shared[sender] = record

    def deliveries(self) -> dict[str, Delivery]:
        """End the second stage, and return what each who shared is sent, by name.

        Raises:
            NotEnoughClients: The round is burnt.
            ValueError: Another stage is open.
        """
        self._advance(Stage.SHARE, self._shared, self._terms.least_survivors)
        self._allowed = frozenset(self._shared)
        inboxes: dict[str, list[SealedShares]] = {name: [] for name in sorted(self._shared)}
        for sender in inboxes:
            for each in self._shared[sender].shares:
                if each.peer in inboxes:
                    inboxes[each.peer].append(SealedShares(peer=sender, sealed=each.sealed))
        return {name: Delivery(round_id=self._terms.round_id, shares=tuple(shares)) for name, shares in inboxes.items()}

    def add_masked(self, sender: str, record: MaskedVector, payload: bytes) -> None:
        """Add a client's masked vector to the sum.

        Raises:
            UpdateRejected: It has no business here, did so before or too late, or the bytes are not what was announced.
        """
        self._admit(sender, record.round_id, Stage.MASK, self._survivors)
        if hashlib.sha256(payload).hexdigest() != record.sha256:
            raise UpdateRejected(sender, "the bytes of its vector do not have the hash it announced")
        try:
            self._sum += masking.words_of(payload, self._terms)
        except PayloadError as error:
            raise UpdateRejected(sender, str(error)) from error
        self._survivors.append(sender)

    def unmask_request(self) -> UnmaskRequest:
        """End the third stage, and return what every survivor is asked.

        Raises:
            NotEnoughClients: Fewer than the noise is sized for; the round is burnt.
            ValueError: Another stage is open.
        """
        self._advance(Stage.MASK, self._survivors, self._terms.least_survivors)
        self._allowed = frozenset(self._survivors)
        return UnmaskRequest(
            round_id=self._terms.round_id,
            survivors=tuple(sorted(self._survivors)),
            dropped=tuple(sorted(self._shared.keys() - self._allowed)),
        )

    def add_unmasking(self, sender: str, record: Unmasking) -> None:
        """Take a survivor's shares.

        Raises:
            UpdateRejected: It has no business here, did so before or too late, or the shares are not those asked for.
        """
        self._admit(sender, record.round_id, Stage.UNMASK, self._unmaskings)
        seeds, dropped = ([each.peer for each in shares] for shares in (record.seed_shares, record.key_shares))
        if sorted(seeds) != sorted(self._survivors) or sorted(dropped) != sorted(self._shared.keys() - self._allowed):
            raise UpdateRejected(sender, "expected one seed share of each survivor and one key share of each dropped")
        self._unmaskings[sender] = record

    def total(self) -> NDArray[np.int64]:
        """End the last stage, and return the sum of the survivors' contributions, in units of the grid.

        Returns:
            Shape ``(terms.dimensions,)``.

        Raises:
            NotEnoughClients: Fewer than the threshold unmask; the round is burnt.
            PayloadError: Shares do not combine to what their owner committed to; the round is burnt.
            ValueError: Another stage is open.
        """
        self._advance(Stage.UNMASK, self._unmaskings, self._terms.threshold)
        self._stage = Stage.OVER
        answers = self._unmaskings.items()
        seeds = _by_owner((holder, each) for holder, answer in answers for each in answer.seed_shares)
        mask_keys = _by_owner((holder, each) for holder, answer in answers for each in answer.key_shares)
        total, self._sum = self._sum, masking.zeros(self._terms)
        for owner, shares in seeds.items():
            total -= masking.expanded(self._seed_of(owner, shares), self._terms)
        for owner, shares in mask_keys.items():
            total += self._shared_masks(owner, self._mask_key_of(owner, shares))  # theirs have the other sign
        self._unmaskings = {}
        return masking.signed(total)

    def _admit(self, sender: str, round_id: str, stage: Stage, there: Collection[str]) -> None:
        if sender not in self._allowed:
            raise UpdateRejected(sender, "it takes no part in this stage of the round")
        if round_id != self._terms.round_id:
            raise UpdateRejected(sender, f"expected a record of round {self._terms.round_id!r}, got {round_id!r}")
        if stage is not self._stage:
            raise UpdateRejected(
                sender, f"expected a record of stage {self._stage.name.lower()}, got one of {stage.name.lower()}"
            )
        if sender in there:
            raise UpdateRejected(sender, f"its record of stage {stage.name.lower()} came before")

    def _advance(self, stage: Stage, there: Collection[str], least: int) -> None:
        if stage is not self._stage:
            raise ValueError(f"expected stage {stage.name.lower()} to be open, it is {self._stage.name.lower()}")
        if len(there) < least:
            self._stage = Stage.OVER
            self._sum = masking.zeros(self._terms)
            raise NotEnoughClients(
                f"stage {stage.name.lower()} of the secure sum {self._terms.round_id} needs {least} clients, got "
                f"{len(there)}; the round is burnt; start another, with more clients or with ones that stay"
            )
        self._stage = Stage(stage + 1)

    def _combined(self, owner: str, shares: dict[str, str]) -> bytes:
        number = {name: place for place, name in enumerate(self._roster, start=1)}
        try:
            return combine({number[holder]: bytes.fromhex(share) for holder, share in shares.items()})
        except PayloadError as error:
            raise PayloadError(f"of what {owner} shared, {error}; the round is burnt") from error

    def _seed_of(self, owner: str, shares: dict[str, str]) -> bytes:
        seed = self._combined(owner, shares)
        committed = self._shared[owner].seed_commitment
        if not keys.is_committed(seed, committed, round_id=self._terms.round_id, name=owner):
            raise PayloadError(f"the shares of {owner}'s seed do not combine to it; the round is burnt")
        return seed

    def _mask_key_of(self, owner: str, shares: dict[str, str]) -> bytes:
        private = self._combined(owner, shares)
        if keys.public_key(private).hex() != self._roster[owner].mask_key:
            raise PayloadError(f"the shares of {owner}'s mask key do not combine to it; the round is burnt")
        return private

    def _shared_masks(self, owner: str, private: bytes) -> masking.Words:
        masks = ((peer, self._shared_mask(owner, private, peer)) for peer in self._survivors)
        return masking.pairwise(owner, masks, self._terms)

    def _shared_mask(self, owner: str, private: bytes, peer: str) -> masking.Words:
        public = bytes.fromhex(self._roster[peer].mask_key)
        key = keys.mask_key(private, public, round_id=self._terms.round_id, between=(owner, peer))
        return masking.expanded(key, self._terms)


def _by_owner(revealed: Iterable[tuple[str, RevealedShare]]) -> dict[str, dict[str, str]]:
    """Return shares by whose they are, then by who held them."""
    found: dict[str, dict[str, str]] = {}
    for holder, each in revealed:
        found.setdefault(each.peer, {})[holder] = each.share
    return found
