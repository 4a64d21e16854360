"""Light clients for ``benchmarks/load.py``: many SuperNodes' worth of Flower's Fleet API in one process, no training.

Each has a key, a node id and a gRPC connection of its own, and does what Flower 1.39's SuperNode does, in its order:
register, activate, heartbeats; then poll, and for each message get the run and its app (the first time), pull every
object, confirm, push the reply, push its objects. Three in ten do not answer a round: of these every second one takes
the message and is silent, the others hang up and come back later. Run as a process by ``benchmarks/load.py``, with one
JSON object of settings on the command line; it writes a line for each update that it has pushed.
"""

import heapq
import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.constant import PULL_BACKOFF_CAP, PULL_INITIAL_BACKOFF
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from load_making import Answerer, Shapes, answerer, client_names, random_weights, silent_in

from pomona import messages
from pomona.messages import pack, unpack
from pomona.processes import die_with_parent

HEARTBEAT_S, AWAY_S, RETRY_S, CALL_S = 30.0, 10.0, 1.0, 120.0
CONNECTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]


@dataclass(frozen=True, slots=True)
class Spec:
    """What one process is to be.

    Attributes:
        address: Of the server's Fleet API.
        first: Number of its first client.
        count: How many it has.
        total: How many there are in all processes.
        rank: Of every client.
        poll_s: Seconds between two questions for work.
        threads: How many clients may talk at once.
        seed: Says who is silent.
        shapes: Of updates, as JSON.
        log: Where pushed updates are written down.
        silent: Three in ten do not answer a round.
        objects: A payload is sent as Flower's arrays, in objects of its own, and not within the record of facts.
    """

    address: str
    first: int
    count: int
    total: int
    rank: int
    poll_s: float
    threads: int
    seed: int
    shapes: str
    log: str
    silent: bool = True
    objects: bool = False


class LightClient:
    """One client: its connection, and what it does next."""

    def __init__(self, name: str, spec: Spec, answer: Answerer) -> None:
        self.name, self._spec, self._answer = name, spec, answer
        self._keys = generate_key_pairs()
        self._runs: set[int] = set()
        self._next_heartbeat = 0.0
        self._registered = False
        self._node: Node | None = None

    def step(self, log: "Log") -> float:
        """Do what is due, and return in how many seconds the next step is."""
        try:
            if self._node is None:
                self._connect()
            if time.monotonic() >= self._next_heartbeat:
                self._next_heartbeat = time.monotonic() + 0.8 * HEARTBEAT_S
                self._fleet.SendNodeHeartbeat(
                    SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_S), timeout=CALL_S
                )
            return self._work(log)
        except grpc.RpcError as error:
            log.write(error=f"{error.code().name}: {error.details()}"[:200], name=self.name)
            return RETRY_S

    def _connect(self) -> None:
        channel = grpc.insecure_channel(self._spec.address, options=CONNECTIONS)
        signing = [RuntimeVersionClientInterceptor(component_name="SuperNode"), NodeAuthClientInterceptor(*self._keys)]
        self._channel = channel
        self._fleet = FleetStub(grpc.intercept_channel(channel, *signing))
        key = public_key_to_bytes(self._keys[1])
        if not self._registered:
            self._fleet.RegisterNode(RegisterNodeFleetRequest(public_key=key), timeout=CALL_S)
            self._registered = True
        active = self._fleet.ActivateNode(
            ActivateNodeRequest(public_key=key, heartbeat_interval=HEARTBEAT_S), timeout=CALL_S
        )
        self._node, self._next_heartbeat = Node(node_id=active.node_id), time.monotonic() + 0.8 * HEARTBEAT_S

    def _work(self, log: "Log") -> float:
        found: PullMessagesResponse = self._fleet.PullMessages(PullMessagesRequest(node=self._node), timeout=CALL_S)
        if not found.messages_list:
            return self._spec.poll_s
        message = self._pulled(found)
        number = int(message.metadata.group_id or 0)
        silent = silent_in(number, client_names(self._spec.total), seed=self._spec.seed) if number else []
        if self._spec.silent and self.name in silent:
            if silent.index(self.name) % 2:
                return self._spec.poll_s
            self._fleet.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id), timeout=CALL_S)
            self._channel.close()
            self._node = None
            return AWAY_S
        began = time.time()
        pushed = self._push(message)
        if number:
            log.write(name=self.name, round=number, began=began, ended=time.time(), bytes=pushed)
        return 0.0

    def _pulled(self, found: PullMessagesResponse) -> Message:
        """Take in a message as a SuperNode does."""
        bare, tree = message_from_proto(found.messages_list[0]), found.message_object_trees[0]
        run_id, message_id = bare.metadata.run_id, bare.metadata.message_id
        if run_id not in self._runs:
            run = self._fleet.GetRun(GetRunRequest(node=self._node, run_id=run_id), timeout=CALL_S).run
            fab = GetFabRequest(node=self._node, hash_str=run.fab_hash, run_id=run_id)
            self._fleet.GetFab(fab, timeout=CALL_S)
            self._runs.add(run_id)
        contents = {}
        for each in iterate_object_tree(tree):
            asked = PullObjectRequest(node=self._node, run_id=run_id, object_id=each.object_id)
            wait_s = PULL_INITIAL_BACKOFF
            while not (answer := self._fleet.PullObject(asked, timeout=CALL_S)).object_available:
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, PULL_BACKOFF_CAP)
            contents[each.object_id] = answer.object_content
        confirmed = ConfirmMessageReceivedRequest(node=self._node, run_id=run_id, message_object_id=message_id)
        self._fleet.ConfirmMessageReceived(confirmed, timeout=CALL_S)
        message = inflate_object_from_contents(message_id, contents)
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = message_id
        return message

    def _push(self, message: Message) -> int:
        """Answer a message as a SuperNode does; return the bytes of all objects."""
        kind, text, payload = self._answer(message.metadata.message_type, unpack(message)[1])
        reply = Message(pack(kind, text, payload), reply_to=message)
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
            contents = {key: each.deflate() for key, each in objects.items()}
            bare = message_to_proto(remove_content_from_message(reply))
        pushed = self._fleet.PushMessages(
            PushMessagesRequest(
                node=self._node, messages_list=[bare], message_object_trees=[tree], clientapp_runtime_list=[0.1]
            ),
            timeout=CALL_S,
        )
        for key in pushed.objects_to_push:
            asked = PushObjectRequest(
                node=self._node,
                run_id=message.metadata.run_id,
                object_id=key,
                object_content=contents[key],
                session_id=pushed.session_id,
            )
            self._fleet.PushObject(asked, timeout=CALL_S)
        return sum(map(len, contents.values()))


