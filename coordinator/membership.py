"""Who is there: inviting the nodes of a run, taking their answers, waiting for enough, and telling who is left out."""

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import httpx
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from pomona.coordinator.enrolment import Introduction, Roster
from pomona.coordinator.replies import Puller, Reply, collect, push
from pomona.errors import (
    AlreadyCoordinated,
    NotEnoughClients,
    PayloadError,
    PomonaError,
    RegistryUnavailable,
    ServerGone,
)
from pomona.messages import pack, unpack
from pomona.protocol import ENROL, TELL, Exclusion, Invitation
from pomona.settings import RunSettings
from pomona.storage.registry import Registry

_log = logging.getLogger(__name__)

_SENDINGS = 3  # of what a private round asks for
_WAIT_S = 1.0
_JOIN_POLL_S = 0.5
_ENROL_S = 3.0  # at a time; a round goes on meanwhile
_GRACE_S = 15.0  # for those who are about to answer when enough have


def cuts_off(error: BaseException) -> bool:
    """Return whether an error ends only what this process does for a run, so that the run can go on as it is.

    Flower turns the signals that stop a server into SystemExit.
    """
    if isinstance(error, RegistryUnavailable):
        return error.passing
    return isinstance(error, KeyboardInterrupt | SystemExit | ServerGone | AlreadyCoordinated | httpx.TransportError)