class Log:
    """A file of JSON lines that threads share."""

    def __init__(self, path: Path) -> None:
        self._file, self._lock = path.open("a"), threading.Lock()

    def write(self, **facts: object) -> None:
        """Append a line."""
        with self._lock:
            self._file.write(json.dumps(facts) + "\n")
            self._file.flush()


class Clients:
    """All clients of this process, whose turns threads take by the clock."""

    def __init__(self, spec: Spec) -> None:
        shapes = Shapes.read(spec.shapes)
        weights = random_weights(shapes, spec.rank, seed=1)
        names = client_names(spec.total)[spec.first : spec.first + spec.count]
        clients = [LightClient(name, spec, answerer(name, spec.rank, shapes, weights)) for name in names]
        self._counter: Iterator[int] = itertools.count()
        spread = spec.poll_s / max(1, len(clients))
        now = time.monotonic()
        self._due = [(now + number * spread, next(self._counter), each) for number, each in enumerate(clients)]
        self._ready, self._log = threading.Condition(), Log(Path(spec.log))
        self._threads = spec.threads

    def run(self) -> None:
        """Go on for ever."""
        threads = [threading.Thread(target=self._turns) for _ in range(self._threads)]
        for each in threads:
            each.start()

    def _turns(self) -> None:
        while True:
            client = self._next()
            wait_s = client.step(self._log)
            with self._ready:
                heapq.heappush(self._due, (time.monotonic() + wait_s, next(self._counter), client))
                self._ready.notify()

    def _next(self) -> LightClient:
        with self._ready:
            while True:
                now = time.monotonic()
                if self._due and self._due[0][0] <= now:
                    return heapq.heappop(self._due)[2]
                self._ready.wait(self._due[0][0] - now if self._due else None)


if __name__ == "__main__":
    die_with_parent()
    spec = Spec(**json.loads(sys.argv[1]))
    if spec.objects:
        messages._INLINE_BYTES = 0
    Clients(spec).run()