class Membership:
    """The clients of one run, as this process knows them.

    Args:
        grid: Where they are.
        settings: Of the run.
        registry: Where they are recorded.
        invitation: What they are told.
        make_sure: Raises AlreadyCoordinated where the run is no longer ours.
        lasting: A round under client-level privacy lasts until its deadline, whoever has answered.
    """

    def __init__(
        self,
        grid: Grid,
        settings: RunSettings,
        registry: Registry,
        invitation: Invitation,
        make_sure: Callable[[], None],
        *,
        lasting: bool = True,
    ) -> None:
        self._grid, self._settings, self._registry, self._invitation = grid, settings, registry, invitation
        self._make_sure, self._lasting = make_sure, lasting
        self._roster = Roster()
        self._puller = Puller(grid)
        self._invited: dict[str, int] = {}
        self._prepare()

    def _prepare(self) -> None:
        """Load what this kind of run needs, once it is known which run it is."""

    def _wait_for_clients(self) -> None:
        cohort = self._settings.cohort
        wanted = cohort.min_clients - len(self._roster.left_out)
        deadline = time.monotonic() + cohort.join_timeout_s
        grace_ends = None
        while True:
            self._enrol_newcomers()
            now = time.monotonic()
            if len(present := self._roster.present(self._online())) >= wanted:
                grace_ends = grace_ends or now + _GRACE_S
                if not self._invited or now > min(grace_ends, deadline):
                    return
            elif now > deadline:
                raise NotEnoughClients(
                    f"expected {wanted} clients within {cohort.join_timeout_s:g} s, got {len(present)}"
                    f"{_why(self._registry.clients(self._invitation.run_id))}; "
                    "join more, or lower cohort.min_clients"
                )
            time.sleep(_JOIN_POLL_S)

    def _wait_for_enough(self, wanted: Collection[str] | None = None) -> list[str]:
        """Return who is connected; where that is fewer than a round needs, or not all wanted, wait for them."""
        cohort = self._settings.cohort
        deadline = time.monotonic() + cohort.join_timeout_s
        while True:
            self._enrol_newcomers()
            present = self._roster.present(self._online())
            enough = len(present) >= cohort.min_replies if wanted is None else set(wanted) <= set(present)
            if enough or time.monotonic() > deadline:
                return present
            time.sleep(_JOIN_POLL_S)

    def _enrol_newcomers(self) -> None:
        """Invite the nodes that are new and take the answers that have come; wait for nobody.

        A node that is slow to answer takes part from the round after its answer.
        """
        online = self._online()
        nodes = sorted(set(self._roster.newcomers(online)) - set(self._invited.values()))
        json, ttl = self._invitation.model_dump_json(), self._settings.cohort.join_timeout_s
        messages = [Message(pack("invitation", json), dst_node_id=node, message_type=ENROL, ttl=ttl) for node in nodes]
        try:
            sent = push(self._grid, messages)
        except ObjectPushError as error:  # they are invited the next time
            _log.warning("not all invitations got to the server: %s", error)
            return
        self._invited.update({message_id: node for message_id, node in zip(sent, nodes, strict=True) if message_id})
        self._puller.landed(self._invited)
        until = time.monotonic() + _ENROL_S
        while True:
            self._take_introductions(online)
            if not self._puller.busy(self._invited) or time.monotonic() > until:
                return

    def _take_introductions(self, online: Sequence[int]) -> None:
        for message_id in self._puller.known(self._invited):
            if (reply := self._puller.pull(message_id)) is not None:
                node = self._invited.pop(message_id)
                self._enrol(node, self._introduction(node, reply, online))

    def _introduction(self, node: int, reply: Reply, online: Sequence[int]) -> Introduction:
        private = self._invitation.private  # what a client says in words may quote its data
        if isinstance(reply, PayloadError):
            return self._roster.unreadable(node, "its answer cannot be read" if private else str(reply))
        if reply.has_error():
            return self._roster.lost(node)
        try:
            kind, json, _ = unpack(reply)
        except PayloadError as error:
            return self._roster.unreadable(node, "its answer cannot be read" if private else str(error))
        return self._roster.introduce(
            node, kind, json, invitation=self._invitation, training=self._settings.training, online=online
        )

    def _enrol(self, node: int, who: Introduction) -> None:
        if who.excluded:
            _log.warning("client %s takes no part: %s", who.name, who.excluded)
            self._tell_nodes([node], who.excluded)
            if who.name in self._roster.members:
                return
        self._registry.enrol_client(
            self._invitation.run_id,
            name=who.name,
            rank=who.rank,
            num_examples=who.num_examples,
            excluded=who.excluded,
        )

    def _online(self) -> list[int]:
        return list(self._grid.get_node_ids())

    def _ask_until_deadline(
        self, asked: Callable[[], Sequence[Message]], take: Callable[[Sequence[tuple[int, Reply]]], None]
    ) -> None:
        """Ask clients, and hand over what they answer until the deadline of a round.

        Where rounds last, this returns no sooner, whoever has answered; nor does it fail by who has.

        Args:
            asked: Begins anew, and returns what is sent; is called again where not all of it got to the server, because
                that stood still and forgot what was being sent.
            take: Given some answers, each with the position of the message that it is to.
        """
        ends = time.monotonic() + self._settings.cohort.round_deadline_s
        for _ in range(_SENDINGS):
            messages = asked()
            with contextlib.suppress(ObjectPushError):
                left_s = ends - time.monotonic()
                for group in collect(self._puller, messages, deadline_s=left_s, idle=self._enrol_newcomers):
                    take(group)
                break
        while self._lasting and (left_s := ends - time.monotonic()) > 0.0:
            self._enrol_newcomers()
            time.sleep(min(_WAIT_S, left_s))

    @contextlib.contextmanager
    def _failing(self, number: int) -> Iterator[None]:
        """Record an error that ends a round for good."""
        try:
            yield
        except BaseException as error:
            if not cuts_off(error) and not isinstance(error, ObjectPushError):
                self._make_sure()
                with contextlib.suppress(PomonaError):
                    self._registry.fail_round(self._invitation.run_id, number, f"{type(error).__name__}: {error}")
            raise

    def _tell(self, clients: Sequence[str], reason: str, *, number: int | None = None) -> None:
        """Tell those of some clients that are connected why the coordinator does without them; wait for no answer."""
        self._tell_nodes([self._roster.nodes[each] for each in clients if each in self._roster.nodes], reason, number)

    def _tell_nodes(self, nodes: Sequence[int], reason: str, number: int | None = None) -> None:
        printable = reason.encode(errors="replace").decode()[:500]  # a client may have put anything into it
        told = Exclusion(run_id=self._invitation.run_id, round_number=number, reason=printable)
        content, ttl = pack("exclusion", told.model_dump_json()), self._settings.cohort.join_timeout_s
        if nodes:
            messages = [Message(content, dst_node_id=node, message_type=TELL, ttl=ttl) for node in nodes]
            with contextlib.suppress(ObjectPushError):  # the log has it, and the client's next round goes on
                push(self._grid, messages)


def _why(clients: Sequence[object]) -> str:
    excluded = [client for client in clients if getattr(client, "excluded", "")]
    return "".join(f"; {getattr(c, 'name')} takes no part: {getattr(c, 'excluded')}" for c in excluded)  # noqa: B009
